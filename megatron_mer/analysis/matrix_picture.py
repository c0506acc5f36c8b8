"""A picture of a square matrix of cosines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_mer.analysis.pictures import INK

COLOURS = "PuOr"
"""Diverging around 0, told apart with any colour vision."""


def matrix_picture(
    names: Sequence[str],
    values: Sequence[Sequence[float | None]],
    path: str | os.PathLike[str],
    title: str = "",
) -> None:
    """Write a heat map with its numbers as a PNG.

    Args:
        names: of rows and columns.
        values: cosines, -1 to 1; None: there is none.
        path: The PNG to write; its directory is made.
        title: Heading.

    Raises:
        ValueError: there is no name.
    """
    if not names:
        raise ValueError("a matrix without a row")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    numbers = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float)
    size = max(4.2, 1.6 + 0.75 * len(names))
    figure = Figure(figsize=(size + 1.2, size), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.2, 0.06, 0.74, 0.74))
    axes.imshow(numbers, cmap=COLOURS, vmin=-1, vmax=1, aspect="auto")
    axes.set_xticks(range(len(names)), names, fontsize=10, color=INK, parse_math=False)
    axes.set_yticks(range(len(names)), names, fontsize=10, color=INK, parse_math=False)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(numbers):
        shown = "-" if not np.isfinite(value) else f"{value:+.2f}" if row != column else "1"
        colour = "white" if abs(value) > 0.65 else INK
        axes.text(column, row, shown, ha="center", va="center", fontsize=10, color=colour)
    if title:
        figure.text(
            0.5, 0.93, title, ha="center", fontsize=11, fontweight="bold", color=INK,
            parse_math=False,
        )  # fmt: skip
    figure.savefig(target, format="png")

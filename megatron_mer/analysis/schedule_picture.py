"""A picture of learning rates over the steps of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_mer.analysis.pictures import COLOURS, FAINT, INK, SHADE

Span = tuple[int, int, str]
"""First step, step after the last, name."""

MOST_POINTS = 4000
"""Points of a curve: more than a picture has columns."""


def schedule_picture(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    path: str | os.PathLike[str],
    spans: Sequence[Span] = (),
    title: str = "",
) -> None:
    """Write `schedule_figure` as a PNG.

    Args:
        curves: As for `schedule_figure`.
        path: The PNG to write; its directory is made.
        spans: As for `schedule_figure`.
        title: As for `schedule_figure`.

    Raises:
        ValueError: As `schedule_figure`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    schedule_figure(curves, spans, title).savefig(target, format="png")


def schedule_figure(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    spans: Sequence[Span] = (),
    title: str = "",
) -> Figure:
    """Draw learning rates over steps, with the tasks' spans shaded in turn.

    Args:
        curves: Name -> (step, rate) in the order of the steps; the only one is not named.
        spans: Tasks in the order of training.
        title: Heading.

    Raises:
        ValueError: There is no point to draw.
    """
    if not any(curves.values()):
        raise ValueError("no learning rate to draw")
    figure = Figure(figsize=(9.6, 3.6), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.085, 0.15, 0.885, 0.66))
    points = [point for curve in curves.values() for point in curve]
    axes.set_xlim(min(step for step, _ in points), max(step for step, _ in points) or 1)
    axes.set_ylim(0, 1.06 * max(rate for _, rate in points))
    _frame(axes)
    for at, (name, curve) in enumerate(curves.items()):
        steps, rates = zip(*curve, strict=True)
        axes.plot(steps, rates, color=COLOURS[at % len(COLOURS)], linewidth=1.8, label=name)
    _spans(axes, spans)
    if len(curves) > 1:
        legend = axes.legend(frameon=False, fontsize=9, labelcolor=INK)
        for text in legend.get_texts():
            text.set_parse_math(False)
    if title:
        figure.text(0.085, 0.93, title, fontsize=12, fontweight="bold", color=INK, parse_math=False)
    return figure


def thinned(steps: int) -> list[int]:
    """Steps to draw of a run: all of a short one, else evenly spread ones and the last.

    Args:
        steps: Steps of the run, at least 1.
    """
    stride = -(-steps // MOST_POINTS)
    return sorted({*range(0, steps, stride), steps - 1})


def _frame(axes: Axes) -> None:
    axes.grid(axis="y", color="#dddddd", linewidth=0.6, zorder=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(colors="#555555", labelsize=9, length=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    axes.yaxis.get_offset_text().set_color("#555555")
    axes.set_xlabel("step", fontsize=10, color=INK)
    axes.set_ylabel("learning rate", fontsize=10, color=INK)


def _spans(axes: Axes, spans: Sequence[Span]) -> None:
    begin, end = axes.get_xlim()
    for at, (first, last, name) in enumerate(spans):
        if at % 2 == 0:
            axes.axvspan(first, last, color=SHADE, zorder=0, linewidth=0)
        if first > begin:
            axes.axvline(first, color=FAINT, linewidth=0.8, zorder=1)
        if last - first > (end - begin) * len(name) / 90:
            axes.text(
                (first + last) / 2,
                1.02,
                name,
                transform=axes.get_xaxis_transform(),
                ha="center",
                fontsize=9.5,
                color=INK,
                parse_math=False,
            )

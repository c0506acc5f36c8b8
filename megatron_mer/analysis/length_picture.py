"""A picture of document lengths: a histogram for each dataset, one below the other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from megatron_mer.analysis.pictures import COLOURS, FAINT, INK
from megatron_mer.data.document_lengths import DocumentLengths, log_edges

MAX_DATASETS = 40
PER_DOUBLING = 4
"""Bins between a length and its double."""
WIDTH, TOP, BOTTOM, LEFT, RIGHT = 9.6, 0.15, 0.75, 0.75, 0.25
"""Of the figure and its margins, in inches."""
LINE, GAP, COLUMN_GAP = 0.19, 0.25, 0.55
"""Of the text above a histogram, and room between rows and between columns, in inches."""


def length_picture(lengths: Mapping[str, DocumentLengths], path: str | os.PathLike[str]) -> None:
    """Write `length_figure` as a PNG.

    Args:
        lengths: As for `length_figure`.
        path: The PNG to write; its directory is made.

    Raises:
        ValueError: As `length_figure`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    length_figure(lengths).savefig(target, format="png")


def length_figure(lengths: Mapping[str, DocumentLengths]) -> Figure:
    """Draw how the documents of datasets spread over lengths, on one logarithmic axis.

    The area below a histogram is the share of the documents: its height is that share for each
    doubling of the length. Empty documents have no place on the axis and are counted above it.

    Args:
        lengths: By the name of the dataset, 1 to `MAX_DATASETS`, in the order in which they are
            drawn.

    Raises:
        ValueError: There is none, or too many for a picture.
    """
    if not 1 <= len(lengths) <= MAX_DATASETS:
        raise ValueError(f"{len(lengths)} datasets; a picture holds 1 to {MAX_DATASETS}")
    columns = 1 if len(lengths) <= 4 else 2
    rows = -(-len(lengths) // columns)
    header = LINE * (1 + columns) + 0.1
    panel = max(0.9, min(3.4, 6.0 / rows))
    height = TOP + BOTTOM + rows * (header + panel) + (rows - 1) * GAP
    figure = Figure(figsize=(WIDTH, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    width = (WIDTH - LEFT - RIGHT - (columns - 1) * COLUMN_GAP) / columns
    limits = _limits(list(lengths.values()))
    for at, (name, each) in enumerate(lengths.items()):
        row, column = divmod(at, columns)
        left = LEFT + column * (width + COLUMN_GAP)
        low = height - TOP - (row + 1) * (header + panel) - row * GAP
        axes = figure.add_axes((left / WIDTH, low / height, width / WIDTH, panel / height))
        _frame(axes, limits, labels=at + columns >= len(lengths))
        letters = int(width * 11)
        shown = name if len(name) <= letters else "..." + name[3 - letters :]
        facts = _facts(each)
        _write(axes, [shown, *(facts if columns > 1 else [", ".join(facts)])], panel)
        _histogram(axes, each)
    _explain(figure, height)
    return figure


def _limits(lengths: Sequence[DocumentLengths]) -> tuple[int, int]:
    """Ends of the common axis: the power of ten before all lengths, the last edge of all bins."""
    shortest = min((each.shortest for each in lengths if each.shortest), default=1)
    longest = max((each.maximum for each in lengths if each.shortest), default=1)
    return 10 ** (len(str(shortest)) - 1), int(log_edges(longest, PER_DOUBLING)[-1])


def _frame(axes: Axes, limits: tuple[int, int], labels: bool) -> None:
    """The common axis of lengths; its labels stand below the last histogram of a column."""
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    decades = [10**power for power in range(19) if limits[0] <= 10**power <= limits[1]]
    axes.xaxis.set_major_locator(FixedLocator(decades))
    axes.xaxis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=99))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: _short(length)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0f} %"))
    axes.grid(axis="both", color="#dddddd", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(colors="#555555", labelsize=8.5, length=3)
    axes.tick_params(which="minor", length=2, color=FAINT)
    axes.tick_params(axis="x", labelbottom=labels)


def _short(number: float) -> str:
    """A round number in few letters."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e5, "k")):
        if number >= size:
            return f"{number / (1e3 if letter == 'k' else size):,.0f}{letter}"
    return f"{number:,.0f}"


def _facts(lengths: DocumentLengths) -> list[str]:
    """What a dataset's histogram does not say exactly."""
    facts = [f"{lengths.documents:,} documents"]
    if lengths.empty:
        facts[0] += f", {lengths.empty:,} empty"
    if lengths.documents:
        facts.append(
            f"median {lengths.quantile(50):,}, 95 % up to {lengths.quantile(95):,}, longest "
            f"{lengths.maximum:,}"
        )
    return facts


def _write(axes: Axes, lines: Sequence[str], panel: float) -> None:
    """Write lines above a histogram of height `panel`, in inches; the first is its name."""
    for at, text in enumerate(lines):
        axes.text(
            0,
            1 + (0.1 + LINE * (len(lines) - 1 - at)) / panel,
            text,
            transform=axes.transAxes,
            fontsize=8.5 if at else 10.5,
            fontweight="normal" if at else "bold",
            color="#555555" if at else INK,
            va="baseline",
            parse_math=False,
        )


def _histogram(axes: Axes, lengths: DocumentLengths) -> None:
    """Shares as an area, with the median and the length that 95 % do not exceed as lines."""
    if lengths.shortest is None:
        why = "only empty documents" if lengths.documents else "no documents"
        axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=FAINT)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_locator(FixedLocator([]))
        return
    edges = log_edges(lengths.maximum, PER_DOUBLING)
    shares = 100 * lengths.histogram(edges) / lengths.documents / np.diff(np.log2(edges))
    axes.stairs(shares, edges, fill=True, color=COLOURS[0], alpha=0.75, linewidth=0, zorder=2)
    axes.set_ylim(0, 1.08 * float(shares.max()))
    for percent, style in ((50, "-"), (95, ":")):
        place = max(1, lengths.quantile(percent))
        axes.axvline(place, color=COLOURS[1], linestyle=style, linewidth=1.4, zorder=3)


def _explain(figure: Figure, height: float) -> None:
    """What the axes and the lines mean, once, below everything."""
    for x, align, text in (
        (LEFT / WIDTH, "left", "length of a document in tokens"),
        (
            1 - RIGHT / WIDTH,
            "right",
            "height: share of the documents for each doubling of the length;  "
            "line: median, dotted: 95 % are not longer",
        ),
    ):
        size, colour = (9.5, INK) if align == "left" else (8, "#777777")
        figure.text(x, 0.22 / height, text, ha=align, fontsize=size, color=colour)

"""Charts that are no lines over steps: what was kept, the matrix, runs against each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_mer.analysis.fonts import plain
from megatron_mer.analysis.pictures import spread
from megatron_mer.analysis.report.drawing import (
    GRID,
    INK,
    MUTED,
    PAPER,
    Chart,
    Frame,
    look,
    new_axes,
    new_figure,
    text_width,
)
from megatron_mer.analysis.report.lines import inside


def kept_chart(summary: Mapping[str, Any]) -> Chart:
    """Retained against learned, a line a set: the filled dot right of the ring is forgetting."""
    learned, retained = summary["learned"]["sets"], summary["retained"]["sets"]
    names = [name for name in retained if None not in (retained[name], learned.get(name))]

    def draw(frame: Frame) -> Figure:
        figure = new_figure(frame)
        left = 18 + min(max(text_width(plain(name, 16)) for name in names), 130)
        axes = new_axes(figure, frame, left, 24, 8, 44)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        for at, name in enumerate(names):
            colour, _ = look(at)
            pair = (learned[name], retained[name])
            axes.plot(pair, (at, at), color=colour, linewidth=3, zorder=2)
            axes.plot(pair[:1], (at,), "o", mfc=PAPER, mec=colour, ms=10, mew=2.2, zorder=3)
            axes.plot(pair[1:], (at,), "o", color=colour, ms=7, zorder=4)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_yticks(range(len(names)), [plain(name, 16) for name in names])
        axes.tick_params(axis="y", labelcolor=INK, labelsize=12)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=max(3, frame.width // 110)))
        axes.set_xlabel("nats a token", fontsize=11.5, color=MUTED)
        axes.margins(x=0.06)
        return figure

    pairs = "; ".join(f"{name}: {learned[name]:.3f}, {retained[name]:.3f}" for name in names)
    return Chart(
        key="kept",
        title="Learned (ring) and retained (dot) loss of each held-out set",
        draw=draw,
        description=f"Learned and retained loss in nats a token by set. {pairs}.",
        names=tuple(names),
        height=70 + 28 * len(names),
    )


def matrix_chart(summary: Mapping[str, Any]) -> Chart:
    """The forgetting matrix as a heat map, for a file: the page has it as a table."""
    matrix, tasks = summary["matrix"], summary.get("set_tasks", {})
    rows, sets, losses = matrix["rows"], matrix["sets"], matrix["losses"]
    heat = heats(losses)

    def draw(frame: Frame) -> Figure:
        figure = new_figure(frame)
        left = 20 + min(max(text_width(_row_label(row)) for row in rows), 150)
        axes = new_axes(figure, frame, left, 16, 34, 12)
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        for at, row in enumerate(losses):
            for column, loss in enumerate(row):
                own = rows[at]["task"] is not None and tasks.get(sets[column]) == rows[at]["task"]
                share = heat[at][column] or 0
                tone = tuple(1 - share * (1 - part) for part in (0.9, 0.55, 0.2))
                axes.fill_between((column, column + 1), at, at + 1, color=tone, linewidth=0)
                axes.text(
                    column + 0.5, at + 0.5, "–" if loss is None else f"{loss:.3f}",
                    ha="center", va="center", fontsize=12 if len(sets) < 13 else 8, color=INK,
                    fontweight="bold" if own else "normal",
                    bbox={"fill": False, "edgecolor": INK, "pad": 4} if own else None,
                )  # fmt: skip
        axes.set_xlim(0, len(sets))
        axes.set_ylim(len(rows), 0)
        axes.xaxis.tick_top()
        most = 16 if len(sets) < 9 else 8
        axes.set_xticks([at + 0.5 for at in range(len(sets))], [plain(n, most) for n in sets])
        axes.set_yticks([at + 0.5 for at in range(len(rows))], [_row_label(row) for row in rows])
        axes.tick_params(labelcolor=INK, length=0)
        return figure

    return Chart(
        key="matrix",
        title="Held-out loss at the ends of the entries, nats a token (framed: own task)",
        draw=draw,
        description="",
        names=(*sets, *(row["label"] for row in rows)),
        height=50 + 30 * len(rows),
    )


def _row_label(row: Mapping[str, Any]) -> str:
    """The number of an entry left of its task, also of an Arabic one."""
    if row["task"] is None:
        return plain(row["label"], 16)
    return f"{row['entry']} \u2068{plain(row['task'], 14)}\u2069"


def heats(losses: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    """How far each loss lies above the lowest of its column, 0 to 1.

    Square roots, since the small differences are those that matter.
    """
    columns = list(zip(*losses, strict=True))
    lows = [min((loss for loss in column if loss is not None), default=0) for column in columns]
    above = [
        [None if loss is None else loss - low for loss, low in zip(row, lows, strict=True)]
        for row in losses
    ]
    most = max((value for row in above for value in row if value is not None), default=0) or 1
    return [[None if value is None else math.sqrt(value / most) for value in row] for row in above]


def scatter_chart(places: Iterable[tuple[str, float, float, int]]) -> Chart:
    """Mean retained against mean learned loss of runs.

    Args:
        places: Number of the run, as text; learned; retained; number of its look.
    """
    runs = list(places)

    def draw(frame: Frame) -> Figure:
        figure = new_figure(frame)
        axes = new_axes(figure, frame, 62, 34, 14, 46)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        values = [value for _, learned, retained, _ in runs for value in (learned, retained)]
        low, high = min(values), max(values)
        margin = 0.08 * (high - low) or 0.1
        ends = (low - margin, high + margin)
        axes.plot(ends, ends, color=MUTED, linewidth=1, linestyle=":", zorder=1)
        axes.set_xlim(*ends)
        axes.set_ylim(*ends)
        for _, learned, retained, number in runs:
            axes.plot([learned], [retained], "o", color=look(number)[0], ms=9, zorder=3)
        _number_points(axes, runs, 16 / frame.height)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=max(3, frame.width // 120)))
        axes.set_xlabel("learned, nats a token", fontsize=11.5, color=MUTED)
        axes.set_ylabel("retained, nats a token", fontsize=11.5, color=MUTED)
        return figure

    said = "; ".join(f"run {name}: {x:.3f}, {y:.3f}" for name, x, y, _ in runs)
    return Chart(
        key="scatter",
        title="Retained against learned loss, mean of the held-out sets",
        draw=draw,
        description=f"Learned and retained loss of each run. {said}.",
        height=400,
    )


def _number_points(axes: Axes, runs: Sequence[tuple[str, float, float, int]], gap: float) -> None:
    """A number right of each point; those of points near each other move apart."""
    low, high = axes.get_ylim()
    share = {name: ((x - low) / (high - low), (y - low) / (high - low)) for name, x, y, _ in runs}
    left = sorted(share, key=lambda name: share[name][0])
    columns: list[list[str]] = []
    for name in left:
        if columns and share[name][0] - share[columns[-1][-1]][0] < 0.06:
            columns[-1].append(name)
        else:
            columns.append([name])
    numbers = {name: number for name, _, _, number in runs}
    for column in columns:
        heights = spread({one: share[one][1] for one in column}, 1.4 * gap)
        for name, height in inside(heights, 1.4 * gap).items():
            axes.text(
                max(share[one][0] for one in column) + 0.022, height, name,
                transform=axes.transAxes, va="center", fontsize=12, fontweight="bold",
                color=look(numbers[name])[1],
            )  # fmt: skip

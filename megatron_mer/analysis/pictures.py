"""Pictures of a run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib import patheffects, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_mer.analysis.fonts import font_families

# Okabe and Ito's colours, told apart with any colour vision; the yellow, too pale for a line on
# white, is left out. Beyond seven sets the line style changes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
INK, FAINT, SHADE = "#222222", "#8a8a8a", "#f3f4f6"
LEFT = 0.075  # of the axes, as a share of the figure
LABEL_GAP = 0.048  # least distance of two labels, as a share of the axis


def loss_picture(
    evaluations: Sequence[Mapping[str, Any]],
    boundaries: Sequence[tuple[int, str]],
    path: str | os.PathLike[str],
    title: str = "",
    set_tasks: Mapping[str, str] | None = None,
) -> None:
    """Write `loss_figure` as a PNG.

    Args:
        evaluations: As for `loss_figure`.
        boundaries: As for `loss_figure`.
        path: The PNG to write; its directory is made.
        title: As for `loss_figure`.
        set_tasks: As for `loss_figure`.

    Raises:
        ValueError: there is nothing to draw.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    names = [name for line in evaluations for name in line["losses"]]
    families = font_families({*names, *(task for _, task in boundaries), title})
    with rc_context({"font.family": families, "text.parse_math": False}):
        loss_figure(evaluations, boundaries, title, set_tasks).savefig(target, format="png")


def loss_figure(
    evaluations: Sequence[Mapping[str, Any]],
    boundaries: Sequence[tuple[int, str]],
    title: str = "",
    set_tasks: Mapping[str, str] | None = None,
) -> Figure:
    """Draw the loss of each held-out set over the run.

    A line is thick while its own task is in training. The tasks' spans are shaded in turn and named
    at the top.

    Args:
        evaluations: Lines of `evaluations.jsonl`: {"step": int, "losses": {set: nats a token}}, in
            any order; a loss may be missing or no number.
        boundaries: (step at its end, task) of each entry of the stream, in order; the first begins
            at step 0, and an end may lie beyond the last evaluation.
        title: Heading.
        set_tasks: Held-out set -> its task; default: sets are named after their tasks.

    Raises:
        ValueError: there is nothing to draw.
    """
    curves = _curves(evaluations)
    if not curves:
        raise ValueError("no evaluation has a loss: nothing to draw")
    spans = _spans(boundaries, max(int(line["step"]) for line in evaluations))
    figure = Figure(figsize=(9.6, 5.4), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    longest = max(len(name) for name in curves)
    axes = figure.add_axes((LEFT, 0.115, max(0.45, 0.9 - LEFT - 0.0095 * longest), 0.745))
    _frame(axes, curves, spans)
    tasks = set_tasks or {name: name for name in curves}
    looks = {
        name: (COLOURS[at % len(COLOURS)], STYLES[at // len(COLOURS) % len(STYLES)])
        for at, name in enumerate(curves)
    }
    for name, points in curves.items():
        own = [span[:2] for span in spans if span[2] == tasks.get(name)]
        _line(axes, points, own, looks[name])
    _name_spans(axes, spans, tasks, looks)
    _name_lines(axes, curves, looks)
    if title:
        figure.text(LEFT, 0.955, title, fontsize=13, fontweight="bold", color=INK, va="center")
    return figure


Point = tuple[int, float]
Span = tuple[int, int, str]
Look = tuple[str, str]


def _curves(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Points (step, loss) by set, in the order of the first appearance, steps ascending."""
    curves: dict[str, list[Point]] = {}
    for line in sorted(evaluations, key=lambda line: int(line["step"])):
        for name, loss in line["losses"].items():
            if loss is not None and math.isfinite(loss):
                curves.setdefault(name, []).append((int(line["step"]), float(loss)))
    return curves


def _spans(boundaries: Sequence[tuple[int, str]], last_step: int) -> list[Span]:
    """(begin, end, task) of each entry that the run has reached, ends cut to its last step."""
    begins = [0, *(end for end, _ in boundaries)]
    return [
        (begin, min(end, last_step), task)
        for begin, (end, task) in zip(begins, boundaries, strict=False)
        if begin < min(end, last_step)
    ]


def _frame(axes: Axes, curves: Mapping[str, Sequence[Point]], spans: Sequence[Span]) -> None:
    """Limits, grid, shaded spans and the names of the axes."""
    points = [point for line in curves.values() for point in line]
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    begin, end = min([0, *steps]), max([1, *steps])
    low, high = min(losses), max(losses)
    margin = 0.05 * (high - low) or 0.5
    axes.set_xlim(begin, end)
    axes.set_ylim(low - margin, high + margin)
    for at, (left, right, _) in enumerate(spans):
        if at % 2 == 0:
            axes.axvspan(left, right, color=SHADE, zorder=0, linewidth=0)
        if left > begin:
            axes.axvline(left, color=FAINT, linewidth=0.8, zorder=1)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6, zorder=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(colors="#555555", labelsize=9, length=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.set_xlabel("step", fontsize=10, color=INK)
    axes.text(
        1.0, -0.063, "thick: own task in training", transform=axes.transAxes,
        ha="right", va="top", fontsize=8.5, color=FAINT,
    )  # fmt: skip
    axes.set_ylabel("held-out loss, nats per token", fontsize=10, color=INK)


def _line(axes: Axes, points: Sequence[Point], own: Sequence[tuple[int, int]], look: Look) -> None:
    """A thin line with a dot an evaluation, thick where both ends lie in the set's own task."""
    colour, style = look
    steps, losses = zip(*points, strict=True)
    axes.plot(steps, losses, color=colour, linestyle=style, linewidth=1.6, alpha=0.85, zorder=3)
    axes.scatter(steps, losses, s=9, color=colour, zorder=4, clip_on=False, linewidths=0)
    for left, right in pairwise(points):
        if any(begin <= left[0] and right[0] <= end for begin, end in own):
            axes.plot(*zip(left, right, strict=True), color=colour, linewidth=4.0,
                      solid_capstyle="round", zorder=3.5)  # fmt: skip


def _name_spans(
    axes: Axes, spans: Sequence[Span], tasks: Mapping[str, str], looks: Mapping[str, Look]
) -> None:
    """Each task above its span, in the colour of its set where it has exactly one.

    Names that would not fit beside each other are small and slanted.
    """
    begin, end = axes.get_xlim()
    letters = 70 / (end - begin)  # that fit on the axis at full size, a step
    fits = all(len(task) < (right - left) * letters for left, right, task in spans)
    for left, right, task in spans:
        mine = [name for name in looks if tasks.get(name) == task]
        axes.text(
            (left + right) / 2,
            1.02,
            task,
            transform=axes.get_xaxis_transform(),
            ha="center" if fits else "left",
            va="bottom",
            rotation=0 if fits else 25,
            rotation_mode="anchor",
            fontsize=11 if fits else 7,
            fontweight="bold",
            color=looks[mine[0]][0] if len(mine) == 1 else INK,
        )


def _name_lines(
    axes: Axes, curves: Mapping[str, Sequence[Point]], looks: Mapping[str, Look]
) -> None:
    """Each set and its last loss at the right of its line, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    ends = {name: (points[-1][1] - low) / (high - low) for name, points in curves.items()}
    for name, height in spread(ends, LABEL_GAP).items():
        colour = looks[name][0]
        text = axes.annotate(
            f"{name}  {curves[name][-1][1]:.2f}",
            xy=(1.0, ends[name]),
            xytext=(1.03, height),
            xycoords="axes fraction",
            fontsize=10.5,
            color=colour,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.6},
        )
        text.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])


def spread(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Heights moved as little as needed so that any two are at least `gap` apart, order kept.

    Neighbours that are too near form a cluster, evenly spaced around its mean; clusters that touch
    merge.

    Args:
        heights: Wanted height by name, any unit.
        gap: Least distance, the same unit.
    """
    names = sorted(heights, key=lambda name: heights[name])
    clusters: list[list[str]] = []
    for name in names:
        clusters.append([name])
        while len(clusters) > 1 and _bottom(clusters[-1], heights, gap) < (
            _bottom(clusters[-2], heights, gap) + gap * len(clusters[-2])
        ):
            last = clusters.pop()
            clusters[-1].extend(last)
    return {
        name: _bottom(cluster, heights, gap) + gap * at
        for cluster in clusters
        for at, name in enumerate(cluster)
    }


def _bottom(cluster: Sequence[str], heights: Mapping[str, float], gap: float) -> float:
    """Height of the lowest of a cluster that is spaced evenly around its mean."""
    return sum(heights[name] for name in cluster) / len(cluster) - gap * (len(cluster) - 1) / 2

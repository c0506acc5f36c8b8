"""Charts of lines over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_mer.analysis.fonts import plain
from megatron_mer.analysis.pictures import spread
from megatron_mer.analysis.report.curves import Curve
from megatron_mer.analysis.report.drawing import (
    INK,
    MUTED,
    SHADE,
    Chart,
    Frame,
    described,
    look,
    new_axes,
    new_figure,
    number_steps,
    short,
    text_at,
    text_width,
)

MOST_LABELS = 16
"""Lines that are named at their ends; more are named in a legend."""

Span = tuple[int, int, str]
"""First step, last step and task of an entry."""


@dataclass(frozen=True)
class LineOf:
    """A line of a chart."""

    name: str
    points: Curve
    number: int
    """Of its look."""
    dashed: bool = False
    own: str = ""
    """Task in whose spans it is thick."""


def line_chart(
    key: str, title: str, lines: Sequence[LineOf], spans: Sequence[Span], **options: Any
) -> Chart:
    """A chart of lines over steps.

    Args:
        key: As for `Chart`.
        title: As for `Chart`.
        lines: Those without points are left out; one must have some.
        spans: Entries, shaded in turn.
        options: Further ones of `Chart`; `gaps`: whether lines break where steps are missing
            (default: no); `named`: whether tasks stand above their spans (default: yes);
            `ends`: whether lines are named at their ends (default: yes), else in a legend.
    """
    gaps, named = options.pop("gaps", False), options.pop("named", True)
    lines = [line for line in lines if line.points]
    labels = options.pop("ends", True) and 1 < len(lines) <= MOST_LABELS
    ends = described([(line.name, line.points[-1][1]) for line in lines])
    last = max((line.points[-1][0] for line in lines), default=0)

    def draw(frame: Frame) -> Figure:
        return _line_figure(frame, lines, spans if named else [], gaps, labels)

    return Chart(
        key=key,
        title=title,
        draw=draw,
        description=f"{title}, lines over the steps up to {last}. Last values: {ends}.",
        names=tuple(line.name for line in lines) + tuple(span[2] for span in spans),
        legend=tuple((line.name, line.number, line.dashed) for line in lines),
        labelled=labels,
        **options,
    )


def spans_of(boundaries: Sequence[Sequence[Any]]) -> list[Span]:
    """Begin, end and task of each entry, from the steps at their ends."""
    begins = [0, *(end for end, _ in boundaries)]
    return [(begin, end, task) for begin, (end, task) in zip(begins, boundaries, strict=False)]


def _line_figure(
    frame: Frame, lines: Sequence[LineOf], spans: Sequence[Span], gaps: bool, labels: bool
) -> Figure:
    figure = new_figure(frame)
    # A file has no legend beside it.
    legend = bool(frame.title) and not labels and len(lines) > 1
    labels = labels and frame.labels
    right = 16.0
    if labels or legend:
        right = 34 + max(text_width(_label(line)) for line in lines)
    values = [value for line in lines for _, value in line.points]
    ticks = max(text_width(short(round(value, 6))) for value in (min(values), max(values)))
    left = 20 + min(max(ticks, 30), 52)
    fits = _names_fit(spans, frame.width - left - right)
    top = 12 + (0 if not spans else 16 if fits else 46)
    axes = new_axes(figure, frame, left, right, top, 44)
    _limits(axes, lines, max((end for _, end, _ in spans), default=0))
    for at, (begin, end, _) in enumerate(spans):
        if at % 2 == 0:
            axes.axvspan(begin, end, color=SHADE, zorder=0, linewidth=0)
        if begin:
            axes.axvline(begin, color=MUTED, linewidth=0.6, zorder=0.5)
    for line in lines:
        _draw_line(axes, line, spans, gaps)
    _name_spans(axes, spans, lines, fits, frame.width - left - right)
    number_steps(axes, frame.width - left - right)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5 if frame.height < 300 else 7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(round(value, 9))))
    if labels:
        _name_lines(axes, lines, 17 / (frame.height - top - 44 - (34 if frame.title else 0)))
    if legend:
        _add_legend(axes, lines)
    return figure


def _limits(axes: Axes, lines: Sequence[LineOf], last: int) -> None:
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    axes.set_xlim(0, max([1, last, *steps]))
    axes.set_ylim(low - margin if low < 0 or low > margin else 0, high + margin)


def _draw_line(axes: Axes, line: LineOf, spans: Sequence[Span], gaps: bool) -> None:
    colour, _ = look(line.number)
    points = _broken(line.points) if gaps else line.points
    steps, values = zip(*points, strict=True)
    dots = len(points) <= 40
    axes.plot(
        steps, values, color=colour, linestyle=_stroke(line), linewidth=1.6, zorder=3,
        marker="o" if dots else "", markersize=3.2, clip_on=False,
    )  # fmt: skip
    own = [span[:2] for span in spans if line.own and span[2] == line.own]
    for left, right in pairwise(line.points):
        if any(begin <= left[0] and right[0] <= end for begin, end in own):
            axes.plot(
                *zip(left, right, strict=True), color=colour, linewidth=4.2, zorder=3.5,
                solid_capstyle="round", clip_on=False,
            )  # fmt: skip


def _broken(points: Curve) -> Curve:
    """The curve with a gap where steps are missing, as between two trainings of a task."""
    if len(points) < 3:
        return points
    most = 4 * median(right[0] - left[0] for left, right in pairwise(points))
    result = points[:1]
    for left, right in pairwise(points):
        if right[0] - left[0] > most:
            result.append((left[0] + 1, math.nan))
        result.append(right)
    return result


def _names_fit(spans: Sequence[Span], width: float) -> bool:
    total = max((end for _, end, _ in spans), default=1) or 1
    return all(text_width(plain(n)) + 6 < (end - begin) / total * width for begin, end, n in spans)


def _name_spans(
    axes: Axes, spans: Sequence[Span], lines: Sequence[LineOf], fits: bool, width: float
) -> None:
    """Each task above its span, in the colour of its line where it has exactly one."""
    total = axes.get_xlim()[1]
    for begin, end, task in spans:
        if not fits and (end - begin) / total * width < 11:
            continue
        mine = [line for line in lines if line.own == task]
        text_at(
            axes, (begin + end) / 2, 1.02, plain(task, 28 if fits else 8),
            ha="center" if fits else "left", va="bottom", rotation=0 if fits else 45,
            rotation_mode="anchor", fontsize=12, fontweight="bold",
            color=look(mine[0].number)[1] if len(mine) == 1 else INK,
        )  # fmt: skip


def _label(line: LineOf) -> str:
    return f"{plain(line.name)}  {line.points[-1][1]:.3f}"


def _name_lines(axes: Axes, lines: Sequence[LineOf], gap: float) -> None:
    """Each line's name at the right, moved apart where they would overlap; then its last value."""
    low, high = axes.get_ylim()
    ends = {str(at): (one.points[-1][1] - low) / (high - low) for at, one in enumerate(lines)}
    for key, height in inside(spread(ends, gap), gap).items():
        line = lines[int(key)]
        colour, text = look(line.number)
        axes.annotate(
            # Marks around the name keep what stands behind an Arabic one behind it.
            f"\u2068{plain(line.name)}\u2069  {line.points[-1][1]:.3f}",
            xy=line.points[-1], xytext=(1.03, height), textcoords="axes fraction",
            fontsize=12, color=text, va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "relpos": (0, 0.5)},
        )  # fmt: skip


def _add_legend(axes: Axes, lines: Sequence[LineOf]) -> None:
    handles = [
        Line2D([], [], color=look(line.number)[0], linestyle=_stroke(line), linewidth=2)
        for line in lines
    ]
    axes.legend(
        handles, [plain(line.name) for line in lines], loc="upper left",
        bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=11 if len(lines) < 20 else 7,
    )  # fmt: skip


def _stroke(line: LineOf) -> Literal["-", "--", ":", "-."]:
    """Colours come again after seven lines; then the stroke tells them apart."""
    return "--" if line.dashed else ("-", ":", "-.")[line.number // 7 % 3]


def inside(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Heights moved together so far up that none lies below the axes."""
    lift = max(0.0, gap / 2 - min(heights.values(), default=1.0))
    return {name: height + lift for name, height in heights.items()}

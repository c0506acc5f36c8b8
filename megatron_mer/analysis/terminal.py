"""Lines for a terminal: charts of characters, columns, and nothing wider than asked for."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.text import Text

GAP = 2  # columns between two fields
_BARS = "▁▂▃▄▅▆▇█"
_BLANK = 0x2800
# Bits of a braille character, by row and column of its 4 x 2 dots.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_CLIPPED = 0.01  # share of the highest values that a chart may cut off
_MANY = 50  # values, from which on it does

Points = Sequence[tuple[float, float]]


def plain(text: str) -> str:
    """The text in one line, without what would move a terminal's cursor."""
    return "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)


def fit(line: Text, width: int) -> Text:
    """The line, or as much of its beginning as fits with an ellipsis."""
    line = line.copy()
    line.no_wrap = True
    line.truncate(max(1, width), overflow="ellipsis")
    return line


def shortened(name: str, width: int) -> str:
    """A name in at most so many columns, its end cut."""
    return name if cell_len(name) <= width else set_cell_size(name, max(0, width - 1)) + "…"


def padded(text: str, width: int, right: bool = False) -> str:
    """A text in just so many columns, to the left or to the right."""
    text = shortened(text, width)
    spaces = " " * (width - cell_len(text))
    return spaces + text if right else text + spaces


def flow(fields: Sequence[Text], width: int) -> list[Text]:
    """Fields one after the other, in as many lines as they need."""
    lines: list[Text] = []
    for field in fields:
        if lines and lines[-1].cell_len + GAP + field.cell_len <= width:
            lines[-1].append(" " * GAP).append_text(field)
        else:
            lines.append(field.copy())
    return [fit(line, width) for line in lines]


def ends(left: Text, right: Text, width: int) -> Text:
    """One text at the left end of a line, another at its right end if there is room."""
    space = width - left.cell_len - right.cell_len
    if not right or space < GAP:
        return fit(left, width)
    return Text().append_text(left).append(" " * space).append_text(right)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 2:05, 1:02:05, 3d 04:00."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def spark(values: Sequence[float], width: int) -> str:
    """The last values as bars, the highest at their maximum and the lowest at their minimum."""
    shown = values[-width:]
    if not shown:
        return ""
    low, span = min(shown), max(shown) - min(shown)
    top = len(_BARS) - 1
    return "".join(_BARS[round((value - low) / span * top) if span else 0] for value in shown)


def chart(points: Points, width: int, height: int) -> list[str]:
    """A curve in braille dots, with its scale at the left.

    A gap between two points, in columns, is bridged by a line. The highest hundredth of many
    values may be cut off at the top, so that a few outliers do not flatten the rest.

    Args:
        points: (x, y) by increasing x; y finite.
        width: columns, at least 12.
        height: lines, at least 1.

    Returns:
        `height` lines; none without points.
    """
    if not points or height < 1:
        return []
    low, high = _range([y for _, y in points])
    labels = [f"{high:.3g}", *[""] * (height - 2), f"{low:.3g}"][:height]
    left = max(map(len, labels)) + 1
    columns, rows = 2 * max(1, width - left), 4 * height
    cells = [[_BLANK] * (columns // 2) for _ in range(height)]
    first, last = points[0][0], points[-1][0]
    scale = (columns - 1) / (last - first) if last > first else 0.0
    before: tuple[int, int] | None = None
    for x, y in points:
        column = round((x - first) * scale)
        share = (high - min(y, high)) / (high - low) if high > low else 0.5
        row = min(rows - 1, round(share * (rows - 1)))
        for across, down in _line(before or (column, row), (column, row)):
            cells[down // 4][across // 2] |= _DOTS[down % 4][across % 2]
        before = (column, row)
    return [
        label.rjust(left - 1) + " " + "".join(map(chr, line))
        for label, line in zip(labels, cells, strict=True)
    ]


def _range(values: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(values)
    top = -1
    if len(ordered) >= _MANY:
        top = math.ceil(len(ordered) * (1 - _CLIPPED)) - 1
    return ordered[0], ordered[top]


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots from one to another."""
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (
            start[0] + round((end[0] - start[0]) * at / steps),
            start[1] + round((end[1] - start[1]) * at / steps),
        )
        for at in range(steps + 1)
    ]


def columns(head: Sequence[str], rows: Sequence[Sequence[str]], names: int) -> list[list[str]]:
    """Head and rows, each cell as wide as its column's widest; names left, numbers right.

    Args:
        head: a name a column.
        rows: as many cells each.
        names: so many columns stand to the left.
    """
    lines = [list(head), *map(list, rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    return [
        [
            padded(cell, width, right=at >= names)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]

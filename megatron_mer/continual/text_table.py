"""Text for a terminal: columns of any script that line up, and no line wider than asked for."""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Sequence

_GAP = "  "
_NAME, _SHORTEST_NAME = 16, 6  # columns that a name keeps before columns are left out, and after
_JOINERS = "\u200c\u200d"  # they shape letters of Arabic and other scripts

Cells = Sequence[Sequence[str]]


def table(cells: Cells, width: int, names: int = 1, droppable: Sequence[str] = ()) -> str:
    """Aligned columns under a head with a rule.

    Args:
        cells: lines of cells, the head first.
        width: columns of the terminal. Where the table is wider, names are shortened in their
            middle, droppable columns are left out, names become shorter still, and lines are cut.
        names: so many columns hold names, which stand to the left; numbers stand to the right.
        droppable: heads of columns that may be left out, first to last.
    """
    wanted = list(droppable)
    while (widths := _fitting(cells, width, names, _NAME)) is None and wanted:
        cells = _without(cells, wanted.pop(0))
    if widths is None:
        widths = _fitting(cells, width, names, _SHORTEST_NAME) or _widths(cells)
    lines = []
    for line in cells:
        left = [
            pad(shorten_middle(cell, size), size)
            for cell, size in zip(line[:names], widths, strict=False)
        ]
        right = [
            pad(cell, size, left=True)
            for cell, size in zip(line[names:], widths[names:], strict=True)
        ]
        lines.append(shorten(_GAP.join([*left, *right]).rstrip(), width))
    lines.insert(1, "-" * max(map(display_width, lines)))
    return "\n".join(lines)


def _widths(cells: Cells) -> list[int]:
    return [max(map(display_width, column)) for column in zip(*cells, strict=True)]


def _fitting(cells: Cells, width: int, names: int, shortest: int) -> list[int] | None:
    """Widths of the columns, with names shortened as far as is needed and allowed."""
    widths = _widths(cells)
    while sum(widths) + len(_GAP) * (len(widths) - 1) > width:
        widest = max(range(names), key=widths.__getitem__)
        if widths[widest] <= shortest:
            return None
        widths[widest] -= 1
    return widths


def _without(cells: Cells, head: str) -> Cells:
    at = list(cells[0]).index(head)
    return [[*line[:at], *line[at + 1 :]] for line in cells]


def wide_table(names: Sequence[str], columns: Cells, width: int) -> str:
    """As many tables, each with the names again, as are needed for all columns of numbers.

    Args:
        names: the first column, its head first.
        columns: the others, each with its head first.
        width: columns of the terminal.
    """
    left = min(_NAME, max(map(display_width, names)))
    pieces: list[list[Sequence[str]]] = [[]]
    rest = width - left
    for column in columns:
        rest -= len(_GAP) + max(map(display_width, column))
        if rest < 0 and pieces[-1]:
            pieces.append([])
            rest = width - left - len(_GAP) - max(map(display_width, column))
        pieces[-1].append(column)
    return "\n\n".join(table(list(zip(names, *piece, strict=True)), width) for piece in pieces)


def wrap(text: str, width: int, indent: str = "") -> str:
    """The text in lines, those after the first indented."""
    return "\n".join(textwrap.wrap(text, width, subsequent_indent=indent))


def percent(share: float) -> str:
    """A share with two decimal places, or one digit where it would be 0."""
    if share >= 5e-5 or share == 0:
        return f"{share:.2%}"
    return f"{100 * share:.{-math.floor(math.log10(100 * share))}f}%"


def one_line(text: str) -> str:
    r"""The text with everything escaped that would move a terminal's cursor or turn its lines.

    Line breaks and tabs become `\n` and `\t`, other control and invisible characters `\xNN` or
    `\uNNNN`. Letters of all scripts and the marks that join them stay.
    """
    return "".join(char if _is_plain(char) else _escape(char) for char in text)


def _is_plain(char: str) -> bool:
    return char in _JOINERS or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def display_width(text: str) -> int:
    """Columns that a text takes: two for the wide characters of East Asia, none for marks."""
    return len(text) if text.isascii() else sum(map(_char_width, text))


def _char_width(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def shorten(text: str, width: int) -> str:
    """The text, or as much of its beginning as fits with an ellipsis."""
    return text if display_width(text) <= width else _beginning(text, width - 1) + "…"


def shorten_middle(name: str, width: int) -> str:
    """The name, or its beginning and end around an ellipsis: names often differ in their end."""
    if display_width(name) <= width:
        return name
    end = _beginning(name[::-1], (width - 1) // 2)[::-1]
    return _beginning(name, width - 1 - display_width(end)) + "…" + end


def _beginning(text: str, width: int) -> str:
    """The longest beginning that takes at most so many columns."""
    for at, char in enumerate(text):
        width -= _char_width(char)
        if width < 0:
            return text[:at]
    return text


def pad(text: str, width: int, left: bool = False) -> str:
    """The text filled up with spaces to so many columns, after it or before it."""
    spaces = " " * (width - display_width(text))
    return spaces + text if left else text + spaces

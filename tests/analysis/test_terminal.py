"""Charts of characters, columns and lines that fit."""

import pytest
from rich.cells import cell_len
from rich.text import Text

from megatron_mer.analysis.terminal import (
    chart,
    clock,
    columns,
    fit,
    flow,
    padded,
    plain,
    shortened,
    spark,
)


def dots(lines: list[str]) -> set[tuple[int, int]]:
    """(column, row) of each dot of a braille picture, counted from the upper left."""
    bits = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]
    return {
        (2 * across + x, 4 * down + y)
        for down, line in enumerate(lines)
        for across, char in enumerate(line)
        for bit, (x, y) in enumerate(bits)
        if (ord(char) - 0x2800) >> bit & 1
    }


def test_a_falling_line_goes_from_corner_to_corner():
    lines = chart([(0, 8.0), (1, 5.0)], width=16, height=3)
    assert [line[:2] for line in lines] == ["8 ", "  ", "5 "]
    found = dots([line[2:] for line in lines])
    assert (0, 0) in found
    assert (27, 11) in found
    # One dot a column at least: no gap between two points.
    assert {x for x, _ in found} == set(range(28))
    assert all(len(line) == 16 for line in lines)


def test_a_flat_or_single_point_is_drawn():
    assert dots([line[2:] for line in chart([(3, 5.0)], 14, 2)])
    assert len({y for _, y in dots([line[2:] for line in chart([(0, 5.0), (9, 5.0)], 14, 2)])}) == 1
    assert chart([], 20, 4) == []


def test_outliers_do_not_flatten_a_long_curve():
    points = [(float(at), 1e6 if at == 7 else 5.0 + at % 2) for at in range(200)]
    assert chart(points, 40, 4)[0].split()[0] == "6"
    few = [(0.0, 5.0), (1.0, 1000.0)]
    assert chart(few, 40, 4)[0].split()[0] == "1e+03"


def test_sparks():
    assert spark([8, 1, 4.5], 9) == "█▁▅"
    assert spark([5, 5], 9) == "▁▁"
    assert spark(range(100), 4) == "▁▃▆█"
    assert spark([], 4) == ""


def test_names_of_any_script_take_their_columns():
    assert padded("日本語", 8) == "日本語  "
    assert padded("日本語", 8, right=True) == "  日本語"
    assert shortened("日本語日本語", 8) == "日本語 …"
    assert cell_len(shortened("日本語日本語", 8)) == 8
    assert shortened("العربية", 10) == "العربية"
    lines = columns(["set", "loss"], [["日本語", "5.9"], ["en", "14.25"]], names=1)
    assert lines == [["set   ", " loss"], ["日本語", "  5.9"], ["en    ", "14.25"]]


def test_control_characters_move_no_cursor():
    assert plain("a\x1b[2Jb\nc\td\u2028e") == "a [2Jb c d e"


def test_lines_fit():
    assert fit(Text("abcdef"), 4).plain == "abc…"
    assert cell_len(fit(Text("日本語日本語"), 7).plain) <= 7
    fields = [Text("a" * 10), Text("b" * 10), Text("c" * 30)]
    assert [line.plain for line in flow(fields, 22)] == [
        "a" * 10 + "  " + "b" * 10,
        "c" * 21 + "…",
    ]
    assert flow([], 20) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (125.4, "2:05"), (3725, "1:02:05"), (3 * 86400 + 4 * 3600, "3d 04:00")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text

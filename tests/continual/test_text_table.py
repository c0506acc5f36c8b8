"""Text for terminals: widths of scripts, escapes, tables that fit."""

import pytest

from megatron_mer.continual.text_table import (
    display_width,
    one_line,
    percent,
    shorten,
    shorten_middle,
    table,
    wide_table,
    wrap,
)


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ("abc", 3),
        ("日本語", 6),
        ("ｶﾅ", 2),
        ("مُحَمَّد", 4),  # four letters, their vowels are marks above them
        ("e\u0301", 1),
        ("می\u200cخواهم", 7),
        ("🦊", 2),
    ],
)
def test_display_width(text: str, width: int) -> None:
    assert display_width(text) == width


def test_one_line_escapes_what_moves_the_cursor_and_keeps_scripts() -> None:
    assert one_line("a\nb\r\tc\x1b[31m\x9b\u2028\u202e\u2066") == (
        "a\\nb\\r\\tc\\x1b[31m\\x9b\\u2028\\u202e\\u2066"
    )
    for text in ("ça, 日本語 مُحَمَّد", "می\u200cخواهم", "a\u200db", "\ufffd 🦊"):
        assert one_line(text) == text
    assert one_line("\ufeff") == "\\ufeff"


@pytest.mark.parametrize("width", range(1, 14))
@pytest.mark.parametrize(
    "text", ["a_long_name_17", "日本語の長い名前", "e\u0301e\u0301e\u0301e\u0301e"]
)
def test_shortened_text_fits(text: str, width: int) -> None:
    for short in (shorten(text, width), shorten_middle(text, width)):
        assert display_width(short) <= width
        assert (short == text) == (display_width(text) <= width)


def test_names_keep_both_ends() -> None:
    assert shorten_middle("web_crawl_shard_0017", 11) == "web_c…_0017"
    assert shorten("web_crawl_shard_0017", 6) == "web_c…"


CELLS = [
    ["dataset", "share", "samples", "tokens"],
    ["web_crawl_of_many_pages_0017", "25.00%", "1,000", "4,096,000"],
    ["語", "75.00%", "3,000", "12,288,000"],
]


def test_table_aligns_names_left_and_numbers_right() -> None:
    lines = table(CELLS, 100).splitlines()
    assert lines[0] == "dataset                        share  samples      tokens"
    assert lines[3] == "語                            75.00%    3,000  12,288,000"
    assert lines[1] == "-" * 57


def test_table_shortens_names_then_drops_columns_then_cuts() -> None:
    narrow = table(CELLS, 46, droppable=("tokens",))
    assert "web_crawl_…ages_0017" not in narrow
    assert "12,288,000" in narrow
    narrower = table(CELLS, 40, droppable=("tokens",))
    assert "12,288,000" not in narrower
    assert "tokens" not in narrower
    assert "3,000" in narrower
    assert max(map(display_width, table(CELLS, 12).splitlines())) == 12


def test_wide_table_repeats_the_names() -> None:
    columns = [[f"task{i}", "1,000", "-"] for i in range(9)]
    text = wide_table(["during", "a", "b"], columns, 30)
    assert text.count("during") == 3
    assert all(f"task{i}" in text for i in range(9))
    assert max(map(display_width, text.splitlines())) <= 30


def test_percent_shows_no_share_as_nothing() -> None:
    assert [percent(share) for share in (0, 1, 0.25, 0.00123, 1e-6)] == [
        "0.00%",
        "100.00%",
        "25.00%",
        "0.12%",
        "0.0001%",
    ]


def test_wrap_indents_what_follows() -> None:
    assert wrap("one two three", 8, "  ") == "one two\n  three"

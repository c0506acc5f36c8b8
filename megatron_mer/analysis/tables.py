"""The matrix of losses as plain text, for a terminal and a log file."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

DASH = "-"


def matrix_table(summary: Mapping[str, Any]) -> str:
    """Two aligned tables: the loss of every held-out set over the entries, what follows from it.

    Args:
        summary: `summary.json` as `continual.forgetting.summary_dict` builds it. An optional key
            "unigram_entropy" {set: nats a token} adds what a model reaches that knows the
            frequencies of the tokens and nothing else.

    Returns:
        Nothing for a summary without a matrix (a run that evaluates nothing), else lines without a
        newline at the end; numbers in nats a token; "-" where there is none.
    """
    if "matrix" not in summary:
        return ""
    sets = summary["matrix"]["sets"]
    parts = [
        "Held-out loss in nats a token at the end of each entry (* = just trained)",
        _aligned(_matrix_cells(summary, sets)),
        "",
        "After the whole stream (forgetting > 0 is worse)",
        _aligned(_measure_cells(summary, sets)),
    ]
    return "\n".join(parts)


def _matrix_cells(summary: Mapping[str, Any], sets: Sequence[str]) -> list[list[str]]:
    matrix, tasks = summary["matrix"], summary["set_tasks"]
    cells = [["after", *sets]]
    for row, losses in zip(matrix["rows"], matrix["losses"], strict=True):
        own = [row["task"] is not None and tasks[name] == row["task"] for name in sets]
        values = [_number(loss) + "* "[not mark] for loss, mark in zip(losses, own, strict=True)]
        cells.append([row["label"], *values])
    entropy = summary.get("unigram_entropy")
    if entropy:
        cells.append(["unigrams", *(_number(entropy.get(name)) + " " for name in sets)])
    # The numbers carry a mark or a blank at their end; so do the names above them.
    cells[0] = [cells[0][0], *(name + " " for name in sets)]
    return cells


def _measure_cells(summary: Mapping[str, Any], sets: Sequence[str]) -> list[list[str]]:
    columns = {
        measure: [*(summary[measure]["sets"][name] for name in sets), summary[measure]["mean"]]
        for measure in ("learned", "retained", "forgetting")
    }
    entropy = summary.get("unigram_entropy")
    if entropy:
        floor = [*(entropy.get(name) for name in sets), None]
        below = [_difference(*pair) for pair in zip(columns["learned"], floor, strict=True)]
        columns = {
            "learned": columns["learned"],
            "unigrams": floor,
            "learned - unigrams": below,
            "retained": columns["retained"],
            "forgetting": columns["forgetting"],
        }
    signed = ("forgetting", "learned - unigrams")
    lines = [
        [label, *(_number(column[at], sign=name in signed) for name, column in columns.items())]
        for at, label in enumerate([*sets, "mean"])
    ]
    return [["set", *columns], *lines]


def _difference(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _number(value: float | None, sign: bool = False) -> str:
    if value is None:
        return DASH
    return f"{value:+.3f}" if sign else f"{value:.3f}"


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    """First column to the left, the others to the right, a rule under the head."""
    widths = [max(_width(cell) for cell in column) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        first = row[0] + " " * (widths[0] - _width(row[0]))
        rest = [
            " " * (width - _width(cell)) + cell
            for cell, width in zip(row[1:], widths[1:], strict=True)
        ]
        lines.append("  ".join([first, *rest]).rstrip())
    lines.insert(1, "-" * max(_width(line) for line in lines))
    return "\n".join(lines)


def _width(text: str) -> int:
    """Columns of a terminal that a text takes: two for the wide characters of East Asia."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )

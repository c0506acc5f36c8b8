"""Where figures are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.parts.measure import ROOT

RESULTS = ROOT / "benchmarks" / "RESULTS.md"


def output_folder(record: bool) -> Path:
    """The folder for figures: that of the repository's own results, or one that git ignores."""
    folder = ROOT / "benchmarks" / "data" if record else ROOT / "build" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(path: Path, environment: Mapping[str, Any], **content: Any) -> None:
    """Keep figures; samples and rows become plain values."""
    values = {"environment": environment, **content}
    path.write_text(json.dumps(values, indent=1, default=asdict) + "\n", encoding="utf-8")


def record_section(name: str, text: str) -> None:
    """Put a text between the marks of its section in RESULTS.md.

    Raises:
        ValueError: RESULTS.md has no such marks.
    """
    page = RESULTS.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, found, rest = page.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"{RESULTS} has no section between {begin} and {end}; add the two lines")
    RESULTS.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")

#!/usr/bin/env python3
"""Draw a run, or compare several: a page, pictures and JSON.

    python tools/report.py runs/quickstart
    python tools/report.py runs/replay runs/plain --out reports/replay

index.html needs nothing beside it: it fetches nothing and opens in any browser, on a phone too.
report.json holds what it shows, the PNGs are its charts. A run that goes on, that was stopped or
whose files are torn is shown as far as it came, with notes on top. Runs that differ only in their
seed are grouped, with mean and 95% interval.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

# Running a file in tools/ leaves the folder above it out of the path; there need be no installed
# package and no torch.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mer.analysis.report.compare import compare
from megatron_mer.analysis.report.content import run_content
from megatron_mer.analysis.report.drawing import Chart, write_png
from megatron_mer.analysis.report.page import render
from megatron_mer.analysis.report.run_charts import run_charts, several_charts
from megatron_mer.analysis.run_reader import RunRecord, read_run
from megatron_mer.command import run_tool
from megatron_mer.continual.forgetting import MatrixRow, matrix_dict
from megatron_mer.errors import DataError, Problem
from megatron_mer.log import setup_logging


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="the directory of a run (its output_dir)")
    add(
        "--out",
        metavar="DIR",
        help="where to write (default: RUN/report for one run, report beside the first of several)",
    )
    return parser.parse_args(arguments)


def computed_measures(run: RunRecord) -> tuple[dict[str, Any] | None, str]:
    """The measures and the matrix of the entries that ended, for a run without its summary.

    Returns:
        They, and for the anchor under "anchor" where all ends have it; None and the reason where
        the evaluations do not give them.
    """
    tasks, before = run.set_tasks, run.trained_before
    rows = matrix_rows(run, "losses")
    if rows is None or len(rows) < 2:
        return None, ""  # No entry has ended; the reader of the run said so.
    try:
        measures: dict[str, Any] = matrix_dict(rows, tasks, before)
        anchor = matrix_rows(run, "losses_anchor")
        if anchor is not None:
            measures["anchor"] = matrix_dict(anchor, tasks, before)
    except ValueError as error:
        return None, f"the evaluations give no matrix: {error}"
    return {**measures, "set_tasks": tasks, "trained_before": before}, ""


def matrix_rows(run: RunRecord, key: str) -> list[MatrixRow] | None:
    """The rows of the matrix; None if the end of an entry has no such losses."""
    rows = []
    for line in run.evaluations:
        if line["moment"] == "interval":
            continue
        losses = line.get("losses" if line["moment"] == "start" else key)
        if losses is None:
            return None
        numbers = {name: math.nan if one is None else one for name, one in losses.items()}
        rows.append(MatrixRow(line["entry"], line["task"], numbers))
    return rows


def build(paths: list[str]) -> tuple[dict[str, Any], list[dict[str, Chart]]]:
    """The report of runs, and its charts."""
    contents = []
    for path in paths:
        run = read_run(path)
        measures, reason = (None, "") if run.finished else computed_measures(run)
        content = run_content(run, measures)
        content["notes"] += [reason] if reason else []
        contents.append(content)
    charts = [run_charts(content) for content in contents]
    if len(contents) == 1:
        return {"title": contents[0]["name"], "runs": contents}, charts
    comparison = compare(contents)
    charts.append(several_charts(contents, comparison["groups"]))
    title = f"{len(contents)} runs compared"
    return {"title": title, "runs": contents, "comparison": comparison}, charts


def out_directory(options: argparse.Namespace) -> Path:
    """Where the report goes; made if missing.

    Raises:
        DataError: it cannot be made.
    """
    first = Path(options.runs[0])
    out = first / "report" if len(options.runs) == 1 else first.resolve().parent / "report"
    out = Path(options.out) if options.out else out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        given = f"cannot be made ({error.strerror})"
        raise DataError(
            [Problem(str(out), given, remedy="choose another with --out DIR")]
        ) from error
    return out


def write(out: Path, report: dict[str, Any], charts: list[dict[str, Chart]]) -> None:
    """Write page, JSON and pictures; of several runs the pictures that compare them.

    Raises:
        DataError: something cannot be written.
    """
    files = {
        "report.json": json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False) + "\n",
        "index.html": render(report, charts),
    }
    try:
        for name, text in files.items():
            # A browser may be looking: it sees the old page or the new one.
            temporary = out / f".{name}.tmp"
            try:
                temporary.write_text(text, encoding="utf-8", errors="replace")
                temporary.replace(out / name)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
        for key, chart in charts[-1].items():
            write_png(chart, out / ("losses.png" if key == "held_out" else f"{key}.png"))
    except OSError as error:
        raise DataError(f"{out}: the report cannot be written there: {error.strerror}") from error


def make(options: argparse.Namespace) -> None:
    """Make the report, and say where it is."""
    report, charts = build(options.runs)
    out = out_directory(options)
    write(out, report, charts)
    for run in report["runs"]:
        for note in run["notes"]:
            print(f"note: {run['name']}: {note}", file=sys.stderr)
    print(out / "index.html")


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    options = parse_arguments(arguments)
    setup_logging(rank=0, level=logging.WARNING)
    return run_tool(lambda: make(options))


if __name__ == "__main__":
    sys.exit(main())

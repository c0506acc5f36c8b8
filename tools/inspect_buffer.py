#!/usr/bin/env python3
"""Say what a run's replay buffer holds at a checkpoint, check it, show samples, drop a task.

    python tools/inspect_buffer.py runs/mine                  # at the newest checkpoint
    python tools/inspect_buffer.py runs/mine@3000 --sizes --json
    python tools/inspect_buffer.py runs/mine --samples 3 --task fr
    python tools/inspect_buffer.py runs/mine --drop-task fr         # what it would do
    python tools/inspect_buffer.py runs/mine --drop-task fr --yes   # the licence has ended

Every record that the checkpoint needs is read and verified; --sizes only looks at the sizes of the
files. Nothing is written, but by --yes. The exit code is 1 if a record cannot be had.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

# A machine that only looks at runs needs no installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mer.command import run_tool
from megatron_mer.continual.text_table import one_line, percent, table, wrap
from megatron_mer.data.tokenizers import Tokenizer, load_tokenizer
from megatron_mer.errors import DataError
from megatron_mer.log import setup_logging
from megatron_mer.training.drop_tasks import Drop, drop_tasks
from megatron_mer.training.dry_run import DOCUMENT_END
from megatron_mer.training.kept_buffer import BufferOfRun, problems, samples

PLAIN_WIDTH = 100  # columns where there is no terminal and COLUMNS is not set
DAMAGED = 1
SHOWN_PROBLEMS = 20
BAR = 40  # characters of the longest bar


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number, at least 1")
    return int(text)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", metavar="RUN[@STEP]", help="a run's output_dir, and one of its checkpoints")
    add("--sizes", action="store_true", help="look at the sizes of the files only, not inside")
    add("--samples", type=positive, metavar="N", help="show N rows as text, drawn")
    add("--task", action="append", default=[], help="with --samples: rows of this task; repeatable")
    add("--seed", type=int, default=1, metavar="K", help="of the draw (default: 1)")
    add("--tokenizer", metavar="KIND:PATH", help="default: the one of the run")
    add("--json", action="store_true", help="print JSON")
    add(
        "--drop-task",
        action="append",
        default=[],
        metavar="TASK",
        help="take all rows of a task out of the buffer and of every kept checkpoint; repeatable",
    )
    add("--yes", action="store_true", help="with --drop-task: do it, do not only say it")
    options = parser.parse_args(arguments)
    if options.samples is None and (options.task or options.tokenizer):
        parser.error("--task and --tokenizer need --samples")
    if options.yes and not options.drop_task:
        parser.error("--yes needs --drop-task")
    if options.drop_task and (options.samples or options.json or options.sizes):
        parser.error("--drop-task goes with --yes alone")
    return options


def show(options: argparse.Namespace) -> int:
    """Print what is known; returns the exit code."""
    run, checkpoint = BufferOfRun.of(options.run)
    if options.drop_task:
        done = drop_tasks(run, checkpoint, options.drop_task, options.yes)
        print(drop_text(done, options.drop_task, options.yes))
        return 0
    about, store = run.store(checkpoint)
    content = checkpoint.content()
    found = problems(content, store, options.sizes)
    report = {
        "run": str(run.root),
        "checkpoint": checkpoint.name,
        "folder": str(store.directory),
        **content.report(),
        "segments": len(content.segments),
        "disk": run.disk(checkpoint, store),
        "checked": "sizes" if options.sizes else "records",
        "problems": found,
        "missing_datasets": checkpoint.missing_datasets(content),
    }
    if not options.json:
        print(report_text(report), flush=True)
    if options.samples:
        tokenizer = open_tokenizer(options.tokenizer or run.config.tokenizer, about.tokenizer)
        rows = samples(content, store, options.samples, options.task, options.seed, tokenizer)
        report["samples"] = rows
        if not options.json:
            print("".join(map(sample_text, rows)))
    if options.json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    for text in problem_lines(report):
        print(text, file=sys.stderr)
    return DAMAGED if found else 0


def open_tokenizer(name: str, fingerprint: str) -> Tokenizer:
    """The tokenizer of the records.

    Raises:
        DataError: it is another one.
    """
    tokenizer = load_tokenizer(name)
    if tokenizer.fingerprint != fingerprint:
        raise DataError(
            f"the records were tokenized by a model with SHA-256 {fingerprint}, but {name} has "
            f"{tokenizer.fingerprint}: their text would come out wrong; name theirs with "
            "--tokenizer KIND:PATH"
        )
    return tokenizer


def report_text(report: dict[str, Any]) -> str:
    """What the buffer holds, in tables."""
    width = shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns
    head = (
        f"{report['folder']} at {report['checkpoint']} (batch {report['batch']:,}): "
        f"{report['rows']:,} rows of a capacity of {report['capacity']:,}, out of "
        f"{report['fresh_rows']:,} fresh rows so far"
    )
    parts = [
        wrap(head, width),
        shares_text(report["tasks"], ["task"], width),
        shares_text(report["datasets"], ["dataset", "task"], width),
        ages_text(report, width),
        disk_text(report, width),
    ]
    if not report["problems"]:
        parts.append(f"whole by {report['checked']}")
    return "\n\n".join(parts)


def shares_text(rows: list[dict[str, Any]], names: list[str], width: int) -> str:
    """Rows held by task or dataset, beside what is to be expected of so many fresh ones."""
    cells = [[*names, "fresh rows", "held", "share", "expected"]]
    for one in rows:
        shares = [percent(one["share"]), percent(one["expected_share"])]
        counts = [f"{one['fresh_rows']:,}", f"{one['rows']:,}"]
        cells.append([*(one_line(one[name]) for name in names), *counts, *shares])
    return table(cells, width, names=len(names))


def ages_text(report: dict[str, Any], width: int) -> str:
    """Rows held by entry and by age, the newest first."""
    entries = [["entry", "task", "held"]]
    entries += [
        [str(one["entry"]), one_line(one["task"]), f"{one['rows']:,}"] for one in report["entries"]
    ]
    edges, rows = report["ages"]["edges"], report["ages"]["rows"]
    most = max([1, *rows])
    cells = [["fresh rows ago", "", "held"]]
    for first, end, count in zip(edges, edges[1:], rows, strict=False):
        bar = "#" * round(BAR * count / most)
        cells.append([f"{first + 1:,} - {end:,}", bar.ljust(BAR), f"{count:,}"])
    return f"{table(entries, width, names=2)}\n\n{table(cells, width, names=2)}"


def disk_text(report: dict[str, Any], width: int) -> str:
    """Bytes by who needs them."""
    disk = report["disk"]
    lines = [
        ["on disk", "MB"],
        [f"{disk['files']:,} segment files", megabytes(disk["bytes"])],
        ["  that this checkpoint needs", megabytes(disk["checkpoint_bytes"])],
        ["  that only other checkpoints need", megabytes(disk["other_checkpoints_bytes"])],
        ["  written since the last of them", megabytes(disk["after_bytes"])],
        ["  of no checkpoint (the run removes them)", megabytes(disk["stale_bytes"])],
        ["twice the capacity, and what only others need", megabytes(disk["most_bytes"])],
    ]
    widest = max(len(line[0]) for line in lines)
    return "\n".join(f"{name:<{widest}}  {size:>12}"[:width].rstrip() for name, size in lines)


def megabytes(count: int) -> str:
    """Bytes in MB."""
    return f"{count / 1e6:,.3f}"


def sample_text(row: dict[str, Any]) -> str:
    """One row under its heading."""
    head = (
        f"record {row['record']:,}: task {one_line(row['task'])}, dataset "
        f"{one_line(row['dataset'])}, sample {row['sample']:,}, {row['age']:,} fresh rows ago"
    )
    return f"\n--- {head} ---\n{DOCUMENT_END.join(map(one_line, row['text']))}\n"


def problem_lines(report: dict[str, Any]) -> list[str]:
    """What is wrong, and what to do about it."""
    found = report["problems"]
    if not found:
        return []
    lines = [f"not whole: {text}" for text in found[:SHOWN_PROBLEMS]]
    if len(found) > SHOWN_PROBLEMS:
        lines.append(f"... and {len(found) - SHOWN_PROBLEMS:,} more")
    missing = [f"{name} ({prefix})" for name, prefix in report["missing_datasets"].items()]
    first = f"bring back {', '.join(missing)}, from which it was filled, then " if missing else ""
    lines.append(
        f"what to do: restore the files from a copy; or {first}remove {report['folder']} and start "
        "the run again, which builds the buffer anew from its datasets"
    )
    return lines


def drop_text(drop: Drop, tasks: list[str], done: bool) -> str:
    """What was done, or would be."""
    names = ", ".join(map(one_line, tasks))
    lines = [f"task {names}: " + ("dropped" if done else "this is what --yes would do")]
    for one in drop.rewrites:
        lines.append(
            f"  {one.checkpoint.name} rewritten: {one.dropped_rows:,} rows dropped, "
            f"{len(one.content.position):,} left"
        )
    if not drop.rewrites:
        lines.append("  no kept checkpoint refers to it")
    lines.append(f"  {len(drop.erasure.of_tasks):,} records erased")
    if len(drop.erasure.untold):
        lines.append(
            f"  {len(drop.erasure.untold):,} torn or damaged records erased, since nobody can tell "
            f"whose they are; checkpoints need {len(drop.erasure.needed):,} of them"
        )
    lines += [f"note: {one_line(text)}" for text in drop.notes]
    lines.append("not touched:")
    lines += [f"  {one_line(text)}" for text in drop.untouched]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    options = parse_arguments(arguments)
    setup_logging(rank=0, level=logging.WARNING)
    return run_tool(lambda: show(options))


if __name__ == "__main__":
    sys.exit(main())

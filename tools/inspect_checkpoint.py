#!/usr/bin/env python3
"""Say what checkpoints hold, at which step, and whether they are whole.

    python tools/inspect_checkpoint.py runs/mine                       # all of a run, a line each
    python tools/inspect_checkpoint.py runs/mine/checkpoints/step_000000300
    python tools/inspect_checkpoint.py runs/mine --sizes --json

Every byte is read and compared with its checksum; --sizes only looks at the sizes of the files.
Nothing is written. The exit code is 1 if any is not whole.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

# A machine that only looks at runs needs no installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mer.checkpoint.contents import CheckpointContents, contents
from megatron_mer.checkpoint.layout import LATEST, step_directories
from megatron_mer.command import run_tool
from megatron_mer.continual.text_table import table
from megatron_mer.errors import CheckpointError, ConfigError, Problem

WIDTH = 100
DAMAGED = 1


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("path", metavar="PATH", help="a run, its folder `checkpoints`, or one checkpoint in there")
    add("--sizes", action="store_true", help="look at the sizes of the files only, not inside")
    add("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def checkpoints(path: Path) -> list[Path]:
    """The checkpoints that are meant, oldest first.

    Raises:
        ConfigError: there are none.
    """
    if path.name.startswith("step_") and path.is_dir():
        return [path]
    inside = path / "checkpoints"
    found = step_directories(inside if inside.is_dir() else path)
    if not found:
        given = (
            f"given {path}, which {'holds no checkpoint' if path.exists() else 'does not exist'}"
        )
        allowed = "the output_dir of a run, its folder checkpoints, or a step_NUMBER in there"
        raise ConfigError([Problem("PATH", given, allowed)])
    return found[::-1]


def look(path: Path, sizes: bool) -> CheckpointContents:
    """One checkpoint; another version's is one that is not whole for this program."""
    try:
        return contents(path, every_byte=not sizes)
    except CheckpointError as error:
        return CheckpointContents(str(path), None, str(error), every_byte=False)


def show(options: argparse.Namespace) -> int:
    """Print what is known; returns the exit code."""
    found = [look(path, options.sizes) for path in checkpoints(Path(options.path))]
    if options.json:
        print(json.dumps([asdict(one) for one in found], ensure_ascii=False, indent=2))
    elif len(found) == 1:
        print(one_text(found[0]))
    else:
        print(several_text(found))
    for one in found:
        if one.problem:
            print(f"not whole: {one.problem}", file=sys.stderr)
    return DAMAGED if any(one.problem for one in found) else 0


def several_text(found: list[CheckpointContents]) -> str:
    """A line a checkpoint."""
    cells = [["checkpoint", "batches", "ranks", "tp_size", "MB", "whole", "by"]]
    for one in found:
        place = Path(one.path)
        latest = place.parent / LATEST
        mark = ""
        if latest.is_file() and latest.read_text(errors="replace").strip() == place.name:
            mark = " (latest)"
        numbers = [_some(one.batches), _some(one.world_size), _some(one.tp_size)]
        size = "-" if one.bytes is None else f"{one.bytes / 1e6:,.1f}"
        whole = ["no" if one.problem else "yes", _checked(one)]
        cells.append([place.name + mark, *numbers, size, *whole])
    return table(cells, WIDTH)


def one_text(one: CheckpointContents) -> str:
    """One checkpoint with its kinds and parameters."""
    if one.problem:
        return f"{one.path}: not whole"
    cells = [["kind", "elements", "bytes"]]
    cells += [[kind, f"{elements:,}", f"{size:,}"] for kind, elements, size in one.kinds]
    shapes = [["parameter", "shape"]]
    shapes += [[name, " x ".join(map(str, shape))] for name, shape in one.tensors]
    head = (
        f"{one.path}: step {_some(one.step)}, batch {_some(one.batches)}, format {one.format}, "
        f"written by {_some(one.world_size)} ranks at tp_size {_some(one.tp_size)}; "
        f"{_some(one.parameters)} parameters; whole by "
        f"{_checked(one)}"
    )
    return f"{head}\n\n{table(cells, WIDTH)}\n\n{table(shapes, WIDTH)}"


def _checked(one: CheckpointContents) -> str:
    return "checksums" if one.every_byte else "sizes"


def _some(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    options = parse_arguments(arguments)
    return run_tool(lambda: show(options))


if __name__ == "__main__":
    sys.exit(main())

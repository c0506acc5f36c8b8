#!/usr/bin/env python3
"""Convert checkpoints.

    python tools/convert_checkpoint.py reshard runs/mine DEST --tp-size 4 --ranks 64
    python tools/convert_checkpoint.py reshard runs/mine/checkpoints/step_000000300 DEST --tp-size 1

reshard: rewrite one checkpoint for another layout, in one process with little memory. A run loads
any checkpoint at any layout as it is; a resharded one spares many ranks the reading across files.
The source stays as it is, and every byte of it is verified first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mer.checkpoint.find import find_latest
from megatron_mer.checkpoint.reshard import reshard
from megatron_mer.command import run_tool
from megatron_mer.engine.tensor_plan import cut_dim, num_slices
from megatron_mer.errors import ConfigError, Problem


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    own = commands.add_parser("reshard", help="another layout", allow_abbrev=False)
    add = own.add_argument
    add("source", metavar="SOURCE", type=Path, help="a checkpoint, or a run: its newest one")
    add("dest", metavar="DEST", type=Path, help="folder that gets step_NUMBER and latest")
    add("--tp-size", type=int, required=True, metavar="T", help="tensor-parallel ranks")
    add("--ranks", type=int, metavar="N", help="all ranks, a multiple of T (default: T)")
    return parser.parse_args(arguments)


def find_source(path: Path) -> Path:
    """The checkpoint that is meant.

    Raises:
        ConfigError: there is none.
        CheckpointError: a run has some, but none is whole.
    """
    if path.name.startswith("step_") and path.is_dir():
        return path
    inside = path / "checkpoints"
    info = find_latest(inside if inside.is_dir() else path)
    if info is None:
        why = "holds no checkpoint" if path.exists() else "does not exist"
        allowed = "the output_dir of a run, its folder checkpoints, or a step_NUMBER in there"
        raise ConfigError([Problem("SOURCE", f"given {path}, which {why}", allowed)])
    return info.path


def convert(options: argparse.Namespace) -> None:
    """Do what the command line says."""
    source = find_source(options.source)
    ranks = options.tp_size if options.ranks is None else options.ranks
    final = reshard(source, options.dest, options.tp_size, ranks, cut_dim, num_slices, show)
    print(f"{final}: tp_size {options.tp_size}, {ranks} ranks, from {source}")


def show(rank: int, ranks: int) -> None:
    """Say how far it is, where somebody watches."""
    if sys.stderr.isatty():
        end = "\n" if rank + 1 == ranks else ""
        print(f"\rwriting rank {rank + 1} of {ranks}", end=end, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    options = parse_arguments(arguments)
    return run_tool(lambda: convert(options))


if __name__ == "__main__":
    sys.exit(main())

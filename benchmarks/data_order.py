"""The data order beside megatron-core's, in one run: planning, start-up and loading.

Example:
    python benchmarks/data_order.py

Prints a table with the limit of each figure and keeps it, with every repetition, as JSON below
build/benchmarks; --record keeps it in benchmarks/data and RESULTS.md instead.
"""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts import loading, planning, startup
from benchmarks.parts.measure import Machine, Row, headline, table
from benchmarks.parts.peer import MISSING, Peer
from benchmarks.parts.record import output_folder, record_section, write_json

PARTS = ("planning", "startup", "loading", "training")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure (default: all)")
    add("--repetitions", type=int, default=15, metavar="N", help="of each figure (default: 15)")
    add("--no-peer", action="store_true", help="leave megatron-core out")
    add("--record", action="store_true", help="keep the figures as the repository's results")
    add("--workdir", type=Path, metavar="DIR", help="for 1 GB of files, removed at the end")
    return parser.parse_args(arguments)


def load_peer(wanted: bool) -> Peer | None:
    """megatron-core, or an explanation of what to install."""
    if not wanted:
        return None
    try:
        return Peer()
    except ImportError as error:
        sys.exit(f"{MISSING} ({error})")


def main() -> None:
    """Measure, print, keep."""
    arguments = parse_arguments()
    machine = Machine(shlex.join(["python", *sys.argv]))
    peer = load_peer(not arguments.no_peer)
    times = arguments.repetitions
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=arguments.workdir, prefix="data-order-") as name:
        folder = Path(name)
        corpora = functools.cache(lambda: loading.Corpora.make(folder))
        works: dict[str, Callable[[], list[Row]]] = {
            "planning": lambda: planning.measure(peer, times),
            "startup": lambda: startup.measure(folder, peer, max(3, times // 3)),
            "loading": lambda: loading.measure(corpora(), peer, times),
            "training": lambda: loading.measure_training_path(corpora(), times),
        }
        for part in (part for part in PARTS if part in arguments.only):
            print(f"measuring: {part}", file=sys.stderr, flush=True)
            rows += works[part]()
    found = machine.found()
    missed = sum(row.held is False for row in rows)
    verdict = f"{missed} of {sum(row.limit is not None for row in rows)} limits missed."
    text = "\n\n".join((headline(found), table(rows), verdict))
    print(text)
    write_json(output_folder(arguments.record) / "data_order.json", found, rows=rows)
    if arguments.record:
        record_section("data_order", text)


if __name__ == "__main__":
    main()

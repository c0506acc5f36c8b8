"""What a job of Slurm asks before and after training: is there anything to do, and once more?

    python tools/requeue.py begin OUTPUT_DIR --submission NAME
    python tools/requeue.py end OUTPUT_DIR --exit-code 143
    python tools/requeue.py bad-nodes OUTPUT_DIR

The scripts in examples/slurm call it. It reads status.json, keeps its counts in restarts.json and
says in one line what it decided and why. A file OUTPUT_DIR/restarts.json that is deleted begins the
count anew.

Exit codes: 0 train, or run again; 3 nothing is left to do; 1 give up.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# A copy of the project that is frozen with a run is no installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mer.command import run_tool
from megatron_mer.launch.requeue import (
    BAD_NODES,
    Decision,
    decide_end,
    decide_refused,
    decide_start,
    keep,
    live_twin,
    read_object,
    read_record,
)

CODES = {"start": 0, "requeue": 0, "end": 3, "fail": 1}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    begin = commands.add_parser("begin", help="is there anything to train?")
    end = commands.add_parser("end", help="shall the job run again?")
    bad = commands.add_parser("bad-nodes", help="print the nodes to leave out, n3,n7")
    for one in (begin, end, bad):
        one.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="the run's directory")
    begin.add_argument(
        "--submission", required=True, metavar="NAME", help="counts begin anew with another name"
    )
    what = end.add_mutually_exclusive_group(required=True)
    what.add_argument("--exit-code", type=int, help="of the launcher, for the log")
    what.add_argument(
        "--refused", action="store_true", help="the program refused its configuration"
    )
    end.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        metavar="N",
        help="restarts in a row that may gain no step (default: %(default)d)",
    )
    return parser.parse_args(arguments)


def begin(options: argparse.Namespace) -> Decision:
    """Decide whether to train; what an earlier submission found wrong with nodes is forgotten."""
    directory, submission = options.output_dir, options.submission
    record = read_record(directory)
    if record.submission != submission:
        (directory / BAD_NODES).unlink(missing_ok=True)
    return decide_start(read_object(directory / "status.json"), record, submission)


def end(options: argparse.Namespace) -> Decision:
    """Decide whether to run again."""
    directory = options.output_dir
    record = read_record(directory)
    if options.refused:
        return decide_refused(record)
    return decide_end(
        read_object(directory / "status.json"),
        record,
        options.exit_code,
        options.max_restarts,
        live_twin(directory),
        {node: str(what) for node, what in read_object(directory / BAD_NODES).items()},
    )


def work(options: argparse.Namespace) -> int:
    """Answer the question."""
    if options.command == "bad-nodes":
        print(",".join(sorted(read_object(options.output_dir / BAD_NODES))))
        return 0
    decision = begin(options) if options.command == "begin" else end(options)
    keep(decision, options.output_dir)
    print(f"requeue.py: {decision.action}: {decision.reason}")
    return CODES[decision.action]


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    options = parse_arguments(arguments)
    return run_tool(lambda: work(options))


if __name__ == "__main__":
    sys.exit(main())

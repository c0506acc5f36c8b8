"""What a job of Slurm asks before and after training: is there anything to do, and once more?

    python tools/requeue.py begin OUTPUT_DIR --submission NAME
    python tools/requeue.py end OUTPUT_DIR --submission NAME --exit-code 143
    python tools/requeue.py leave-out OUTPUT_DIR --nodes n3 n7 --why TEXT
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
from megatron_mer.config import LaunchConfig
from megatron_mer.config.yaml12 import read_yaml
from megatron_mer.launch.requeue import (
    BAD_NODES,
    Decision,
    decide_end,
    decide_not_started,
    decide_refused,
    decide_start,
    decide_taken_over,
    keep,
    live_twin,
    read_object,
    read_record,
    write_object,
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
    out = commands.add_parser("leave-out", help="note nodes that are to be left out")
    for one in (begin, end, bad, out):
        one.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="the run's directory")
    for one in (begin, end):
        one.add_argument(
            "--submission",
            required=True,
            metavar="NAME",
            help="counts begin anew with another name",
        )
    out.add_argument("--nodes", nargs="+", required=True, metavar="NODE")
    out.add_argument("--why", required=True, metavar="TEXT", help="what is wrong with them")
    what = end.add_mutually_exclusive_group(required=True)
    what.add_argument("--exit-code", type=int, help="of the launcher, for the log")
    what.add_argument(
        "--refused", action="store_true", help="the program refused its configuration"
    )
    what.add_argument(
        "--not-started", action="store_true", help="Slurm's warning came before any rank"
    )
    end.add_argument(
        "--max-restarts",
        type=int,
        metavar="N",
        help="restarts in a row that may gain no step (default: the run's own setting)",
    )
    return parser.parse_args(arguments)


def begin(options: argparse.Namespace) -> Decision:
    """Decide whether to train; what an earlier submission found wrong with nodes is forgotten."""
    directory, submission = options.output_dir, options.submission
    record = read_record(directory)
    decision = decide_start(read_object(directory / "status.json"), record, submission)
    if decision.record.submission != record.submission:
        (directory / BAD_NODES).unlink(missing_ok=True)
    return decision


def end(options: argparse.Namespace) -> Decision:
    """Decide whether to run again."""
    directory = options.output_dir
    record = read_record(directory)
    if taken := decide_taken_over(record, options.submission):
        return taken
    if options.refused:
        return decide_refused(record)
    if options.not_started:
        return decide_not_started(record)
    return decide_end(
        read_object(directory / "status.json"),
        record,
        options.exit_code,
        allowed_restarts(directory) if options.max_restarts is None else options.max_restarts,
        live_twin(directory),
        {node: str(what) for node, what in read_object(directory / BAD_NODES).items()},
    )


def allowed_restarts(directory: Path) -> int:
    """`launch.max_restarts_without_step` of the run; its default where no rank came so far."""
    try:
        text = (directory / "config.yaml").read_text(encoding="utf-8")
        return int(read_yaml(text, "config.yaml").data["launch"]["max_restarts_without_step"])
    except (OSError, ValueError, TypeError, KeyError):
        return LaunchConfig().max_restarts_without_step


def work(options: argparse.Namespace) -> int:
    """Answer the question."""
    if options.command == "bad-nodes":
        print(",".join(sorted(read_object(options.output_dir / BAD_NODES))))
        return 0
    if options.command == "leave-out":
        path = options.output_dir / BAD_NODES
        write_object(path, {**read_object(path), **dict.fromkeys(options.nodes, options.why)})
        return 0
    before = read_record(options.output_dir)
    decision = begin(options) if options.command == "begin" else end(options)
    print(f"requeue.py: {decision.action}: {decision.reason}", flush=True)
    # A start is always noted, so that a disk that stays full ends the job.
    if decision.record != before or decision.action == "start":
        try:
            keep(decision, options.output_dir)
        except OSError as error:
            # A full disk may have ended the training too. The next start fails if it still is.
            if decision.action != "requeue":
                raise
            print(f"requeue.py: {error.filename}: {error.strerror}", file=sys.stderr)
    return CODES[decision.action]


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    options = parse_arguments(arguments)
    return run_tool(lambda: work(options))


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Test that a run of yours resumes exactly, on your machine, with your configuration and data.

    python tools/check_resume.py --config run.yaml
    python tools/check_resume.py --config run.yaml --ranks 4 --parallel.tp_size 2
    python tools/check_resume.py --config run.yaml --ranks 2 --change-layout tp_size=2

The run is made short, but keeps its model, batches and data. It is trained (1) without interruption
and (2) up to some steps behind a checkpoint, where all ranks are killed with SIGKILL; then (3) it
resumes from the checkpoint. What stood in every row of every batch, losses, gradient norms,
Reptile's figures, held-out losses and every number of the last checkpoint must be the same to the
bit. With --change-layout the resume has another layout: what it loads and its batches must be the
same to the bit, losses and gradient norms as near as --tolerance. Rounding leaves more in bf16;
--precision fp32 judges sharply.

The ranks are processes of this node; on a cluster, start it on one node with what it may use there.
Your output_dir is neither read nor written. The folder that it works in needs the space of up to
nine checkpoints; it goes when all agrees. Any key of the configuration can be patched:
--model.num_layers 2

Exit codes: 0 identical (or near enough at another layout), 1 different, or the training program
failed, 2 a configuration that is refused.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mer.command import run_tool
from megatron_mer.config import load_config

DIFFERENT = 1


def parse_arguments(
    arguments: list[str] | None = None,
) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into the tool's own options and configuration overrides."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="the run's YAML")
    add(
        "--ranks",
        type=int,
        metavar="N",
        help="number of ranks (default: the fewest that the layout allows)",
    )
    add("--steps", type=int, default=6, metavar="K", help="steps to the checkpoint (default: 6)")
    add("--more", type=int, default=6, metavar="M", help="steps behind it (default: 6)")
    add(
        "--change-layout",
        default="",
        metavar="KEY=NUMBER[,...]",
        help="resume at another layout: tp_size, pp_size, micro_batch_size, ranks; what is not "
        "named stays, the number of ranks too",
    )
    add(
        "--tolerance",
        type=float,
        metavar="SHARE",
        help="relative difference of losses, and of the first gradient norm, that is allowed at "
        "another layout; later norms and Reptile's figures may differ by 100 times as much, at "
        "most 0.1 (default: 1e-6 in fp32, 1e-2 in bf16)",
    )
    add(
        "--work-dir",
        type=Path,
        metavar="FOLDER",
        help="make the folder to work in here (default: beside the run's output_dir)",
    )
    add("--keep", action="store_true", help="keep that folder also when all agrees")
    add(
        "--timeout",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="time that each of the three starts may take (default: 1800)",
    )
    return parser.parse_known_args(arguments)


def check(own: argparse.Namespace, overrides: list[str]) -> int:
    """Test, and print what came out; returns the exit code."""
    config = load_config(own.config, overrides)
    # torch takes seconds to import, so a refused configuration does not wait for it.
    from megatron_mer.training.check_resume.check import SelfTest, check_resume

    test = SelfTest(
        config=config,
        ranks=own.ranks,
        steps=own.steps,
        more=own.more,
        layout=own.change_layout,
        work_dir=own.work_dir,
        keep=own.keep,
        timeout=own.timeout,
        tolerance=own.tolerance,
    )
    verdict = check_resume(test, lambda line: print(line, flush=True))
    for line in verdict.lines:
        print(line)
    return 0 if verdict.agrees else DIFFERENT


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    own, overrides = parse_arguments(arguments)
    # Stopped in any way, it does not leave ranks behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run_tool(lambda: check(own, overrides))


if __name__ == "__main__":
    sys.exit(main())

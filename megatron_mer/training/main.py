"""The command line of ``pretrain_llama_mer.py``."""

from __future__ import annotations

import argparse
import faulthandler
import io
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence

from megatron_mer.config import RunConfig, describe, load_config
from megatron_mer.continual.history import KINDS
from megatron_mer.errors import ConfigError, LaunchError, MegatronMerError, Problem, RunStopped
from megatron_mer.launch.environment import RankEnvironment, rank_environment
from megatron_mer.log import setup_logging
from megatron_mer.training.preflight import Prepared, prepare

_SECONDS_FOR_RANK_0 = 10.0
_PLAIN_WIDTH = 100  # columns where there is no terminal and COLUMNS is not set

_USAGE = """\
Continual pre-training of a Llama: one stream of tasks, replay, Reptile.

The same script runs under deepspeed, torchrun, srun and as one plain process:
  deepspeed --num_accelerators 2 pretrain_llama_mer.py --config run.yaml
  torchrun --nproc-per-node 2 pretrain_llama_mer.py --config run.yaml
  srun python pretrain_llama_mer.py --config run.yaml
  python pretrain_llama_mer.py --config run.yaml

A started run resumes from its newest checkpoint, or says that it is done. --dry-run says what a
start would do, and does nothing:
  python pretrain_llama_mer.py --config run.yaml --dry-run --ranks 64

Every key of the configuration can be patched: --reptile.epsilon 0.1 --optimizer.lr=2e-4
"""


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into the script's own options and configuration overrides."""
    parser = argparse.ArgumentParser(
        prog="pretrain_llama_mer.py",
        description=_USAGE,
        epilog="configuration keys:\n" + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's YAML")
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="begin anew; an earlier run in output_dir is renamed, not deleted",
    )
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="KIND[,KIND]",
        help="kinds of change that a resumed run may take up from its next batch on: "
        + "; ".join(f"{kind}: {what}" for kind, what in KINDS.items()),
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print plan, layout, learning rates, what a start would do in output_dir, and the "
        "first batch as text; train and write nothing",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="the number of ranks that --dry-run assumes (default: the launcher's, or the fewest "
        "that the layout allows)",
    )
    # The deepspeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_known_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Returns:
        Its exit code: 0 done, 1 failed, 2 refused, 3 stopped on request, 4 to be started again.
    """
    own, overrides = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    setup_logging(rank=0)
    try:
        environment = rank_environment(os.environ)
    except MegatronMerError as error:
        return _report(error, rank=0)
    environment.export(os.environ)
    setup_logging(environment.rank)
    try:
        accept = _accepted(own)
        config = load_config(own.config, overrides)
        ranks = _assumed_ranks(own, config, environment)
        prepared = prepare(config, ranks, own.fresh)
        if own.dry_run:
            return _show(prepared, environment, ranks, own, accept)
    except MegatronMerError as error:
        return _refuse(error, environment)
    return _train(prepared, environment, own.fresh, accept)


def _accepted(own: argparse.Namespace) -> frozenset[str]:
    """The kinds of change that were accepted.

    Raises:
        ConfigError: there is no such kind, or nothing that a change could be accepted in.
    """
    given = [kind.strip() for text in own.accept for kind in text.split(",")]
    problems = [
        Problem("--accept", f"given {kind!r}", ", ".join(KINDS))
        for kind in dict.fromkeys(given)
        if kind not in KINDS
    ]
    if own.fresh and given:
        text = "given with --fresh, which continues nothing that could change"
        problems.append(Problem("--accept", text, remedy="leave one of them out"))
    if problems:
        raise ConfigError(problems)
    return frozenset(given)


def _assumed_ranks(own: argparse.Namespace, config: RunConfig, environment: RankEnvironment) -> int:
    """Number of ranks to prepare for: a dry run can be told another than there are.

    Raises:
        ConfigError: ``--ranks`` is not for this start, or is no number of ranks.
    """
    started = environment.launcher != "python"
    if own.ranks is not None:
        problem = None
        if not own.dry_run:
            text, remedy = "given without --dry-run", "a launcher says how many ranks there are"
            problem = Problem("--ranks", text, remedy=remedy)
        elif own.ranks < 1:
            problem = Problem("--ranks", f"given {own.ranks}", "at least 1")
        elif started and own.ranks != environment.world_size:
            text = f"given {own.ranks}, but the launcher started {environment.world_size}"
            problem = Problem("--ranks", text, remedy="leave it out, or start one plain process")
        if problem is not None:
            raise ConfigError([problem])
        return int(own.ranks)
    if own.dry_run and not started:
        return config.parallel.tp_size * config.parallel.pp_size
    return environment.world_size


def _show(
    prepared: Prepared,
    environment: RankEnvironment,
    ranks: int,
    own: argparse.Namespace,
    accept: frozenset[str],
) -> int:
    """Print what a start would do.

    Raises:
        MegatronMerError: what the start would raise.
    """
    # What only a dry run needs.
    from megatron_mer.training.dry_run import describe_start

    if environment.rank > 0:
        return 0
    width = shutil.get_terminal_size((_PLAIN_WIDTH, 24)).columns
    fewest = own.ranks is None and environment.launcher == "python"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # text of any script, in any terminal
    try:
        for paragraph in describe_start(prepared, ranks, own.fresh, accept, width, fewest):
            print(f"{paragraph}\n", flush=True)
    except BrokenPipeError:
        # The reader (head, less) has seen enough; nothing must be written at the end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _train(
    prepared: Prepared, environment: RankEnvironment, fresh: bool, accept: frozenset[str]
) -> int:
    # torch and DeepSpeed take seconds to import, so a refused configuration does not wait for them.
    from megatron_mer.training.start import run

    # A crash of the interpreter, or NCCL's abort after a time limit, says where it was.
    faulthandler.enable()
    try:
        run(prepared, environment.rank, environment.world_size, fresh, accept)
    except KeyboardInterrupt:
        return 3
    except (ConfigError, LaunchError) as error:
        return _refuse(error, environment)
    except RunStopped as error:
        if environment.rank == 0:
            print(f"{error.status}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except MegatronMerError as error:
        return _report(error, environment.rank)
    except Exception:  # noqa: BLE001
        # The script ends without the interpreter's clean-up, so the trace is printed here.
        traceback.print_exc()
        return 1
    return 0


def _refuse(error: MegatronMerError, environment: RankEnvironment) -> int:
    """Say what is refused: once, if every rank found the same.

    Launchers end all ranks at the first exit, so the others let rank 0 go first. What is left after
    that found something that rank 0 did not (data that one node lacks): one rank a node says it.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if environment.rank > 0:
        time.sleep(_SECONDS_FOR_RANK_0)
    if environment.local_rank == 0:
        return _report(error, environment.rank)
    return error.exit_code


def _report(error: MegatronMerError, rank: int) -> int:
    mark = "" if rank == 0 else f"[rank {rank}] "
    lines = "\n".join(f"  {line}" for line in str(error).splitlines())
    print(f"{mark}error ({type(error).__name__}):\n{lines}", file=sys.stderr, flush=True)
    return error.exit_code

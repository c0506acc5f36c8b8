"""The command line of ``pretrain_llama_mer.py``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence

from megatron_mer.config import describe, load_config
from megatron_mer.errors import ConfigError, MegatronMerError
from megatron_mer.launch.environment import RankEnvironment, rank_environment
from megatron_mer.log import setup_logging
from megatron_mer.training.preflight import Prepared, prepare

_SECONDS_FOR_RANK_0 = 10.0

_USAGE = """\
Continual pre-training of a Llama: one stream of tasks, replay, Reptile.

The same script runs under deepspeed, torchrun, srun and as one plain process:
  deepspeed --num_accelerators 2 pretrain_llama_mer.py --config run.yaml
  torchrun --nproc-per-node 2 pretrain_llama_mer.py --config run.yaml
  srun python pretrain_llama_mer.py --config run.yaml
  python pretrain_llama_mer.py --config run.yaml

A started run resumes from its newest checkpoint, or says that it is done.
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
    # The deepspeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_known_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code (0 done, 2 bad configuration, 1 failed)."""
    own, overrides = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    setup_logging(rank=0)
    try:
        environment = rank_environment(os.environ)
    except MegatronMerError as error:
        return _report(error, rank=0)
    environment.export(os.environ)
    setup_logging(environment.rank)
    try:
        prepared = prepare(load_config(own.config, overrides), environment.world_size)
    except MegatronMerError as error:
        return _refuse(error, environment)
    return _train(prepared, environment, own.fresh)


def _train(prepared: Prepared, environment: RankEnvironment, fresh: bool) -> int:
    # torch and DeepSpeed take seconds to import, so a refused configuration does not wait for them.
    from megatron_mer.training.start import run

    # A launcher that is interrupted ends its ranks with SIGTERM: the run says that it was stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(prepared, environment.rank, environment.world_size, fresh)
    except KeyboardInterrupt:
        return 3
    except ConfigError as error:
        return _refuse(error, environment)
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

"""Starting or resuming a run: from a checked configuration to a trainer at the right batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mer.analysis.tables import matrix_table
from megatron_mer.checkpoint import CheckpointInfo, CheckpointReader, find_latest
from megatron_mer.config import to_yaml
from megatron_mer.continual.reptile import Reptile
from megatron_mer.continual.stream import differences
from megatron_mer.engine.distributed import start_distributed
from megatron_mer.engine.training_engine import TrainingEngine
from megatron_mer.errors import CheckpointError, ConfigError, MegatronMerError, Problem
from megatron_mer.log import get_logger, setup_logging
from megatron_mer.parallel import Layout
from megatron_mer.training.loop import Trainer
from megatron_mer.training.outputs import RunDirectory
from megatron_mer.training.preflight import Prepared
from megatron_mer.training.run_state import RunState
from megatron_mer.training.summary import read_summary

logger = get_logger(__name__)


def run(prepared: Prepared, rank: int, world_size: int, fresh: bool) -> None:
    """Train a prepared run to its end, from its newest checkpoint if it has one.

    Args:
        prepared: the checked run.
        rank: this rank.
        world_size: number of ranks.
        fresh: begin anew; an earlier run's directory is renamed, not deleted.

    Raises:
        MegatronMerError: what went wrong, after ``status.json`` says so too.
    """
    outputs = RunDirectory(prepared.config.output_dir)
    start_distributed()
    _prepare_directory(outputs, rank, fresh)
    setup_logging(rank, outputs.log_file if rank == 0 else None)
    try:
        _run(prepared, outputs, rank, world_size)
    except KeyboardInterrupt:
        _note(outputs, "stopped", "interrupted; start again to resume from the last checkpoint")
        raise
    except ConfigError:
        raise  # a refused resume leaves the run as it was
    except MegatronMerError as error:
        _note(outputs, "failed", f"rank {rank}: {error}")
        raise
    except Exception as error:
        _note(outputs, "failed", f"rank {rank}: {type(error).__name__}: {error}")
        raise
    finally:
        logger.handlers.clear()


def _note(outputs: RunDirectory, status: Any, reason: str) -> None:
    step = int(outputs.read_status().get("step", 0))
    outputs.write_status(status, step, reason)


def _prepare_directory(outputs: RunDirectory, rank: int, fresh: bool) -> None:
    if rank == 0:
        aside = outputs.set_aside() if fresh else None
        outputs.make()
        if aside:
            logger.info("--fresh: the earlier run lies in %s", aside)
    dist.barrier()


def _run(prepared: Prepared, outputs: RunDirectory, rank: int, world_size: int) -> None:
    config = prepared.config
    info = _agreed_checkpoint(outputs, rank)
    state = _state(prepared, info)
    if state.batches >= prepared.plan.total_batches:
        _say_done(outputs, state, rank)
        return
    if rank == 0:
        _record_start(prepared, outputs, state)
    parallel = config.parallel
    layout = Layout(
        tp_size=parallel.tp_size,
        pp_size=parallel.pp_size,
        dp_size=world_size // (parallel.tp_size * parallel.pp_size),
    )
    engine = TrainingEngine(config, layout, rank)
    reptile = Reptile(config.reptile, engine.masters) if config.reptile else None
    if info is not None:
        _load(info, engine, reptile, state, rank)
    Trainer(prepared, engine, reptile, state, outputs, rank, world_size).run()


def _agreed_checkpoint(outputs: RunDirectory, rank: int) -> CheckpointInfo | None:
    """The checkpoint that rank 0 chose, so that no two ranks resume from different ones."""
    chosen: list[str | None] = [None]
    error: list[str | None] = [None]
    if rank == 0:
        try:
            info = find_latest(outputs.checkpoints)
            chosen = [str(info.path) if info else None]
        except CheckpointError as problem:
            error = [str(problem)]
    dist.broadcast_object_list(error, src=0)
    if error[0] is not None:
        raise CheckpointError(error[0])
    dist.broadcast_object_list(chosen, src=0)
    return None if chosen[0] is None else CheckpointInfo.read(Path(chosen[0]))


def _state(prepared: Prepared, info: CheckpointInfo | None) -> RunState:
    """The counters to start from; refuses a configuration that would change what was trained.

    Raises:
        ConfigError: the data order, or the schedule's horizon, differs from the checkpoint's.
    """
    config, plan = prepared.config, prepared.plan
    if info is None:
        return RunState(horizon=config.schedule.total_steps or plan.total_batches)
    state = RunState.from_json(info.run_state)
    problems = [
        Problem("resume", given=difference, remedy="begin anew with --fresh, or undo the change")
        for difference in differences(info.run_state["history"], plan)
    ]
    problems += _horizon_problems(prepared, state)
    if problems:
        raise ConfigError(problems)
    plan.restore_skipped(info.run_state["history"])
    return state


def _horizon_problems(prepared: Prepared, state: RunState) -> list[Problem]:
    """The learning-rate schedule's length is fixed at first launch."""
    schedule = prepared.config.schedule
    if schedule.kind == "constant":
        return []
    wanted = schedule.total_steps
    total = prepared.plan.total_batches
    if wanted is not None and wanted != state.horizon:
        return [
            Problem(
                "schedule.total_steps",
                given=f"{wanted}, but the run began with a schedule of {state.horizon} steps",
                allowed=str(state.horizon),
                remedy="a resumed run keeps its schedule",
            )
        ]
    if wanted is None and total > state.horizon:
        return [
            Problem(
                "stream",
                given=f"now {total} batches, but the learning-rate schedule was fixed at first "
                f"launch to end after {state.horizon}, where the rate is {schedule.min_lr:g}",
                allowed=f"schedule.total_steps: {state.horizon}, which trains what follows at "
                f"{schedule.min_lr:g}",
                remedy="say so explicitly, or begin anew with --fresh",
            )
        ]
    return []


def _load(
    info: CheckpointInfo,
    engine: TrainingEngine,
    reptile: Reptile | None,
    state: RunState,
    rank: int,
) -> None:
    saved = info.run_state["reptile"]
    if (saved is None) != (reptile is None):
        had, has = ("no", "a") if saved is None else ("a", "no")
        raise ConfigError(
            [
                Problem(
                    "reptile",
                    given=f"the checkpoint was written with {had} reptile section, the "
                    f"configuration has {has} one",
                    remedy="a resumed run keeps its Reptile; begin anew with --fresh",
                )
            ]
        )
    engine.load(
        CheckpointReader(info.path, rank=rank),
        state.updates,
        reptile.tensors() if reptile else {},
    )
    if reptile:
        reptile.restore_counters(saved)


def _record_start(prepared: Prepared, outputs: RunDirectory, state: RunState) -> None:
    outputs.cut_to(state.batches)
    outputs.write_text("config.yaml", to_yaml(prepared.config))
    outputs.write_environment()
    outputs.write_json("plan.json", prepared.plan.history())
    outputs.write_status("running", state.updates)
    plan = prepared.plan
    logger.info(
        "%s: %d batches of %d rows x %d tokens, tasks %s; process %d",
        prepared.config.name,
        plan.total_batches,
        prepared.config.batch.global_batch_size,
        prepared.config.model.seq_length,
        ", ".join(entry.task for entry in plan.entries if not entry.trained_before),
        os.getpid(),
    )
    if state.batches:
        logger.info("resuming after batch %d (step %d)", state.batches, state.updates)


def _say_done(outputs: RunDirectory, state: RunState, rank: int) -> None:
    if rank != 0:
        return
    logger.info(
        "the run is done: %d batches, results in %s; --fresh begins anew",
        state.batches,
        outputs.root,
    )
    summary = read_summary(outputs)
    if summary:
        for line in matrix_table(summary).splitlines():
            logger.info("%s", line)

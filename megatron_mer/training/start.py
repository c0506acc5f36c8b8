"""Starting or resuming a run: from a checked configuration to a trainer at the right batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from megatron_mer.checkpoint import (
    CheckpointInfo,
    CheckpointReader,
    candidates,
    damaged,
    first_whole,
)
from megatron_mer.config import RunConfig, to_yaml
from megatron_mer.continual.reptile import Reptile
from megatron_mer.engine.distributed import device, first_failure, start_distributed
from megatron_mer.engine.training_engine import TrainingEngine
from megatron_mer.errors import CheckpointError, ConfigError, MegatronMerError, Problem
from megatron_mer.log import get_logger, setup_logging
from megatron_mer.optim.schedule import end_of_schedule, horizon, lr_at
from megatron_mer.parallel import Layout
from megatron_mer.training.advice import bubble_advice
from megatron_mer.training.bring_back import bring_back
from megatron_mer.training.buffer_folder import set_aside
from megatron_mer.training.copies import refuse_fresh
from megatron_mer.training.dropped import dropped_tasks, without_dropped
from megatron_mer.training.exports import AfterCheckpoint
from megatron_mer.training.from_hf import begin_with_folder, keep_folder
from megatron_mer.training.guard import Guard
from megatron_mer.training.loop import Trainer
from megatron_mer.training.node_checks import check_nodes
from megatron_mer.training.outputs import RunDirectory
from megatron_mer.training.preflight import Prepared
from megatron_mer.training.rank_0 import from_rank_0, raise_everywhere
from megatron_mer.training.resume import changes, incomparable, resumed
from megatron_mer.training.run_buffer import open_buffer
from megatron_mer.training.run_state import RunState
from megatron_mer.training.summary import show_results, write_results
from megatron_mer.training.trackers import Tracker, Trackers
from megatron_mer.training.warm_start import old_run, updates_before

logger = get_logger(__name__)


def run(
    prepared: Prepared,
    rank: int,
    world_size: int,
    fresh: bool,
    accept: Collection[str] = (),
) -> None:
    """Train a prepared run to its end, from its newest checkpoint if it has one.

    Args:
        prepared: the checked run.
        rank: this rank.
        world_size: number of ranks.
        fresh: begin anew; an earlier run's directory is renamed, not deleted.
        accept: kinds of changes to the plan that a resumed run takes up, see `training.resume`.

    Raises:
        ConfigError: the configuration may not continue the run that is there; it stays as it was.
        MegatronMerError: what went wrong, after ``status.json`` says so too.
    """
    launch = prepared.config.launch
    outputs = RunDirectory(prepared.config.output_dir)
    guard = Guard(launch, outputs, rank)
    guard.start(start_distributed(timedelta(seconds=launch.setup_timeout_seconds)))
    try:
        _prepare_directory(prepared.config, outputs, rank, fresh)
        if limits := launch.preflight:
            check_nodes(limits, outputs.root, rank)
        _run(prepared, outputs, rank, world_size, accept, guard)
    except BaseException as error:
        ended = guard.end(error)
        if ended is error:
            raise
        raise ended from error
    finally:
        guard.close()
        outputs.unlock()


def _run(
    prepared: Prepared,
    outputs: RunDirectory,
    rank: int,
    world_size: int,
    accept: Collection[str],
    guard: Guard,
) -> None:
    passed_over = bring_back(prepared, outputs, rank, world_size, accept)
    info = _agreed_checkpoint(outputs, rank, passed_over)
    guard.progress()
    if (found := info) is not None:
        info = from_rank_0(rank, lambda: _without_dropped(found, outputs, passed_over))
    prepared, state = _state(prepared, info, accept)
    setup_logging(rank, outputs.log_file if rank == 0 else None)
    if rank == 0:
        for line in passed_over:
            logger.warning("%s", line)
    if state.batches >= prepared.plan.total_batches and not state.evaluation_due:
        guard.no_more_steps()
        _end(prepared, outputs, state, rank, world_size)
        return
    guard.owner = from_rank_0(rank, lambda: guard.begin(state.updates))
    _train(prepared, outputs, info, state, rank, world_size, accept, guard)


def _without_dropped(
    info: CheckpointInfo, outputs: RunDirectory, said: list[str]
) -> CheckpointInfo:
    """The checkpoint, without what was dropped from the replay buffer after it was written."""
    run_state, tasks = without_dropped(info.run_state, dropped_tasks(outputs.root))
    if tasks:
        named = ", ".join(tasks)
        said.append(f"task {named} was dropped from the replay buffer after {info.path.name} was ")
        said[-1] += "written: no row of it from before is replayed from here on"
    return replace(info, run_state=dict(run_state))


def _prepare_directory(config: RunConfig, outputs: RunDirectory, rank: int, fresh: bool) -> None:
    problem = None
    if rank == 0:
        try:
            if fresh:
                refuse_fresh(config)
            aside = outputs.set_aside() if fresh else None
            outputs.make()
            outputs.lock()
            if aside:
                logger.info("--fresh: the earlier run lies in %s", aside)
            if fresh and (aside := set_aside(config)):
                logger.info("--fresh: its replay buffer lies in %s", aside)
        except MegatronMerError as error:
            problem = error
    raise_everywhere(problem)


def _agreed_checkpoint(
    outputs: RunDirectory, rank: int, passed_over: list[str]
) -> CheckpointInfo | None:
    """The newest checkpoint that is whole to the byte, each rank having read a share of it.

    Args:
        outputs: the run's directory.
        rank: this rank.
        passed_over: gets a line for each newer one that is not whole.
    """
    listed = from_rank_0(rank, lambda: [str(path) for path in candidates(outputs.checkpoints)])
    size = dist.get_world_size()
    path = first_whole(
        map(Path, listed), lambda one: first_failure(damaged(one, rank, size)), passed_over.append
    )
    if path is None:
        return None
    info: CheckpointInfo = from_rank_0(rank, lambda: CheckpointInfo.read(path))
    return info


def _state(
    prepared: Prepared, info: CheckpointInfo | None, accept: Collection[str]
) -> tuple[Prepared, RunState]:
    if info is not None:
        return resumed(prepared, info.run_state, accept)
    if prepared.plan.exhausted:
        raise ConfigError(prepared.plan.exhausted)
    steps = horizon(prepared.config.schedule, prepared.plan.total_batches)
    return prepared, RunState(horizon=steps, updates_before=updates_before(prepared.config))


def _train(
    prepared: Prepared,
    outputs: RunDirectory,
    info: CheckpointInfo | None,
    state: RunState,
    rank: int,
    world_size: int,
    accept: Collection[str],
    guard: Guard,
) -> None:
    config = prepared.config
    layout = Layout.of(config.parallel, world_size)
    engine = TrainingEngine(config, layout, rank)
    guard.progress()
    if info is None and config.checkpoint.init_from is not None:
        _take_weights(engine, config, state, rank)
    elif info is None and config.model.from_hf is not None:
        begin_with_folder(engine, prepared, rank)
    reptile = Reptile(config.reptile, engine.masters) if config.reptile else None
    if info is not None:
        reader = CheckpointReader(info.path, rank=rank, verified=True)
        engine.load(
            reader, state.updates + state.updates_before, reptile.tensors() if reptile else {}
        )
        if reptile:
            reptile.restore_counters(info.run_state["reptile"])
    guard.built(engine.checkpoint_bytes(reptile.tensors() if reptile else {}))
    engine.on_micro_batch(guard.progress)
    dist.barrier()
    if rank == 0:
        _record_start(prepared, outputs, info, state, world_size, accept)
    with contextlib.ExitStack() as stack:
        trackers = _trackers(prepared.config, outputs, state, rank)
        stack.callback(trackers.finish)
        buffer = open_buffer(
            prepared,
            info.run_state if info else None,
            state.batches,
            engine,
            rank,
            outputs.checkpoints,
        )
        if buffer:
            stack.callback(buffer.close)
        trainer = Trainer(
            prepared, engine, reptile, state, outputs, rank, world_size, guard, trackers, buffer
        )
        stack.callback(trainer.close)
        trainer.run()


def _take_weights(engine: TrainingEngine, config: RunConfig, state: RunState, rank: int) -> None:
    """Begin with another run's weights, every byte of them verified. Collective.

    Raises:
        CheckpointError: the checkpoint is not whole, or lacks something.
    """
    text, what = str(config.checkpoint.init_from), config.checkpoint.init_weights
    path = old_run(text).path
    problem = first_failure(damaged(path, rank, dist.get_world_size()))
    if problem is not None:
        raise CheckpointError(f"checkpoint.init_from: given {text}, which is not whole: {problem}")
    reader = CheckpointReader(path, rank=rank, verified=True)
    engine.start_from(reader, "anchor" if what == "anchor" else "master", state.updates_before)
    if rank == 0:
        logger.info("starting with the %s of %s", what.replace("_", " "), text)


def _trackers(config: RunConfig, outputs: RunDirectory, state: RunState, rank: int) -> Trackers:
    """The metric services of rank 0, with all that the files hold. Collective.

    Raises:
        ConfigError: on every rank; one cannot be used as it is configured.
    """
    problem: MegatronMerError | None = None
    trackers = Trackers()
    if rank == 0:
        try:
            trackers = Trackers(_open_trackers(config, outputs, state))
        except MegatronMerError as error:
            problem = error
    raise_everywhere(problem)
    trackers.catch_up(outputs.metrics(), outputs.evaluations())
    return trackers


def _open_trackers(config: RunConfig, outputs: RunDirectory, state: RunState) -> Iterator[Tracker]:
    """Open what the configuration asks for; a service that does not answer is left out."""
    # Each imports a package that a run without it need not have.
    if config.tensorboard is not None:
        from megatron_mer.training.tensorboard_tracker import TensorboardTracker

        folder = Path(config.tensorboard.dir or outputs.root / "tensorboard")
        try:
            yield TensorboardTracker(folder, state.updates)
        except OSError as error:
            given = f"given {folder}, which cannot be written ({error.strerror})"
            raise ConfigError([Problem("tensorboard.dir", given)]) from error
    if config.wandb is not None:
        from megatron_mer.training.wandb_tracker import WandbTracker

        try:
            settings = yaml.safe_load(to_yaml(config))
            yield WandbTracker(config.wandb, outputs.root, config.name, settings)
        except MegatronMerError:
            raise
        except Exception as error:  # noqa: BLE001 - no service may keep a run from training
            logger.warning("wandb is left out: %s: %s", type(error).__name__, error)


def _warn_of_slow_bf16(config: RunConfig) -> None:
    emulated = device().type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512"
    if emulated and config.precision == "bf16":
        logger.warning(
            "precision bf16 on a CPU without AVX-512 is emulated, tens of times slower than fp32: "
            "give --precision fp32 unless bf16 is what you test"
        )


def _record_start(
    prepared: Prepared,
    outputs: RunDirectory,
    info: CheckpointInfo | None,
    state: RunState,
    world_size: int,
    accept: Collection[str],
) -> None:
    _warn_of_slow_bf16(prepared.config)
    if advice := bubble_advice(prepared.config, world_size):
        logger.warning("%s", advice)
    outputs.cut_to(state.batches, evaluated=not state.evaluation_due)
    _describe_run(prepared, outputs, world_size)
    if info is None:
        keep_folder(prepared, outputs.root)
    config, plan = prepared.config, prepared.plan
    logger.info(
        "%s: %d batches of %d rows x %d tokens, tasks %s; process %d",
        config.name,
        plan.total_batches,
        config.batch.global_batch_size,
        config.model.seq_length,
        ", ".join(entry.task for entry in plan.spec.stream if not entry.trained_before),
        os.getpid(),
    )
    last = end_of_schedule(config.schedule, state.horizon)
    if last is not None and plan.total_batches > last:
        rate = lr_at(config.schedule, config.optimizer.lr, state.horizon, last)
        logger.info("the schedule ends after step %d; what follows trains at %g", last, rate)
    if info is not None:
        logger.info("resuming after batch %d (step %d)", state.batches, state.updates)
        for line in changes(prepared, info.run_state, accept):
            logger.info("%s", line)
        for line in incomparable(prepared, info.run_state):
            logger.warning("%s", line)


def _describe_run(prepared: Prepared, outputs: RunDirectory, world_size: int) -> None:
    outputs.write_text("config.yaml", to_yaml(prepared.config))
    outputs.write_environment(world_size, str(device()))
    outputs.write_json("plan.json", prepared.plan.history())


def _end(
    prepared: Prepared, outputs: RunDirectory, state: RunState, rank: int, world_size: int
) -> None:
    """Say that the run is done; write what a start that died after its last checkpoint did not."""
    if rank != 0:
        return
    if outputs.read_status().get("status") != "done":
        outputs.cut_to(state.batches)
        if not (outputs.root / "plan.json").exists():  # of a run that came back from its copies
            _describe_run(prepared, outputs, world_size)
        write_results(outputs, prepared, state)
        outputs.write_status("done", state.updates)
    logger.info("the run is done: %d batches; --fresh begins anew", state.batches)
    show_results(outputs)
    copies = AfterCheckpoint(prepared.config, outputs)
    copies.start()
    copies.finish(None)

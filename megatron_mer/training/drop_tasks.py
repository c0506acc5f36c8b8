"""Tasks leave a replay buffer for good: no checkpoint refers to them, no record has their text.

The order is what makes it safe to be killed: every checkpoint is rewritten first, then the records
are erased. Whatever was done by then is whole, and the same call does the rest.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mer.checkpoint.save import clear_replaced, prepare, rewrite_run_state
from megatron_mer.continual.buffer_content import BufferContent
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.replay_buffer import dataset_key
from megatron_mer.continual.segments import ranges_of
from megatron_mer.data.record_scan import scan
from megatron_mer.data.record_store import RecordStore
from megatron_mer.errors import ConfigError, DataError, MegatronMerError, Problem
from megatron_mer.training.buffer_folder import shared_with
from megatron_mer.training.dropped import NAME, dropped_tasks
from megatron_mer.training.kept_buffer import BufferOfRun, KeptCheckpoint, check_tasks
from megatron_mer.training.lock import RunLock

OPTION = "--drop-task"


@dataclass(frozen=True)
class Rewrite:
    """A checkpoint that refers to the tasks, and what becomes of it."""

    checkpoint: KeptCheckpoint
    plan: Plan
    """That replays nothing of them from here on."""
    content: BufferContent
    """What its buffer holds without them."""
    dropped_rows: int

    @property
    def run_state(self) -> dict[str, Any]:
        """The new one."""
        old = self.checkpoint.info.run_state
        buffer = {
            **old["buffer"],
            "tail": self.content.tail,
            "segments": ranges_of(self.content.segments),
        }
        return {**old, "history": self.plan.history(), "buffer": buffer}


@dataclass(frozen=True)
class Erasure:
    """Records that have to go, by position."""

    of_tasks: NDArray[np.int64]
    untold: NDArray[np.int64]
    """Torn or damaged ones that may be of the tasks; nobody can read them."""
    needed: NDArray[np.int64]
    """Those of the untold that a checkpoint refers to."""


@dataclass(frozen=True)
class Drop:
    """What dropping tasks does, or did."""

    rewrites: list[Rewrite]
    erasure: Erasure
    notes: list[str] = field(default_factory=list)
    """What the user must know of what else is there."""
    untouched: list[str] = field(default_factory=list)
    """What holds text of the tasks, or refers to them, and stays as it is."""


def drop_tasks(
    run: BufferOfRun, checkpoint: KeptCheckpoint, tasks: Sequence[str], do: bool
) -> Drop:
    """Take all rows of some tasks out of a run's buffer.

    Args:
        run: the run.
        checkpoint: one whose buffer it is.
        tasks: their names.
        do: do it; else only find out what it would do.

    Raises:
        ConfigError: a run is alive there, there is no such task, or one is in training at a kept
            checkpoint.
        DataError: a run could not go on without them, or the records are not this run's.
        CheckpointError: a checkpoint cannot be rewritten.
        OSError: the disk refuses.
    """
    about, store = run.store(checkpoint)
    if (other := shared_with(store.directory, about, run.root)) is not None:
        given = f"given {run.root}, whose buffer {store.directory} is that of the run in {other}"
        raise ConfigError([Problem(OPTION, given, remedy="drop the task from that run")])
    if not do:
        return _look(run, store, about.id, tasks)
    with _alone(run.root, "output_dir"), _alone(store.directory, "replay.dir"):
        prepare(run.outputs.checkpoints)
        clear_replaced(run.outputs.checkpoints)
        found = _look(run, store, about.id, tasks)
        marked = dict.fromkeys([*dropped_tasks(run.root), *tasks])
        run.outputs.write_json(NAME, {"tasks": list(marked)})
        for one in found.rewrites:
            rewrite_run_state(one.checkpoint.info.path, one.run_state)
        store.erase(np.concatenate([found.erasure.of_tasks, found.erasure.untold]))
    return found


@contextlib.contextmanager
def _alone(folder: Path, key: str) -> Iterator[None]:
    lock = RunLock(folder, key=key)
    try:
        lock.take()
    except ConfigError as error:
        raise ConfigError(f"{OPTION}: a task leaves only what no run uses: {error}") from error
    try:
        yield
    finally:
        lock.release()


def _look(run: BufferOfRun, store: RecordStore, id: str, tasks: Sequence[str]) -> Drop:
    kept = run.kept()
    plans = [one.plan for one in kept]
    with contextlib.suppress(OSError, ValueError, MegatronMerError):  # A note of the last start.
        plans.append(Plan.from_history(json.loads((run.root / "plan.json").read_text())))
    check_tasks(OPTION, tasks, [one.task for plan in plans for one in plan.entries])
    refuse_in_training(kept, tasks)
    rewrites, contents, notes = [], [], [f"not whole, left as it is: {t}" for t in run.not_whole()]
    for one in kept:
        if one.saved is None:
            notes.append(f"{one.name} replays from no buffer: left as it is")
            continue
        rewrite = rewrite_of(one, tasks)
        if one.saved["id"] == id:
            contents.append(rewrite.content)
        if rewrite.dropped_rows:
            rewrites.append(rewrite)
        notes += _notes(rewrite, tasks)
    owners = _owners(plans)
    for name, theirs in owners.items():
        if theirs & set(tasks) and (others := sorted(theirs - set(tasks))):
            notes.append(
                f"dataset {name!r} is of task {', '.join(others)} too: what was trained of it "
                "there stays"
            )
    names = [name for name, theirs in owners.items() if theirs & set(tasks)]
    return Drop(
        rewrites, erasure(store, names, contents), notes, list(_untouched(run, store, names))
    )


def refuse_in_training(kept: Sequence[KeptCheckpoint], tasks: Collection[str]) -> None:
    """Refuse tasks that a run which resumes from one of the checkpoints goes on with.

    Raises:
        ConfigError: names tasks and checkpoints.
    """
    problems = []
    for one in kept:
        if not 0 < one.batch < one.plan.total_batches:
            continue
        before, now = one.plan.entry_of(one.batch - 1), one.plan.entry_of(one.batch)
        if now.task in tasks and before.index == now.index:
            given = f"given {now.task!r}, which is in training at {one.info.path}"
            remedy = "let the run come to its end and remove this checkpoint, or remove it now"
            problems.append(Problem(OPTION, given, "a task that is not in training", remedy))
    if problems:
        raise ConfigError(problems)


def rewrite_of(one: KeptCheckpoint, tasks: Collection[str]) -> Rewrite:
    """What becomes of a checkpoint; without a row of the tasks it stays as it is.

    Raises:
        DataError: its next batch would find nothing to replay.
    """
    content = one.content()
    rows = int(content.of_tasks(set(tasks)).sum())
    if not rows:
        return Rewrite(one, one.plan, content, 0)
    plan = Plan.without(one.info.run_state["history"], tasks, one.batch)
    rewrite = Rewrite(one, plan, one.content(plan), rows)
    if one.batch < plan.total_batches:
        try:
            plan.rows(one.batch)
        except DataError as error:
            raise DataError(
                f"{one.info.path} without {', '.join(tasks)}: {error}. Remove this checkpoint, or "
                "begin anew"
            ) from error
    return rewrite


def _notes(rewrite: Rewrite, tasks: Collection[str]) -> Iterator[str]:
    one, plan = rewrite.checkpoint, rewrite.plan
    for entry in plan.entries:
        if entry.task in tasks and not entry.trained_before and entry.first_batch >= one.batch:
            yield (
                f"{one.name} still trains {entry.task} from batch {entry.first_batch} on: take it "
                "out of the stream (--accept stream) before a run resumes from there"
            )
    if plan.total_batches != one.plan.total_batches:
        yield (
            f"{one.name}: with less to replay the run has {plan.total_batches} batches instead of "
            f"{one.plan.total_batches}"
        )


def _owners(plans: Sequence[Plan]) -> dict[str, set[str]]:
    """The tasks that each dataset belongs to, in any of the plans."""
    owners: dict[str, set[str]] = {}
    for plan in plans:
        for segment in plan.segments:
            for entry in segment.spec.stream:
                for one in entry.datasets:
                    owners.setdefault(one.name, set()).add(entry.task)
    return owners


def erasure(
    store: RecordStore, datasets: Collection[str], contents: Sequence[BufferContent]
) -> Erasure:
    """Which records have to go: all of some datasets but those that a content needs.

    Every segment file is read whole: rows that were displaced, copies of those that moved, and what
    no checkpoint knows lie there too.

    Args:
        store: the records.
        datasets: names.
        contents: what kept checkpoints need, without the tasks.

    Raises:
        DataError: nothing that is needed can be told: the records are not this buffer's.
        OSError: a file cannot be read.
    """
    keys = [dataset_key(name) for name in datasets]
    stays: set[tuple[int, ...]] = set()
    needed = np.unique(np.concatenate([one.position for one in contents] or [_NONE]))
    for one in contents:
        rows = np.isin(one.identity[:, 1], keys)
        columns = (one.position[rows], *one.identity[rows].T)
        stays.update(zip(*(column.tolist() for column in columns), strict=True))
    gone, untold, told = [_NONE], [_NONE], [_NONE]
    for segment in store.segments():
        for found in scan(store, segment):
            told.append(found.positions[found.told])
            untold.append(found.positions[~found.told])
            ours = np.flatnonzero(found.told & np.isin(found.identity[:, 1], keys))
            columns = (found.positions[ours], *found.identity[ours].T)
            records = zip(*(column.tolist() for column in columns), strict=True)
            gone.append(np.array([row[0] for row in records if row not in stays], dtype=np.int64))
    damaged = np.intersect1d(np.concatenate(untold), needed)
    if len(damaged) and not len(np.intersect1d(np.concatenate(told), needed)):
        raise DataError(
            f"{store.directory}: nothing that checkpoints need can be read as a record of this "
            "buffer; nothing was changed. Is its buffer.json that of these files?"
        )
    return Erasure(np.concatenate(gone), np.concatenate(untold), damaged)


_NONE: NDArray[np.int64] = np.empty(0, dtype=np.int64)


def _untouched(run: BufferOfRun, store: RecordStore, names: Collection[str]) -> Iterator[str]:
    yield f"{run.root / 'plan.json'}: it tells of the run up to its last start; the next writes it"
    prefixes: Mapping[str, str] = {
        one.name: one.prefix for task in run.config.stream for one in task.train
    }
    folders = {str(one.saved["dir"]) for one in run.kept() if one.saved is not None}
    for folder in sorted(folders):
        earlier = Path(folder)
        if earlier.resolve() != store.directory.resolve() and any(earlier.glob("*.rec")):
            yield f"{folder}: an earlier folder of the run's buffer, with its records; remove it"
    for name in names:
        yield f"dataset {name!r}: {prefixes.get(name, 'where it lies')}"
    if place := getattr(run.config.checkpoint, "copy_to", None):
        yield f"copies of checkpoints in {place}: a run that goes on from one drops the tasks anew"
    yield "snapshots of the disk, and old blocks where a file system copies on write"
    for path in sorted(run.root.parent.glob(f"{run.root.name}.before_*")):
        yield f"an earlier run in {path}, perhaps with a buffer of its own"

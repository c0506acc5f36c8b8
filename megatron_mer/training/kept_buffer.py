"""A run's replay buffer as its checkpoints need it, for tools that look at it from outside."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mer.checkpoint.find import CheckpointInfo, broken, candidates, first_whole
from megatron_mer.checkpoint.layout import REPLACED, parse_step, step_directories
from megatron_mer.config import RunConfig, load_config
from megatron_mer.continual.buffer_content import BufferContent
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.segments import batches_of
from megatron_mer.data.record_store import RecordStore
from megatron_mer.data.tokenizers import Tokenizer
from megatron_mer.errors import ConfigError, DataError, Problem
from megatron_mer.training.buffer_folder import ABOUT, About
from megatron_mer.training.dry_run import document_texts
from megatron_mer.training.outputs import RunDirectory

_KEY = "RUN"


@dataclass(frozen=True)
class KeptCheckpoint:
    """A whole checkpoint of a run with a buffer."""

    info: CheckpointInfo

    @property
    def name(self) -> str:
        """Of its directory."""
        return self.info.path.name

    @property
    def batch(self) -> int:
        """Batches that the run had behind it."""
        return int(self.info.run_state["batches"])

    @property
    def saved(self) -> Mapping[str, Any] | None:
        """What it says of the buffer; None: the run replayed from none."""
        return self.info.run_state.get("buffer")

    @cached_property
    def plan(self) -> Plan:
        """The run's plan as it was then."""
        return Plan.from_history(self.info.run_state["history"])

    def content(self, plan: Plan | None = None) -> BufferContent:
        """What the buffer held then, or what it would hold by another plan."""
        records = int((self.saved or {})["segment_records"])
        return BufferContent.at(plan or self.plan, records, self.batch)

    def missing_datasets(self, content: BufferContent) -> dict[str, str]:
        """Datasets that its content could be built from again and that are not there: prefixes."""
        prefixes = self.info.run_state["settings"].get("prefixes", {})
        names = [content.plan.datasets[at] for at in np.unique(content.dataset).tolist()]
        found = {name: str(prefixes.get(name, name)) for name in names}
        return {
            name: prefix
            for name, prefix in found.items()
            if not all(os.path.exists(f"{prefix}{suffix}") for suffix in (".bin", ".idx"))
        }


class BufferOfRun:
    """A run's checkpoints and its buffer.

    Args:
        root: the run's output_dir, wherever it lies now.

    Raises:
        ConfigError: there is no run, or none with a checkpoint.
        CheckpointError: no checkpoint is whole.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.outputs = RunDirectory(root)
        if not step_directories(self.outputs.checkpoints):
            here = "which holds no checkpoint" if root.exists() else "which does not exist"
            allowed = "the output_dir of a run, or RUN@STEP"
            raise ConfigError([Problem(_KEY, f"given {root}, {here}", allowed)])
        self.config: RunConfig = load_config(root / "config.yaml")

    @classmethod
    def of(cls, text: str) -> tuple[BufferOfRun, KeptCheckpoint]:
        """The run and the checkpoint that RUN or RUN@STEP names.

        Raises:
            ConfigError, CheckpointError: as for a run, or it has no such step.
        """
        place, _, step = text.rpartition("@")
        if not place or not step.isdecimal():
            run = cls(Path(text))
            path = first_whole(candidates(run.outputs.checkpoints), broken)
        else:
            run = cls(Path(place))
            there = step_directories(run.outputs.checkpoints)
            path = next((one for one in there if parse_step(one.name) == int(step)), None)
            if path is None:
                known = ", ".join(str(parse_step(one.name)) for one in there[::-1])
                raise ConfigError([Problem(_KEY, f"given step {step} of {place}", known)])
        assert path is not None  # There are checkpoints.
        return run, KeptCheckpoint(CheckpointInfo.read(path))

    def kept(self) -> list[KeptCheckpoint]:
        """The whole checkpoints, oldest first."""
        there = [one for one in step_directories(self.outputs.checkpoints) if not _is_copy(one)]
        whole = [one for one in there[::-1] if broken(one) is None]
        return [KeptCheckpoint(CheckpointInfo.read(one)) for one in whole]

    def not_whole(self) -> list[str]:
        """Why each of the other checkpoints is not whole."""
        there = [one for one in step_directories(self.outputs.checkpoints) if not _is_copy(one)]
        return [problem for one in there[::-1] if (problem := broken(one)) is not None]

    def store(self, checkpoint: KeptCheckpoint) -> tuple[About, RecordStore]:
        """The records that a checkpoint needs.

        Raises:
            ConfigError: the run replayed from no buffer.
            DataError: the buffer is not where the run has it.
        """
        saved = checkpoint.saved
        if saved is None:
            given = f"given {self.root}, whose {checkpoint.name} replays from no buffer"
            raise ConfigError([Problem(_KEY, given, "a run with replay.source: buffer")])
        dir = self.config.replay.dir if self.config.replay else None
        places = [Path(dir) if dir else self.root / "buffer", Path(saved["dir"])]
        for place in places:
            about = About.read(place)
            if about is not None and about.id == saved["id"]:
                return about, RecordStore(place, about.record_format(), about.segment_records)
        raise DataError(
            f"the buffer of {checkpoint.info.path} is not there: expected {places[0] / ABOUT} with "
            f"the id {saved['id']} (the run wrote it to {places[1]}). A start of the run builds it "
            "again from its datasets where these are there"
        )

    def disk(self, checkpoint: KeptCheckpoint, store: RecordStore) -> dict[str, int]:
        """Bytes of the segment files, by who needs them; see `docs/replay_buffer.md`."""
        own = _segments(checkpoint)
        others: set[int] = set()
        tail = 0
        for one in self.kept():
            if one.saved is not None and one.saved["id"] == (checkpoint.saved or {})["id"]:
                others |= _segments(one) - own
                tail = max(tail, int(one.saved["tail"]))
        sizes = dict(_sizes(store))
        first_open = tail // store.segment_records
        after = {one for one in sizes if one >= first_open} - own - others
        capacity = checkpoint.plan.num_slots * store.record_bytes
        by_others = sum(sizes.get(one, 0) for one in others)
        return {
            "record_bytes": store.record_bytes,
            "files": len(sizes),
            "bytes": sum(sizes.values()),
            "capacity_bytes": capacity,
            "checkpoint_bytes": sum(sizes.get(one, 0) for one in own),
            "other_checkpoints_bytes": by_others,
            "after_bytes": sum(sizes[one] for one in after),
            "stale_bytes": sum(
                size for one, size in sizes.items() if one not in own | others | after
            ),
            "most_bytes": 2 * capacity + by_others,
        }


def _is_copy(path: Path) -> bool:
    """Whether a killed rewrite left the old state of a checkpoint that is there."""
    name = path.name.removesuffix(REPLACED)
    return name != path.name and path.with_name(name).exists()


def _segments(checkpoint: KeptCheckpoint) -> set[int]:
    return set(batches_of(checkpoint.saved["segments"])) if checkpoint.saved else set()


def _sizes(store: RecordStore) -> Iterator[tuple[int, int]]:
    for segment in store.segments():
        with contextlib.suppress(FileNotFoundError):  # A live run removed it.
            yield segment, store.path(segment).stat().st_blocks * 512


def problems(content: BufferContent, store: RecordStore, sizes: bool = False) -> list[str]:
    """What is wrong with the records of a content.

    Args:
        content: what must be there.
        store: where.
        sizes: look at the sizes of the files only, not inside.
    """
    if not sizes:
        return [text for _, text in store.check(content.position, content.identity)]
    found = []
    segments = content.position // store.segment_records
    for segment in content.segments:
        path = store.path(segment)
        last = int(content.position[segments == segment].max()) % store.segment_records
        least = (last + 1) * store.record_bytes
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            found.append(f"{path}: expected at least {least} bytes, found no file")
            continue
        if size < least:
            found.append(f"{path}: expected at least {least} bytes, found {size}")
    return found


def samples(
    content: BufferContent,
    store: RecordStore,
    count: int,
    tasks: Sequence[str],
    seed: int,
    tokenizer: Tokenizer,
) -> list[dict[str, Any]]:
    """Some of the rows as text, drawn by a key, in the order of the log.

    Args:
        content: what is drawn from.
        store: its records.
        count: at most so many.
        tasks: rows of these only; none: all.
        seed: of the draw.
        tokenizer: the run's.

    Raises:
        ConfigError: the plan has no such task.
        DataError: a record cannot be had, or the tokenizer is another one.
    """
    check_tasks("--task", tasks, [one.task for one in content.plan.entries])
    rows = np.arange(len(content.position))
    if tasks:
        rows = np.flatnonzero(content.of_tasks(set(tasks)))
    drawn = sorted(random.Random(seed).sample(rows.tolist(), min(count, len(rows))))
    tokens, _ = store.read(content.position[drawn], content.identity[drawn])
    return [
        {
            "record": int(content.position[row]),
            "task": content.plan.entries[content.entry[row]].task,
            "dataset": content.plan.datasets[content.dataset[row]],
            "sample": int(content.sample[row]),
            "age": int(content.age[row]),
            "text": document_texts(ids, tokenizer),
        }
        for row, ids in zip(drawn, tokens, strict=True)
    ]


def check_tasks(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Refuse tasks that a run does not have.

    Raises:
        ConfigError: names those that it has.
    """
    found = [
        Problem(option, f"given {task!r}", ", ".join(dict.fromkeys(known)))
        for task in given
        if task not in known
    ]
    if found:
        raise ConfigError(found)

"""What a plan is made from: a resolved stream as plain values, which JSON can hold."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from typing import Any

from megatron_mer.errors import Problem

MAX_SEED = 2**64 - 1
MAX_DENOMINATOR = 10**18
MAX_CAPACITY = 2**31 - 1


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset of one entry."""

    name: str
    """Keys its permutation, cursor and ledger; the same name in two entries is the same dataset."""
    num_samples: int
    """At least 1."""
    weight: float | None = None
    """Above 0; without one the entry's datasets share by their numbers of samples."""
    max_epochs: float | None = None
    """How often it may have been gone through by the end of the entry; None: as the entry says."""

    def to_json(self) -> dict[str, Any]:
        """The values as JSON types."""
        return {**vars(self)}


@dataclass(frozen=True)
class EntrySpec:
    """An entry of the stream; `steps` or `fresh_tokens`, or neither if `trained_before`."""

    task: str
    datasets: tuple[DatasetSpec, ...]
    steps: int | None = None
    """Batches."""
    fresh_tokens: int | None = None
    """Tokens that its fresh rows hold together, rounded up to whole batches."""
    max_epochs: float = 1.0
    """How often a dataset may have been gone through by the end of this entry."""
    trained_before: bool = False
    """It trains no step, and its samples are in the replay pool from batch 0."""

    def sample_limit(self, dataset: DatasetSpec) -> int:
        """Samples of a dataset within `max_epochs`, by the decimal number as it was written."""
        return math.floor(Fraction(str(self.epoch_limit(dataset))) * dataset.num_samples)

    def epoch_limit(self, dataset: DatasetSpec) -> float:
        """`max_epochs` of a dataset: its own or the entry's."""
        return self.max_epochs if dataset.max_epochs is None else dataset.max_epochs

    def to_json(self) -> dict[str, Any]:
        """The values as JSON types."""
        return {**vars(self), "datasets": [one.to_json() for one in self.datasets]}


@dataclass(frozen=True)
class ReplaySpec:
    """Where replay rows come from, and how many there are."""

    alpha: Decimal
    """Share of the global batch, 0 <= alpha < 1, exact."""
    source: str = "stream"
    policy: str = "uniform"
    """uniform: each row in the pool alike; equal: each task in it; weights: tasks by `weights`."""
    include_current_task: bool = False
    weights: Mapping[str, float] | None = None
    """Share of each task among the replay rows, relative to the others in the pool; 0: never."""
    capacity: int | Mapping[str, int] | None = None
    """Rows that a buffer holds: in all, or of each task. With the source buffer only."""

    def task_weights(self, tasks: Sequence[str]) -> list[float]:
        """The weight of each task, or nothing if tasks do not matter.

        Args:
            tasks: names; one that the policy does not know is never replayed.
        """
        if self.policy == "uniform":
            return []
        if self.weights is None:
            return [1.0] * len(tasks)
        return [self.weights.get(task, 0.0) for task in tasks]

    def to_json(self) -> dict[str, Any]:
        """The values as JSON types."""
        weights = None if self.weights is None else dict(self.weights)
        values = {**vars(self), "alpha": str(self.alpha), "weights": weights}
        if self.capacity is None:
            del values["capacity"]
        elif not isinstance(self.capacity, int):
            values["capacity"] = dict(self.capacity)
        return values


@dataclass(frozen=True)
class PlanSpec:
    """Everything that decides every row of a run."""

    seed: int
    global_batch_size: int
    """Rows a batch."""
    seq_length: int
    """Tokens a row."""
    replay: ReplaySpec | None
    stream: tuple[EntrySpec, ...]

    @cached_property
    def datasets(self) -> dict[str, int]:
        """Samples of each dataset by its name, in the order of first mention."""
        return {one.name: one.num_samples for entry in self.stream for one in entry.datasets}

    def to_json(self) -> dict[str, Any]:
        """The values as JSON types; `from_json` gives an equal specification back."""
        # Written out, since dataclasses.asdict takes seconds for thousands of datasets.
        return {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "seq_length": self.seq_length,
            "replay": None if self.replay is None else self.replay.to_json(),
            "stream": [entry.to_json() for entry in self.stream],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PlanSpec:
        """Reads what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError, ArithmeticError: it is something else.
        """
        replay = values["replay"]
        return cls(
            seed=values["seed"],
            global_batch_size=values["global_batch_size"],
            seq_length=values["seq_length"],
            replay=ReplaySpec(**{**replay, "alpha": Decimal(replay["alpha"])}) if replay else None,
            stream=tuple(
                EntrySpec(
                    **{**entry, "datasets": tuple(DatasetSpec(**one) for one in entry["datasets"])}
                )
                for entry in values["stream"]
            ),
        )


def problems_of(spec: PlanSpec) -> list[Problem]:
    """Everything in a specification that no plan can be made from, by the paths of the YAML."""
    problems = list(_numbers(spec))
    if spec.replay is not None:
        problems += _replay(spec.replay, [entry.task for entry in spec.stream])
    if all(entry.trained_before for entry in spec.stream):
        problems.append(
            Problem("stream", "no entry trains a step", "at least one without trained_before")
        )
    sizes = spec.datasets
    for index, entry in enumerate(spec.stream):
        path = f"stream.{index}"
        problems += _length(entry, path)
        problems += _datasets(entry, path)
        problems += _weights(entry, path)
        problems += [
            Problem(
                f"{path}.train.{place}",
                f"dataset {one.name!r} has {one.num_samples} samples here and "
                f"{sizes[one.name]} elsewhere in the stream",
                "one number, since one name is one dataset",
            )
            for place, one in enumerate(entry.datasets)
            if one.num_samples != sizes[one.name]
        ]
    return problems


def shortened(problems: list[Problem], most: int = 20) -> list[Problem]:
    """The first ones, and how many more there are: a task may have thousands of datasets."""
    if len(problems) <= most:
        return problems
    more = f"{len(problems) - most} more datasets that would not last"
    remedy = "tools/inspect_stream.py --summary lists what does not last, and what would fit"
    return [*problems[:most], Problem("stream", more, remedy=remedy)]


def _numbers(spec: PlanSpec) -> Iterator[Problem]:
    if not 0 <= spec.seed <= MAX_SEED:
        yield Problem("seed", f"{spec.seed}", "0 to 2^64 - 1")
    if not 1 <= spec.global_batch_size <= 2**62:
        yield Problem("batch.global_batch_size", f"{spec.global_batch_size}", "1 to 2^62")
    if spec.seq_length < 1:
        yield Problem("model.seq_length", f"{spec.seq_length}", "at least 1")


def _replay(replay: ReplaySpec, tasks: Sequence[str]) -> Iterator[Problem]:
    alpha = replay.alpha
    if not (alpha.is_finite() and 0 <= alpha < 1):
        yield Problem("replay.alpha", f"{alpha}", "0 <= alpha < 1")
    elif alpha.as_integer_ratio()[1] > MAX_DENOMINATOR:
        yield Problem("replay.alpha", f"{alpha}", "at most 18 decimal places")
    if replay.source not in ("stream", "buffer"):
        yield Problem("replay.source", replay.source, "stream or buffer")
    yield from _capacity(replay, tasks)
    if replay.policy not in ("uniform", "equal", "weights"):
        yield Problem("replay.policy", replay.policy, "uniform, equal or weights")
    if (replay.policy == "weights") != (replay.weights is not None):
        given = f"{'no ' if replay.weights is None else ''}weights with policy {replay.policy}"
        yield Problem("replay.weights", given, "weights for the policy weights, and only for it")
    if replay.weights is not None:
        yield from _replay_weights(replay.weights, tasks)


def _capacity(replay: ReplaySpec, tasks: Sequence[str]) -> Iterator[Problem]:
    path, given = "replay.capacity_samples", replay.capacity
    if (given is None) != (replay.source == "stream"):
        text = "none" if given is None else f"{given}"
        yield Problem(path, f"{text} with source {replay.source}", "one with source buffer only")
        return
    if given is None:
        return
    by_task = {} if isinstance(given, int) else dict(given)
    sizes = [given] if isinstance(given, int) else list(by_task.values())
    if any(size < 1 for size in sizes) or sum(sizes) > MAX_CAPACITY:
        yield Problem(path, f"{given}", f"1 or more a task, at most {MAX_CAPACITY} in all")
    if isinstance(given, int):
        if replay.policy != "uniform":
            text = f"{given} with policy {replay.policy}, which takes rows by task"
            yield Problem(path, text, "a capacity for each task, as {en: 1000, fr: 1000}")
        return
    for task in dict.fromkeys([*tasks, *by_task]):
        if task not in by_task:
            yield Problem(path, f"none for task {task!r}", "one for each task of the stream")
        elif task not in tasks:
            allowed = f"the tasks of the stream: {', '.join(dict.fromkeys(tasks))}"
            yield Problem(f"{path}.{task}", "no task of the stream", allowed)


def _replay_weights(weights: Mapping[str, float], tasks: Sequence[str]) -> Iterator[Problem]:
    for task in dict.fromkeys([*tasks, *weights]):
        if task not in weights:
            yield Problem("replay.weights", f"none for task {task!r}", "one for each task")
        elif task not in tasks:
            allowed = f"the tasks of the stream: {', '.join(dict.fromkeys(tasks))}"
            yield Problem(f"replay.weights.{task}", "no task of the stream", allowed)
        elif not (math.isfinite(weights[task]) and weights[task] >= 0):
            yield Problem(
                f"replay.weights.{task}", f"{weights[task]}", "a finite number, 0 or more"
            )
    if not any(weight > 0 for weight in weights.values()):
        yield Problem("replay.weights", "every task has weight 0", "at least one above 0")


def _length(entry: EntrySpec, path: str) -> Iterator[Problem]:
    lengths = {"steps": entry.steps, "fresh_tokens": entry.fresh_tokens}
    given = [f"{key}: {value}" for key, value in lengths.items() if value is not None]
    if len(given) != (0 if entry.trained_before else 1):
        allowed = "exactly one of steps and fresh_tokens"
        if entry.trained_before:
            allowed = "neither steps nor fresh_tokens for an entry trained before"
        yield Problem(path, ", ".join(given) or "no length", allowed)
    for key, value in lengths.items():
        if value is not None and not 1 <= value <= 2**62:
            yield Problem(f"{path}.{key}", f"{value}", "1 to 2^62")
    if not _is_positive(entry.max_epochs):
        yield Problem(f"{path}.max_epochs", f"{entry.max_epochs}", "a finite number above 0")


def _datasets(entry: EntrySpec, path: str) -> Iterator[Problem]:
    if not entry.datasets:
        yield Problem(f"{path}.train", "no dataset", "at least one")
    for name, times in Counter(one.name for one in entry.datasets).items():
        if times > 1:
            yield Problem(
                f"{path}.train",
                f"dataset {name!r} {times} times",
                "each dataset once in an entry",
                "give different data different names, or one dataset one weight",
            )
    for place, one in enumerate(entry.datasets):
        if not 1 <= one.num_samples <= 2**62:
            yield Problem(
                f"{path}.train.{place}",
                f"dataset {one.name!r} has {one.num_samples} samples",
                "1 to 2^62",
            )
        if one.max_epochs is not None and not _is_positive(one.max_epochs):
            yield Problem(
                f"{path}.train.{place}.max_epochs", f"{one.max_epochs}", "a finite number above 0"
            )


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _weights(entry: EntrySpec, path: str) -> Iterator[Problem]:
    weights = [one.weight for one in entry.datasets]
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        yield Problem(
            f"{path}.train",
            f"{len(given)} of {len(weights)} datasets with a weight",
            "a weight for all datasets of an entry, or for none",
        )
    for place, weight in enumerate(weights):
        if weight is not None and not _is_positive(weight):
            yield Problem(f"{path}.train.{place}.weight", f"{weight}", "a finite number above 0")

"""What two runs are compared by: every number of every step, with its place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_mer.checkpoint import CheckpointInfo
from megatron_mer.training.outputs import read_lines

# No two runs have these in common.
_MEASURED = frozenset(
    (
        "step_seconds",
        "tokens_per_second",
        "mfu",
        "data_wait_seconds",
        "replay_wait_seconds",
        "memory_gib",
        "seconds",
    )
)
_IN_STATE = ("batches", "updates", "horizon", "skipped_in_a_row", "history", "reptile")

ROWS, LOSSES, NORMS, REPTILE, HELD_OUT, OTHER, STATE = (
    "rows of batches",
    "losses",
    "gradient norms",
    "Reptile figures",
    "held-out losses",
    "other figures of steps",
    "counters and plan",
)
GROUPS = (ROWS, LOSSES, NORMS, REPTILE, HELD_OUT, OTHER, STATE)

LOOSER, LOOSEST = 100, 0.1
"""At another layout gradient norms behind the first step, and Reptile's figures, may differ by so
many times the tolerance, by this share at most. The first step begins from the same weights; from
there on Adam makes more of what rounding left, and norms show it long before losses do: 8e-6 and
5e-9 with the quickstart in fp32."""


@dataclass(frozen=True, order=True)
class Place:
    """Where a value stands; sorts by time."""

    batch: int
    """Global batch, from 0; -1: before the first."""
    part: int
    """Its rows, then its figures, then the evaluation after it."""
    number: int
    """Of a row; elsewhere of the group."""
    name: str = field(default="")
    """`grad_norm`, `losses.en`."""
    group: str = field(default="", compare=False)
    """One of `GROUPS`."""
    text: str = field(default="", compare=False)
    """The place in words."""


@dataclass(frozen=True)
class Difference:
    """Two values that should be one."""

    place: str
    mine: Any
    other: Any
    group: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {_shown(self.mine)} against {_shown(self.other)}"


def _shown(value: Any) -> str:
    return "nothing" if value is _ABSENT else str(value)


_ABSENT = object()

Figures = Mapping[Place, Any]


def figures(run: Path, records: Path, lost: bool = False) -> dict[Place, Any]:
    """Every value of a run: its rows, then what its files say of them.

    Args:
        run: its output_dir.
        records: what its ranks wrote down of their batches.
        lost: also what a resume moved aside.
    """
    found: dict[Place, Any] = dict(rows(records))
    for end in ("jsonl", "lost.jsonl") if lost else ("jsonl",):
        for line in read_lines(run / f"metrics.{end}"):
            found.update(_metrics(line))
        for line in read_lines(run / f"evaluations.{end}"):
            found.update(_evaluation(line))
    return found


def state(info: CheckpointInfo) -> dict[Place, Any]:
    """Counters, plan and Reptile's counters of a checkpoint."""
    batches = int(info.run_state["batches"])
    leaves = [leaf for key in _IN_STATE for leaf in _leaves(info.run_state.get(key), key)]
    return {
        Place(batches, 3, 0, name, STATE, f"the last checkpoint, {name}"): value
        for name, value in leaves
    }


def rows(records: Path) -> Iterator[tuple[Place, str]]:
    """What stood in every row of every batch that was drawn, by the ranks that drew it.

    Ranks that share a row (tensor-parallel ones, first and last stage) have to agree.
    """
    drawn: dict[tuple[int, int], dict[str, list[str]]] = {}
    for path in sorted(records.glob("rank_*.jsonl")):
        for line in read_lines(path):
            for place, (kind, dataset, sample, digest) in enumerate(line["rows"], line["first"]):
                text = f"{kind} sample {sample} of {dataset} (content {digest})"
                ranks = drawn.setdefault((line["batch"], place), {}).setdefault(text, [])
                ranks.append(path.stem)
    for (batch, row), texts in sorted(drawn.items()):
        if len(texts) == 1:
            (value,) = texts
        else:
            value = "; ".join(f"{text} on {', '.join(ranks)}" for text, ranks in texts.items())
        yield Place(batch, 0, row, group=ROWS, text=f"batch {batch}, row {row}"), value


def _metrics(line: Mapping[str, Any]) -> Iterator[tuple[Place, Any]]:
    batch = int(line["batch"])
    where = f"step {line['step']}" if line["step"] is not None else f"batch {batch} (no update)"
    for key, value in line.items():
        for name, leaf in _leaves(value, key):
            if key not in _MEASURED:
                group = _group(key)
                number = GROUPS.index(group)
                yield Place(batch, 1, number, name, group, f"{where}, {name}"), leaf


def _group(key: str) -> str:
    if key.startswith("loss"):
        return LOSSES
    if key == "grad_norm":
        return NORMS
    return REPTILE if "reptile" in key else OTHER


def _evaluation(line: Mapping[str, Any]) -> Iterator[tuple[Place, Any]]:
    batches = int(line["batches"])
    for key, value in line.items():
        for name, leaf in _leaves(value, key):
            if key not in _MEASURED:
                group = HELD_OUT if key.startswith("losses") else OTHER
                number = GROUPS.index(group)
                text = f"evaluation after step {line['step']}, {name}"
                yield Place(batches - 1, 2, number, name, group, text), leaf


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _leaves(one, f"{path}.{key}")
    elif isinstance(value, list):
        for place, one in enumerate(value):
            yield from _leaves(one, f"{path}.{place}")
    else:
        yield path, value


def exactly(mine: Figures, other: Figures) -> Iterator[Difference]:
    """Every place where two runs do not have the same value, in the order of time."""
    for place in sorted(mine.keys() | other.keys()):
        one, two = mine.get(place, _ABSENT), other.get(place, _ABSENT)
        if one != two:
            yield Difference(place.text, one, two, place.group)


@dataclass
class Closeness:
    """How far two runs are apart that need not agree to the bit."""

    tolerance: float
    """Relative, of losses, and of the gradient norm of the first batch."""
    first_batch: int
    """The first one at the other layout."""
    worst: dict[str, tuple[float, Difference]] = field(default_factory=dict)
    """The largest relative difference of each group, and where."""
    beyond: list[Difference] = field(default_factory=list)
    """What is further apart than it may be, in the order of time."""

    def compare(self, mine: Figures, other: Figures) -> None:
        """Take up every value of two runs."""
        for place in sorted(mine.keys() | other.keys()):
            one, two = mine.get(place, _ABSENT), other.get(place, _ABSENT)
            if one == two:
                continue
            found = Difference(place.text, one, two, place.group)
            apart = distance(one, two, "cosine" in place.name)
            if apart > self.worst.get(place.group, (-1.0,))[0]:
                self.worst[place.group] = (apart, found)
            if apart > self._allowed(place):
                self.beyond.append(found)

    @property
    def looser(self) -> float:
        """What is allowed of later gradient norms, and of Reptile's figures."""
        return max(self.tolerance, min(LOOSER * self.tolerance, LOOSEST))

    def _allowed(self, place: Place) -> float:
        later = place.group == NORMS and place.batch > self.first_batch
        return self.looser if later or place.group == REPTILE else self.tolerance


def distance(one: Any, two: Any, absolute: bool = False) -> float:
    """How far two values are apart, relative to the larger; infinity where they are no floats."""
    if not (isinstance(one, float) and isinstance(two, float)):
        return math.inf
    apart = abs(one - two)
    return apart if absolute else apart / max(abs(one), abs(two))


def between(found: Figures, first: int, end: int | None = None) -> dict[Place, Any]:
    """The values of batches `first` to `end` - 1, or to the last one there is."""
    return {
        place: value
        for place, value in found.items()
        if place.batch >= first and (end is None or place.batch < end)
    }


def counts(found: Iterable[Place]) -> dict[str, int]:
    """How many values each group has."""
    numbers = dict.fromkeys(GROUPS, 0)
    for place in found:
        numbers[place.group] += 1
    return numbers

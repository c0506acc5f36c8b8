"""Compares a run's plan with the configuration that it is to go on with."""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Any, Literal

from megatron_mer.continual.entries import Entry
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.segments import fresh_rows_of, pool_key, same_capacity
from megatron_mer.continual.spec import EntrySpec, PlanSpec, ReplaySpec
from megatron_mer.errors import ConfigError

Kind = Literal["batch-size", "replay", "mix", "length", "stream"]

KINDS: dict[Kind, str] = {
    "batch-size": "another global_batch_size",
    "replay": "another alpha or policy of replay, or replay switched on or off",
    "mix": "other datasets or weights in the task in training or one to come",
    "length": "another length of the task in training or one to come",
    "stream": "tasks to come that are inserted, removed or put into another order, and new ones "
    "trained before",
}
"""What a resumed run may change if it is told so; the keys are the values of ``--accept``."""


_CLOSED = "it was trained to its end: put it back as it was"


@dataclass(frozen=True)
class Difference:
    """Something that a configuration says otherwise than the plan that was trained."""

    batch: int
    """The first batch that it touches."""
    text: str
    accept: Kind | None = None
    """The kind of change that has to be accepted; None: it cannot be."""
    remedy: str = ""
    """What to do about one that cannot be accepted."""

    def __str__(self) -> str:
        """The first batch and the text."""
        return f"from batch {self.batch}: {self.text}"


def differences(
    history: Sequence[Mapping[str, Any]], spec: PlanSpec, batch: int
) -> list[Difference]:
    """What a configuration would change of a plan, in the order of the batches.

    Tasks that are appended at the end change nothing of what was there, so they are no difference.
    Nor is `max_epochs`, which permits and does not order, or a length that is only written in
    another way.

    Args:
        history: `history()` of the plan that was trained.
        spec: the configuration as it is now.
        batch: batches that were trained; nothing that can be accepted touches them.

    Returns:
        What was found. If all of it is accepted, the new segment begins at the first batch of all
        (`Plan.continued`).

    Raises:
        CheckpointError: it is no history of a plan.
    """
    comparison = _Comparison(history, spec, batch)
    found = [
        *comparison.fixed(),
        *comparison.batch_size(),
        *comparison.replay(),
        *comparison.trained_before(),
        *comparison.begun_entries(),
        *comparison.entries_to_come(),
    ]
    return sorted(found, key=lambda one: one.batch)


class _Comparison:
    """The plan that was trained, and what the configuration would make of it."""

    def __init__(self, history: Sequence[Mapping[str, Any]], spec: PlanSpec, batch: int) -> None:
        self.old = Plan.from_history(history)
        self.spec = spec
        self.batch = min(batch, self.old.total_batches)
        self.progress = self.old.progress_at(self.batch)
        try:
            self.new = Plan.continued(history, spec, self.batch, allow_exhausted=True)
        except ConfigError:
            self.new = self.old  # No plan at all: the problems are named where it is made.
        self.respecified: Plan | None = None
        with contextlib.suppress(ConfigError):  # The batches that were trained are not all in it.
            self.respecified = Plan.respecified(history, spec)

    def fixed(self) -> Iterator[Difference]:
        old, new = self.old.spec, self.spec
        for name in ("seed", "seq_length"):
            was, now = getattr(old, name), getattr(new, name)
            if was != now:
                text = f"{name} was {was}, is {now}, which would change every sample's place"
                yield Difference(0, text, remedy=f"set it to {was}")
        yield from self._capacity()
        for name, size in new.datasets.items():
            was = self.old.dataset_sizes.get(name, size)
            if was != size and old.seq_length == new.seq_length:
                text = f"dataset {name!r} had {was} samples, has {size}: its content changed"
                remedy = "bring the old data back, or give the new data another name and prefix"
                yield Difference(_first_read(self.old, name), text, remedy=remedy)

    def _capacity(self) -> Iterator[Difference]:
        given = [one.spec.replay for one in self.old.segments] + [self.spec.replay]
        capacities = [one.capacity for one in given if one and one.capacity is not None]
        for was, now in pairwise(capacities):
            if not same_capacity(was, now):
                text = f"replay.capacity_samples was {was}, is {now}, which would change what the "
                yield Difference(0, text + "buffer had held so far", remedy=f"set it to {was}")

    def batch_size(self) -> Iterator[Difference]:
        was, now = self.old.spec.global_batch_size, self.spec.global_batch_size
        if was != now:
            yield Difference(self.batch, f"global_batch_size was {was}, is {now}", "batch-size")

    def replay(self) -> Iterator[Difference]:
        was, now = self.old.spec.replay, self.spec.replay
        tasks = {entry.task for entry in self.old.spec.stream}
        if _effective(was, tasks) != _effective(now, tasks):
            yield Difference(self._first_replay(), _replay_text(was, now), "replay")

    def trained_before(self) -> Iterator[Difference]:
        """Entries trained before are told apart by what they hold, not by their place."""
        was = [entry for entry in self.old.spec.stream if entry.trained_before]
        now = [entry for entry in self.spec.stream if entry.trained_before]
        missing = Counter(map(pool_key, was)) - Counter(map(pool_key, now))
        for entry in was:
            if missing[pool_key(entry)]:
                yield Difference(
                    0,
                    f"{_name(entry)}, is gone or has other datasets or weights, but its rows are "
                    "in the replay pool",
                    remedy="bring it back; `replay: {policy: weights}` gives a task the weight 0",
                )
        kept = [entry for entry in now if pool_key(entry) in set(map(pool_key, was))]
        if not missing and list(map(pool_key, kept))[: len(was)] != list(map(pool_key, was)):
            names = ", ".join(entry.task for entry in was)
            text = "the tasks trained before stand in another order, which would change the pool"
            yield Difference(0, text, remedy=f"put them back into theirs: {names}")
        added = Counter(map(pool_key, now)) - Counter(map(pool_key, was))
        for entry in now:
            if added[pool_key(entry)]:
                text = f"{_name(entry)}, was not in the replay pool"
                yield Difference(self._first_replay(), text, "stream")

    def begun_entries(self) -> Iterator[Difference]:
        """They keep their places; only the last one may still change."""
        old, new = self.old.spec.stream, self.spec.stream
        for place in range(self.progress.last_begun + 1):
            if place >= len(new):
                text = f"stream.{place}: {_name(old[place])} is gone, but was begun"
                yield Difference(_start(self.old, place), text, remedy=self._keep_begun())
            elif (old[place].task, old[place].trained_before) != (
                new[place].task,
                new[place].trained_before,
            ):
                text = f"stream.{place} was {_name(old[place])}, is {_name(new[place])}"
                yield Difference(_start(self.old, place), text, remedy=self._keep_begun())
            elif not old[place].trained_before:
                yield from self._begun_mix(place, old[place], new[place])
                yield from self._begun_length(place, old[place], new[place])

    def _keep_begun(self) -> str:
        begun = self.old.spec.stream[: self.progress.last_begun + 1]
        names = ", ".join(_name(entry) for entry in begun[-3:])
        return (
            f"the {len(begun)} begun entries stand first, in their order, up to {names}; new ones "
            "go behind them"
        )

    def _begun_mix(self, place: int, was: EntrySpec, now: EntrySpec) -> Iterator[Difference]:
        at_end = _end(self.old, place) <= self.batch and _same_length(was, now)
        for text in _mix_differences(was, now):
            text = f"stream.{place} ({_name(now)}): {text}"
            if place < self.progress.last_begun or at_end:
                yield Difference(_start(self.old, place), text, remedy=_CLOSED)
            else:
                yield Difference(max(self.batch, _start(self.old, place)), text, "mix")

    def _begun_length(self, place: int, was: EntrySpec, now: EntrySpec) -> Iterator[Difference]:
        if _same_length(was, now):
            return
        path, seq_length = f"stream.{place} ({_name(now)})", self.spec.seq_length
        text = f"{path}: its length was {_length(was)}, is {_length(now)}"
        done, fresh = self.progress.batches[place], self.progress.fresh_rows[place]
        ends = [_end(plan, place) for plan in (self.old, self.new, self.respecified)]
        at_end = ends[0] <= self.batch
        short = (now.steps or 0) <= done and fresh_rows_of(now, seq_length) <= fresh
        if place < self.progress.last_begun:
            yield Difference(ends[0], text, remedy=_CLOSED)
        elif short and not (at_end and len(set(ends)) == 1 and self._just_ends(place, now)):
            text += f", but {done} batches with {fresh * seq_length} fresh tokens were trained"
            least = f"steps: {done + 1} or fresh_tokens: {fresh * seq_length + 1}, or more"
            yield Difference(self.batch, text, remedy=least)
        elif len(set(ends)) > 1:
            yield Difference(max(self.batch, min(ends)), text, "length")

    def _just_ends(self, place: int, now: EntrySpec) -> bool:
        """Whether the length is one that the batches trained of an entry just reach."""
        if now.steps is not None:
            return now.steps == self.progress.batches[place]
        before = self.old.progress_at(_end(self.old, place) - 1).fresh_rows.get(place, 0)
        return before < fresh_rows_of(now, self.spec.seq_length)

    def entries_to_come(self) -> Iterator[Difference]:
        """Entries that no batch has begun; those trained before are compared elsewhere."""
        old, new = (
            [
                (place, entry)
                for place, entry in enumerate(stream)
                if place > self.progress.last_begun and not entry.trained_before
            ]
            for stream in (self.old.spec.stream, self.spec.stream)
        )
        was, now = ([entry.task for _, entry in entries] for entries in (old, new))
        matcher = SequenceMatcher(a=was, b=now, autojunk=False)
        for tag, first, end, new_first, new_end in matcher.get_opcodes():
            if tag == "equal":
                for pair in zip(old[first:end], new[new_first:new_end], strict=True):
                    yield from self._entry_to_come(*pair[0], *pair[1])
                continue
            for place, entry in old[first:end]:
                text = f"stream.{place}: {_name(entry)} is gone"
                yield Difference(_start(self.old, place), text, "stream")
            for place, entry in new[new_first:new_end] if first < len(old) else ():
                text = f"stream.{place}: {_name(entry)} is new before {_name(old[first][1])}"
                yield Difference(_start(self.old, old[first][0]), text, "stream")

    def _entry_to_come(
        self, place: int, was: EntrySpec, now_place: int, now: EntrySpec
    ) -> Iterator[Difference]:
        path, start = f"stream.{now_place} ({_name(now)})", _start(self.old, place)
        pools = [
            sum(entry.trained_before for entry in stream[:at])
            for stream, at in ((self.old.spec.stream, place), (self.spec.stream, now_place))
        ]
        if pools[0] != pools[1]:  # Else a task that is new or gone before it has been named.
            yield Difference(start, f"{path}: it stood at stream.{place}", "stream")
        for text in _mix_differences(was, now):
            yield Difference(start, f"{path}: {text}", "mix")
        others = (self.new, self.respecified)
        lengths = {_end(one, now_place) - _start(one, now_place) for one in others}
        if not _same_length(was, now) and lengths != {_end(self.old, place) - start}:
            text = f"{path}: its length was {_length(was)}, is {_length(now)}"
            first = min(_end(self.old, place), start + min(lengths))
            yield Difference(max(self.batch, first), text, "length")

    def _first_replay(self) -> int:
        """The first batch to come with a replay row in either plan, or the end of the shorter."""
        return min(_first_replay(plan, self.batch) for plan in (self.old, self.new))


def _first_replay(plan: Plan, batch: int) -> int:
    def replayed_before(other: int) -> int:
        return plan.rows_before(other) - plan.fresh_rows_before(other)

    counts = range(plan.total_batches + 1)
    return bisect_right(counts, replayed_before(batch), lo=batch, key=replayed_before) - 1


def _mix_differences(old: EntrySpec, new: EntrySpec) -> Iterator[str]:
    """At most one line a kind of difference: a task may have thousands of datasets."""
    was = {one.name: one.weight for one in old.datasets}
    now = {one.name: one.weight for one in new.datasets}
    if gone := [repr(name) for name in was if name not in now]:
        yield f"{_listed(gone)} {'is' if len(gone) == 1 else 'are'} gone"
    if added := [repr(name) for name in now if name not in was]:
        yield f"{_listed(added)} {'was' if len(added) == 1 else 'were'} not there"
    if moved := [
        f"{name!r} from {_weight(was[name])} to {_weight(weight)}"
        for name, weight in now.items()
        if name in was and was[name] != weight
    ]:
        yield f"other weights: {_listed(moved)}"
    if was.keys() == now.keys() and list(was) != list(now):
        at = next(at for at, pair in enumerate(zip(was, now, strict=True)) if pair[0] != pair[1])
        yield f"its datasets stand in another order, from place {at} on"


def _listed(items: Sequence[str]) -> str:
    shown = ", ".join(items[:3])
    many = f", ... ({len(items)} in all)" if len(items) > 3 else ""
    return f"dataset{'s' if len(items) > 1 else ''} {shown}{many}"


def _first_read(plan: Plan, name: str) -> int:
    """The first batch of the first entry that a dataset belongs to."""
    return min(
        (
            entry.first_batch
            for entry in plan.entries
            for one in plan.segments[entry.segment].spec.stream[entry.index].datasets
            if one.name == name
        ),
        default=0,
    )


def _spans(plan: Plan | None, place: int) -> list[Entry]:
    entries = plan.entries if plan else ()
    return [one for one in entries if one.index == place and not one.trained_before]


def _start(plan: Plan | None, place: int) -> int:
    """The first batch of an entry; 0 for one trained before."""
    return min((one.first_batch for one in _spans(plan, place)), default=0)


def _end(plan: Plan | None, place: int) -> int:
    """The batch after an entry's last."""
    return max((one.last_batch for one in _spans(plan, place)), default=0)


def _same_length(old: EntrySpec, new: EntrySpec) -> bool:
    return (old.steps, old.fresh_tokens) == (new.steps, new.fresh_tokens)


def _length(entry: EntrySpec) -> str:
    if entry.steps is not None:
        return f"{entry.steps} steps"
    return f"{entry.fresh_tokens} fresh tokens"


def _weight(weight: float | None) -> str:
    return "none" if weight is None else f"{weight:g}"


def _name(entry: EntrySpec) -> str:
    return f"task {entry.task!r}{', trained before' if entry.trained_before else ''}"


def _effective(replay: ReplaySpec | None, tasks: Container[str]) -> ReplaySpec | None:
    """Without the spelling: 0.5 and 0.50 are one share, and alpha 0 is no replay.

    The weight of a task that is appended changes nothing ahead of it.
    """
    if replay is None or replay.alpha == 0:
        return None
    weights = None
    if replay.weights is not None:
        weights = {task: weight for task, weight in replay.weights.items() if task in tasks}
    return replace(replay, alpha=replay.alpha.normalize(), weights=weights, capacity=None)


def _replay_text(was: ReplaySpec | None, now: ReplaySpec | None) -> str:
    """What of the section differs, as YAML spells it."""
    if was is None or now is None:
        return f"replay was {_yaml(was)}, is {_yaml(now)}"
    before, after = was.to_json(), now.to_json()
    return ", ".join(
        f"replay.{key} was {_yaml(before[key])}, is {_yaml(after[key])}"
        for key in vars(was)
        if key != "capacity" and before[key] != after[key]
    )


def _yaml(value: object) -> str:
    if value is None:
        return "off"
    if isinstance(value, ReplaySpec):
        return f"on with alpha {value.alpha}, policy {value.policy}"
    return str(value).lower() if isinstance(value, bool) else str(value)

"""Compares a run's plan with the one it is to go on with."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from megatron_mer.continual.plan import Plan
from megatron_mer.continual.spec import EntrySpec, ReplaySpec


def differences(old_history: Sequence[Mapping[str, Any]], new_plan: Plan) -> list[str]:
    """What a new plan would change of an old one, each with the first batch that it touches.

    Entries to train that are appended at the end change nothing of what was there, so they are no
    difference. Nor is `max_epochs`, which permits and does not order.

    Args:
        old_history: `history()` of the plan that was trained.
        new_plan: the plan of the configuration as it is now.

    Raises:
        CheckpointError: it is no history of a plan.
    """
    old_plan = Plan.from_history(old_history)
    found = [*_run_differences(old_plan, new_plan), *_stream_differences(old_plan, new_plan)]
    return [f"from batch {batch}: {text}" for batch, text in sorted(found, key=lambda one: one[0])]


def _run_differences(old_plan: Plan, new_plan: Plan) -> Iterator[tuple[int, str]]:
    old, new = old_plan.spec, new_plan.spec
    for name in ("seed", "global_batch_size", "seq_length"):
        was, now = getattr(old, name), getattr(new, name)
        if was != now:
            yield 0, f"{name} was {was}, is {now}"
    if _effective(old.replay) != _effective(new.replay):
        was, now = _describe_replay(old.replay), _describe_replay(new.replay)
        yield _first_replay(old_plan, new_plan), f"replay was {was}, is {now}"


def _stream_differences(old_plan: Plan, new_plan: Plan) -> Iterator[tuple[int, str]]:
    for index, (old, new) in enumerate(zip_longest(old_plan.spec.stream, new_plan.spec.stream)):
        if old is None:
            if new.trained_before:
                yield (
                    _first_replay(old_plan, new_plan),
                    f"stream.{index}: task {new.task!r}, trained before, was not in the pool",
                )
        elif new is None:
            yield _start(old_plan, index, new_plan), f"stream.{index}: task {old.task!r} is gone"
        else:
            starts = [_start(old_plan, index, new_plan), _start(new_plan, index, old_plan)]
            for text in _entry_differences(old, new):
                yield min(starts), f"stream.{index} (task {new.task!r}): {text}"
            was, now = old_plan.entries[index], new_plan.entries[index]
            lengths = [entry.last_batch - entry.first_batch for entry in (was, now)]
            if lengths[0] != lengths[1] and old.trained_before == new.trained_before:
                yield (
                    min(starts) + min(lengths),
                    f"stream.{index} (task {new.task!r}): it had {lengths[0]} batches, "
                    f"has {lengths[1]}",
                )


def _entry_differences(old: EntrySpec, new: EntrySpec) -> Iterator[str]:
    if old.task != new.task:
        yield f"its name was {old.task!r}"
    if old.trained_before != new.trained_before:
        yield f"trained_before was {old.trained_before}, is {new.trained_before}"
    was = {one.name: one for one in old.datasets}
    now = {one.name: one for one in new.datasets}
    for name in [*was, *(name for name in now if name not in was)]:
        if name not in now:
            yield f"dataset {name!r} is gone"
        elif name not in was:
            yield f"dataset {name!r} was not there"
        elif was[name].num_samples != now[name].num_samples:
            before, after = was[name].num_samples, now[name].num_samples
            yield f"dataset {name!r} had {before} samples, has {after}"
        elif was[name].weight != now[name].weight:
            yield f"dataset {name!r} had weight {was[name].weight}, has {now[name].weight}"
    if was.keys() == now.keys() and list(was) != list(now):
        yield f"its datasets stood as {', '.join(was)}, stand as {', '.join(now)}"


def _start(plan: Plan, index: int, other: Plan) -> int:
    """The first batch that an entry has a part in."""
    entry = plan.entries[index]
    return _first_replay(plan, other) if entry.trained_before else entry.first_batch


def _first_replay(*plans: Plan) -> int:
    """The first batch with a replay row in any of the plans, or the end of the shortest."""
    return min(_first_replay_of(plan) for plan in plans)


def _first_replay_of(plan: Plan) -> int:
    rows = plan.spec.global_batch_size

    def replay_rows_before(batch: int) -> int:
        return batch * rows - plan.fresh_rows_before(batch)

    counts = range(plan.total_batches + 1)
    return bisect_right(counts, 0, key=replay_rows_before) - 1


def _effective(replay: ReplaySpec | None) -> ReplaySpec | None:
    return replay if replay is not None and replay.alpha > 0 else None


def _describe_replay(replay: ReplaySpec | None) -> str:
    if replay is None:
        return "off"
    return (
        f"alpha {replay.alpha}, source {replay.source}, policy {replay.policy}, "
        f"include_current_task {replay.include_current_task}"
    )

"""A user's configuration made short, with all that a resume has to get right still inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from megatron_mer.config import ReplayConfig, ReptileConfig, RunConfig, ScheduleConfig, TaskConfig
from megatron_mer.config.schema import EvaluateConfig, ScheduleSegmentConfig
from megatron_mer.errors import ConfigError, Problem

_LOST = 2  # steps between the checkpoint and the kill, where there is room for them


@dataclass(frozen=True)
class Short:
    """A shortened run."""

    config: RunConfig
    """Its configuration; `output_dir` is still the user's."""
    steps: int
    """The step of the checkpoint that the resume begins from."""
    killed_after: int
    """The last step before the kill; no checkpoint lies between."""
    total: int
    """Steps of the whole run."""
    changes: tuple[str, ...]
    """What was changed, a line each."""


def shorten(config: RunConfig, steps: int, more: int) -> Short:
    """Make a run short: its first entries, each at most as long as it is.

    The first boundary between tasks lies ahead of the checkpoint, so that rows are replayed on both
    sides of it; the second, if there are three tasks, behind the kill. A Reptile update lies on
    both sides, and none at the checkpoint, so that a window is cut in two.

    Args:
        config: the user's, as `load_config` gave it.
        steps: the step of the checkpoint, >= 1.
        more: steps behind it, >= 1.

    Raises:
        ConfigError: the numbers are none, or the stream has fewer steps.
    """
    for name, value in (("--steps", steps), ("--more", more)):
        if value < 1:
            raise ConfigError([Problem(name, f"given {value}", "at least 1")])
    total = steps + more
    lost = min(_LOST, more - 1)
    lengths = _lengths(config, steps, more, lost)
    stream = tuple(_stream(config.stream, lengths))
    short = replace(
        config,
        stream=stream,
        schedule=_schedule(config.schedule, lengths),
        replay=_replay(config.replay, stream),
        reptile=_reptile(config.reptile, steps, total),
        evaluate=_evaluate(config, stream, total),
        checkpoint=replace(
            config.checkpoint, every_steps=steps, keep_last=1, keep_every=None, copy_to=None
        ),
        wandb=None,
        tensorboard=None,
    )
    changes = (*_stream_changes(config.stream, lengths), *_changes(config, short))
    return Short(short, steps, _killed_after(lengths, steps, lost), total, changes)


def _trained(stream: Sequence[TaskConfig]) -> list[TaskConfig]:
    return [entry for entry in stream if not entry.trained_before]


def _own_length(entry: TaskConfig, config: RunConfig) -> int:
    """The fewest batches that an entry has in the user's run."""
    if entry.steps is not None:
        return entry.steps
    rows = -(-(entry.fresh_tokens or 1) // config.model.seq_length)
    return -(-rows // config.batch.global_batch_size)


def _lengths(config: RunConfig, steps: int, more: int, lost: int) -> list[int]:
    """Steps of the first entries that train, `steps` + `more` together.

    None is longer than the user's own, so that its data last.

    Raises:
        ConfigError: the stream has fewer.
    """
    own = [_own_length(entry, config) for entry in _trained(config.stream)]
    total, first = steps + more, max(1, steps // 2)
    ends = [first, total]
    if len(own) > 2 and more - lost > 1:
        ends.insert(1, steps + lost + (more - lost) // 2)
    if len(own) == 1:
        ends = [total]
    lengths: list[int] = []
    for place, most in enumerate(own):
        left = ends[min(place, len(ends) - 1)] - sum(lengths)
        if sum(lengths) >= total:
            break
        lengths.append(min(most, left))
    for place in reversed(range(len(lengths))):
        lengths[place] += min(own[place] - lengths[place], total - sum(lengths))
    if sum(lengths) < total:
        given = f"given {steps} and {more}, but the stream has {sum(own)} steps"
        raise ConfigError([Problem("--steps and --more", given, f"{sum(own)} together at most")])
    return lengths


def _killed_after(lengths: Sequence[int], steps: int, lost: int) -> int:
    """The last of the steps after the checkpoint before anything newer is saved."""
    ends = {sum(lengths[: place + 1]) for place in range(len(lengths))}
    last = steps
    while last < steps + lost and last + 1 not in ends and (last + 1) % steps:
        last += 1
    return last


def _stream(stream: Sequence[TaskConfig], lengths: Sequence[int]) -> Iterator[TaskConfig]:
    left = list(lengths)
    for entry in stream:
        if entry.trained_before:
            yield entry
        elif left:
            yield replace(entry, steps=left.pop(0), fresh_tokens=None)


def _schedule(schedule: ScheduleConfig, lengths: Sequence[int]) -> ScheduleConfig:
    """The same phases, in as few steps as there are."""
    total = sum(lengths)
    room = min(lengths) if schedule.per_task else total
    parts = schedule.then
    if parts:
        room = max(2, total // 2)
        each = max(2, (total - room) // len(parts))
        parts = tuple(_segment(part, each) for part in parts)
    decay = max(1, room // 4) if schedule.kind in ("wsd", "infinite") else None
    cooldown = max(1, room // 3) if schedule.kind == "infinite" else None
    most = room - max(1, (decay or 0) + (cooldown or 0))
    return replace(
        schedule,
        total_steps=room if parts else None,
        warmup_steps=min(schedule.warmup_steps, most, max(1, room // 4)),
        decay_steps=decay,
        cooldown_steps=cooldown,
        then=parts,
    )


def _segment(part: ScheduleSegmentConfig, steps: int) -> ScheduleSegmentConfig:
    short = None if part.steps is None else min(part.steps, steps)
    most = max(0, (steps if short is None else short) - 1)
    return replace(part, steps=short, warmup_steps=min(part.warmup_steps, most, max(1, steps // 3)))


def _replay(replay: ReplayConfig | None, stream: Sequence[TaskConfig]) -> ReplayConfig | None:
    if replay is None:
        return None
    tasks = {entry.task for entry in stream}
    capacity = replay.capacity_samples
    if isinstance(capacity, Mapping):
        capacity = {task: rows for task, rows in capacity.items() if task in tasks}
    # The folder of the run's own buffer is not for a test.
    replay = replace(replay, dir=None, capacity_samples=capacity)
    if replay.weights is None:
        return replay
    weights = {task: weight for task, weight in replay.weights.items() if task in tasks}
    if not any(weights.values()):
        return replace(replay, policy="equal", weights=None)
    return replace(replay, weights=weights)


def _reptile(reptile: ReptileConfig | None, steps: int, total: int) -> ReptileConfig | None:
    if reptile is None:
        return None
    fitting = (k for k in range(max(2, 2 * steps // 3), 1, -1) if steps % k)
    return replace(reptile, k=min(reptile.k, next(fitting, min(steps + 1, total))))


def _evaluate(config: RunConfig, stream: Sequence[TaskConfig], total: int) -> EvaluateConfig | None:
    if not any(entry.valid for entry in stream):
        return None
    own = config.evaluate or EvaluateConfig()
    every = own.every_steps and min(own.every_steps, max(1, total // 3))
    return replace(own, every_steps=every, max_batches=1, bounds=None)


def _stream_changes(stream: Sequence[TaskConfig], lengths: Sequence[int]) -> Iterator[str]:
    trained = _trained(stream)
    for entry, length in zip(trained, lengths, strict=False):
        index = next(place for place, one in enumerate(stream) if one is entry)
        key = "steps" if entry.steps is not None else "fresh_tokens"
        was, path = getattr(entry, key), f"stream.{index}"
        if (key, was) != ("steps", length):
            yield f"{path}.{key} {was} -> {path}.steps {length} (task {entry.task})"
    if dropped := trained[len(lengths) :]:
        names = ", ".join(dict.fromkeys(entry.task for entry in dropped))
        yield f"stream: without its last {len(dropped)} entries (tasks {names})"
    if len(lengths) == 1:
        yield "stream: it has one entry in so few steps, so no boundary between tasks is tested"


def _changes(was: Any, now: Any, path: str = "") -> Iterator[str]:
    """Each value that is another one, but for the stream's."""
    if is_dataclass(was) and type(was) is type(now):
        for field in fields(was):
            if path or field.name != "stream":
                here = f"{path}.{field.name}" if path else field.name
                yield from _changes(getattr(was, field.name), getattr(now, field.name), here)
    elif isinstance(was, tuple) and isinstance(now, tuple) and len(was) == len(now):
        for place, (one, other) in enumerate(zip(was, now, strict=True)):
            yield from _changes(one, other, f"{path}.{place}")
    elif was != now:
        yield f"{path} {_shown(was)} -> {_shown(now)}"


def _shown(value: Any) -> str:
    if is_dataclass(value):
        return "as given"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {one}" for key, one in value.items()) + "}"
    return "none" if value is None else str(value)

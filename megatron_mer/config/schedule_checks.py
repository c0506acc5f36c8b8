"""Rules between the values of the learning-rate schedule and of its segments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from megatron_mer.config.parse import as_far_as_parsed
from megatron_mer.config.schema import RunConfig, ScheduleConfig, ScheduleSegmentConfig
from megatron_mer.errors import Problem

Problems = Iterator[Problem]


def check_segments(schedule: ScheduleConfig) -> list[Problem]:
    """Finds what keeps `schedule.then` from following the first schedule."""
    found: list[Problem] = []
    if schedule.then and schedule.total_steps is None:
        given = "missing, so that the end of the stream would move where schedule.then begins"
        remedy = "say after how many steps it begins"
        found.append(Problem("schedule.total_steps", given, "a whole number >= 1", remedy))
    last = len(schedule.then) - 1
    for index, segment in enumerate(schedule.then):
        path = f"schedule.then.{index}"
        found += as_far_as_parsed(_values(segment, path))
        found += as_far_as_parsed(_length(segment, path, index == last))
    return found


def _values(segment: ScheduleSegmentConfig, path: str) -> Problems:
    if segment.kind == "constant":
        if segment.min_lr != 0:
            given = f"given {segment.min_lr:g}, which kind constant does not use"
            yield Problem(f"{path}.min_lr", given, "nothing", "leave it out or choose cosine")
    elif not 0 <= segment.min_lr <= segment.lr:
        given = f"{segment.min_lr:g} with {path}.lr {segment.lr:g}"
        yield Problem(f"{path}.min_lr", given, f"0 to {segment.lr:g}")


def _length(segment: ScheduleSegmentConfig, path: str, is_last: bool) -> Problems:
    steps, cosine = segment.steps, segment.kind == "cosine"
    if steps is None:
        if cosine or not is_last:
            given = "missing for a cosine" if cosine else "missing for a segment before another"
            allowed = "a whole number >= 1; only a constant that is the last may leave it out"
            yield Problem(f"{path}.steps", given, allowed, "add it")
        return
    # A cosine of no length is none.
    most = steps - cosine
    if not 0 <= segment.warmup_steps <= most:
        given = f"{segment.warmup_steps} steps of warm-up in a segment of {steps}"
        yield Problem(f"{path}.warmup_steps", given, f"0 to {most}")


# Keys that belong to some kinds only.
_OF_KINDS: Final = {
    "min_lr": ("cosine", "wsd", "infinite"),
    "decay_steps": ("wsd", "infinite"),
    "decay": ("wsd", "infinite"),
    "cooldown_steps": ("infinite",),
    "constant_lr": ("infinite",),
}


def unused_or_above_peak(config: RunConfig) -> Problems:
    """Values that a kind does not read, and a floor above the peak."""
    schedule = config.schedule
    kind = schedule.kind
    for key, kinds in _OF_KINDS.items():
        value = getattr(schedule, key)
        if value and kind not in kinds:
            shown = value if isinstance(value, str) else f"{value:g}"
            given = f"given {shown}, which kind {kind} does not use"
            yield Problem(f"schedule.{key}", given, "nothing", f"leave it out or choose {kinds[0]}")
    if schedule.per_task:
        yield from _per_task(schedule)
    elif kind == "constant" and schedule.total_steps is not None and not schedule.then:
        given = f"given {schedule.total_steps}, where schedule.then says nothing that begins"
        remedy = "leave it out, choose cosine, or say in schedule.then what follows"
        yield Problem("schedule.total_steps", given, "nothing for kind constant", remedy)
    if kind != "constant" and schedule.min_lr > config.optimizer.lr:
        given = f"{schedule.min_lr:g} is above the peak, optimizer.lr {config.optimizer.lr:g}"
        yield Problem("schedule.min_lr", given, f"0 to {config.optimizer.lr:g}")


def _per_task(schedule: ScheduleConfig) -> Problems:
    if schedule.kind == "constant":
        given = "given true with kind constant, which ends where it would begin again"
        remedy = "leave it out, or choose another kind"
        yield Problem("schedule.per_task", given, "false", remedy)
    if schedule.total_steps is not None:
        given = f"given {schedule.total_steps} with per_task, where each entry has its own length"
        yield Problem("schedule.total_steps", given, "nothing", "leave it out")
    if schedule.then:
        given = "given with per_task, where each further entry has a schedule of its own"
        yield Problem("schedule.then", given, "nothing", "leave it out")


def warmup_too_long(config: RunConfig) -> Problems:
    """A warm-up that does not fit into the first schedule, as far as its length is known."""
    total, warmup = config.schedule.total_steps, config.schedule.warmup_steps
    trained = [entry for entry in config.stream if not entry.trained_before]
    steps = [entry.steps for entry in trained if entry.steps is not None]
    # A task given in fresh tokens takes a number of steps that only the plan knows.
    if config.schedule.per_task:
        total = min(steps, default=None)
    elif total is None and len(steps) == len(trained):
        total = sum(steps)
    # A decay of no length is none; see optim.schedule.check_schedule.
    most = total - (config.schedule.kind != "constant") if total else warmup
    if warmup > most:
        what = "of the shortest entry's" if config.schedule.per_task else "of"
        given = f"{warmup} steps of warm-up in a schedule {what} {total}"
        yield Problem("schedule.warmup_steps", given, f"0 to {most}")


def segments(config: RunConfig) -> Problems:
    """What `check_segments` finds."""
    yield from check_segments(config.schedule)

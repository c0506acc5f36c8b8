"""Rules between the values of the replay section."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Final

from megatron_mer.config.parse import show, suggest
from megatron_mer.config.schema import ReplayConfig, RunConfig
from megatron_mer.errors import Problem

Problems = Iterator[Problem]

MOST_SAMPLES: Final = 2**31 - 1
"""Rows that a buffer holds at most: its slots have 32-bit numbers."""


def replay_weights(config: RunConfig) -> Problems:
    """Finds weights that do not fit the policy or the stream."""
    replay = config.replay
    if replay is None:
        return
    weights, given_by_policy = replay.weights, replay.policy == "weights"
    if weights is not None and not given_by_policy:
        given = f"given, which policy {replay.policy} does not use"
        remedy = "leave it out or choose policy: weights"
        yield Problem("replay.weights", given, "nothing", remedy)
    if not given_by_policy:
        return
    tasks = dict.fromkeys(entry.task for entry in config.stream)
    if weights is None:
        given = "missing, which policy weights needs"
        allowed = f"a number >= 0 for each of the tasks {show(list(tasks))}"
        yield Problem("replay.weights", given, allowed, "add it or choose policy: equal")
        return
    for name in weights:
        if name not in tasks:
            given = f"the stream has no task {name!r}"
            yield Problem(f"replay.weights.{name}", given, show(list(tasks)), suggest(name, tasks))
    left_out = [task for task in tasks if task not in weights]
    if left_out:
        given = f"no weight for {show(left_out)}"
        remedy = "add it; 0 means that it is never replayed"
        yield Problem("replay.weights", given, "a number >= 0 for each task", remedy)
    if weights and not any(weights.values()):
        given = "each weight is 0, so that nothing would ever be replayed"
        yield Problem("replay.weights", given, "at least one above 0", "or leave replay: out")


def replay_buffer(config: RunConfig) -> Problems:
    """Finds what a buffer needs and what only a buffer takes."""
    replay = config.replay
    if replay is None:
        return
    if replay.source == "stream":
        defaults = {"capacity_samples": None, "dir": None, "prefetch": 2}
        for key, default in defaults.items():
            if getattr(replay, key) != default:
                given = "given, which source stream does not use"
                yield Problem(f"replay.{key}", given, "nothing", "leave it out or choose buffer")
        return
    yield from _capacity(config, replay)
    place = replay.dir and os.path.abspath(replay.dir)
    if place and os.path.abspath(f"{config.output_dir}/checkpoints") == place:
        given = f"given {replay.dir}, where the run's checkpoints lie"
        yield Problem("replay.dir", given, "a folder of the buffer's own")


def _capacity(config: RunConfig, replay: ReplayConfig) -> Problems:
    path, capacity = "replay.capacity_samples", replay.capacity_samples
    tasks = dict.fromkeys(entry.task for entry in config.stream)
    example = f"{{{', '.join(f'{task}: 1000' for task in list(tasks)[:2])}}}"
    if capacity is None:
        given = "missing, which source buffer needs"
        allowed = f"a number of samples, or one for each task, as {example}"
        yield Problem(path, given, allowed, "add it, or choose source: stream")
        return
    by_task = capacity if isinstance(capacity, Mapping) else {}
    total = capacity if isinstance(capacity, int) else sum(by_task.values())
    if total > MOST_SAMPLES:
        yield Problem(path, f"{total} samples in all", f"at most {MOST_SAMPLES}")
    if not isinstance(capacity, Mapping):
        if replay.policy != "uniform":
            given = f"{capacity} for all tasks together, and policy {replay.policy} takes rows by "
            remedy = "split it by task, or choose policy: uniform"
            yield Problem(path, given + "task", f"a capacity for each task, as {example}", remedy)
        return
    for name in by_task:
        if name not in tasks:
            given = f"the stream has no task {name!r}"
            yield Problem(f"{path}.{name}", given, show(list(tasks)), suggest(name, tasks))
    if left_out := [task for task in tasks if task not in by_task]:
        given = f"no capacity for {show(left_out)}"
        yield Problem(path, given, "a number of samples for each task of the stream")

"""From the stream of a configuration to what a plan is made from.

A run is an index: what stands at a place of a batch follows from the configuration alone, on any
layout of ranks and after any restart (`continual.plan`; the arithmetic is in csrc/).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from megatron_mer.config import DatasetConfig, ReplayConfig, TaskConfig
from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec, ReplaySpec
from megatron_mer.errors import ConfigError, Problem


def plan_spec(
    stream: Sequence[TaskConfig],
    replay: ReplayConfig | None,
    seed: int,
    global_batch_size: int,
    seq_length: int,
    dataset_sizes: Mapping[str, int],
) -> PlanSpec:
    """Resolves what decides every row of a run; `Plan` lays it out.

    - Inside a dataset: each epoch is a permutation keyed by (seed, dataset name, epoch). A name
      that comes again in a later entry goes on where the earlier one left it.
    - Across the datasets of an entry: by weight, each within about a sample of its share at any
      time; without weights by number of samples.
    - Length: `steps` is the number of batches, replay rows included (fixed total). `fresh_tokens`
      is the smallest number of batches whose fresh rows hold that many tokens, so that replay makes
      an entry longer (fixed fresh).
    - Replay: in the first t batches of an entry floor(alpha N t) rows are replay rows, each a
      uniform draw, keyed by (seed, batch, row), over the fresh rows of earlier entries, or with
      `include_current_task` over all fresh rows of earlier batches. Policies `equal` and `weights`
      apportion an entry's replay rows to the tasks that the pool holds, exact to two rows at any
      time, and draw uniformly inside a task. Skipped batches are left out. While there is nothing
      to draw from, batches are all fresh.
    - Buffer: with `source: buffer` a replay row is drawn not from all of these rows but from those
      that a reservoir of bounded capacity holds at that moment; which they are is a function of
      the seed and of how many rows were fresh before.
    - `trained_before`: as many rows as its datasets have samples, blended by their weights, are in
      the pool from the first batch of the plan, wherever the entry stands. It moves no dataset's
      cursor, and `max_epochs` does not concern it: a dataset that is also trained on starts at its
      beginning.
    - Order: the rows of a batch lie in an order keyed by (seed, batch).

    Args:
        stream: the entries, in training order.
        replay: None and alpha 0 give the same plan.
        seed: 0 to 2^64 - 1.
        global_batch_size: rows a batch.
        seq_length: tokens a row.
        dataset_sizes: samples of each dataset by name; more names than the stream has do no harm.

    Raises:
        ConfigError: a dataset without a size, or two datasets under one name.
    """
    problems = [*_missing_sizes(stream, dataset_sizes), *_shared_names(stream)]
    if problems:
        raise ConfigError(problems)
    return PlanSpec(
        seed=seed,
        global_batch_size=global_batch_size,
        seq_length=seq_length,
        replay=None if replay is None else _replay_spec(replay),
        stream=tuple(_entry_spec(task, dataset_sizes) for task in stream),
    )


def _datasets(stream: Sequence[TaskConfig]) -> Iterator[tuple[str, DatasetConfig]]:
    """Every dataset of the stream with its path in the configuration."""
    for index, task in enumerate(stream):
        for place, dataset in enumerate(task.train):
            yield f"stream.{index}.train.{place}", dataset


def _missing_sizes(stream: Sequence[TaskConfig], sizes: Mapping[str, int]) -> Iterator[Problem]:
    for path, dataset in _datasets(stream):
        if dataset.name not in sizes:
            yield Problem(
                path,
                f"dataset {dataset.name!r}, whose number of samples is not known",
                f"one of {', '.join(sorted(sizes)) or 'none'}",
            )


def _shared_names(stream: Sequence[TaskConfig]) -> Iterator[Problem]:
    """Two corpora under one name would be taken for one, and share its cursor."""
    prefixes: dict[str, str] = {}
    for path, dataset in _datasets(stream):
        name = dataset.name
        first = prefixes.setdefault(name, dataset.prefix)
        if os.path.normpath(first) != os.path.normpath(dataset.prefix):
            yield Problem(
                path,
                f"prefix {dataset.prefix} under the name {name!r}, which {first} has already",
                "one prefix for a name",
                "give one of them another `name`",
            )


def _replay_spec(replay: ReplayConfig) -> ReplaySpec:
    return ReplaySpec(
        alpha=replay.alpha,
        source=replay.source,
        policy=replay.policy,
        include_current_task=replay.include_current_task,
        weights=replay.weights,
        capacity=replay.capacity_samples,
    )


def _entry_spec(task: TaskConfig, sizes: Mapping[str, int]) -> EntrySpec:
    return EntrySpec(
        task=task.task,
        datasets=tuple(
            DatasetSpec(one.name, int(sizes[one.name]), one.weight, one.max_epochs)
            for one in task.train
        ),
        steps=task.steps,
        fresh_tokens=task.fresh_tokens,
        max_epochs=task.max_epochs,
        trained_before=task.trained_before,
    )

"""What a plan runs out of: samples of a dataset, rows of a buffer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from megatron_mer import _index
from megatron_mer.continual.segments import Segment, tasks_of
from megatron_mer.errors import DataError, Problem


def exhausted_datasets(index: _index.Plan, segments: Sequence[Segment]) -> Iterator[Problem]:
    """Datasets that have to give more samples than they hold within `max_epochs`.

    Looks at the last segment: what earlier ones did was decided when they were made.
    """
    last = len(segments) - 1
    for span, (place, _, segment, *_, before) in enumerate(index.spans().tolist()):
        if before or segment != last:
            continue
        entry = segments[last].spec.stream[place]
        asked_of = index.cursors_after(span).tolist()
        for at, (dataset, asked) in enumerate(zip(entry.datasets, asked_of, strict=True)):
            held = entry.sample_limit(dataset)
            if asked > held:
                epochs = asked / dataset.num_samples
                yield Problem(
                    f"stream.{place}.train.{at}",
                    f"by the end of task {entry.task!r} dataset {dataset.name!r} would have "
                    f"given {asked} samples ({epochs:.4g} epochs)",
                    f"{held}, which it holds within max_epochs "
                    f"{entry.epoch_limit(dataset):g} ({dataset.num_samples} samples)",
                    "shorten the task (steps, fresh_tokens), lower the dataset's weight, add "
                    "data, or raise max_epochs",
                )


def empty_buffer(segments: Sequence[Segment], batch: int, task: int) -> DataError:
    """The error for a batch that finds nothing to replay in the buffer.

    Args:
        segments: of the plan.
        batch: the batch.
        task: whose rows it looked for, if there is a capacity for each task.
    """
    replay = segments[-1].spec.replay
    capacity = replay.capacity if replay else None
    what = f"of task {tasks_of(segments)[task]!r} " if isinstance(capacity, Mapping) else ""
    return DataError(
        f"batch {batch}: the replay buffer holds no sample {what}that may be replayed: all that it "
        "held were displaced by the task in training. Its capacity (replay.capacity_samples, "
        f"{capacity}) is too small beside that task; give a new run a larger one, one for "
        "each task, or replay.include_current_task: true"
    )

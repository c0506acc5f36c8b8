"""What is known of a run at one moment, from its output directory alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

TaskState = Literal["before", "past", "current", "future"]


@dataclass(frozen=True)
class TaskSpan:
    """One entry of the stream."""

    entry: int
    """Its place in the stream."""
    task: str
    first_batch: int
    last_batch: int
    """The batch after its last one."""
    state: TaskState


@dataclass(frozen=True)
class Speed:
    """What the last batches took; None: not in the lines."""

    step_seconds: float
    """Mean seconds of a step, without evaluations and checkpoints."""
    tokens_per_second: float | None = None
    mfu: float | None = None
    """Model FLOPs utilisation, 0 to 1."""
    data_wait: float | None = None
    """Share of the time that waited for data, 0 to 1."""
    memory_gib: float | None = None
    """Peak of the fullest rank."""


@dataclass(frozen=True)
class Losses:
    """Training losses in nats a token; None: not finite, or no such row."""

    loss: float | None
    fresh: float | None
    replay: float | None
    mean: float | None
    """Over the last `mean_of` batches that had a finite loss."""
    mean_of: int
    grad_norm: float | None = None


@dataclass(frozen=True)
class ReptileState:
    """Where Reptile stands."""

    updates_since: int
    k: int | None
    last_step: int | None
    """Step of the last Reptile update among the lines that were read."""
    delta_norm: float | None
    delta_cosine: float | None


@dataclass(frozen=True)
class HeldOut:
    """One held-out set, in nats a token; None: there is none (yet), or it is not finite."""

    name: str
    task: str | None
    state: TaskState | None
    first: float | None
    """Before the first step."""
    best: float | None
    """The lowest at the ends of entries since its task was first trained, without the last
    evaluation."""
    now: float | None
    forgetting: float | None
    """now - best; positive is worse."""
    trend: tuple[float, ...] = ()
    """Its losses over the run, thinned."""


@dataclass(frozen=True)
class MatrixLine:
    """The held-out losses at the end of one entry."""

    label: str
    task: str | None
    losses: Mapping[str, float | None]


@dataclass(frozen=True)
class Evaluated:
    """The last evaluation."""

    step: int
    moment: str
    seconds: float | None
    mean_forgetting: float | None
    """Over the sets that have one and whose task is not in training."""


@dataclass(frozen=True)
class CheckpointState:
    """The newest checkpoint."""

    step: int
    age_seconds: float


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment. A value that the run has not written (yet) is None or empty."""

    directory: str
    name: str
    status: str
    """running, done, stopped, failed or requeue, as the run wrote it; starting: there is a
    directory and no status; absent: there is no directory."""
    reason: str = ""
    alarms: tuple[str, ...] = ()
    """What somebody should look at now."""
    notes: tuple[str, ...] = ()
    """What could not be read."""
    step: int | None = None
    """Applied updates."""
    batches: int = 0
    """Batches drawn."""
    total_batches: int | None = None
    quiet_seconds: float | None = None
    """Since the last line of a step."""
    seconds_left: float | None = None
    tasks: tuple[TaskSpan, ...] = ()
    task: str | None = None
    lr: float | None = None
    losses: Losses | None = None
    curve: tuple[tuple[float, float], ...] = ()
    """(batch, training loss) over the run, thinned."""
    speed: Speed | None = None
    reptile: ReptileState | None = None
    held_out: tuple[HeldOut, ...] = ()
    matrix: tuple[MatrixLine, ...] = ()
    evaluated: Evaluated | None = None
    max_forgetting: float | None = None
    """The bound of the configuration, nats a token."""
    checkpoint: CheckpointState | None = None
    warnings: tuple[str, ...] = ()
    """The last warnings and errors of the log, oldest first."""


@dataclass
class Curve:
    """Means over equal stretches of a run, at most so many however long it gets.

    A stretch is a power of two of batches. When they become too many, neighbours are joined.
    """

    most: int
    """Points that are kept, >= 2."""
    _stretch: int = 1
    _sums: dict[int, tuple[float, int]] = field(default_factory=dict)

    def add(self, batch: int, value: float) -> None:
        """Take a value; batches may come in any order."""
        while batch // self._stretch >= self.most:
            self._stretch *= 2
            joined: dict[int, tuple[float, int]] = {}
            for place, (total, count) in self._sums.items():
                before = joined.get(place // 2, (0.0, 0))
                joined[place // 2] = (before[0] + total, before[1] + count)
            self._sums = joined
        total, count = self._sums.get(batch // self._stretch, (0.0, 0))
        self._sums[batch // self._stretch] = (total + value, count + 1)

    def points(self) -> tuple[tuple[float, float], ...]:
        """(middle of a stretch in batches, mean), in the order of the batches."""
        return tuple(
            ((place + 0.5) * self._stretch, total / count)
            for place, (total, count) in sorted(self._sums.items())
        )


def duration(seconds: float) -> str:
    """A time in words: 8 s, 12 min, 3 h 5 min, 2 d 4 h."""
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"

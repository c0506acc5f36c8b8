"""Following a run from its output directory alone, as `tools/watch.py` does; without torch."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mer.analysis.run_logs import (
    EvaluationLog,
    StepLog,
    WarningLog,
    json_object,
    number,
    whole,
)
from megatron_mer.analysis.snapshot import (
    CheckpointState,
    Evaluated,
    HeldOut,
    MatrixLine,
    Snapshot,
    TaskSpan,
    TaskState,
    duration,
)
from megatron_mer.analysis.tail import WholeFile
from megatron_mer.continual.forgetting import ForgettingMatrix, MatrixRow
from megatron_mer.training.run_shape import RunShape

QUIET_SECONDS = 120.0  # a run may be so long without a step before it is worth a word,
SLOW_STEPS = 10.0  # or so many times its slowest recent step,
LONG_EVALUATIONS = 3.0  # or so many times its last evaluation,
STARTING_SECONDS = 600.0  # and so long before its first step.
_CHECKPOINT = re.compile(r"step_(\d+)")
_UNFINISHED = re.compile(r"step_\d+\.tmp")
_NOW = "\0now"  # stands for the task of a row that is no end of an entry; no task is called so


class RunFollower:
    """Reads what is new in a run's directory at each look. Nothing is written.

    Args:
        directory: the run's output_dir; need not be there yet, and may be replaced.
        clock: seconds since the epoch, to compare with the times of files.
        ticks: seconds that never go backwards.
    """

    def __init__(
        self,
        directory: str | Path,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self.root = Path(directory)
        self._clock, self._ticks = clock, ticks
        self._shape = RunShape(self.root)
        self._steps = StepLog(self.root / "metrics.jsonl")
        self._evaluations = EvaluationLog(self.root / "evaluations.jsonl")
        self._warnings = WarningLog(self.root / "train.log")
        self._status_file = WholeFile(self.root / "status.json")
        self._status: dict[str, Any] = {}
        self._looked: float | None = None
        self._step_at: float | None = None  # in ticks

    def look(self) -> Snapshot:
        """Read what is new and say where the run stands."""
        self._shape.read()
        content = self._status_file.changed()
        if content is not None:
            # A torn one leaves what was known; without a file nothing is known any more.
            self._status = json_object(content) or (self._status if content else {})
        grown = self._steps.read()
        self._note_growth(grown)
        self._evaluations.read()
        self._warnings.read()
        return self._snapshot()

    def _note_growth(self, grown: bool) -> None:
        now = self._ticks()
        if grown:
            age = self._age(self.root / "metrics.jsonl") or 0.0
            # What was seen to grow since the last look needs no agreement of two clocks.
            self._step_at = now - (age if self._looked is None else min(age, now - self._looked))
        elif not self._steps.batches:
            self._step_at = None
        self._looked = now

    def _snapshot(self) -> Snapshot:
        steps, shape = self._steps, self._shape
        status = self._status_word()
        quiet = None if self._step_at is None else self._ticks() - self._step_at
        tasks = shape.tasks(steps.batches, status == "done")
        scores = _Scores(self._evaluations, shape)
        task = steps.last.get("task")
        return Snapshot(
            directory=str(self.root),
            name=shape.name or self.root.name or str(self.root),
            status=status,
            reason=str(self._status.get("reason") or ""),
            alarms=tuple(self._alarms(status, quiet)),
            notes=(*shape.notes, *scores.notes, *self._unreadable()),
            step=steps.step if steps.batches else whole(self._status.get("step")),
            batches=steps.batches,
            total_batches=shape.total_batches,
            quiet_seconds=quiet,
            seconds_left=self._seconds_left() if status in ("running", "starting") else None,
            tasks=tasks,
            task=None if task is None else str(task),
            lr=number(steps.last.get("lr")),
            losses=steps.losses(),
            curve=steps.curve(),
            speed=steps.speed(),
            reptile=steps.reptile(shape.whole("reptile", "k")),
            held_out=scores.held_out(tasks),
            matrix=scores.matrix(),
            evaluated=scores.evaluated(tasks),
            max_forgetting=shape.number("evaluate.bounds", "max_forgetting"),
            checkpoint=self._checkpoint(),
            warnings=tuple(self._warnings.lines),
        )

    def _status_word(self) -> str:
        if not self._status:
            return "starting" if self.root.is_dir() else "absent"
        return str(self._status.get("status") or "starting")

    def _unreadable(self) -> list[str]:
        counts = {
            "metrics.jsonl": self._steps.unreadable,
            "evaluations.jsonl": self._evaluations.unreadable,
        }
        return [
            f"{name}: {count} unreadable {'line' if count == 1 else 'lines'} left out"
            for name, count in counts.items()
            if count
        ]

    def _age(self, path: Path) -> float | None:
        """Seconds since a file was written; None if there is none."""
        try:
            # The clock of a file server may run ahead of this machine's.
            return max(0.0, self._clock() - path.stat().st_mtime)
        except OSError:
            return None

    def _alarms(self, status: str, quiet: float | None) -> list[str]:
        if status != "running":
            return []
        alarms = self._gone()
        evaluation = number((self._evaluations.last or {}).get("seconds")) or 0.0
        patience = max(
            QUIET_SECONDS,
            SLOW_STEPS * self._steps.slowest_step(),
            LONG_EVALUATIONS * evaluation,
        )
        # The status is written at the start, before the first step, and at each checkpoint.
        started = self._age(self.root / "status.json") or 0.0
        if quiet is None or started < quiet:
            patience = max(patience, STARTING_SECONDS)
        if (started if quiet is None else min(quiet, started)) > patience:
            saving = "; a checkpoint is being written" if self._is_saving() else ""
            if quiet is None:
                alarms.append(f"no step yet, {duration(started)} after the start{saving}")
            else:
                alarms.append(f"no step for {duration(quiet)}{saving}")
        if count := self._steps.without_update:
            what = "batch" if count == 1 else f"{count} batches in a row"
            alarms.append(f"the last {what} gave no update: loss or gradient not finite")
        return alarms

    def _gone(self) -> list[str]:
        """Whether the process that wrote the status has died, if it ran on this machine."""
        pid, host = whole(self._status.get("pid")), self._status.get("host")
        if pid is None or pid <= 0 or host != platform.node():
            return []
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return [f"process {pid} is gone and has left no reason; start the run again to resume"]
        except OSError:
            pass
        return []

    def _seconds_left(self) -> float | None:
        """To the end of the stream, with the evaluations on the way if one was timed."""
        speed, total = self._steps.speed(), self._shape.total_batches
        if speed is None or total is None:
            return None
        batches = self._steps.batches
        evaluation = number((self._evaluations.last or {}).get("seconds")) or 0.0
        steps = max(0, total - batches) * speed.step_seconds
        return steps + evaluation * self._shape.evaluations_left(batches)

    def _checkpoint(self) -> CheckpointState | None:
        """The newest checkpoint that is whole: one that is being written has another name."""
        names = self._checkpoint_names()
        found = [match for name in names if (match := _CHECKPOINT.fullmatch(name))]
        if not found:
            return None
        newest = max(found, key=lambda match: int(match[1]))
        age = self._age(self.root / "checkpoints" / newest[0] / "manifest.json")
        return None if age is None else CheckpointState(int(newest[1]), age)

    def _is_saving(self) -> bool:
        return any(_UNFINISHED.fullmatch(name) for name in self._checkpoint_names())

    def _checkpoint_names(self) -> list[str]:
        try:
            return os.listdir(self.root / "checkpoints")
        except OSError:
            return []


class _Scores:
    """What the evaluations up to now say of each held-out set, as if the run ended here."""

    def __init__(self, log: EvaluationLog, shape: RunShape) -> None:
        self._log = log
        self.notes: tuple[str, ...] = ()
        self._set_tasks: dict[str, str] = {}
        self._rows: list[MatrixRow] = []
        self._last: Mapping[str, float | None] = {}
        self._forgetting: dict[str, float | None] = {}
        if log.last is None:
            return
        self._last = log.last["losses"]
        set_tasks = shape.set_tasks or {name: name for name in self._last}
        # A run whose first evaluation is lost has an empty row 0.
        empty = {"losses": dict.fromkeys(set_tasks)}
        rows = [_row(log.start or empty), *(_row(line) for line in log.ends)]
        at_row = log.last is log.start or log.last in log.ends[-1:]
        now = [] if at_row else [MatrixRow(None, _NOW, _losses(self._last))]
        try:
            scores = ForgettingMatrix([*rows, *now], set_tasks, shape.trained_before).scores()
        except ValueError as error:
            self.notes = (f"evaluations.jsonl does not fit config.yaml: {error}",)
            return
        self._set_tasks, self._rows = set_tasks, rows
        self._forgetting = {name: number(score.forgetting) for name, score in scores.items()}

    def held_out(self, tasks: Sequence[TaskSpan]) -> tuple[HeldOut, ...]:
        """Each held-out set, in the order of the stream."""
        states: dict[str, TaskState] = {}
        for state in ("future", "before", "past", "current"):
            states.update({span.task: span.state for span in tasks if span.state == state})
        found = []
        for name, task in self._set_tasks.items():
            now, forgetting = self._last.get(name), self._forgetting[name]
            found.append(
                HeldOut(
                    name=name,
                    task=task,
                    state=states.get(task),
                    first=number(self._rows[0].losses.get(name)),
                    best=None if now is None or forgetting is None else now - forgetting,
                    now=now,
                    forgetting=forgetting,
                    trend=self._log.trend(name),
                )
            )
        return tuple(found)

    def matrix(self) -> tuple[MatrixLine, ...]:
        """The rows that have been measured."""
        return tuple(
            MatrixLine(
                row.label,
                row.task,
                {name: number(row.losses.get(name)) for name in self._set_tasks},
            )
            for row in self._rows
            if any(number(loss) is not None for loss in row.losses.values())
        )

    def evaluated(self, tasks: Sequence[TaskSpan]) -> Evaluated | None:
        """The last evaluation."""
        last = self._log.last
        if last is None:
            return None
        current = {span.task for span in tasks if span.state == "current"}
        known = [
            value
            for name, value in self._forgetting.items()
            if value is not None and self._set_tasks[name] not in current
        ]
        return Evaluated(
            step=whole(last.get("step")) or 0,
            moment=str(last.get("moment") or ""),
            seconds=number(last.get("seconds")),
            mean_forgetting=sum(known) / len(known) if known else None,
        )


def _row(line: Mapping[str, Any]) -> MatrixRow:
    task = line.get("task")
    return MatrixRow(
        whole(line.get("entry")), None if task is None else str(task), _losses(line["losses"])
    )


def _losses(losses: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float("nan") if value is None else value for name, value in losses.items()}

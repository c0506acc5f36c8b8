"""Metric services beside the run's own files: fed from a thread, never in the way of training.

What a service has is brought in line with the files at each start. They are cut to the checkpoint
that the run resumes from, so their lines are the truth: those that a service does not have yet are
sent again, and steps that it recorded before a crash are not sent twice (a resumed run trains them
to the same bits).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from megatron_mer.log import get_logger
from megatron_mer.training.tracker_rows import Row, evaluation_row, metrics_row

logger = get_logger(__name__)

_FLUSH_SECONDS = 30.0
"""How long a checkpoint waits for a service at most."""
_WAITING_ROWS = 10_000
"""Rows that wait for a slow service at most; then its thread's backlog holds the step up."""


class Tracker(Protocol):
    """A metric service, for rank 0."""

    name: str
    """Section of the configuration."""
    last_step: int
    """The last step that the service has, whole; -1: none."""

    def log(self, step: int, row: Row) -> None:
        """Record the numbers of a step; steps come once each and ascending."""

    def flush(self) -> None:
        """Make what was logged outlive this process."""

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """End the run there.

        Args:
            summary: `summary.json` of a run that is done; None for one that ended early.
        """


class Trackers:
    """All metric services of a run; without any every call does nothing.

    A service that fails is left out from then on, with a warning: the run's own files have all.

    Args:
        trackers: open services.
    """

    def __init__(self, trackers: Iterable[Tracker] = ()) -> None:
        self._workers = [_Worker(tracker) for tracker in trackers]
        self._step = -1
        self._row: Row = {}

    def catch_up(
        self, metrics: Iterable[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
    ) -> None:
        """Send what the files hold and a service does not have.

        Args:
            metrics: lines of metrics.jsonl, read as they are asked for.
            evaluations: lines of evaluations.jsonl.
        """
        if self._workers:
            for step, row in _merged(metrics, evaluations):
                self._add(step, row)

    def metrics(self, line: Mapping[str, Any]) -> None:
        """Take a line of metrics.jsonl; a batch without an update has no step and is left out."""
        if self._workers and line["step"] is not None:
            self._add(int(line["step"]), metrics_row(line))

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """Take a line of evaluations.jsonl."""
        if self._workers:
            self._add(int(line["step"]), evaluation_row(line))

    def _add(self, step: int, row: Row) -> None:
        # A step goes out whole, with the evaluation that follows it.
        if step != self._step:
            self._send()
            self._step = step
        self._row.update(row)

    def _send(self) -> None:
        row, self._row = self._row, {}
        for worker in self._workers if row else ():
            worker.log(self._step, row)

    def flush(self) -> None:
        """Make all steps so far outlive this process: a checkpoint builds on it."""
        self._send()
        for worker in self._workers:
            worker.flush()

    def finish(self, summary: Mapping[str, Any] | None = None) -> None:
        """End the run in every service; may be called twice.

        Args:
            summary: `summary.json` of a run that is done; None for one that ended early.
        """
        self._send()
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.finish(summary)


def _merged(
    metrics: Iterable[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[int, Row]]:
    """Rows of both files by ascending step."""
    waiting = sorted(evaluations, key=lambda line: int(line["step"]))
    at = 0
    for line in metrics:
        if line["step"] is None:
            continue
        while at < len(waiting) and int(waiting[at]["step"]) < int(line["step"]):
            yield int(waiting[at]["step"]), evaluation_row(waiting[at])
            at += 1
        yield int(line["step"]), metrics_row(line)
    for line in waiting[at:]:
        yield int(line["step"]), evaluation_row(line)


class _Worker:
    """One service and the thread that talks to it."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._broken = False
        self._work: queue.Queue[Callable[[], None] | threading.Event | None]
        self._work = queue.Queue(_WAITING_ROWS)
        self._thread = threading.Thread(
            target=self._run, name=f"tracker-{tracker.name}", daemon=True
        )
        self._thread.start()

    def log(self, step: int, row: Row) -> None:
        if step > self._tracker.last_step and not self._broken:
            self._work.put(lambda: self._tracker.log(step, row))

    def flush(self) -> None:
        done = threading.Event()
        self._work.put(self._tracker.flush)
        self._work.put(done)
        if not done.wait(_FLUSH_SECONDS):
            logger.warning(
                "%s did not take its metrics within %.0f s; training goes on",
                self._tracker.name,
                _FLUSH_SECONDS,
            )

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        self._work.put(lambda: self._tracker.finish(summary))
        self._work.put(None)
        self._thread.join(_FLUSH_SECONDS)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                if isinstance(work, threading.Event):
                    work.set()
                elif not self._broken:
                    work()
            except Exception as error:  # noqa: BLE001 - no service may end a run
                self._broken = True
                logger.warning(
                    "%s is left out from here on: %s: %s; metrics.jsonl has everything, and the "
                    "next start sends what is missing",
                    self._tracker.name,
                    type(error).__name__,
                    error,
                )

"""Worker processes: units to them, progress back, and an end that waits for nobody."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from megatron_mer.data.corpus.reading import Unit
from megatron_mer.data.corpus.worker import Cancelled, JobSettings, UnitWorker
from megatron_mer.data.tokenizers import load_tokenizer
from megatron_mer.data.tokenizers.fast import Choice, GigatokenEncoder
from megatron_mer.errors import DataError

POLL_SECONDS = 0.1


class WorkerPool:
    """Processes that make the shards of units; use it as a context manager.

    Args:
        settings: of the job.
        folder: for the shards.
        choice: which library gives the ids.
        processes: how many.
    """

    def __init__(self, settings: JobSettings, folder: Path, choice: Choice, processes: int) -> None:
        # A fresh interpreter for each: forking a process that has threads can hang.
        context = multiprocessing.get_context("spawn")
        self._progress = context.SimpleQueue()
        self._stop = context.Event()
        fast = choice.fast is not None
        self._pool = ProcessPoolExecutor(
            processes,
            mp_context=context,
            initializer=_start_worker,
            initargs=(settings, folder, fast, choice.reason, self._progress, self._stop),
        )

    def run(self, units: Sequence[Unit], report: Callable[[int, int, int], None]) -> Iterator[None]:
        """Make all shards; yields now and then, so that the caller can use what is finished.

        Raises:
            DataError: a unit fails, or a worker died.
        """
        try:
            waiting: set[Future[None]] = {self._pool.submit(_work, unit) for unit in units}
            while waiting:
                done, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
                while not self._progress.empty():
                    report(*self._progress.get())
                for future in done:
                    future.result()
                yield
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died, most likely killed for its memory; use fewer workers or "
                "less --worker-memory. Finished shards stay; the same command goes on"
            ) from error

    def __enter__(self) -> WorkerPool:
        """Return the pool."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Tell the workers to end, and do not wait for them."""
        self._stop.set()
        # An interrupt while a worker was being started leaves one that never ends.
        self._pool.shutdown(wait=False, cancel_futures=True)


_worker: list[UnitWorker] = []
"""A worker process's own: made once, by its initializer."""


def _start_worker(
    settings: JobSettings, folder: Path, fast: bool, reason: str, progress: Any, stop: Any
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent decides.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tokenizer = load_tokenizer(settings.tokenizer)
    choice = Choice(GigatokenEncoder(tokenizer) if fast else None, reason)

    def stopped() -> None:
        if stop.is_set():
            raise Cancelled

    def report(source: int, position: int, documents: int) -> None:
        progress.put((source, position, documents))

    _worker.append(UnitWorker(settings, folder, tokenizer, choice, report, stopped))


def _end_with_parent() -> None:
    """A killed parent leaves nobody to close the queue: its workers would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(unit: Unit) -> None:
    _worker[0].run(unit)

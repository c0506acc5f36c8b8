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
from typing import Any, BinaryIO

from megatron_mer.data.corpus.reading import Unit
from megatron_mer.data.corpus.worker import Cancelled, JobSettings, UnitWorker
from megatron_mer.data.tokenizers import Tokenizer, load_tokenizer
from megatron_mer.data.tokenizers.fast import Choice, GigatokenEncoder
from megatron_mer.errors import DataError

POLL_SECONDS = 0.1


class WorkerPool:
    """Processes that make the shards of units; use it as a context manager.

    Args:
        settings: of the job.
        folder: for the shards.
        tokenizer: that the settings name.
        choice: which library gives the ids.
        processes: how many.
        locked: a file that only this process may keep open, with nothing in its buffer.
    """

    def __init__(
        self,
        settings: JobSettings,
        folder: Path,
        tokenizer: Tokenizer,
        choice: Choice,
        processes: int,
        locked: BinaryIO,
    ) -> None:
        # A process that has threads (of pyarrow, s3fs, a library of linear algebra) can hang once
        # it is forked: then a fresh interpreter for each, which loads the tokenizer again.
        fork = _has_one_thread()
        context = multiprocessing.get_context("fork" if fork else "spawn")
        self._progress = context.SimpleQueue()
        self._stop = context.Event()
        expected = None if choice.fast is None else choice.fast.expected
        self._pool = ProcessPoolExecutor(
            processes,
            mp_context=context,
            initializer=_start_worker,
            initargs=(
                settings,
                folder,
                (tokenizer, choice, locked) if fork else (expected, choice.reason, None),
                self._progress,
                self._stop,
            ),
        )

    def run(
        self,
        units: Sequence[Unit],
        report: Callable[[int, int, int], None],
        begun: Callable[[], None],
    ) -> Iterator[None]:
        """Make all shards; yields now and then, so that the caller can use what is finished.

        Args:
            units: what is to be done.
            report: progress.
            begun: called once the workers are there: before, this process may not start threads.

        Raises:
            DataError: a unit fails, or a worker died.
        """
        try:
            waiting: set[Future[None]] = {self._pool.submit(_work, unit) for unit in units}
            begun()
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


def _has_one_thread() -> bool:
    """Whether this process has no thread but this one, those of libraries included."""
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def _start_worker(
    settings: JobSettings,
    folder: Path,
    tools: tuple[Tokenizer, Choice, BinaryIO] | tuple[int | None, str, None],
    progress: Any,
    stop: Any,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent decides.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if tools[2] is not None:
        tokenizer, choice, locked = tools
        locked.close()  # Else its lock would outlive the parent.
    else:
        expected, reason, _ = tools
        tokenizer = load_tokenizer(settings.tokenizer, settings.append_eod)
        fast = None if expected is None else GigatokenEncoder(tokenizer, expected)
        choice = Choice(fast, reason)

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

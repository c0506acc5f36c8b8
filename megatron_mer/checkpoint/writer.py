"""Writing checkpoints beside training: it waits for a copy in memory, not for the disk.

A write has two parts. First every rank writes its files, from a thread; once all have, rank 0
writes the manifest and gives the checkpoint its name, from a thread too. That all have is known
without a collective of its own: each rank's word goes with the numbers that the ranks share after
every step (`report`, `advance`).
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mer.checkpoint.files import remove_directory
from megatron_mer.checkpoint.layout import TEMPORARY, Fragment, step_name
from megatron_mer.checkpoint.save import (
    WriteStopped,
    commit,
    prepare,
    prune,
    write_manifest,
    write_rank,
)
from megatron_mer.checkpoint.snapshot import Snapshot
from megatron_mer.errors import CheckpointError
from megatron_mer.log import get_logger

logger = get_logger(__name__)

FirstFailure = Callable[[str | None], str | None]

FAILED, BUSY, READY = -1.0, 0.0, 1.0
"""What a rank reports of its work."""

_LONG_WAIT = 1.0
"""Seconds of waiting for the checkpoint before that are worth a warning."""


@dataclass
class _Write:
    """A checkpoint on its way to the disk."""

    step: int
    permanent: bool
    final: Path
    run_state: bytes = b""
    """JSON; on rank 0 only."""
    written: bool = False
    """Every rank's files are there; rank 0 gives it its name."""
    stall: float = 0.0
    """Seconds that training waited for the copy."""
    worked: float = 0.0
    """Seconds that this rank wrote after that."""
    begin: float = 0.0

    @property
    def temporary(self) -> Path:
        return self.final.with_name(self.final.name + TEMPORARY)


class _WatchedStop(threading.Event):
    """Whether to stop; whoever asks, once a piece, shows that the write goes on."""

    def __init__(self, progress: Callable[[], None]) -> None:
        super().__init__()
        self._progress = progress

    def is_set(self) -> bool:
        """Whether the write is to end."""
        self._progress()
        return super().is_set()


class CheckpointWriter:
    """Writes this rank's part of each checkpoint in the background, one checkpoint at a time.

    At any moment `find_latest` gives the previous checkpoint or the new one, whole. A failure on
    one rank (a full disk) is an error on all of them, at the next `advance`, `save` or `wait`;
    older checkpoints stay as they are.

    Args:
        directory: Where checkpoints live, on a file system that all ranks share; made when missing.
        rank: This rank.
        world_size: Number of ranks.
        first_failure: A collective: every rank gives why it failed, or None, and gets the reason of
            the first rank that did.
        keep_last: Newest checkpoints to keep, >= 1. Those with a larger step than a new one are of
            a future that this run has left, and go.
        keep_every: Checkpoints whose step is a multiple stay too.
        snapshot_bytes: Host memory to take at once for the copy of this rank's state.
        pin_memory: The state is on a GPU: take page-locked memory.
        committed: Called on rank 0 with the step of a checkpoint that is whole on the disk.
        in_use: Gives on rank 0 the name of a checkpoint that must not be removed now.
        progress: Called in the thread as each piece goes to the disk.
        measured: Called with the seconds that this rank's part of a whole checkpoint took.

    Raises:
        CheckpointError: on all ranks; the directory cannot be written, or memory is short.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        rank: int,
        world_size: int,
        first_failure: FirstFailure,
        keep_last: int = 2,
        keep_every: int | None = None,
        snapshot_bytes: int = 0,
        pin_memory: bool = False,
        committed: Callable[[int], None] = lambda step: None,
        in_use: Callable[[], str | None] = lambda: None,
        progress: Callable[[], None] = lambda: None,
        measured: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._root = Path(directory)
        self._rank = rank
        self._world_size = world_size
        self._first_failure = first_failure
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._committed = committed
        self._in_use = in_use
        self._measured = measured
        self._write: _Write | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._stop = _WatchedStop(progress)
        try:
            if keep_last < 1:
                raise ValueError(f"keep_last is {keep_last}, it must be at least 1")
            if rank == 0:
                prepare(self._root)
            self._snapshot = Snapshot(snapshot_bytes, pin_memory)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
            self._failure = error
        self._agree(f"checkpoints cannot be written to {self._root}")

    def save(
        self,
        step: int,
        fragments: Iterable[Fragment],
        run_state: Mapping[str, Any],
        permanent: bool = False,
        first: Callable[[], None] | None = None,
    ) -> Path:
        """Copy this rank's part and begin to write it. Collective if one is still being written.

        Args:
            step: Applied optimizer updates, >= 0. A checkpoint of the same step is replaced: a
                skipped batch advances the data but not the step.
            fragments: What this rank owns; one a kind and parameter.
            run_state: JSON values that are the same on all ranks; rank 0's are written.
            permanent: This one stays for good.
            first: Called in this rank's thread before anything is written: returns when what the
                checkpoint refers to outside of itself is on the disk, and raises if it cannot be.

        Returns:
            The directory that the checkpoint gets.

        Raises:
            CheckpointError: on all ranks when the write before this one failed on any.
        """
        self._wait_for_the_last()
        begin = time.perf_counter()
        write = _Write(step, permanent, self._root / step_name(step), begin=begin)
        self._write = write
        try:
            copies = self._snapshot.take(fragments)
            if self._rank == 0:
                write.run_state = json.dumps(run_state, indent=1, allow_nan=False).encode()
        except Exception as error:  # noqa: BLE001 - told to all ranks at the next step
            self._failure = error
        else:
            self._start(lambda: self._write_files(write, copies, first))
        write.stall = time.perf_counter() - begin
        return write.final

    def report(self) -> float:
        """What this rank has to say of the write, for `advance`: FAILED, BUSY or READY."""
        if self._failure is not None:
            return FAILED
        return BUSY if self._thread is not None and self._thread.is_alive() else READY

    def advance(self, reports: Sequence[float]) -> None:
        """Go on with the write as far as all ranks are. Costs nothing unless one failed.

        Args:
            reports: every rank's `report` of one moment, the same on all ranks.

        Raises:
            CheckpointError: on all ranks when any failed; its cause is the failing rank's error.
        """
        if self._write is None:
            return
        if min(reports) == FAILED:
            self._stop.set()
            self._join()
            self._agree_on_write()
        elif min(reports) == READY:
            self._go_on()

    def wait(self) -> None:
        """Return when the last checkpoint is whole on the disk. Collective.

        Raises:
            CheckpointError: as `advance`.
        """
        while self._write is not None:
            self._join()
            self._agree_on_write()
            self._go_on()

    def close(self) -> None:
        """Give up what is not written, and return when nothing writes any more. No collective."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._write is not None:
            self._remove(self._write.temporary)

    def _wait_for_the_last(self) -> None:
        """One copy in memory at most: the next one waits."""
        if self._write is None:
            return
        begin, name = time.perf_counter(), self._write.final.name
        self.wait()
        seconds = time.perf_counter() - begin
        if self._rank == 0 and seconds > _LONG_WAIT:
            logger.warning(
                "training waited %.1f s for the write of %s before the next checkpoint; write "
                "less often (checkpoint.every_steps) or to a faster disk",
                seconds,
                name,
            )

    def _start(self, work: Callable[[], None]) -> None:
        write = self._write

        def run() -> None:
            begin = time.perf_counter()
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - the main thread raises it
                self._failure = error
            if write is not None:
                write.worked += time.perf_counter() - begin

        # A daemon: a process that is being stopped does not wait for the disk.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def _write_files(
        self, write: _Write, copies: Sequence[Fragment], first: Callable[[], None] | None
    ) -> None:
        if first is not None:
            first()
        write_rank(write.temporary, copies, self._rank, self._world_size, self._stop)

    def _name(self, write: _Write) -> None:
        write_manifest(
            write.temporary, write.step, self._world_size, write.run_state, write.permanent
        )
        commit(self._root, write.temporary, write.final)
        prune(self._root, write.step, self._keep_last, self._keep_every, self._in_use())

    def _go_on(self) -> None:
        """Every rank is ready: name the checkpoint, or, if that is done, be done with it."""
        write = self._write
        self._thread = None
        if write is None:
            return
        if not write.written:
            write.written = True
            if self._rank == 0:
                self._start(lambda: self._name(write))
            return
        self._write = None
        self._measured(write.stall + write.worked)
        if self._rank == 0:
            logger.info(
                "%s is written: %.1f s, of which training waited %.2f s",
                write.final.name,
                time.perf_counter() - write.begin,
                write.stall,
            )
            self._committed(write.step)

    def _join(self) -> None:
        """Wait for this rank's work; what is no `Exception` ends this rank at once."""
        if self._thread is not None:
            self._thread.join()
        if self._failure is not None and not isinstance(self._failure, Exception):
            raise self._failure

    def _remove(self, temporary: Path) -> None:
        """Give a full disk its space back, so that there is room to say what happened."""
        if self._rank == 0 and temporary.exists():
            with contextlib.suppress(OSError):
                remove_directory(temporary)

    def _agree_on_write(self) -> None:
        write = self._write
        if write is not None:
            self._agree(f"{write.final} was not written", write.temporary)

    def _agree(self, what: str, temporary: Path | None = None) -> None:
        """Raise on all ranks what any has failed with. Collective."""
        own = None if isinstance(self._failure, WriteStopped) else self._failure
        reason = self._first_failure(f"rank {self._rank}: {own}" if own else None)
        if reason is None:
            return
        self._write = None
        if temporary is not None:  # No rank writes any more.
            self._remove(temporary)
        raise CheckpointError(
            f"{what} ({reason}); older checkpoints are whole. "
            "Check the space and the rights there, then start again: the run resumes."
        ) from own


def save_checkpoint(
    directory: str | os.PathLike[str],
    step: int,
    fragments: Iterable[Fragment],
    run_state: Mapping[str, Any],
    *,
    rank: int,
    world_size: int,
    first_failure: FirstFailure,
    keep_last: int = 2,
    keep_every: int | None = None,
    permanent: bool = False,
) -> Path:
    """Write one checkpoint and wait until it is on the disk. Collective.

    The arguments are those of `CheckpointWriter` and its `save`.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: on all ranks when any failed; its cause is the failing rank's exception.
    """
    writer = CheckpointWriter(
        directory,
        rank=rank,
        world_size=world_size,
        first_failure=first_failure,
        keep_last=keep_last,
        keep_every=keep_every,
    )
    final = writer.save(step, fragments, run_state, permanent)
    writer.wait()
    return final

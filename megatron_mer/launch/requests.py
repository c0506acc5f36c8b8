"""What a running training can be asked for: by signals, by files, and by the end of its job."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Final, Literal

from megatron_mer.errors import LaunchError, Problem
from megatron_mer.log import get_logger

SAVE, STOP = "SAVE", "STOP"
"""Names of the files in output_dir that ask."""
JOB_END: Final = "SLURM_JOB_END_TIME"

# What a checkpoint is taken to need before the first one was measured, in bytes a second.
_RANK_SPEED: Final = 100e6
_DISK_SPEED: Final = 1e9
_STEPS_OF_LATE: Final = 100

logger = get_logger(__name__)

Effect = Literal["nothing", "save", "requeue", "stop"]


class Request(IntEnum):
    """Who asks; of several, the largest counts.

    All of them lead to a checkpoint, so the smaller ones are answered with it.
    """

    NONE = 0
    SIGUSR2 = 1
    SAVE_FILE = 2
    SIGUSR1 = 3
    SIGTERM = 4
    JOB_END = 5
    STOP_FILE = 6

    @property
    def effect(self) -> Effect:
        """What follows from it."""
        if self in (Request.SIGUSR2, Request.SAVE_FILE):
            return "save"
        if self is Request.STOP_FILE:
            return "stop"
        return "requeue" if self else "nothing"

    @property
    def text(self) -> str:
        """What asked, for the log and for status.json."""
        by_file = {Request.SAVE_FILE: SAVE, Request.STOP_FILE: STOP}
        if self in by_file:
            return f"the file {by_file[self]}"
        return (
            f"the end of the job ({JOB_END})" if self is Request.JOB_END else f"signal {self.name}"
        )


_SIGNALS: Final = {
    signal.SIGUSR2: Request.SIGUSR2,
    signal.SIGUSR1: Request.SIGUSR1,
    signal.SIGTERM: Request.SIGTERM,
}


class Requests:
    """Collects what one rank is asked for until the next step asks it.

    Args:
        job_end: when the job ends, seconds since the epoch; None: not known.
        folder: where the files are looked for, on one rank; None: on no other.
    """

    def __init__(
        self,
        job_end: float | None = None,
        folder: Path | None = None,
    ) -> None:
        self.job_end = job_end
        self.folder = folder
        self._asked = Request.NONE
        self._saving = False
        self._came = -1

    def listen(self, *signals: signal.Signals) -> None:
        """Take signals from now on; without this they end the process. For the main thread."""
        if self._came < 0:
            self._came, written = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        for number in signals or tuple(_SIGNALS):
            signal.signal(number, self._heard)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        # No log line: the signal may have come in the middle of one.
        self._asked = max(self._asked, _SIGNALS[signal.Signals(number)])

    def term_came(self) -> bool:
        """Whether SIGTERM came since this was last asked; for a thread.

        The interpreter calls handlers in the main thread only, which may wait for a dead rank
        outside of it. The signals' numbers are written into a pipe at once.
        """
        try:
            return self._came >= 0 and signal.SIGTERM in os.read(self._came, 4096)
        except BlockingIOError:
            return False

    def now(self, seconds_needed: float) -> Request:
        """What is asked for at this moment.

        Args:
            seconds_needed: from now to a whole checkpoint, if it is asked for one step later.
        """
        found = [self._asked]
        if self.job_end is not None and time.time() + seconds_needed >= self.job_end:
            found.append(Request.JOB_END)
        if self.folder is not None:
            for name, request in ((SAVE, Request.SAVE_FILE), (STOP, Request.STOP_FILE)):
                if (self.folder / name).exists() and not (name == SAVE and self._saving):
                    found.append(request)
        return max(found)

    def saving(self) -> None:
        """A checkpoint begins, which answers all that asks for no more than that."""
        self._saving = True
        if self._asked == Request.SIGUSR2:
            self._asked = Request.NONE

    def saved(self) -> None:
        """That checkpoint is whole."""
        self._saving = False
        self._remove(SAVE)

    def stopped(self) -> None:
        """The run ends as it was asked to."""
        self._remove(SAVE, STOP)

    def _remove(self, *names: str) -> None:
        if self.folder is not None:
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    (self.folder / name).unlink()


class Pace:
    """How long the parts of a run take, so that its end comes early enough.

    Args:
        margin: seconds to spare.
        rank_bytes: of this rank's part of a checkpoint.
        world_size: number of ranks.
    """

    def __init__(self, margin: float, rank_bytes: int = 0, world_size: int = 1) -> None:
        self._margin = margin
        self._estimate = max(rank_bytes / _RANK_SPEED, rank_bytes * world_size / _DISK_SPEED)
        self._steps: deque[float] = deque(maxlen=_STEPS_OF_LATE)
        self._evaluation = 0.0
        self._checkpoint: float | None = None

    def step(self, seconds: float) -> None:
        """A step took so long."""
        self._steps.append(seconds)

    def evaluation(self, seconds: float) -> None:
        """An evaluation took so long."""
        self._evaluation = max(self._evaluation, seconds)

    def checkpoint(self, seconds: float) -> None:
        """A checkpoint took so long, from its beginning to its name."""
        self._checkpoint = max(self._checkpoint or 0.0, seconds)

    @property
    def longest_step(self) -> float | None:
        """Of the last hundred, in seconds; None before the first."""
        return max(self._steps, default=None)

    @property
    def seconds_needed(self) -> float:
        """From before a step to a whole checkpoint that is asked for before the next one.

        Two steps and what may be evaluated between them, then the checkpoint, and the one before it
        that may still be on its way. Until one was measured a checkpoint counts with 100 MB/s a
        rank and 1 GB/s in all.
        """
        checkpoint = self._estimate if self._checkpoint is None else self._checkpoint
        steps = 2 * (self.longest_step or 0.0)
        return steps + self._evaluation + 2 * checkpoint + self._margin


def job_end(environ: Mapping[str, str]) -> float | None:
    """When the job ends, in seconds since the epoch; None: it is not said.

    A time that is past is left over from another job.

    Raises:
        LaunchError: what is said is no time.
    """
    text = environ.get(JOB_END, "")
    if not text:
        return None
    if not text.isdecimal():
        given, allowed = f"given {text!r}", "whole seconds since the epoch"
        raise LaunchError([Problem(JOB_END, given, allowed, "unset it if nothing ends the run")])
    if float(text) < time.time():
        logger.info("%s is %s, which is past: it is ignored", JOB_END, text)
        return None
    return float(text)

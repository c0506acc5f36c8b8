"""A thread that ends a process which stands still, and says where it stands."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

TICK: Final = 1.0
"""Longest time between two looks, seconds."""
SECONDS_TO_TELL: Final = 5.0
"""How long one who ends waits for the others to speak too."""
SECONDS_AFTER_TERM: Final = 10.0
"""How long a step may go on after SIGTERM, at least: a launcher sends it too when a rank died."""


class Watchdog:
    """Ends the process when nothing moves for too long.

    It counts the time in its own looks: a process that was stopped and goes on, as a suspended job
    does, has not stood still.

    Args:
        rank: this rank, for what is printed.
        limit: seconds without progress; None: any number.
        first_limit: the same until `trained` is called, if it is more.
        tell: told why, before the process ends: notes it, and tells the other ranks. It may hang.
        term_came: whether SIGTERM came since it was last asked.
        leave: ends the process with an exit code.
    """

    def __init__(
        self,
        rank: int,
        limit: float | None,
        first_limit: float,
        tell: Callable[[str], None],
        term_came: Callable[[], bool] = lambda: False,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self._rank = rank
        self._limit = limit
        self._now = None if limit is None else max(limit, first_limit)
        self._tell = tell
        self._term_came = term_came
        self._leave = leave
        self._idle = 0.0
        self._longest_step: float | None = None
        self._term: float | None = None
        self._stop = threading.Event()
        self._tick = min(TICK, (limit or TICK) / 4)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def progress(self) -> None:
        """Something was done."""
        self._idle = 0.0

    def step_begins(self, longest: float | None) -> None:
        """A step begins.

        Args:
            longest: how long one took of late, seconds; None: none is known.
        """
        self._idle = 0.0
        self._longest_step = longest

    def step_ends(self) -> None:
        """A step is done: it was not waiting for a rank that died."""
        self._idle = 0.0
        self._longest_step = self._term = None
        self._now = self._limit

    def close(self) -> None:
        """Watch no more: what follows takes as long as it takes."""
        self._stop.set()

    def say_and_leave(self, text: str, stacks: bool = False) -> None:
        """End the process after a last word, unless it ends by itself in the meantime.

        Args:
            text: why.
            stacks: print where every thread stands.
        """
        where = f"; this is where rank {self._rank} stands" if stacks else ""
        sys.stderr.write(f"[rank {self._rank}] {text}{where}\n")
        sys.stderr.flush()
        if stacks:
            faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
        telling = threading.Thread(target=self._tell, args=(text,), daemon=True)
        telling.start()
        # The others print where they stand before a launcher ends them.
        end = time.monotonic() + SECONDS_TO_TELL
        telling.join(SECONDS_TO_TELL)
        if stacks:
            time.sleep(max(0.0, end - time.monotonic()))
        self._leave(1)

    def _hurry(self) -> None:
        """SIGTERM came. It asks for a checkpoint, or it means that another rank has died."""
        if self._term is None and self._longest_step is not None:
            self._term = time.monotonic() + max(SECONDS_AFTER_TERM, 2 * self._longest_step)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self._tick):
            now = time.monotonic()
            self._idle += min(now - last, 2 * self._tick)
            last = now
            if self._term_came():
                self._hurry()
            term, limit = self._term, self._now
            if term is not None and now > term:
                text = "SIGTERM came and the step does not end: another rank is gone"
                self.say_and_leave(text)
                return
            if limit is not None and self._idle > limit:
                text = f"nothing moved for {limit:g} s (launch.watchdog_seconds)"
                self.say_and_leave(text, stacks=True)
                return

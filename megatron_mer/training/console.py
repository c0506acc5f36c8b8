"""The progress bar of a terminal. Elsewhere there are only the lines of the log."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from megatron_mer.log import ROOT

REFRESH_SECONDS = 0.1
WINDOW = 50  # steps of the moving average


class RemainingTime:
    """Time left, from a moving average over the last steps.

    It counts wall time: evaluations and checkpoints are in it as far as they fell into the window.

    Args:
        total: Steps of the whole run.
        clock: Seconds, never backwards.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque(maxlen=WINDOW + 1)

    def restart(self, step: int) -> None:
        """Forget earlier steps: a resumed run has a speed of its own."""
        self._marks.clear()
        self.update(step)

    def update(self, step: int) -> None:
        """Note that this many steps are done."""
        self._marks.append((self._clock(), step))

    def seconds(self) -> float | None:
        """Seconds to the end; None before the first step after a start."""
        if not self._marks:
            return None
        (begin, first), (now, last) = self._marks[0], self._marks[-1]
        if last <= first:
            return None
        return (now - begin) / (last - first) * max(0, self._total - last)


class Progress:
    """One line at the bottom of a terminal: task, bar, step, loss, tokens a second, time left.

    The lines of the log go above it. Where the stream is no terminal nothing is drawn. The bar is
    drawn by `update` itself, without a thread.

    Args:
        total_steps: Steps of the whole run.
        enabled: False draws nothing; only one rank of a run should.
        stream: Where to draw; default: standard error, where the log goes too.
    """

    def __init__(
        self, total_steps: int, enabled: bool = True, stream: TextIO | None = None
    ) -> None:
        self._total = total_steps
        self._remaining = RemainingTime(total_steps)
        self._stream = stream if stream is not None else sys.stderr
        self._enabled = enabled and _is_terminal(self._stream)
        self._bar: Bar | None = None
        self._drawn = 0.0
        self._diverted: list[tuple[logging.StreamHandler[TextIO], TextIO]] = []

    def start(self, step: int) -> None:
        """Show the bar.

        Args:
            step: Steps that are done already, > 0 in a resumed run.
        """
        self._remaining.restart(step)
        if not self._enabled or self._bar is not None:
            return
        console = Console(file=self._stream)
        self._bar = _bar(console)
        self._bar.add_task(
            "starting", total=self._total, completed=step, loss="", speed="", left=""
        )
        self._divert(console)
        self._bar.start()
        self._bar.refresh()

    def update(self, step: int, task: str, loss: float, tokens_per_second: float) -> None:
        """Show a finished step.

        Args:
            step: Steps that are done.
            task: Task in training.
            loss: Nats a token; NaN for a batch that was skipped.
            tokens_per_second: Of the whole run, all ranks.
        """
        self._remaining.update(step)
        if self._bar is None:
            return
        self._bar.update(
            self._bar.task_ids[0],
            description=task,
            completed=step,
            loss="skipped" if math.isnan(loss) else f"loss {loss:.3f}",
            speed=f"{_compact(tokens_per_second)} tokens/s",
            left=f"{_clock_text(self._remaining.seconds())} left",
        )
        now = time.monotonic()
        if now - self._drawn >= REFRESH_SECONDS:
            self._drawn = now
            self._bar.refresh()

    def stop(self) -> None:
        """Leave the bar as it stands and give the log its stream back; may be called twice."""
        if self._bar is None:
            return
        bar, self._bar = self._bar, None
        try:
            bar.stop()
        finally:
            for handler, stream in self._diverted:
                handler.setStream(stream)
            self._diverted.clear()

    def _divert(self, console: Console) -> None:
        """Let the log's lines that would go to a terminal go above the bar."""
        for handler in logging.getLogger(ROOT).handlers:
            if isinstance(handler, logging.StreamHandler) and _is_terminal(handler.stream):
                self._diverted.append((handler, handler.stream))
                handler.setStream(_AboveBar(console))


class _AboveBar:
    """A stream whose lines a console prints above what is live on it."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def write(self, text: str) -> int:
        if text.rstrip("\n"):
            self._console.print(Text(text.rstrip("\n")), soft_wrap=True)
        return len(text)

    def flush(self) -> None:
        self._console.file.flush()


def _bar(console: Console) -> Bar:
    return Bar(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[left]}"),
        console=console,
        auto_refresh=False,
        expand=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


def _is_terminal(stream: TextIO) -> bool:
    """Asked of the stream itself: an environment variable cannot turn a pipe into a terminal."""
    with contextlib.suppress(AttributeError, ValueError):
        return stream.isatty() and not Console(file=stream).is_dumb_terminal
    return False


def _compact(number: float) -> str:
    """A number with three digits: 950, 12.3k, 1.25M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _clock_text(seconds: float | None) -> str:
    """Hours, minutes and seconds: 2:05, 1:02:05, 3d 04:00."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

"""What the growing files of a run say up to now: steps, evaluations, warnings."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_mer.analysis.snapshot import Curve, Losses, ReptileState, Speed
from megatron_mer.analysis.tail import MIB, LineTail, News, sample_lines

WINDOW = 100  # batches that averages are over
CURVE_POINTS = 512
TREND_POINTS = 16
SAMPLES = 200  # lines read of the beginning of a metrics.jsonl that is too long to be read whole
KEPT_WARNINGS = 5
_METRICS_BYTES = 4 * MIB
_LOG_BYTES = MIB // 4
_PIECES = 1000  # looks at a file in a row, if it grows faster than it is read


def number(value: Any) -> float | None:
    """A finite number of a JSON line; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def whole(value: Any) -> int | None:
    """A whole number of a JSON line; None for everything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def json_object(text: bytes | str) -> dict[str, Any] | None:
    """The JSON object of a text; None if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class StepLog:
    """`metrics.jsonl`: its end, and samples of what lies before.

    Args:
        path: the file; need not be there yet.
    """

    def __init__(self, path: Path, keep: int = _METRICS_BYTES) -> None:
        self._path = path
        self._tail = LineTail(path, keep=keep)
        self._forget()

    def _forget(self) -> None:
        self.batches = 0
        self.step: int | None = None
        self.last: dict[str, Any] = {}
        self.without_update = 0
        """Batches in a row, up to the last one, that gave no update."""
        self.unreadable = 0
        self._recent: deque[dict[str, Any]] = deque(maxlen=WINDOW)
        self._update: dict[str, Any] | None = None
        self._curve = Curve(CURVE_POINTS)

    def read(self) -> bool:
        """Take what is new; whether there were new lines."""
        news = self._tail.read()
        if news.restarted:
            self._forget()
        if news.left_out and news.lines:
            self._sample(self.batches, json_object(news.lines[0]))
        self._take(news.lines)
        return bool(news.lines)

    def _sample(self, known: int, first: Mapping[str, Any] | None) -> None:
        """Fill the curve between the batches that are known and the first line of the end."""
        end = whole((first or {}).get("batch"))
        for text in sample_lines(self._path, SAMPLES):
            line = json_object(text) or {}
            batch, loss = whole(line.get("batch")), number(line.get("loss"))
            if batch is not None and loss is not None and known <= batch < (end or 0):
                self._curve.add(batch, loss)

    def _take(self, lines: Iterable[bytes]) -> None:
        for text in lines:
            line = json_object(text)
            batch = whole((line or {}).get("batch"))
            if line is None or batch is None or batch < 0:
                self.unreadable += 1
                continue
            line.pop("loss_by_dataset", None)  # thousands of numbers in large runs
            self.last, self.batches = line, batch + 1
            step = whole(line.get("step"))
            self.step = self.step if step is None else step
            self.without_update = self.without_update + 1 if step is None else 0
            self._recent.append(line)
            if "reptile_delta_norm" in line:
                self._update = line
            loss = number(line.get("loss"))
            if loss is not None:
                self._curve.add(batch, loss)

    def curve(self) -> tuple[tuple[float, float], ...]:
        """(batch, training loss), thinned."""
        return self._curve.points()

    def losses(self) -> Losses | None:
        """Training losses of the last batch and their mean; None before the first one."""
        if not self.last:
            return None
        known = [loss for line in self._recent if (loss := number(line.get("loss"))) is not None]
        return Losses(
            loss=number(self.last.get("loss")),
            fresh=number(self.last.get("loss_fresh")),
            replay=number(self.last.get("loss_replay")),
            mean=sum(known) / len(known) if known else None,
            mean_of=len(known),
            grad_norm=number(self.last.get("grad_norm")),
        )

    def speed(self) -> Speed | None:
        """Means over the last batches, by time; None before the first one."""
        timed = [
            (seconds, line)
            for line in self._recent
            if (seconds := number(line.get("step_seconds"))) is not None and seconds > 0
        ]
        if not timed:
            return None
        total = sum(seconds for seconds, _ in timed)

        def mean(key: str) -> float | None:
            known = [
                (s, value) for s, line in timed if (value := number(line.get(key))) is not None
            ]
            over = sum(seconds for seconds, _ in known)
            return sum(seconds * value for seconds, value in known) / over if known else None

        waits = [number(line.get("data_wait_seconds")) for _, line in timed]
        waited = [wait for wait in waits if wait is not None]
        return Speed(
            step_seconds=total / len(timed),
            tokens_per_second=mean("tokens_per_second"),
            mfu=mean("mfu"),
            data_wait=min(1.0, sum(waited) / total) if len(waited) == len(timed) else None,
            memory_gib=number(self.last.get("memory_gib")),
        )

    def slowest_step(self) -> float:
        """Seconds of the slowest of the last steps; 0 before the first one."""
        return max((number(line.get("step_seconds")) or 0.0 for line in self._recent), default=0.0)

    def reptile(self, k: int | None) -> ReptileState | None:
        """Where Reptile stands; None without Reptile."""
        since = whole(self.last.get("updates_since_reptile"))
        if since is None:
            return None
        update = self._update or {}
        return ReptileState(
            updates_since=since,
            k=k,
            last_step=whole(update.get("step")),
            delta_norm=number(update.get("reptile_delta_norm")),
            delta_cosine=number(update.get("reptile_delta_cosine")),
        )


class EvaluationLog:
    """`evaluations.jsonl`: the first evaluation, those at the ends of entries, and the last one.

    Args:
        path: the file; need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._tail = LineTail(path)
        self._forget()

    def _forget(self) -> None:
        self.start: dict[str, Any] | None = None
        self.ends: list[dict[str, Any]] = []
        self.last: dict[str, Any] | None = None
        self.unreadable = 0
        self._trends: dict[str, Curve] = {}

    def read(self) -> bool:
        """Take what is new; whether there were new lines."""
        found = False
        for news in drain(self._tail):
            if news.restarted:
                self._forget()
            for text in news.lines:
                found = True
                self._take(json_object(text))
        return found

    def _take(self, line: dict[str, Any] | None) -> None:
        if line is None or not isinstance(line.get("losses"), dict):
            self.unreadable += 1
            return
        line["losses"] = {name: number(value) for name, value in line["losses"].items()}
        if line.get("moment") == "start":
            self.start = line
        elif line.get("moment") == "entry_end":
            self.ends.append(line)
        self.last = line
        for name, value in line["losses"].items():
            if value is not None:
                curve = self._trends.setdefault(name, Curve(TREND_POINTS))
                curve.add(max(0, whole(line.get("batches")) or 0), value)

    def trend(self, name: str) -> tuple[float, ...]:
        """The losses of a set over the run, thinned."""
        curve = self._trends.get(name)
        return () if curve is None else tuple(value for _, value in curve.points())


class WarningLog:
    """`train.log`: the last warnings and errors.

    Args:
        path: the file; need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._tail = LineTail(path, keep=_LOG_BYTES)
        self.lines: deque[str] = deque(maxlen=KEPT_WARNINGS)

    def read(self) -> None:
        """Take what is new."""
        for news in drain(self._tail):
            if news.restarted:
                self.lines.clear()
            for text in news.lines:
                # "2026-11-23 19:12:51 WARNING ...": date, time, level.
                level = text.split(b" ", 3)[2:3]
                if level in ([b"WARNING"], [b"ERROR"], [b"CRITICAL"]):
                    self.lines.append(text.decode("utf-8", errors="replace"))


def drain(tail: LineTail) -> Iterable[News]:
    """All that is new, piece by piece."""
    for _ in range(_PIECES):
        news = tail.read()
        yield news
        if not news.more:
            return

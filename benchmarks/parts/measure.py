"""Timing, the machine it happened on, and tables of figures."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("numpy", "torch", "megatron-core")

Work = Callable[[int], float]
"""Does repetition r of something; returns the seconds of the part that counts."""


@dataclass(frozen=True)
class Sample:
    """Figures of one thing, one a repetition."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one: a disturbed repetition does not move it."""
        return statistics.median(self.values)

    def scaled(self, factor: float) -> Sample:
        """Every figure times a factor, such as 1e9 / rows for nanoseconds a row."""
        return Sample(tuple(value * factor for value in self.values))

    def rate(self, count: float) -> Sample:
        """`count` a second, from seconds."""
        return Sample(tuple(count / value for value in self.values))

    def __str__(self) -> str:
        """The median and the range."""
        return f"{number(self.median)} ({number(min(self.values))}-{number(max(self.values))})"


@dataclass(frozen=True)
class Row:
    """A line of a table of results."""

    what: str
    unit: str
    ours: Sample | None = None
    limit: float | None = None
    at_least: bool = False
    """Whether the limit is a lower one."""
    peer: Sample | None = None
    note: str = ""

    @property
    def held(self) -> bool | None:
        """Whether our median is within the limit; None where there is none."""
        if self.ours is None or self.limit is None:
            return None
        return self.ours.median >= self.limit if self.at_least else self.ours.median <= self.limit

    def cells(self) -> list[str]:
        """The line's cells, in the order of `HEAD`."""
        measured = "" if self.ours is None else str(self.ours)
        if self.limit is not None:
            bound = "at least" if self.at_least else "at most"
            measured += f" / {bound} {number(self.limit)}{'' if self.held else ' **missed**'}"
        peer = "" if self.peer is None else str(self.peer)
        return [self.what, self.unit, measured, peer, self.note]


HEAD = ["what", "unit", "measured / limit", "megatron-core", "note"]


def number(value: float) -> str:
    """Three significant digits, thousands separated; integers in full."""
    if isinstance(value, int) or value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 2 if abs(value) < 10 else 1
    return f"{value:.{digits}f}" if abs(value) >= 0.1 else f"{value:.2g}"


def timed(work: Callable[[], Any]) -> float:
    """Seconds that something takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(works: Mapping[str, Work], repetitions: int) -> dict[str, Sample]:
    """Repeat several works in turn (a, b, a, b, ...), so that what disturbs one disturbs all.

    One round before the first that counts warms caches up.
    """
    figures: dict[str, list[float]] = {name: [] for name in works}
    for repetition in range(repetitions + 1):
        for name, work in works.items():
            value = work(repetition)
            if repetition > 0:
                figures[name].append(value)
    return {name: Sample(tuple(values)) for name, values in figures.items()}


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table that is readable as text and as Markdown."""
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in (head, rule, *lines)
    )


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    return markdown(HEAD, [row.cells() for row in rows])


class Machine:
    """The machine during a run; begins to watch it when it is made."""

    def __init__(self, command: str) -> None:
        self._found = _environment(command)
        self._start = self._seconds()

    def found(self) -> dict[str, Any]:
        """When, where and with which versions a run measured, and how undisturbed it was so far."""
        wall, busy, own = (
            now - then for now, then in zip(self._seconds(), self._start, strict=True)
        )
        others = max(busy - own, 0.0) / wall
        return {**self._found, "cores_busy_with_other_processes": round(others, 2)}

    @staticmethod
    def _seconds() -> tuple[float, float, float]:
        """Wall time, processor time of the machine, and that of this process and its children."""
        first = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0]
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, first.split()[1:])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, sum(os.times()[:4])


def _environment(command: str) -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": len(_git("status", "--porcelain").splitlines()),
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def headline(found: Mapping[str, Any]) -> str:
    """The environment in a line, for people."""
    packages = ", ".join(f"{name} {value}" for name, value in found["versions"].items() if value)
    return (
        f"{found['date']}: {found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB, "
        f"Linux {found['kernel']}, Python {found['python']}, {packages}; other "
        f"processes kept {found['cores_busy_with_other_processes']} cores busy meanwhile"
    )


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return result.stdout.strip()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

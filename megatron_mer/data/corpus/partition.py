"""Splitting one job over nodes: each takes consecutive units, and merging joins them in order."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_mer.data.corpus.reading import Unit
from megatron_mer.errors import DataError

SLURM = "slurm"


@dataclass(frozen=True)
class Partition:
    """Which part of a job this process does."""

    index: int = 0
    """From 0."""
    count: int = 1
    """Number of parts."""

    def prefix(self, prefix: str) -> str:
        """Return the prefix of this part's dataset; in alphabetical order they are in order."""
        return prefix if self.count == 1 else f"{prefix}.part-{self.index:05d}-of-{self.count:05d}"

    def choose(self, units: Sequence[Unit]) -> list[Unit]:
        """Return this part's units: consecutive ones, of about the same size in each part.

        Together the parts have each unit once. A part of few units may have none.
        """
        total = sum(max(unit.size, 1) for unit in units)
        chosen, before = [], 0
        for unit in units:
            # The part that a unit's middle falls into; whole numbers, so all parts agree.
            middle = 2 * before + max(unit.size, 1)
            if middle * self.count // (2 * total) == self.index:
                chosen.append(unit)
            before += max(unit.size, 1)
        return chosen


def parse_partition(text: str, environment: Mapping[str, str] = os.environ) -> Partition:
    """Read `I/N`, with I from 0 to N - 1, or `slurm`: the task of an array job.

    Raises:
        DataError: it is neither, or the variables of an array job are not there.
    """
    if text == SLURM:
        return _from_slurm(environment)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise DataError(f"partition {text!r}; allowed: I/N with 0 <= I < N, such as 0/16, or slurm")
    return Partition(int(match[1]), int(match[2]))


def _from_slurm(environment: Mapping[str, str]) -> Partition:
    names = ("ID", "MIN", "MAX", "STEP", "COUNT")
    try:
        task, first, last, step, count = (
            int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in names
        )
    except (KeyError, ValueError) as error:
        raise DataError(
            f"partition slurm, but {error} is not set: that is for tasks of an array job (sbatch "
            "--array=0-15); elsewhere give I/N"
        ) from error
    if step < 1 or (last - first) // step + 1 != count:
        raise DataError(
            f"partition slurm: the array has {count} tasks from {first} to {last} by {step}, with "
            "gaps; give --array=FIRST-LAST, or I/N"
        )
    return Partition((task - first) // step, count)

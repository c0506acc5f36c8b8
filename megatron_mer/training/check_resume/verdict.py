"""Whether a resumed run is the run that was not interrupted, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_mer.checkpoint import CheckpointInfo, find_latest
from megatron_mer.errors import TrainingError
from megatron_mer.training.check_resume.figures import (
    GROUPS,
    HELD_OUT,
    LOOSER,
    LOSSES,
    NORMS,
    REPTILE,
    ROWS,
    Closeness,
    Difference,
    Place,
    between,
    counts,
    exactly,
    figures,
    rows,
    state,
)
from megatron_mer.training.check_resume.weights import compare_fragments, furthest

CLOSE = (LOSSES, NORMS, REPTILE, HELD_OUT)
"""What need not agree to the bit at another layout."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The two runs of a test."""

    whole: Path
    """output_dir of the run without interruption."""
    killed: Path
    """output_dir of the one that was killed and resumed."""
    whole_records: Path
    """What the ranks of the first wrote down of their batches."""
    killed_records: Path
    """Those of the second up to the kill."""
    resumed_records: Path
    """Those of the second from the resume on."""
    first_batch: int
    """The batch that the resume has to begin with."""


@dataclass
class Verdict:
    """What came out."""

    agrees: bool
    """Identical; at another layout: as close as it has to be."""
    lines: list[str] = field(default_factory=list)
    """In words, the first one first."""


def judge(runs: Runs, tolerance: float | None) -> Verdict:
    """Compare the two runs of a test.

    Args:
        runs: where they lie.
        tolerance: relative difference that losses and gradient norms may have behind the resume,
            which was at another layout; None: it was the same one, and none.

    Raises:
        TrainingError: a run has no checkpoint.
        CheckpointError: a checkpoint cannot be read.
    """
    whole = figures(runs.whole, runs.whole_records)
    before = _until_kill(runs)
    drawn = max((place.batch for place in before), default=-1)
    early = list(exactly(between(whole, -1, drawn + 1), before))
    if early:
        hint = (
            "it lies before the kill: two starts of this configuration do not agree on this "
            "machine even without a resume, so this says nothing of resuming"
        )
        return Verdict(False, [*_first(early, _by_group(early)), hint])
    after = figures(runs.killed, runs.resumed_records)
    behind = {
        place: value
        for place, value in after.items()
        # The resume has drawn its rows itself, so one too early is seen.
        if place.group == ROWS or place.batch >= runs.first_batch
    }
    expected = between(whole, runs.first_batch)
    mine, other = (_last_checkpoint(run) for run in (runs.whole, runs.killed))
    expected.update(state(mine))
    behind.update(state(other))
    if tolerance is not None:
        return _close(expected, behind, tolerance, mine.path, other.path)
    return _to_the_bit({**whole, **state(mine)}, list(exactly(expected, behind)), mine, other)


def _until_kill(runs: Runs) -> dict[Place, Any]:
    """The values that the killed run had, those included that the resume moved aside."""
    drawn = max((place.batch for place, _ in rows(runs.killed_records)), default=-1)
    return between(figures(runs.killed, runs.killed_records, lost=True), -1, drawn + 1)


def _last_checkpoint(run: Path) -> CheckpointInfo:
    info = find_latest(run / "checkpoints")
    if info is None:
        raise TrainingError(f"{run} has no checkpoint")
    return info


def _to_the_bit(
    whole: Mapping[Place, Any],
    found: list[Difference],
    mine: CheckpointInfo,
    other: CheckpointInfo,
) -> Verdict:
    weights = compare_fragments(mine.path, other.path)
    kinds = ", ".join(f"{number} {kind}" for kind, number in weights.fragments.items())
    if not found and weights.first is None:
        stored = f"{sum(weights.fragments.values())} fragments of weights ({kinds}; "
        stored += f"{weights.numbers:,} numbers)"
        return Verdict(True, [f"identical to the bit: {_listed(counts(whole))}, {stored}"])
    more = _by_group(found)
    if weights.first is not None:
        found.append(weights.first)
        text = f"weights: {weights.differing:,} of {weights.numbers:,} numbers"
        more = [*more, f"{text}, the first is {weights.first}"]
    return Verdict(False, _first(found, more))


def _first(found: Sequence[Difference], more: Iterable[str]) -> list[str]:
    return [f"DIFFERENT, first at {found[0]}", *(f"  differ in all: {line}" for line in more)]


def _by_group(found: Iterable[Difference]) -> list[str]:
    numbers = Counter(one.group for one in found)
    listed = [f"{numbers[group]} {group}" for group in GROUPS if numbers[group]]
    return [", ".join(listed)] if listed else []


def _listed(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {group}" for group, number in numbers.items() if number)


def _close(
    expected: Mapping[Place, Any],
    behind: Mapping[Place, Any],
    tolerance: float,
    mine: Path,
    other: Path,
) -> Verdict:
    close = Closeness(tolerance)
    close.compare(expected, behind)
    lines = []
    if close.beyond:
        lines += _first(close.beyond, _by_group(close.beyond))
    else:
        numbers = counts(expected)
        same = {group: n for group, n in numbers.items() if group not in CLOSE}
        near = {group: n for group, n in numbers.items() if group in CLOSE}
        lines.append(
            f"agrees at the other layout: identical {_listed(same)}; within {tolerance:g} "
            f"(Reptile's within {LOOSER * tolerance:g}), relative: {_listed(near)}"
        )
    lines.append("largest relative differences behind the resume:")
    for group in CLOSE:
        if group in close.worst:
            apart, where = close.worst[group]
            lines.append(f"  {group}: {apart:.2g}, {where}")
        elif counts(expected)[group]:
            lines.append(f"  {group}: none")
    lines.append("of the last checkpoint, relative to each parameter's largest (not judged):")
    for kind, (apart, where) in furthest(mine, other).items():
        lines.append(f"  {kind}: {apart:.2g}, {where}")
    return Verdict(not close.beyond, lines)

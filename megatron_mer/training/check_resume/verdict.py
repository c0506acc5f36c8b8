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
from megatron_mer.training.check_resume.weights import (
    WeightComparison,
    compare_fragments,
    furthest,
)

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
    loaded: Path
    """Checkpoint of what the resume loaded, if it has another layout."""
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
        tolerance: as in `Closeness`, behind a resume at another layout; None: it was at the same
            one, so that everything has to be the same to the bit.

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
        close = Closeness(tolerance, runs.first_batch)
        close.compare(expected, behind)
        # Loading computes nothing, so at any layout no bit of it may be another.
        saved = mine.path.with_name(runs.loaded.name)
        loaded = compare_fragments(runs.loaded, saved, same_layout=False)
        return _close(expected, close, loaded, furthest(mine.path, other.path))
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
    if not found and weights.first is None:
        text = f"identical to the bit: {_listed(counts(whole))}, {_stored(weights)}"
        return Verdict(True, [text])
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
    close: Closeness,
    loaded: WeightComparison,
    last: Mapping[str, tuple[float, Difference]],
) -> Verdict:
    lines = _too_far(close, loaded)
    agrees = not lines
    if agrees:
        numbers = counts(expected)
        same = {group: n for group, n in numbers.items() if group not in CLOSE}
        near = {group: n for group, n in numbers.items() if group in CLOSE}
        lines.append(
            f"agrees at the other layout: identical to the bit {_stored(loaded)} as loaded, "
            f"{_listed(same)}; within {close.tolerance:g} (Reptile's figures and, behind the first "
            f"step, gradient norms within {close.looser:g}), relative: {_listed(near)}"
        )
    lines.append("largest relative differences behind the resume:")
    for group in CLOSE:
        if group in close.worst:
            apart, where = close.worst[group]
            lines.append(f"  {group}: {apart:.2g}, {where}")
        elif counts(expected)[group]:
            lines.append(f"  {group}: none")
    lines.append("of the last checkpoint, relative to each parameter's largest (not judged):")
    lines += [f"  {kind}: {apart:.2g}, {where}" for kind, (apart, where) in last.items()]
    return Verdict(agrees, lines)


def _too_far(close: Closeness, loaded: WeightComparison) -> list[str]:
    """The first difference that may not be, and what else."""
    found, more = list(close.beyond), _by_group(close.beyond)
    if loaded.first is not None:
        first = loaded.first
        # The other way round: the run that was not interrupted comes first.
        found.insert(0, Difference(f"the state as loaded, {first.place}", first.other, first.mine))
        more = [f"{loaded.differing:,} of {loaded.numbers:,} loaded numbers", *more]
    return _first(found, more) if found else []


def _stored(weights: WeightComparison) -> str:
    kinds = ", ".join(f"{number} {kind}" for kind, number in weights.fragments.items())
    total = sum(weights.fragments.values())
    return f"{total} fragments of weights ({kinds}; {weights.numbers:,} numbers)"

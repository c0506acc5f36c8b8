"""What is wrong with which node, from what its ranks measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from megatron_mer.config import PreflightConfig
from megatron_mer.errors import Problem

SECTION: Final = "launch.preflight"
Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What one node says of itself."""

    node: str
    """Its name, for Slurm where there is one."""
    trouble: str = ""
    """Why it cannot use output_dir; empty where it can."""
    free_gib: float = 0.0
    """Space at output_dir in GiB; 0 where it cannot be used."""
    clock: float = 0.0
    """Seconds since the epoch, at a moment that all nodes share."""


@dataclass(frozen=True)
class Findings:
    """What is wrong, and which nodes are to be left out for it."""

    problems: tuple[Problem, ...]
    bad: Mapping[str, str]
    """Node -> what is wrong with it."""


def neighbours(nodes: int) -> list[list[Pair]]:
    """Gives rounds of pairs, so that no node is in two pairs of a round.

    The pairs are those of a ring: each node has two, so that a slow pair's fault can be told from
    its members' other pairs. A node alone is a pair with itself.
    """
    if nodes <= 2:
        return [[(0, nodes - 1)]]
    ring = [(node, (node + 1) % nodes) for node in range(nodes)]
    even = nodes - nodes % 2
    rounds = [ring[0:even:2], ring[1:even:2], ring[even:]]
    return [one for one in rounds if one]


def judge(
    facts: Sequence[NodeFacts], speeds: Mapping[Pair, float], limits: PreflightConfig
) -> Findings:
    """Says what is wrong.

    Args:
        facts: of each node; the first is rank 0's.
        speeds: what was measured, pair of places in ``facts`` -> GiB a second.
        limits: what is allowed.
    """
    named = [*_unusable(facts), *_clocks(facts, limits), *_slow(facts, speeds, limits)]
    bad: dict[str, list[str]] = {}
    for node, problem in named:
        if node:
            bad.setdefault(node, []).append(problem.given)
    problems = [problem for _, problem in named]
    free = facts[0].free_gib
    if not facts[0].trouble and free < limits.min_free_gib:
        given = f"{free:.1f} GiB are free at output_dir"
        allowed = f"at least {limits.min_free_gib:g}"
        problems.append(Problem(f"{SECTION}.min_free_gib", given, allowed, "make space there"))
    return Findings(tuple(problems), {node: "; ".join(what) for node, what in bad.items()})


def _unusable(facts: Sequence[NodeFacts]) -> Iterator[tuple[str, Problem]]:
    for one in facts:
        if one.trouble:
            remedy = "output_dir must lie on a file system that all nodes share"
            yield one.node, Problem(SECTION, f"node {one.node} {one.trouble}", remedy=remedy)


def _clocks(facts: Sequence[NodeFacts], limits: PreflightConfig) -> Iterator[tuple[str, Problem]]:
    middle = statistics.median(one.clock for one in facts)
    for one in facts:
        skew = one.clock - middle
        if abs(skew) > limits.max_clock_skew_seconds:
            given = f"node {one.node}'s clock is {skew:+.1f} s from the middle one"
            allowed = f"{limits.max_clock_skew_seconds:g} s"
            yield one.node, Problem(f"{SECTION}.max_clock_skew_seconds", given, allowed)


def _slow(
    facts: Sequence[NodeFacts], speeds: Mapping[Pair, float], limits: PreflightConfig
) -> Iterator[tuple[str, Problem]]:
    """A node is slow if its best pair is; of two nodes nobody can tell which one it is."""
    least = limits.min_all_reduce_gib_per_second
    if least is None or not speeds:
        return
    path, allowed = f"{SECTION}.min_all_reduce_gib_per_second", f"at least {least:g} GiB/s"
    if len(facts) == 2:
        speed = speeds[0, 1]
        if speed < least:
            both = f"{facts[0].node} and {facts[1].node}"
            remedy = "one of them is slow: a third node would tell which"
            yield "", Problem(path, f"nodes {both} reach {speed:.3g} GiB/s", allowed, remedy)
        return
    for place, one in enumerate(facts):
        best = max(speed for pair, speed in speeds.items() if place in pair)
        if best < least:
            yield one.node, Problem(path, f"node {one.node} reaches {best:.3g} GiB/s", allowed)

"""Which changes of a run make it take less memory, the cheapest first.

How much slower a change makes a step is an estimate that only orders the answers: recomputing costs
a third of the arithmetic (one forward pass of three), a pipeline waits for its dearest stage and
idles (pp - 1) / micro batches of its time (Narayanan et al. 2021, arXiv 2104.04473, section 2.2),
and our own guesses are a tenth for each doubling of tp, for its messages, and 3 % for each halving
of a micro batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_mer.analysis.memory.plan import StageMemory, plan_memory
from megatron_mer.analysis.memory.shape import Device
from megatron_mer.config import RunConfig, check_layout
from megatron_mer.model.flops import layer_costs
from megatron_mer.parallel.topology import Layout, num_micro_batches, stage_bounds

RECOMPUTING = 4 / 3
TENSOR_DOUBLED = 1.1
MICRO_BATCH_HALVED = 1.03
LARGEST_TP = 8  # ranks of a host, which tensor-parallel messages should not leave
MOST_RANKS = 64  # times as many as given
KEYS = (
    "batch.micro_batch_size",
    "parallel.activation_checkpointing",
    "parallel.tp_size",
    "parallel.pp_size",
    "ranks",
)


@dataclass(frozen=True)
class Change:
    """A run that differs in what costs memory, and what it takes."""

    settings: tuple[tuple[str, str, str], ...]
    """(key, old value, new value); the key `ranks` stands for their number."""
    slowdown: float
    """Estimated step time by that of the given run, the number of ranks left aside."""
    ranks: int
    worst: StageMemory

    @property
    def strength(self) -> tuple[float, ...]:
        """How far it goes in each of its settings, as numbers that grow."""
        went = {key: (old, new) for key, old, new in self.settings}
        return tuple(_distance(*went[key]) if key in went else 0.0 for key in KEYS)

    def __str__(self) -> str:
        return ", ".join(f"{key.split('.')[-1]} {old} -> {new}" for key, old, new in self.settings)


def worst_stage(stages: list[StageMemory], device: Device) -> StageMemory:
    """The stage whose ranks take the most."""
    return max(stages, key=lambda one: needed(one, device))


def needed(memory: StageMemory, device: Device) -> int:
    """Bytes that have to fit: on a GPU its own, on a CPU the host's too."""
    return memory.peak + (memory.host_total if device == "cpu" else 0)


def single_changes(config: RunConfig, ranks: int, device: Device) -> list[Change]:
    """Each change by itself, as far as it is allowed: halved or doubled once."""
    changes: dict[str, Change] = {}
    for change in _changes(config, ranks, device, most_ranks=2):
        if len(change.settings) == 1:
            changes.setdefault(change.settings[0][0], change)
    return list(changes.values())


def fitting_changes(
    config: RunConfig, ranks: int, device: Device, limit: int, most: int = 5
) -> list[Change]:
    """What fits, with the fewest ranks first and then by slowdown.

    Args:
        config: the configuration, its vocabulary size known.
        ranks: number of ranks.
        device: where it trains.
        limit: bytes of a rank.
        most: changes to return.

    Returns:
        None of them goes as far as another in each setting: what fits is not given with more.
    """
    found: list[Change] = []
    for times in _doublings(1, MOST_RANKS):
        fitting = [
            one
            for one in _changes(config, ranks, device, times, least_ranks=times)
            if needed(one.worst, device) <= limit
        ]
        for one in sorted(fitting, key=lambda one: (one.slowdown, len(one.settings))):
            if not any(_further(one, other) for other in found):
                found.append(one)
        if len(found) >= most:
            break
    return found[:most]


def _further(one: Change, other: Change) -> bool:
    return all(a >= b for a, b in zip(one.strength, other.strength, strict=True))


def _distance(old: str, new: str) -> float:
    return abs(math.log2(int(new) / int(old))) if new.isdecimal() else 1.0


def _doublings(first: int, last: int) -> list[int]:
    return [first << power for power in range(max(0, last // first).bit_length())]


def _changes(
    config: RunConfig, ranks: int, device: Device, most_ranks: int, least_ranks: int = 1
) -> Iterator[Change]:
    """All allowed combinations of halved micro batches, recomputing, more tp, pp and ranks."""
    rows, parallel = config.batch.micro_batch_size, config.parallel
    halved = [rows >> power for power in range(rows.bit_length()) if rows % (1 << power) == 0]
    recomputing = dict.fromkeys((parallel.activation_checkpointing, "full"))
    tensor = _doublings(parallel.tp_size, max(LARGEST_TP, parallel.tp_size))
    pipe = _doublings(parallel.pp_size, config.model.num_layers)
    times = _doublings(least_ranks, most_ranks)
    for more, pp, tp, full, micro in itertools.product(times, pipe, tensor, recomputing, halved):
        changed = replace(
            config,
            batch=replace(config.batch, micro_batch_size=micro),
            parallel=replace(parallel, pp_size=pp, tp_size=tp, activation_checkpointing=full),
        )
        settings = _settings(config, changed, ranks, ranks * more)
        if settings and not check_layout(changed, ranks * more):
            yield _change(config, changed, ranks, ranks * more, device, settings)


def _settings(
    old: RunConfig, new: RunConfig, old_ranks: int, new_ranks: int
) -> tuple[tuple[str, str, str], ...]:
    before, after = (
        (
            run.batch.micro_batch_size,
            run.parallel.activation_checkpointing,
            run.parallel.tp_size,
            run.parallel.pp_size,
            ranks,
        )
        for run, ranks in ((old, old_ranks), (new, new_ranks))
    )
    return tuple(
        (key, str(was), str(will))
        for key, was, will in zip(KEYS, before, after, strict=True)
        if was != will
    )


def _change(
    old: RunConfig,
    new: RunConfig,
    old_ranks: int,
    new_ranks: int,
    device: Device,
    settings: tuple[tuple[str, str, str], ...],
) -> Change:
    layout = Layout.of(new.parallel, new_ranks)
    return Change(
        settings=settings,
        slowdown=_cost(new, layout) / _cost(old, Layout.of(old.parallel, old_ranks)),
        ranks=new_ranks,
        worst=worst_stage(plan_memory(new, layout, device), device),
    )


def _cost(config: RunConfig, layout: Layout) -> float:
    """Time of a step by that of a run without all that, other things equal."""
    costs = layer_costs(config.model)
    bounds = stage_bounds(costs, layout.pp_size)
    slowest = max(sum(costs[start:stop]) for start, stop in itertools.pairwise(bounds))
    uneven = slowest * layout.pp_size / sum(costs)
    idle = (layout.pp_size - 1) / num_micro_batches(config, layout.dp_size)
    full = config.parallel.activation_checkpointing == "full"
    messages: float = TENSOR_DOUBLED ** math.log2(layout.tp_size)
    small: float = MICRO_BATCH_HALVED ** -math.log2(config.batch.micro_batch_size)
    return (RECOMPUTING if full else 1.0) * uneven * (1 + idle) * messages * small

"""Arithmetic of the rank grid: who sits where, and which layers a stage holds. No communication."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_mer.config import ParallelConfig, RunConfig
from megatron_mer.errors import ConfigError, LaunchError, Problem


class Coordinate(NamedTuple):
    """A rank's place on each axis of the grid."""

    pipe: int
    data: int
    model: int


@dataclass(frozen=True)
class Layout:
    """A grid of ranks with the axes (pipe, data, model), the last one counting fastest.

    Ranks that share a tensor-parallel group are neighbours, so that they sit in one host. The order
    is that of DeepSpeed's PipeModelDataParallelTopology.
    """

    tp_size: int
    """Ranks along the model axis: they share each layer's tensors."""
    pp_size: int
    """Ranks along the pipe axis: they share the layers."""
    dp_size: int
    """Ranks along the data axis: they share the rows of a batch."""

    def __post_init__(self) -> None:
        sizes = {"tp_size": self.tp_size, "pp_size": self.pp_size, "dp_size": self.dp_size}
        problems = [
            Problem(f"parallel.{name}", str(size), "an integer >= 1")
            for name, size in sizes.items()
            if size < 1
        ]
        if problems:
            raise ConfigError(problems)

    @classmethod
    def of(cls, parallel: ParallelConfig, world_size: int) -> Layout:
        """The grid of a configuration on a number of ranks that `check_layout` accepted."""
        share = parallel.tp_size * parallel.pp_size
        return cls(parallel.tp_size, parallel.pp_size, world_size // share)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp_size * self.pp_size * self.dp_size

    def coordinate(self, rank: int) -> Coordinate:
        """A rank's place.

        Raises:
            LaunchError: there is no such rank in the grid.
        """
        if not 0 <= rank < self.world_size:
            raise LaunchError(
                f"rank {rank} in a grid of pp {self.pp_size} x dp {self.dp_size} x tp "
                f"{self.tp_size}; ranks 0 to {self.world_size - 1} are allowed; start as many "
                "processes as the grid has places"
            )
        outer, model = divmod(rank, self.tp_size)
        pipe, data = divmod(outer, self.dp_size)
        return Coordinate(pipe, data, model)

    def rank_of(self, pipe: int, data: int, model: int) -> int:
        """The rank at a place; each index is >= 0 and below its axis's size."""
        return (pipe * self.dp_size + data) * self.tp_size + model

    def tensor_groups(self) -> list[list[int]]:
        """The ranks along the model axis, one list for each (pipe, data), in that order."""
        return [
            [self.rank_of(pipe, data, model) for model in range(self.tp_size)]
            for pipe, data in itertools.product(range(self.pp_size), range(self.dp_size))
        ]

    def data_groups(self) -> list[list[int]]:
        """The ranks along the data axis, one list for each (pipe, model), in that order."""
        return [
            [self.rank_of(pipe, data, model) for data in range(self.dp_size)]
            for pipe, model in itertools.product(range(self.pp_size), range(self.tp_size))
        ]

    def pipe_groups(self) -> list[list[int]]:
        """The ranks along the pipe axis, one list for each (data, model), in that order."""
        return [
            [self.rank_of(pipe, data, model) for pipe in range(self.pp_size)]
            for data, model in itertools.product(range(self.dp_size), range(self.tp_size))
        ]


def num_micro_batches(config: RunConfig, dp_size: int) -> int:
    """Micro batches a data-parallel rank works through for one update."""
    return config.batch.global_batch_size // (config.batch.micro_batch_size * dp_size)


def pipeline_bubble(pp_size: int, micro_batches: int) -> float:
    """Share of a step for which each stage of a pipeline waits: (pp - 1) / (m + pp - 1).

    m micro batches pass a stage in m of m + pp - 1 slots (Huang et al. 2019, arXiv 1811.06965;
    1F1B has the same, Narayanan et al. 2021, arXiv 2104.04473, section 2.2).
    """
    return (pp_size - 1) / (micro_batches + pp_size - 1)


def stage_bounds(costs: Sequence[float], pp_size: int) -> list[int]:
    """Cut a Llama's layers into stages that each hold a block at least.

    DeepSpeed reduces the gradient norm once a parameter group: a stage of the head alone has no
    norm weights, hence one group less, and the other stages would wait for it for ever. So the
    embedding goes with the first block, final norm and head with the last.

    Args:
        costs: cost of each layer: embedding, blocks, final norm, head.
        pp_size: number of stages, at most the number of blocks.

    Returns:
        pp_size + 1 increasing numbers; stage i holds layers bounds[i] to bounds[i + 1] - 1.
    """
    blocks = list(costs[1:-2])
    blocks[0] += costs[0]
    blocks[-1] += sum(costs[-2:])
    cuts = split_stages(blocks, pp_size)
    return [0, *(cut + 1 for cut in cuts[1:-1]), len(costs)]


def split_stages(costs: Sequence[float], pp_size: int) -> list[int]:
    """Cuts a row of layers into stages so that the dearest stage is as cheap as possible.

    Among the cuts that reach it, the one with the least sum of squared stage costs is taken, and of
    those the one whose early stages hold fewest layers.

    Args:
        costs: cost of each layer, >= 0, in order.
        pp_size: number of stages; each gets at least one layer.

    Returns:
        pp_size + 1 increasing numbers; stage i holds the layers bounds[i] to bounds[i + 1] - 1.

    Raises:
        ConfigError: there are fewer layers than stages.
    """
    if not 1 <= pp_size <= len(costs):
        allowed = f"1 to {len(costs)}, the number of layers"
        raise ConfigError([Problem("parallel.pp_size", str(pp_size), allowed)])
    sums = [0.0, *itertools.accumulate(costs)]
    dearest, _ = _best_cut(sums, pp_size, squared=False, cap=float("inf"))
    # Sums of floats in another order may differ in the last bits.
    _, bounds = _best_cut(sums, pp_size, squared=True, cap=dearest * (1 + 1e-9))
    return bounds


def _best_cut(
    sums: Sequence[float], stages: int, squared: bool, cap: float
) -> tuple[float, list[int]]:
    """Dynamic programming over (stages used, layers used).

    Args:
        sums: prefix sums of the costs, one more than layers.
        stages: number of stages.
        squared: add the squares of the stages' costs up, instead of taking the largest cost.
        cap: no stage may cost more.

    Returns:
        The best value and its bounds.
    """
    layers = len(sums) - 1
    best: list[tuple[float, list[int]]] = [(0.0, [0])] + [(float("inf"), [])] * layers
    for stage in range(1, stages + 1):
        following: list[tuple[float, list[int]]] = [(float("inf"), [])] * (layers + 1)
        # Each of the stages still to come needs a layer.
        for stop in range(stage, layers - (stages - stage) + 1):
            for start in range(stage - 1, stop):
                cost = sums[stop] - sums[start]
                value = best[start][0] + cost * cost if squared else max(best[start][0], cost)
                if cost <= cap and value < following[stop][0]:
                    following[stop] = (value, [*best[start][1], stop])
        best = following
    return best[layers]

"""The rank grid, tensor-parallel layers and loss."""

from megatron_mer.parallel.collectives import (
    TensorParallelGroup,
    enter_region,
    reduce_from_region,
)
from megatron_mer.parallel.layers import (
    ColumnParallelLinear,
    ParallelKind,
    RowParallelLinear,
    VocabParallelEmbedding,
    apply_plan,
)
from megatron_mer.parallel.loss import vocab_parallel_cross_entropy
from megatron_mer.parallel.topology import Coordinate, Layout, split_stages, stage_bounds

__all__ = [
    "ColumnParallelLinear",
    "Coordinate",
    "Layout",
    "ParallelKind",
    "RowParallelLinear",
    "TensorParallelGroup",
    "VocabParallelEmbedding",
    "apply_plan",
    "enter_region",
    "reduce_from_region",
    "split_stages",
    "stage_bounds",
    "vocab_parallel_cross_entropy",
]

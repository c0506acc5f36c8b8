"""The rank grid, tensor-parallel layers and loss."""

from megatron_mer.parallel.collectives import (
    TensorParallelGroup,
    enter_region,
    reduce_from_region,
)
from megatron_mer.parallel.cut import Cut, cut_of, slice_bounds
from megatron_mer.parallel.layers import (
    ColumnParallelLinear,
    KeyValueLinear,
    ParallelKind,
    RowParallelLinear,
    VocabParallelEmbedding,
    apply_plan,
)
from megatron_mer.parallel.loss import vocab_parallel_cross_entropy
from megatron_mer.parallel.topology import Coordinate, Layout, split_stages

__all__ = [
    "ColumnParallelLinear",
    "Coordinate",
    "Cut",
    "KeyValueLinear",
    "Layout",
    "ParallelKind",
    "RowParallelLinear",
    "TensorParallelGroup",
    "VocabParallelEmbedding",
    "apply_plan",
    "cut_of",
    "enter_region",
    "reduce_from_region",
    "slice_bounds",
    "split_stages",
    "vocab_parallel_cross_entropy",
]

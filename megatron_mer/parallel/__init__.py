"""The rank grid, tensor-parallel layers and loss."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_mer.parallel.chunk import chunk_tokens
from megatron_mer.parallel.topology import (
    Coordinate,
    Layout,
    num_micro_batches,
    pipeline_bubble,
    split_stages,
    stage_bounds,
)

if TYPE_CHECKING:
    from megatron_mer.parallel.chunked_loss import chunked_linear_cross_entropy
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
    "chunk_tokens",
    "chunked_linear_cross_entropy",
    "cut_of",
    "enter_region",
    "num_micro_batches",
    "pipeline_bubble",
    "reduce_from_region",
    "slice_bounds",
    "split_stages",
    "stage_bounds",
    "vocab_parallel_cross_entropy",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch once it is asked for: the rank grid works without."""
    if name in __all__:
        for module in ("chunked_loss", "collectives", "cut", "layers", "loss"):
            found = vars(import_module(f"{__name__}.{module}"))
            if name in found:
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Llama in plain PyTorch, as a list of layers that know no ranks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_mer.model.dimensions import Dimensions
from megatron_mer.model.flops import layer_costs
from megatron_mer.model.utilisation import flops_per_token, peak_tflops

if TYPE_CHECKING:
    from megatron_mer.model.init import init_parameter, init_std, init_tensor, initialise_layer
    from megatron_mer.model.llama import (
        MLP,
        Attention,
        Block,
        Embedding,
        FinalNorm,
        Head,
        Llama,
        RMSNorm,
        build_layers,
    )
    from megatron_mer.model.rope import apply_rope, rope_tables

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "Dimensions",
    "Embedding",
    "FinalNorm",
    "Head",
    "Llama",
    "RMSNorm",
    "apply_rope",
    "build_layers",
    "flops_per_token",
    "init_parameter",
    "init_std",
    "init_tensor",
    "initialise_layer",
    "layer_costs",
    "peak_tflops",
    "rope_tables",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch once it is asked for: sizes and counts work without."""
    if name in __all__:
        for module in ("init", "llama", "rope"):
            found = vars(import_module(f"{__name__}.{module}"))
            if name in found:
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Named shapes of the Llama."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from megatron_mer.config.model_schema import ModelConfig, RopeScaling

DIMENSIONS: Final = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_hidden_size")


def _shape(layers: int, hidden: int, heads: int, ffn: int, **other: Any) -> Mapping[str, Any]:
    dimensions = {"hidden_size": hidden, "num_layers": layers, "num_heads": heads}
    return MappingProxyType({**dimensions, "ffn_hidden_size": ffn, **other})


def _llama3(layers: int, hidden: int, heads: int, ffn: int, **other: Any) -> Mapping[str, Any]:
    scaling = {
        "kind": "llama3",
        "factor": other.pop("factor"),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    rope = {"rope_base": 500000.0, "rope_scaling": MappingProxyType(scaling)}
    return _shape(layers, hidden, heads, ffn, num_kv_heads=8, **rope, **other)


# "99m" to "3.9b": arXiv 2508.01908. Their names are its names and count the parameters with a
# vocabulary of about 50,000, untied; with 128,256 rows "99m" has 180M, "1.1b" has 1.43B.
# "6b" is our choice: that paper says of its largest model that it has 5.7B parameters, and nowhere
# which shape. This one has as many, and heads and feed-forward in the proportions of "3.9b".
# "llama3-": Llama 3.2 (1B, 3B) and Llama 3.1 (8B, 70B), arXiv 2407.21783 and their config.json,
# which all have a vocabulary of 128,256.
SIZES: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "llama-1m": _shape(4, 128, 4, 384, num_kv_heads=2, tie_embeddings=True),
        "llama-99m": _shape(16, 512, 8, 1280),
        "llama-190m": _shape(16, 768, 12, 2048),
        "llama-390m": _shape(24, 1024, 16, 2560),
        "llama-560m": _shape(24, 1280, 20, 3072),
        "llama-830m": _shape(24, 1536, 24, 4096),
        "llama-1.1b": _shape(24, 1792, 28, 5120),
        "llama-1.5b": _shape(24, 2048, 32, 6144),
        "llama-2.4b": _shape(30, 2304, 36, 7680),
        "llama-3.9b": _shape(30, 3072, 24, 9216),
        "llama-6b": _shape(32, 3584, 28, 10752),
        "llama3-1b": _llama3(16, 2048, 32, 8192, factor=32.0, tie_embeddings=True),
        "llama3-3b": _llama3(28, 3072, 24, 8192, factor=32.0, tie_embeddings=True),
        "llama3-8b": _llama3(32, 4096, 32, 14336, factor=8.0),
        "llama3-70b": _llama3(80, 8192, 64, 28672, factor=8.0),
    }
)


def fill_size(model: Mapping[str, Any]) -> dict[str, Any]:
    """Fills in what a model section leaves to its size.

    Args:
        model: keys as given; `size`, if there, is one of `SIZES`.

    Returns:
        The keys with the size's dimensions below them, and `num_kv_heads` = `num_heads` where
        neither says otherwise.
    """
    filled = {**SIZES.get(model.get("size", ""), {}), **model}
    if "num_heads" in filled:
        filled.setdefault("num_kv_heads", filled["num_heads"])
    return filled


def model_of_size(size: str, **keys: Any) -> ModelConfig:
    """Builds the model section of a named size, as a configuration file would give it.

    Args:
        size: a key of `SIZES`.
        **keys: the other keys, `seq_length` at least; dimensions among them override the size's.

    Raises:
        KeyError: if there is no such size.
    """
    if size not in SIZES:
        raise KeyError(size)
    filled = fill_size({"size": size, **keys})
    scaling = filled.get("rope_scaling")
    if isinstance(scaling, Mapping):
        filled["rope_scaling"] = RopeScaling(**scaling)
    return ModelConfig(**filled)

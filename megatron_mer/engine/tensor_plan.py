"""What each module of a Llama becomes under tensor parallelism."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_mer.parallel import ParallelKind

_DIMS: Mapping[ParallelKind, int] = {"column": 0, "kv": 0, "head": 0, "vocab": 0, "row": 1}

# By the layer's name up to its first dot, then by the module's path inside the layer. "region": its
# input enters the tensor-parallel region once, so that q, k and v share one all-reduce of the
# gradient.
LLAMA_PLAN: Mapping[str, Mapping[str, ParallelKind]] = {
    "embedding": {"": "vocab"},
    "layers": {
        "attention": "region",
        "attention.q_proj": "column",
        "attention.k_proj": "kv",
        "attention.v_proj": "kv",
        "attention.o_proj": "row",
        "mlp": "region",
        "mlp.gate_proj": "column",
        "mlp.up_proj": "column",
        "mlp.down_proj": "row",
    },
    "final_norm": {},
    "head": {"": "head"},
}


def cut_dim(name: str) -> int | None:
    """The dim along which tensor parallelism cuts a parameter; None: every tensor rank has it.

    Args:
        name: canonical, as "layers.3.attention.q_proj.weight".
    """
    kind = _kind(name)
    return None if kind is None else _DIMS.get(kind)


def num_slices(name: str, tp_size: int, num_kv_heads: int) -> int:
    """Into how many slices tensor parallelism cuts a parameter that it cuts.

    Fewer than there are ranks are repeated on tp_size / num_slices neighbours each.

    Args:
        name: canonical.
        tp_size: tensor-parallel ranks.
        num_kv_heads: of the model, a multiple or a divisor of tp_size.
    """
    return min(tp_size, num_kv_heads) if _kind(name) == "kv" else tp_size


def _kind(name: str) -> ParallelKind | None:
    layer, _, rest = name.partition(".")
    if layer == "layers":
        rest = rest.partition(".")[2]
    module, _, tensor = rest.rpartition(".")
    return LLAMA_PLAN[layer].get(module) if tensor == "weight" else None

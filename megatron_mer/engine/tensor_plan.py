"""What each module of a Llama becomes under tensor parallelism."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_mer.parallel import ParallelKind

_DIMS: Mapping[ParallelKind, int] = {"column": 0, "column_region": 0, "vocab": 0, "row": 1}

# By the layer's name up to its first dot, then by the module's path inside the layer. "region": its
# input enters the tensor-parallel region once, so that q, k and v share one all-reduce of the
# gradient.
LLAMA_PLAN: Mapping[str, Mapping[str, ParallelKind]] = {
    "embedding": {"": "vocab"},
    "layers": {
        "attention": "region",
        "attention.q_proj": "column",
        "attention.k_proj": "column",
        "attention.v_proj": "column",
        "attention.o_proj": "row",
        "mlp": "region",
        "mlp.gate_proj": "column",
        "mlp.up_proj": "column",
        "mlp.down_proj": "row",
    },
    "final_norm": {},
    "head": {"": "column_region"},
}


def cut_dim(name: str) -> int | None:
    """The dim along which tensor parallelism cuts a parameter; None: every tensor rank has it.

    Args:
        name: canonical, as "layers.3.attention.q_proj.weight".
    """
    layer, _, rest = name.partition(".")
    if layer == "layers":
        rest = rest.partition(".")[2]
    module, _, tensor = rest.rpartition(".")
    kind = LLAMA_PLAN[layer].get(module)
    return _DIMS.get(kind) if kind is not None and tensor == "weight" else None

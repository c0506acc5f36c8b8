"""What each module of a Llama becomes under tensor parallelism."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_mer.parallel import ParallelKind

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

"""What Hugging Face calls the weights of a Llama, and their shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

Shapes = Mapping[str, tuple[int, ...]]

_PARTS = (
    ("layers.", "model.layers."),
    ("embedding.", "model.embed_tokens."),
    ("final_norm.", "model.norm."),
    ("head.", "lm_head."),
)
_INSIDE = (
    ("input_norm", "input_layernorm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("attention.", "self_attn."),
)
EMBEDDING, HEAD = "embedding.weight", "head.weight"
VOCABULARY = (EMBEDDING, HEAD)
"""Parameters with a row a token."""

_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def hf_name(name: str) -> str:
    """Hugging Face's name of a parameter.

    Rows and columns mean the same on both sides, those of the rotary pairs too: nothing is moved.

    Args:
        name: canonical, as "layers.3.attention.q_proj.weight".
    """
    ours, theirs = next(pair for pair in _PARTS if name.startswith(pair[0]))
    rest = name.removeprefix(ours)
    for inside, outside in _INSIDE:
        layer, dot, tail = rest.partition(".")
        if dot and tail.startswith(inside):
            rest = f"{layer}.{outside}{tail.removeprefix(inside)}"
    return theirs + rest


def is_buffer(name: str) -> bool:
    """Whether a stored tensor is the rotary table of an old file, which is no weight."""
    return _BUFFER.fullmatch(name) is not None


def in_model_order(names: Iterable[str]) -> list[str]:
    """Canonical names in the order in which a token passes the weights."""
    begin = [part[0].rstrip(".") for part in _PARTS]
    order = [begin.index(part) for part in ("embedding", "layers", "final_norm", "head")]

    def place(name: str) -> tuple[int, int, str]:
        first, _, rest = name.partition(".")
        number = int(rest.partition(".")[0]) if first == "layers" else 0
        return order.index(begin.index(first)), number, name

    return sorted(names, key=place)


def canonical_shapes(keys: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its canonical name, in the model's order.

    Args:
        keys: of a `model:` section, all dimensions known.
    """
    width, heads, kv_heads, inner, rows, layers = (
        int(str(keys[key]))
        for key in (
            "hidden_size", "num_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size",
            "num_layers",
        )
    )  # fmt: skip
    head = int(str(keys["head_dim"]))
    block = {
        "input_norm.weight": (width,),
        "attention.q_proj.weight": (heads * head, width),
        "attention.k_proj.weight": (kv_heads * head, width),
        "attention.v_proj.weight": (kv_heads * head, width),
        "attention.o_proj.weight": (width, heads * head),
        "post_attention_norm.weight": (width,),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (rows, width)}
    for layer in range(layers):
        shapes.update({f"layers.{layer}.{name}": shape for name, shape in block.items()})
    shapes["final_norm.weight"] = (width,)
    if not keys.get("tie_embeddings"):
        shapes[HEAD] = (rows, width)
    return shapes

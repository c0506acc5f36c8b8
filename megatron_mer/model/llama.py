"""Llama (Touvron et al. 2023, arXiv 2302.13971) as a list of layers in plain PyTorch.

Each layer takes one tensor and gives one tensor: token ids (B, S) -> hidden states (B, S, D) ->
... -> logits (B, S, V), so that a layer can be a pipeline stage. Nothing here knows of ranks. What
a module needs to know of widths it reads from the tensors that reach it, so that linear maps can be
replaced by ones that hold a share of the heads, the channels or the vocabulary.

Weights have no useful value before `initialise_layer`; make layers under `torch.device("meta")`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_mer.config import ModelConfig
from megatron_mer.model.dimensions import Dimensions
from megatron_mer.model.init import initialise_layer
from megatron_mer.model.rope import apply_rope, rope_tables

LayerFactory = Callable[[], nn.Module]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divides by the root mean square over the last dim, in fp32 whatever the dtype."""
    return functional.rms_norm(x, weight.shape, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The product silu(gate) * up."""
    return functional.silu(gate) * up


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 whatever the dtype (Zhang & Sennrich 2019).

    Args:
        hidden_size: width D.
        eps: added to the mean square.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.eps = eps
        self.normalise: Callable[[Tensor, Tensor, float], Tensor] = rms_norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalises (..., D) over its last dim."""
        return self.normalise(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key-value heads (GQA).

    Args:
        config: the model's section of the configuration, resolved.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dims = Dimensions.of(config)
        self.head_dim = dims.head_dim
        self.rope_base = config.rope_base
        self.rope_scaling = config.rope_scaling
        width, kv_width = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
        self.q_proj = nn.Linear(dims.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(dims.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(dims.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, dims.hidden_size, bias=False)

    def _heads(self, projected: Tensor) -> Tensor:
        # (B, S, H * Dh) -> (B, S, H, Dh); H is as wide as the projection at hand.
        return projected.view(*projected.shape[:-1], -1, self.head_dim)

    def tables(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Angles of the positions of x (B, S, D)."""
        return rope_tables(x.size(1), self.head_dim, self.rope_base, x.device, self.rope_scaling)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Maps (B, S, D) to (B, S, D)."""
        query = apply_rope(self._heads(self.q_proj(x)), tables).transpose(1, 2)
        key = apply_rope(self._heads(self.k_proj(x)), tables).transpose(1, 2)
        value = self._heads(self.v_proj(x)).transpose(1, 2)
        # On a CPU the grouped kernel is 3-6% faster, forward and backward, than repeating heads.
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=query.size(1) != key.size(1)
        )
        return cast(Tensor, self.o_proj(mixed.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202).

    Args:
        config: the model's section of the configuration, resolved.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dims = Dimensions.of(config)
        self.gate_proj = nn.Linear(dims.hidden_size, dims.ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(dims.hidden_size, dims.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(dims.ffn_hidden_size, dims.hidden_size, bias=False)
        self.gate: Callable[[Tensor, Tensor], Tensor] = swiglu

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, S, D) to (B, S, D)."""
        return cast(Tensor, self.down_proj(self.gate(self.gate_proj(x), self.up_proj(x))))


class Block(nn.Module):
    """One transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        config: the model's section of the configuration, resolved.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dims = Dimensions.of(config)
        self.input_norm = RMSNorm(dims.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.post_attention_norm = RMSNorm(dims.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, S, D) to (B, S, D)."""
        return self.compute(x, self.attention.tables(x))

    def compute(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """The same with the positions' angles given: the part that may be compiled."""
        x = x + self.attention(self.input_norm(x), tables)
        return cast(Tensor, x + self.mlp(self.post_attention_norm(x)))


class Embedding(nn.Module):
    """The token table, which also gives the logits when head and embedding are tied.

    Args:
        vocab_size: rows V.
        hidden_size: width D.
    """

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, ids: Tensor) -> Tensor:
        """Maps token ids (B, S) int64 to (B, S, D)."""
        return functional.embedding(ids, self.weight)

    def logits(self, x: Tensor) -> Tensor:
        """Maps hidden states (B, S, D) to (B, S, V): the tied head."""
        return functional.linear(x, self.weight)


class FinalNorm(RMSNorm):
    """The norm after the last block."""


class Head(nn.Linear):
    """The untied output projection, (B, S, D) to logits (B, S, V).

    Args:
        hidden_size: width D.
        vocab_size: rows V.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)


def build_layers(config: ModelConfig) -> list[tuple[str, LayerFactory]]:
    """The model as (layer name, factory), in the order in which tensors pass through.

    A parameter's canonical name is its layer's name, a dot, and its name inside the layer, such as
    `layers.3.attention.q_proj.weight`.

    Args:
        config: the model's section of the configuration, resolved.

    Returns:
        num_layers + 3 layers: "embedding", "layers.0" ..., "final_norm", "head". With tied
        embeddings the last one is "embedding" again: the same module, used by its method `logits`.
    """
    dims = Dimensions.of(config)
    embedding = partial(Embedding, dims.vocab_size, dims.hidden_size)
    layers: list[tuple[str, LayerFactory]] = [("embedding", embedding)]
    layers += [(f"layers.{index}", partial(Block, config)) for index in range(dims.num_layers)]
    layers.append(("final_norm", partial(FinalNorm, dims.hidden_size, config.norm_eps)))
    if config.tie_embeddings:
        layers.append(("embedding", embedding))
    else:
        layers.append(("head", partial(Head, dims.hidden_size, dims.vocab_size)))
    return layers


class Llama(nn.Module):
    """The whole model in one process, from the same layers and with the same initial weights.

    Its state dict has the canonical parameter names.

    Args:
        config: the model's section of the configuration, resolved.
        seed: the run's seed.
    """

    embedding: Embedding
    final_norm: FinalNorm

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.head: Head | None = None
        # A dict: the tied head is the embedding again.
        for name, factory in dict(build_layers(config)).items():
            with torch.device("meta"):
                layer = factory()
            initialise_layer(layer, name, config, seed)
            if name.startswith("layers."):
                self.layers.append(layer)
            else:
                setattr(self, name, layer)

    def forward(self, ids: Tensor) -> Tensor:
        """Maps token ids (B, S) int64 to logits (B, S, V)."""
        x = self.embedding(ids)
        for block in self.layers:
            x = block(x)
        x = self.final_norm(x)
        return cast(Tensor, self.embedding.logits(x) if self.head is None else self.head(x))

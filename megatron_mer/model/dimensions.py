"""The sizes of a model, all known: what a resolved configuration says, without its blanks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mer.config import ModelConfig
from megatron_mer.errors import ConfigError


@dataclass(frozen=True)
class Dimensions:
    """Whole-model sizes, never a rank's share: D, H, Hkv, Dh, F, V and the number of blocks."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int

    @classmethod
    def of(cls, config: ModelConfig) -> Dimensions:
        """The sizes of a resolved configuration.

        Raises:
            ConfigError: a size has no value yet (the vocabulary's comes from the tokenizer), or
                the heads do not divide as attention needs it.
        """
        names = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_hidden_size")
        sizes = {name: getattr(config, name) for name in (*names, "vocab_size")}
        blank = [f"model.{name}" for name, value in sizes.items() if value is None]
        if blank:
            raise ConfigError(
                f"{', '.join(blank)}: no value; a positive integer is allowed; give it in the "
                "configuration, or resolve it from model.size and the tokenizer first"
            )
        heads, kv_heads = sizes["num_heads"], sizes["num_kv_heads"]
        head_dim = config.head_dim
        if head_dim is None or head_dim % 2:
            given = f"{head_dim}" if head_dim is not None else "no whole number"
            raise ConfigError(
                f"model.head_dim: {given}, with model.hidden_size {config.hidden_size} and "
                f"model.num_heads {heads}; rotary embeddings turn channels in pairs; give an even "
                f"model.head_dim, or take a hidden_size that is a multiple of {2 * heads}"
            )
        if heads % kv_heads:
            raise ConfigError(
                f"model.num_kv_heads: {kv_heads} with model.num_heads {heads}; each key-value head "
                "serves equally many query heads; take a divisor of model.num_heads"
            )
        return cls(head_dim=head_dim, **sizes)

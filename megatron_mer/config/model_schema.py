"""Every key of the section `model`, in the manner of `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from megatron_mer.config.field_types import Count, Flag, Positive, Text

BETA_FAST: Final = 32.0
"""YaRN's default turns of a channel that stays."""
BETA_SLOW: Final = 1.0
"""YaRN's default turns of a channel that is stretched by the whole factor."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary angles changed for longer contexts, with Hugging Face's names and numbers."""

    kind: Literal["linear", "llama3", "yarn"]
    """linear: every frequency divided by factor (arXiv 2306.15595); llama3: the low ones are, with
    a smooth passage, as in Llama 3.1; yarn: as in arXiv 2309.00071, and the cosines and sines are
    multiplied by attention_factor."""
    factor: Positive
    """How many times longer the context becomes, 1 or above."""
    original_max_position_embeddings: Count | None = None
    """llama3 and yarn, required there: tokens of the context that the model was trained with."""
    low_freq_factor: Positive | None = None
    """llama3, required there: wavelengths above original_max_position_embeddings divided by this
    are stretched by the whole factor."""
    high_freq_factor: Positive | None = None
    """llama3, required there and above low_freq_factor: wavelengths below
    original_max_position_embeddings divided by this stay."""
    attention_factor: Positive | None = None
    """yarn: multiplies cosines and sines; default: 0.1 ln(factor) + 1, or by the two mscale."""
    beta_fast: Positive | None = None
    """yarn: channels that turn at least so often in the original context stay; default: 32."""
    beta_slow: Positive | None = None
    """yarn: channels that turn at most so often are stretched by the whole factor; default: 1."""
    mscale: Positive | None = None
    """yarn, together with mscale_all_dim: attention_factor is (0.1 mscale ln(factor) + 1) / (0.1
    mscale_all_dim ln(factor) + 1)."""
    mscale_all_dim: Positive | None = None
    """yarn: see mscale."""
    truncate: Flag | None = None
    """yarn: widen the passage between the two betas to whole channels; default: true."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the Llama: by `size`, by hand, or a size with some dimensions changed."""

    size: Text | None = None
    """A named shape (megatron_mer/config/sizes.py); dimensions given beside it override its own."""
    from_hf: Text | None = None
    """A local Hugging Face folder (config.json, *.safetensors) whose weights the run starts from.
    Dimensions that are not given are its own; the tokenizer is its own, or one that extends it."""
    seq_length: Count
    """S, tokens of a row. A dataset of n tokens has (n - 1) // S samples."""
    hidden_size: Count
    """D, width of the residual stream."""
    num_layers: Count
    """Transformer blocks."""
    num_heads: Count
    """H, attention heads."""
    num_kv_heads: Count
    """Hkv, heads of keys and values, a divisor of num_heads; by hand the default is num_heads."""
    head_dim: Count | None = None
    """Dh, channels of a head, an even number (rotary pairs); default: the size's, else
    hidden_size / num_heads."""
    ffn_hidden_size: Count
    """F, width of the gated SwiGLU feed-forward layer."""
    vocab_size: Count | None = None
    """V; default: the tokenizer's. A larger one leaves unused rows."""
    tie_embeddings: Flag = False
    """Share one weight between the input embedding and the output head."""
    rope_base: Positive = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling: RopeScaling | None = None
    """Leave out: the size's, else none; null: none."""
    norm_eps: Positive = 1e-5
    """Epsilon of RMSNorm."""
    init_std: Positive = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        if self.head_dim is None and self.hidden_size % self.num_heads == 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)

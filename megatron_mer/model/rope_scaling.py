"""Frequencies of the rotary embedding, plain or scaled for a longer context.

The numbers are those of transformers' `ROPE_INIT_FUNCTIONS`, to the bit, so that a model from
there goes on as it was.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_mer.config import RopeScaling
from megatron_mer.config.model_schema import BETA_FAST, BETA_SLOW
from megatron_mer.errors import ConfigError, Problem


def rope_frequencies(
    head_dim: int, base: float, scaling: RopeScaling | None
) -> tuple[Tensor, float]:
    """Radians a position of each pair of channels, and what cosines and sines are multiplied by.

    Args:
        head_dim: channels of a head Dh, even.
        base: base of the geometric row of wavelengths.
        scaling: how the row is changed; None: not at all.

    Returns:
        (Dh/2,) fp32 on the CPU, and a factor of 1 but for YaRN.

    Raises:
        ConfigError: a number that this kind of scaling needs is missing.
    """
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    wavelengths = base ** (channels / head_dim)  # over 2 pi
    if scaling is None:
        return 1.0 / wavelengths, 1.0
    if scaling.kind == "linear":
        return 1.0 / wavelengths / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(1.0 / wavelengths, scaling), 1.0
    return _yarn(wavelengths, base, head_dim, scaling), _attention_factor(scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Divides long wavelengths by the factor, keeps short ones, passes smoothly between them."""
    context = _needed(scaling, "original_max_position_embeddings")
    low, high = _needed(scaling, "low_freq_factor"), _needed(scaling, "high_freq_factor")
    wavelengths = 2 * math.pi / frequencies
    long, short = wavelengths > context / low, wavelengths < context / high
    stretched = torch.where(long, frequencies / scaling.factor, frequencies)
    share = (context / wavelengths - low) / (high - low)
    between = (1 - share) * stretched / scaling.factor + share * stretched
    return torch.where(long | short, stretched, between)


def _yarn(wavelengths: Tensor, base: float, head_dim: int, scaling: RopeScaling) -> Tensor:
    """Stretches channels by how often they turn in the original context (section 3.2 there)."""
    context = _needed(scaling, "original_max_position_embeddings")

    def channel(turns: float) -> float:
        return (head_dim * math.log(context / (turns * 2 * math.pi))) / (2 * math.log(base))

    first, last = channel(scaling.beta_fast or BETA_FAST), channel(scaling.beta_slow or BETA_SLOW)
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    places = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    kept = 1 - torch.clamp((places - first) / (last - first), 0, 1)
    return 1.0 / (scaling.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.mscale is not None and scaling.mscale_all_dim is not None:
        return scale(scaling.mscale) / scale(scaling.mscale_all_dim)
    return scale(1.0)


def _needed(scaling: RopeScaling, key: str) -> float:
    value: float | None = getattr(scaling, key)
    if value is None:
        allowed = f"a number, for {scaling.kind}"
        raise ConfigError([Problem(f"model.rope_scaling.{key}", "missing", allowed, "add it")])
    return value

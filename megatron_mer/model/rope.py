"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), in Llama's half-split layout."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from megatron_mer.config import RopeScaling
from megatron_mer.model.rope_scaling import rope_frequencies


@lru_cache(maxsize=16)
def rope_tables(
    seq_length: int,
    head_dim: int,
    base: float,
    device: torch.device,
    scaling: RopeScaling | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of every position's angles, made once and shared by all blocks.

    They are no buffers of the module: casting a model to bf16 casts its buffers too, and bf16
    angles are wrong by more than a position.

    Args:
        seq_length: number of positions S.
        head_dim: channels of a head Dh, even.
        base: base of the geometric row of wavelengths.
        device: where the tables are kept.
        scaling: how the wavelengths are changed for longer contexts; None: not at all.

    Returns:
        Two fp32 tensors (S, 1, Dh): [cos, cos] and [-sin, sin] along the channels.
    """
    # A table first made while evaluating must still serve training.
    with torch.inference_mode(False), torch.no_grad():
        frequencies, factor = rope_frequencies(head_dim, base, scaling)
        positions = torch.arange(seq_length, dtype=torch.float32, device="cpu")
        angles = positions[:, None, None] * frequencies
        cos, sin = angles.cos() * factor, angles.sin() * factor
        cosines, signed_sines = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        return cosines.to(device), signed_sines.to(device)


def apply_rope(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turns channel i with channel i + Dh/2 by its position's angle, in fp32.

    Args:
        x: (B, S, H, Dh), any floating-point dtype.
        tables: what `rope_tables` gave for S and Dh.

    Returns:
        A tensor like x.
    """
    cosines, signed_sines = tables
    # roll() exchanges the halves; the sines carry the sign that "rotate_half" puts on them.
    swapped = x.roll(x.size(-1) // 2, -1)
    return (x * cosines + swapped * signed_sines).to(x.dtype)

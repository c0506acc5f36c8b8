"""Arithmetic of training, and what devices can do of it: model FLOPs utilisation (MFU).

MFU = tokens/s * FLOPs a token / (devices * peak FLOP/s of one), with the FLOPs that the model needs
and not those that were spent (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): recomputation
does not count.
"""

from __future__ import annotations

from megatron_mer.model.dimensions import Dimensions

TERA = 1e12

# Dense bf16 TFLOP/s of one device by a word of its name, from the vendors' data sheets, without
# sparsity. The first word that the name holds counts, so what is more special stands first.
PEAK_BF16_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 311.9,
    "A800": 311.9,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "MI300X": 1307.4,
    "MI250X": 383.0,
}


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Dense peak of one device in TFLOP/s; None where it is not known.

    Args:
        device_name: as torch names it, such as "NVIDIA H100 80GB HBM3".
        precision: bf16 or fp32. In fp32 the peak depends on whether tensor cores round to TF32, so
            it is not known.
    """
    if precision != "bf16":
        return None
    words = device_name.replace("-", " ").upper()
    for name, peak in PEAK_BF16_TFLOPS.items():
        if f" {name.upper()} " in f" {words} ":
            return peak
    return None


def matmul_parameters(dimensions: Dimensions) -> int:
    """Weights that a token is multiplied with: attention, feed-forward and output head.

    The embedding is a lookup and does not count, the head does, tied or not; norms are left out.
    """
    d = dimensions
    attention = d.hidden_size * d.head_dim * (2 * d.num_heads + 2 * d.num_kv_heads)
    feed_forward = 3 * d.hidden_size * d.ffn_hidden_size
    return d.num_layers * (attention + feed_forward) + d.hidden_size * d.vocab_size


def flops_per_token(dimensions: Dimensions, seq_length: int) -> float:
    """FLOPs of forward and backward pass for one token: 6 N_matmul + 6 L H Dh S.

    Two FLOPs a weight forward and four backward; attention scores and their sum over values take
    12 L H Dh S over a whole sequence (arXiv 2204.02311), half of that with a causal mask.

    Args:
        dimensions: of the whole model.
        seq_length: S, tokens.
    """
    d = dimensions
    attention = 6 * d.num_layers * d.num_heads * d.head_dim * seq_length
    return float(6 * matmul_parameters(dimensions) + attention)

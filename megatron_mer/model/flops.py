"""How much arithmetic a token costs in each layer."""

from __future__ import annotations

from megatron_mer.config import ModelConfig
from megatron_mer.model.dimensions import Dimensions


def layer_costs(config: ModelConfig) -> list[float]:
    """Forward FLOPs a token of each layer that `build_layers` gives, in its order.

    A weight costs one multiplication and one addition; attention's scores and their product with
    the values cost 2 S H Dh each, with the causal half counted in full. This is the usual count
    (Chowdhery et al. 2022, arXiv 2204.02311, appendix B; Narayanan et al. 2021, arXiv 2104.04473,
    appendix), with GQA's narrower keys and values and SwiGLU's third matrix. A training step costs
    three times as much, backward included.

    Args:
        config: the model's section of the configuration, resolved.

    Returns:
        num_layers + 3 numbers. The embedding is a look-up and costs 0.
    """
    dims = Dimensions.of(config)
    hidden = dims.hidden_size
    width, kv_width = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    attention_weights = 2 * hidden * (width + kv_width)
    mlp_weights = 3 * hidden * dims.ffn_hidden_size
    scores = 4 * config.seq_length * width
    norm = 4 * hidden  # square, sum, scale, weight
    block = 2 * (attention_weights + mlp_weights) + scores + 2 * norm
    head = 2 * hidden * dims.vocab_size
    return [0.0, *[float(block)] * dims.num_layers, float(norm), float(head)]

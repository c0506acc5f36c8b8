"""The arithmetic behind the utilisation, against numbers worked out by hand."""

from dataclasses import replace

import pytest

from megatron_mer.config import ModelConfig
from megatron_mer.model import Dimensions, flops_per_token, layer_costs, peak_tflops
from megatron_mer.model.utilisation import matmul_parameters

CONFIG = ModelConfig(
    seq_length=16,
    hidden_size=8,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_hidden_size=24,
    vocab_size=100,
)


def test_a_small_model_by_hand():
    dimensions = Dimensions.of(CONFIG)
    # q and o: 8 x 8; k and v: 8 x 4; gate, up and down: 8 x 24; head: 8 x 100. No embedding.
    weights = 2 * (2 * 64 + 2 * 32 + 3 * 192) + 800
    assert matmul_parameters(dimensions) == weights == 2336
    # Scores and values: 2 matrices of 2 x 8 FLOPs a pair, half of 16 pairs, three times for the
    # backward pass, 2 layers.
    assert flops_per_token(dimensions, 16) == 6 * weights + 3 * 2 * (2 * 2 * 8 * 16 // 2)


def test_wide_heads_by_hand():
    config = replace(CONFIG, head_dim=6)
    dimensions = Dimensions.of(config)
    # q and o: 8 x 24; k and v: 8 x 12.
    weights = 2 * (2 * 192 + 2 * 96 + 3 * 192) + 800
    assert matmul_parameters(dimensions) == weights == 3104
    assert flops_per_token(dimensions, 16) == 6 * weights + 3 * 2 * (2 * 2 * 24 * 16 // 2)
    blocks = 2 * (2 * (2 * 192 + 2 * 96 + 3 * 192) + 4 * 16 * 24 + 2 * 4 * 8)
    assert sum(layer_costs(config)) == blocks + 4 * 8 + 2 * 800


def test_it_is_three_times_the_forward_cost_but_for_norms_and_the_causal_half():
    costs = sum(layer_costs(CONFIG))
    norms = (2 * 2 + 1) * 4 * 8
    causal_half = 2 * (4 * 16 * 8) / 2
    assert flops_per_token(Dimensions.of(CONFIG), 16) == 3 * (costs - norms - causal_half)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 311.9),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", None),
        ("", None),
    ],
)
def test_peaks_are_known_by_whole_words(name, peak):
    assert peak_tflops(name, "bf16") == peak
    assert peak_tflops(name, "fp32") is None

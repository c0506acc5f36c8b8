"""Rotary embeddings turn by position, exactly, in every dtype."""

from dataclasses import asdict, replace

import pytest
import torch

from megatron_mer.config import ModelConfig, RopeScaling
from megatron_mer.errors import ConfigError
from megatron_mer.model import Llama, apply_rope, rope_tables
from megatron_mer.model.rope_scaling import rope_frequencies

CPU = torch.device("cpu")


def test_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    query, key = torch.randn(2, 16, dtype=torch.float64)
    tables = rope_tables(64, 16, 10000.0, CPU)
    turned = [apply_rope(x.expand(1, 64, 1, 16), tables)[0, :, 0] for x in (query, key)]
    products = turned[0] @ turned[1].T
    for distance in (-20, 0, 7):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-4)
    assert products[0].std() > 0.1


def test_position_zero_is_left_alone_and_lengths_stay():
    x = torch.randn(1, 9, 2, 8)
    turned = apply_rope(x, rope_tables(9, 8, 10000.0, CPU))
    assert torch.equal(turned[:, 0], x[:, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_bf16_is_rounded_once():
    """The angles stay fp32: bf16 ones are wrong by whole positions far out."""
    tables = rope_tables(600, 8, 10000.0, CPU)
    x = torch.randn(1, 600, 2, 8).bfloat16()
    assert torch.equal(apply_rope(x, tables), apply_rope(x.float(), tables).bfloat16())
    exact = 599 * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    torch.testing.assert_close(tables[0][599, 0, :4].double(), exact.cos(), rtol=0, atol=1e-4)


SCALINGS = {
    "linear": RopeScaling(kind="linear", factor=3.0),
    "llama31": RopeScaling(
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    "yarn": RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=4096),
    "yarn_all": RopeScaling(
        kind="yarn",
        factor=40.0,
        original_max_position_embeddings=4096,
        beta_fast=16.0,
        beta_slow=2.0,
        mscale=1.0,
        mscale_all_dim=0.707,
        truncate=False,
    ),
    "yarn_given": RopeScaling(
        kind="yarn", factor=1.0, original_max_position_embeddings=7, attention_factor=1.3
    ),
}


@pytest.mark.parametrize("head_dim", [6, 64, 128])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_scaled_frequencies_are_those_of_transformers_to_the_bit(scaling, base, head_dim):
    transformers = pytest.importorskip("transformers")
    functions = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS
    given = {key: value for key, value in asdict(scaling).items() if value is not None}
    kind = given.pop("kind")
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=65536,
        rope_parameters={"rope_type": kind, "rope_theta": base, **given},
    )
    wanted, factor = functions[kind](config, CPU)
    frequencies, ours = rope_frequencies(head_dim, base, scaling)
    assert torch.equal(frequencies, wanted)
    assert ours == factor
    assert not torch.equal(frequencies, rope_frequencies(head_dim, base, None)[0]) or ours != 1.0


def test_a_number_that_is_missing_is_named():
    with pytest.raises(ConfigError, match="low_freq_factor"):
        rope_frequencies(8, 1e4, replace(SCALINGS["llama31"], low_freq_factor=None))


def test_casting_a_model_finds_no_tables_to_cast():
    config = ModelConfig(
        seq_length=8,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        ffn_hidden_size=16,
        vocab_size=8,
    )
    assert not list(Llama(config, seed=1).buffers())

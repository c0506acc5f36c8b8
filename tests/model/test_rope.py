"""Rotary embeddings turn by position, exactly, in every dtype."""

import torch

from megatron_mer.config import ModelConfig
from megatron_mer.model import Llama, apply_rope, rope_tables

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

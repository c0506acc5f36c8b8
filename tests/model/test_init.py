"""Initial weights depend on their key alone."""

import math

import pytest
import torch

from megatron_mer.config import ModelConfig
from megatron_mer.model import (
    Llama,
    build_layers,
    init_parameter,
    init_std,
    init_tensor,
    initialise_layer,
)

CONFIG = ModelConfig(
    seq_length=16,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    ffn_hidden_size=320,
    vocab_size=600,
)


class Part:
    """One of `parts` slices of `size` places, the last ones shorter."""

    def __init__(self, dim, size, parts, index):
        share = -(-size // parts)
        self.dim, self.size = dim, size
        self.begin, self.end = min(index * share, size), min((index + 1) * share, size)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("rows", [8, 256, 1000, 1028])
def test_slices_are_cut_from_the_whole(dim, parts, rows):
    shape = (rows, 12)
    whole = init_tensor(7, "a.weight", shape, 0.5)
    for index in range(parts):
        part = init_tensor(7, "a.weight", shape, 0.5, Part(dim, shape[dim], parts, index))
        assert torch.equal(part, whole.chunk(parts, dim)[index])


def test_key_decides_and_nothing_else():
    first = init_tensor(7, "a.weight", (300, 8), 1.0)
    torch.manual_seed(0)
    torch.randn(5)
    assert torch.equal(first, init_tensor(7, "a.weight", (300, 8), 1.0))
    assert not torch.equal(first, init_tensor(8, "a.weight", (300, 8), 1.0))
    assert not torch.equal(first, init_tensor(7, "b.weight", (300, 8), 1.0))
    assert not torch.equal(first[:44], first[256:])
    # Seeds that agree in their low 32 bits differ.
    assert not torch.equal(first, init_tensor(7 + 2**32, "a.weight", (300, 8), 1.0))


def test_values_are_pinned():
    """What a seed means may not change by accident: a run would no longer be repeatable."""
    values = init_tensor(1, "embedding.weight", (257, 2), 0.02)
    expected = [[-0.022638496, -0.0552141815], [-0.0330593586, -0.0108060455]]
    torch.testing.assert_close(values[[0, 256]], torch.tensor(expected), rtol=1e-6, atol=0)


def test_values_are_normal():
    values = init_tensor(1, "a.weight", (1024, 512), 0.02).double() / 0.02
    count = values.numel()
    assert abs(values.mean()) < 5 / math.sqrt(count)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((values**4).mean() - 3) < 5 * math.sqrt(96 / count)
    assert abs((values[:256] * values[256:512]).mean()) < 5 / math.sqrt(256 * 512)


def test_a_slice_that_does_not_exist_is_an_error():
    for part in (Part(0, 9, 1, 0), Part(2, 4, 1, 0), Part(1, 8, 2, 1)):
        with pytest.raises(ValueError, match=r"a\.weight"):
            init_tensor(1, "a.weight", (8, 4), 1.0, part)


def test_standard_deviations_of_a_model():
    model = Llama(CONFIG, seed=2)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        residual = "o_proj" in name or "down_proj" in name
        expected = 0.02 / math.sqrt(6) if residual else 0.02
        assert init_std(name, CONFIG) == pytest.approx(expected)
        spread = 5 / math.sqrt(2 * parameter.numel())
        assert parameter.std().item() == pytest.approx(expected, rel=spread)


@pytest.mark.parametrize("meta", [True, False])
def test_layers_of_ranks_hold_slices_of_the_model(meta):
    model = Llama(CONFIG, seed=2)
    whole = model.state_dict()
    for name, factory in reversed(build_layers(CONFIG)):
        for rank in range(2):
            with torch.device("meta" if meta else "cpu"):
                layer = factory()
                for local, parameter in list(layer.named_parameters()):
                    split(layer, local, parameter, rank)
            initialise_layer(layer, name, CONFIG, 2)
            for local, parameter in layer.named_parameters():
                expected = whole[f"{name}.{local}"]
                if parameter.dim() == 2:
                    expected = expected.chunk(2, parameter.cut.dim)[rank]
                assert torch.equal(parameter, expected)
                assert parameter.dtype == torch.float32


def test_what_is_beyond_the_slice_is_zero():
    whole = Llama(CONFIG, seed=2).embedding.weight
    parameter = torch.nn.Parameter(torch.empty(86, 64))
    for index, held in enumerate([86] * 6 + [84]):
        parameter.cut = Part(0, 600, 7, index)
        values = init_parameter(parameter, "embedding.weight", CONFIG, seed=2)
        assert torch.equal(values[:held], whole[86 * index :][:held])
        assert not values[held:].any()


def split(layer, local, parameter, rank):
    """Replace a matrix by a marked one of half the size, as tensor-parallel layers do."""
    if parameter.dim() == 1:
        return
    dim = 1 if "o_proj" in local or "down_proj" in local else 0
    shape = list(parameter.shape)
    shape[dim] //= 2
    half = torch.nn.Parameter(torch.empty(shape))
    half.cut = Part(dim, parameter.shape[dim], 2, rank)
    path, _, last = local.rpartition(".")
    setattr(layer.get_submodule(path), last, half)

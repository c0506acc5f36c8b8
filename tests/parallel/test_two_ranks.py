"""Tensor parallelism on two ranks equals one process, forward and backward."""

import os

import pytest
import torch
import torch.distributed as dist

from megatron_mer.config import ModelConfig
from megatron_mer.engine.tensor_plan import LLAMA_PLAN
from megatron_mer.model import Llama, build_layers, initialise_layer
from megatron_mer.parallel import (
    TensorParallelGroup,
    apply_plan,
    enter_region,
    vocab_parallel_cross_entropy,
)
from megatron_mer.testing import run_world

SEED = 4


def model_config(tied):
    return ModelConfig(
        seq_length=16,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        ffn_hidden_size=48,
        vocab_size=64,
        tie_embeddings=tied,
        init_std=0.2,
    )


def staged_forward(named, layers, ids):
    x = ids
    for place, (name, _) in enumerate(named):
        tied_head = name == "embedding" and place > 0
        x = layers[name].logits(x) if tied_head else layers[name](x)
    return x


def close(got, wanted, what, tolerance=1e-6):
    gap = (got - wanted).abs().max().item()
    assert gap <= tolerance * max(1.0, wanted.abs().max().item()), f"{what}: off by {gap}"


def check_model(group, tied):
    config = model_config(tied)
    whole = Llama(config, SEED)
    named = build_layers(config)
    layers = {}
    for name, factory in named:
        with torch.device("meta"):
            layer = apply_plan(factory(), LLAMA_PLAN[name.split(".")[0]], group)
        initialise_layer(layer, name, config, SEED, group)
        layers[name] = layer
    ids = torch.randint(0, 64, (3, 17), generator=torch.Generator().manual_seed(1))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    weights = torch.rand(3, 16, generator=torch.Generator().manual_seed(2)) / 48

    expected_logits = whole(inputs)
    expected = vocab_parallel_cross_entropy(expected_logits, targets, TensorParallelGroup())
    (expected * weights).sum().backward()

    logits = staged_forward(named, layers, inputs)
    close(logits, expected_logits.chunk(2, -1)[group.rank], "logits")
    losses = vocab_parallel_cross_entropy(logits, targets, group)
    close(losses, expected, "losses")
    (losses * weights).sum().backward()

    wanted = dict(whole.named_parameters())
    for name, layer in layers.items():
        for local, parameter in layer.named_parameters():
            grad = wanted[f"{name}.{local}"].grad
            assert grad.abs().max() > 1e-4, local
            if parameter.dim() == 2:
                grad = grad.chunk(2, parameter.partition_dim)[group.rank]
            else:
                same_on_both(parameter.grad, f"{name}.{local}")
            close(parameter.grad, grad, f"gradient of {name}.{local}")


def same_on_both(tensor, what):
    """Weights that both ranks hold must move alike, bit for bit, or they drift apart."""
    copies = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(copies, tensor)
    assert torch.equal(copies[0], copies[1]), what


def check_not_finite(group):
    """A NaN that one rank alone has reaches the loss of both."""
    for bad in (float("nan"), float("inf")):
        logits = torch.zeros(1, 2, 8, requires_grad=True)
        with torch.no_grad():
            logits[0, 1, 3] = bad if group.rank == 1 else 0.0
        losses = vocab_parallel_cross_entropy(logits, torch.zeros(1, 2, dtype=torch.int64), group)
        assert losses[0, 0].isfinite()
        assert losses[0, 1].isnan()
        losses.sum().backward()
        assert logits.grad[0, 1].isnan().any()


def check_gradient_of_a_residual(group):
    """Entering a region must not write into a gradient that another branch uses too."""
    x = torch.full((2,), 3.0, requires_grad=True)
    y = x * 1.0
    (y + enter_region(y, group)).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 1.0 + group.size))


def compare():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = TensorParallelGroup(dist.group.WORLD, int(os.environ["RANK"]), 2)
    for tied in (False, True):
        check_model(group, tied)
    check_not_finite(group)
    check_gradient_of_a_residual(group)
    dist.destroy_process_group()
    return True


@pytest.mark.dist
def test_two_ranks_equal_one_process():
    assert run_world(__file__, "compare", world_size=2, timeout=60) == [True, True]

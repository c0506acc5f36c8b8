"""Tensor parallelism on several ranks equals one process, forward and backward."""

import pytest
import torch
import torch.distributed as dist

from megatron_mer.config import ModelConfig
from megatron_mer.engine.distributed import tensor_parallel_group
from megatron_mer.engine.tensor_plan import LLAMA_PLAN
from megatron_mer.model import Llama, build_layers, initialise_layer
from megatron_mer.parallel import (
    Layout,
    TensorParallelGroup,
    apply_plan,
    chunked_linear_cross_entropy,
    cut_of,
    enter_region,
    slice_bounds,
    vocab_parallel_cross_entropy,
)
from megatron_mer.testing import run_world

SEED = 4


def model_config(tied, num_kv_heads, vocab_size):
    return ModelConfig(
        seq_length=16,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        ffn_hidden_size=48,
        vocab_size=vocab_size,
        tie_embeddings=tied,
        init_std=0.2,
    )


def staged_forward(named, layers, ids):
    x = ids
    for place, (name, _) in enumerate(named):
        tied_head = name == "embedding" and place > 0
        x = layers[name].logits(x) if tied_head else layers[name](x)
    return x


def close(got, wanted, what, tolerance=3e-6):  # fp32 alone is that far off fp64 here
    assert got.shape == wanted.shape, what
    if wanted.numel() == 0:  # the last rank of a small vocabulary
        return
    gap = (got - wanted).abs().max().item()
    assert gap <= tolerance * max(1.0, wanted.abs().max().item()), f"{what}: off by {gap}"


def check_model(group, tied, num_kv_heads, vocab_size):
    config = model_config(tied, num_kv_heads, vocab_size)
    whole = Llama(config, SEED)
    named = build_layers(config)
    layers = {}
    for name, factory in named:
        with torch.device("meta"):
            layer = apply_plan(factory(), LLAMA_PLAN[name.split(".")[0]], group)
        initialise_layer(layer, name, config, SEED)
        layers[name] = layer
    ids = torch.randint(0, vocab_size, (3, 17), generator=torch.Generator().manual_seed(1))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    weights = torch.rand(3, 16, generator=torch.Generator().manual_seed(2)) / 48

    expected_logits = whole(inputs)
    expected = vocab_parallel_cross_entropy(expected_logits, targets, TensorParallelGroup())
    (expected * weights).sum().backward()

    logits = staged_forward(named, layers, inputs)
    begin, end = slice_bounds(vocab_size, group.size, group.rank)
    held = logits[..., : end - begin]
    close(held, expected_logits[..., begin:end], "logits")
    losses = vocab_parallel_cross_entropy(logits, targets, group, vocab_size)
    close(losses, expected, "losses")
    (losses * weights).sum().backward()
    check_chunked(named, layers, inputs, targets, weights, losses, group, vocab_size)

    wanted = dict(whole.named_parameters())
    for name, layer in layers.items():
        for local, parameter in layer.named_parameters():
            grad = wanted[f"{name}.{local}"].grad
            assert grad.abs().max() > 1e-4, local
            cut, what = cut_of(parameter), f"{name}.{local}"
            if cut is None:
                same_on_all(parameter.grad, group.group, group.size, what)
                close(parameter.grad, grad, f"gradient of {what}")
                continue
            same = group.kv_replicas
            if cut.parts < group.size:
                same_on_all(parameter.grad, same.group, same.size, what)
            width = cut.end - cut.begin
            mine, padding = parameter.grad.split([width, parameter.shape[cut.dim] - width], cut.dim)
            close(mine, grad.narrow(cut.dim, cut.begin, width), f"gradient of {what}")
            assert torch.equal(padding, torch.zeros_like(padding)), what


def check_chunked(named, layers, inputs, targets, weights, losses, group, vocab_size):
    """The logits of some tokens at a time give the same, down to the embedding's gradient."""
    parameters = [p for layer in layers.values() for p in layer.parameters()]
    kept = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    hidden = staged_forward(named[:-1], layers, inputs)
    head = layers[named[-1][0]].weight
    total, chunked = chunked_linear_cross_entropy(
        enter_region(hidden, group), head, targets, weights, group, vocab_size, chunk=7
    )
    total.backward()
    close(chunked, losses.detach(), "chunked losses")
    for parameter, whole in zip(parameters, kept, strict=True):
        close(parameter.grad, whole, "gradient of a chunked loss")
        parameter.grad = whole


def same_on_all(tensor, group, size, what):
    """Weights that several ranks hold must move alike, bit for bit, or they drift apart."""
    copies = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(copies, tensor.contiguous(), group=group)
    assert all(torch.equal(copies[0], copy) for copy in copies), what


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


def place(num_kv_heads):
    """This rank's place among all ranks, which are one tensor-parallel group."""
    layout = Layout(tp_size=dist.get_world_size(), pp_size=1, dp_size=1)
    return tensor_parallel_group(layout, dist.get_rank(), num_kv_heads)


def compare():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = place(num_kv_heads=2)
    for tied in (False, True):
        check_model(group, tied, num_kv_heads=2, vocab_size=64)
    check_not_finite(group)
    check_gradient_of_a_residual(group)
    dist.destroy_process_group()
    return True


def compare_uneven():
    """Fewer heads of keys and values than ranks, and vocabularies that do not divide."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for num_kv_heads in (1, 2):
        group = place(num_kv_heads)
        for tied in (False, True):
            check_model(group, tied, num_kv_heads, vocab_size=61)
    check_model(group, True, num_kv_heads=2, vocab_size=dist.get_world_size() + 1)
    dist.destroy_process_group()
    return True


@pytest.mark.dist
def test_two_ranks_equal_one_process():
    assert run_world(__file__, "compare", world_size=2, timeout=60) == [True, True]


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [2, 4])
def test_repeated_heads_and_a_padded_vocabulary_equal_one_process(world_size):
    said = run_world(__file__, "compare_uneven", world_size=world_size, timeout=60)
    assert said == [True] * world_size

"""The chunked loss against the loss of whole logits."""

import pytest
import torch

from megatron_mer.parallel import (
    TensorParallelGroup,
    chunk_tokens,
    chunked_linear_cross_entropy,
    vocab_parallel_cross_entropy,
)

ONE = TensorParallelGroup()


def case(dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 7, 16, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(50, 16, generator=generator) * scale).to(dtype).requires_grad_()
    targets = torch.randint(0, 50, (2, 7), generator=generator)
    factors = torch.rand(2, 7, generator=generator)
    factors[0, 2] = 0.0
    return hidden, weight, targets, factors


def whole(hidden, weight, targets, factors):
    losses = vocab_parallel_cross_entropy(hidden @ weight.t(), targets, ONE)
    return (losses * factors).sum(), losses


@pytest.mark.parametrize("chunk", [1, 4, 5, 14, 100])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_equals_the_whole_logits(chunk, scale):
    hidden, weight, targets, factors = case(scale=scale)
    exact_hidden, exact_weight = (
        one.detach().double().requires_grad_() for one in (hidden, weight)
    )
    total, losses = chunked_linear_cross_entropy(hidden, weight, targets, factors, ONE, chunk=chunk)
    logits = exact_hidden @ exact_weight.t()
    exact = logits.logsumexp(-1) - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(losses, exact.float(), rtol=2e-6, atol=2e-6)
    wanted = (exact * factors).sum()
    torch.testing.assert_close(total, wanted.float(), rtol=2e-6, atol=2e-6)
    (0.25 * total).backward()
    (0.25 * wanted).backward()
    torch.testing.assert_close(hidden.grad, exact_hidden.grad.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, exact_weight.grad.float(), rtol=1e-4, atol=1e-5)
    assert (hidden.grad[0, 2] == 0).all()


def test_bf16_is_as_far_from_exact_as_whole_logits_are():
    hidden, weight, targets, factors = case(torch.bfloat16)
    total, losses = chunked_linear_cross_entropy(hidden, weight, targets, factors, ONE, chunk=4)
    total.backward()
    other = [one.detach().clone().requires_grad_() for one in (hidden, weight)]
    expected, expected_losses = whole(*other, targets, factors)
    expected.backward()
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected_losses, rtol=1e-6, atol=1e-6)
    for mine, its in zip((hidden, weight), other, strict=True):
        assert mine.grad.dtype == torch.bfloat16
        torch.testing.assert_close(mine.grad, its.grad, rtol=2**-7, atol=2**-9)


def test_without_gradients_none_are_made():
    hidden, weight, targets, factors = case()
    with torch.no_grad():
        total, losses = chunked_linear_cross_entropy(hidden, weight, targets, factors, ONE, chunk=4)
    expected, expected_losses = whole(hidden, weight, targets, factors)
    assert not total.requires_grad
    assert not losses.requires_grad
    torch.testing.assert_close(total, expected.detach())
    torch.testing.assert_close(losses, expected_losses.detach())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_token(bad):
    hidden, weight, targets, factors = case()
    with torch.no_grad():
        hidden[1, 3, 4] = bad
    total, losses = chunked_linear_cross_entropy(hidden, weight, targets, factors, ONE, chunk=4)
    assert losses[1, 3].isnan()
    assert losses.isnan().sum() == 1
    assert total.isnan()
    total.backward()
    assert hidden.grad[1, 3].isnan().any()
    assert hidden.grad[0].isfinite().all()
    assert weight.grad.isnan().any()


def test_second_backward_is_refused_not_wrong():
    total, _ = chunked_linear_cross_entropy(*case(), ONE)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        total.backward()


def test_chunks_shrink_with_the_vocabulary_down_to_a_least():
    assert chunk_tokens(4096, "cpu") == 512
    assert chunk_tokens(128_256, "cpu") == 512
    assert chunk_tokens(128_256, "cuda") == 1046
    assert chunk_tokens(32_000, "cuda") == 4194

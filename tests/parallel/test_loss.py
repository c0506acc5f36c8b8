"""The loss against torch.nn.functional.cross_entropy in one process."""

import pytest
import torch
from torch.nn import functional

from megatron_mer.parallel import TensorParallelGroup, vocab_parallel_cross_entropy

ONE = TensorParallelGroup()


def case(dtype, scale=5.0):
    torch.manual_seed(2)
    logits = (torch.randn(2, 7, 50) * scale).to(dtype).requires_grad_()
    return logits, torch.randint(0, 50, (2, 7)), torch.rand(2, 7)


def reference(logits, targets):
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_equals_torch(scale):
    logits, targets, weights = case(torch.float32, scale)
    losses = vocab_parallel_cross_entropy(logits, targets, ONE)
    exact = logits.detach().double().requires_grad_()
    expected = reference(exact, targets)
    torch.testing.assert_close(losses, expected.float(), rtol=1e-6, atol=1e-6)
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(logits.grad, exact.grad.float(), rtol=1e-5, atol=1e-7)


def test_bf16_logits_are_taken_in_fp32():
    logits, targets, weights = case(torch.bfloat16)
    losses = vocab_parallel_cross_entropy(logits, targets, ONE)
    assert losses.dtype == torch.float32
    exact = logits.detach().float().requires_grad_()
    expected = reference(exact, targets)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    assert logits.grad.dtype == torch.bfloat16
    # Rounded once, at the very end.
    torch.testing.assert_close(logits.grad.float(), exact.grad, rtol=2**-8, atol=1e-7)


def test_logits_are_left_alone():
    logits, targets, _ = case(torch.float32)
    before = logits.detach().clone()
    vocab_parallel_cross_entropy(logits, targets, ONE).sum().backward()
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_logits_show_in_their_token_only(bad):
    logits, targets, _ = case(torch.float32)
    with torch.no_grad():
        logits[1, 3, 4] = bad
    losses = vocab_parallel_cross_entropy(logits, targets, ONE)
    assert losses[1, 3].isnan()
    assert losses.isnan().sum() == 1
    losses.sum().backward()
    assert logits.grad[1, 3].isnan().any()
    assert logits.grad[0].isfinite().all()


def test_masked_tokens_have_no_gradient():
    logits, targets, _ = case(torch.float32)
    mask = torch.ones(2, 7)
    mask[0, 2] = 0.0
    (vocab_parallel_cross_entropy(logits, targets, ONE) * mask).sum().backward()
    assert (logits.grad[0, 2] == 0).all()
    assert (logits.grad[0, 3] != 0).any()


def test_second_backward_is_refused_not_wrong():
    logits, targets, _ = case(torch.float32)
    total = vocab_parallel_cross_entropy(logits, targets, ONE).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        total.backward()

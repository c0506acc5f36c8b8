"""Cross-entropy over a vocabulary that tensor-parallel ranks share."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mer.parallel.collectives import TensorParallelGroup
from megatron_mer.parallel.cut import slice_bounds


class _CrossEntropy(torch.autograd.Function):
    """log(sum exp(x - max)) - (x[target] - max), in fp32.

    One fp32 tensor of the logits' shape is made, kept for backward and there turned into the
    gradient in place. PyTorch refuses a second backward through it, since it has changed.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, group: TensorParallelGroup, held: int
    ) -> Tensor:
        largest = _largest(logits[..., :held])
        group.all_reduce(largest, dist.ReduceOp.MAX)
        # bf16 minus fp32 is fp32, without a copy of the logits in between.
        shifted = logits - largest
        # Padding: no probability, hence no gradient.
        shifted[..., held:] = -torch.inf
        local, owned = _local_targets(targets, logits.size(-1), group)
        # (2, B, S): target's logit and sum of exponentials, reduced together.
        parts = torch.empty((2, *targets.shape), dtype=torch.float32, device=logits.device)
        torch.gather(shifted, -1, local.unsqueeze(-1), out=parts[0].unsqueeze(-1))
        if owned is not None:
            parts[0].masked_fill_(~owned, 0.0)
        exponentials = shifted.exp_()
        torch.sum(exponentials, -1, out=parts[1])
        group.all_reduce(parts)
        target_logits, total = parts.unbind()
        ctx.save_for_backward(exponentials, total, local, owned)
        ctx.dtype = logits.dtype
        return total.log() - target_logits

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        exponentials, total, local, owned = ctx.saved_tensors
        grad = grads[0].float()
        # d loss / d x = softmax(x) - onehot(target)
        result = exponentials.mul_((grad / total).unsqueeze(-1))
        at_target = grad if owned is None else grad.masked_fill(~owned, 0.0)
        result.scatter_add_(-1, local.unsqueeze(-1), -at_target.unsqueeze(-1))
        return result.to(ctx.dtype), None, None, None


def _largest(logits: Tensor) -> Tensor:
    """(B, S, 1) fp32; without a column -inf, as the last ranks of a small vocabulary have it."""
    if logits.size(-1) == 0:
        return logits.new_full((*logits.shape[:-1], 1), -torch.inf, dtype=torch.float32)
    return logits.amax(-1, keepdim=True).float()


def _local_targets(
    targets: Tensor, share: int, group: TensorParallelGroup
) -> tuple[Tensor, Tensor | None]:
    """Targets as columns of this rank's logits (0 if foreign), and which are (None: all)."""
    if group.size == 1:
        return targets, None
    local = targets - group.rank * share
    owned = (local >= 0) & (local < share)
    return local.masked_fill(~owned, 0), owned


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, group: TensorParallelGroup, vocab_size: int | None = None
) -> Tensor:
    """Cross-entropy of each token, without gathering the logits.

    The ranks exchange two numbers a token and their maximum (Shoeybi et al. 2019, section 3). A NaN
    or infinite logit of any rank gives NaN on all.

    Args:
        logits: (B, S, ceil(V/tp)), this rank's columns, any floating-point dtype.
        targets: (B, S) int64, 0 <= target < V, equal on all ranks; tokens that do not count need a
            valid id too, and a loss that is multiplied by 0.
        group: this rank's place in its tensor-parallel group.
        vocab_size: V; the ranks' columns above it are padding and count as -inf. None: there is
            none.

    Returns:
        Losses (B, S) in nats, fp32, equal on all ranks. Can be differentiated once.
    """
    share = logits.size(-1)
    begin, end = slice_bounds(vocab_size or share * group.size, group.size, group.rank)
    return cast(Tensor, _CrossEntropy.apply(logits, targets, group, end - begin))  # type: ignore[no-untyped-call]

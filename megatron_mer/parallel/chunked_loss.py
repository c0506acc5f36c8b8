"""Output head and cross-entropy in one, some tokens at a time: the logits never exist whole.

The gradients of a chunk are made at once, while its logits are there: the forward pass leaves the
gradients of the hidden states and of the head's weight, and the backward pass only scales them (as
Hsu et al. 2024, arXiv 2410.10989, section 3.2, do). It takes no more arithmetic than the logits
whole, and each chunk's logits stay in the processor's caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mer.parallel.chunk import chunk_tokens
from megatron_mer.parallel.collectives import TensorParallelGroup
from megatron_mer.parallel.cut import slice_bounds


@dataclass(frozen=True)
class _Head:
    """What the chunks have in common."""

    weight: Tensor
    """(held, D): this rank's rows of the vocabulary without padding."""
    first: int
    """The vocabulary's row that is this rank's first."""
    group: TensorParallelGroup

    def chunk(
        self,
        hidden: Tensor,
        targets: Tensor,
        factors: Tensor,
        into: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Losses (n,) of n tokens; their gradients are written and added to two tensors."""
        losses, inside = self.probabilities(hidden, targets)
        if into is not None:
            hidden_grad, weight_grad = into
            grads = self.logit_gradients(inside, targets, factors)
            torch.mm(grads, self.weight, out=hidden_grad)
            if grads.dtype == weight_grad.dtype:
                weight_grad.addmm_(grads.t(), hidden)
            else:
                weight_grad += grads.t() @ hidden
        return losses

    def probabilities(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (n,) and the softmax (n, held), both fp32, of n tokens."""
        logits = hidden @ self.weight.t()
        local, owned = self.local(targets)
        if logits.size(-1) == 0:  # the last ranks of a small vocabulary
            inside = targets.new_zeros(len(targets), 0, dtype=torch.float32)
            norms = inside.new_full((len(targets),), -torch.inf)
            at_target = torch.zeros_like(norms)
        else:
            inside = torch.softmax(logits, -1, dtype=torch.float32)
            # The largest probability is 1 / vocabulary or more, so that its logarithm is exact.
            norms = logits.amax(-1).float() - inside.amax(-1).log()
            at_target = logits.gather(-1, local.unsqueeze(-1)).squeeze(-1).float()
            at_target = at_target.masked_fill(~owned, 0.0)
        if self.group.size == 1:
            return norms - at_target, inside
        largest = norms.clone()
        self.group.all_reduce(largest, dist.ReduceOp.MAX)
        parts = torch.stack([torch.exp(norms - largest), at_target])
        self.group.all_reduce(parts)
        whole = largest + parts[0].log()
        inside.mul_(torch.exp(norms - whole).unsqueeze(-1))
        return whole - parts[1], inside

    def local(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Targets as columns of this rank (0 if foreign), and which are its own."""
        local = targets - self.first
        owned = (local >= 0) & (local < len(self.weight))
        return local.masked_fill(~owned, 0), owned

    def logit_gradients(self, inside: Tensor, targets: Tensor, factors: Tensor) -> Tensor:
        """(softmax - onehot(target)) * factor, in the weight's dtype; overwrites the softmax."""
        local, owned = self.local(targets)
        if inside.size(-1):
            inside.scatter_add_(-1, local.unsqueeze(-1), -owned.to(inside.dtype).unsqueeze(-1))
        return inside.mul_(factors.unsqueeze(-1)).to(self.weight.dtype)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        factors: Tensor,
        head: _Head,
        chunk: int,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor]:
        losses = factors.new_empty(len(targets))
        held = len(head.weight)
        if differentiate:
            ctx.hidden_grad = torch.empty_like(hidden)
            # Sums over chunks, and over their tokens, in fp32.
            ctx.weight_grad = torch.zeros_like(weight, dtype=torch.float32)
            ctx.dtype = weight.dtype
        for start in range(0, len(targets), chunk):
            at = slice(start, start + chunk)
            into = (ctx.hidden_grad[at], ctx.weight_grad[:held]) if differentiate else None
            losses[at] = head.chunk(hidden[at], targets[at], factors[at], into)
        ctx.mark_non_differentiable(losses)
        return (losses * factors).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        if ctx.hidden_grad is None:
            raise RuntimeError("the chunked loss can be differentiated once: its gradient is gone")
        hidden_grad = ctx.hidden_grad.mul_(grads[0])
        weight_grad = ctx.weight_grad.mul_(grads[0]).to(ctx.dtype)
        ctx.hidden_grad = ctx.weight_grad = None
        return hidden_grad, weight_grad, None, None, None, None, None


def chunked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    factors: Tensor,
    group: TensorParallelGroup,
    vocab_size: int | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the tokens' cross-entropies, from the hidden states.

    A NaN or infinite logit of any rank gives NaN on all.

    Args:
        hidden: (B, S, D), any floating-point dtype, equal on all ranks. Its gradient here is this
            rank's part: with several ranks it has to have entered the region (`enter_region`).
        weight: (ceil(V/tp), D), this rank's rows of the head; those above V are padding.
        targets: (B, S) int64, 0 <= target < V, equal on all ranks; tokens that do not count too.
        factors: (B, S) fp32, what each token's loss is multiplied by.
        group: this rank's place in its tensor-parallel group.
        vocab_size: V; None: no rank has padding.
        chunk: tokens whose logits are made at once; default `chunk_tokens`.

    Returns:
        The sum, fp32, which can be differentiated once, and the losses (B, S) in nats, fp32, which
        cannot. Both are equal on all ranks.
    """
    share = weight.size(0)
    begin, end = slice_bounds(vocab_size or share * group.size, group.size, group.rank)
    head = _Head(weight.detach()[: end - begin], begin, group)
    total, losses = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(-1, hidden.size(-1)),
        weight,
        targets.reshape(-1),
        factors.reshape(-1),
        head,
        chunk or chunk_tokens(share, hidden.device.type),
        torch.is_grad_enabled(),
    )
    return cast(Tensor, total), cast(Tensor, losses).view_as(targets)

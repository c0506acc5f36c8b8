"""The training loss: token losses summed over the unmasked tokens of the *global* batch."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mer.parallel import TensorParallelGroup, vocab_parallel_cross_entropy

# (targets (B, S) int64, mask (B, S) fp32, is_replay (B,) bool, unmasked (1,) fp32)
Labels = tuple[Tensor, Tensor, Tensor, Tensor]


class GlobalTokenLoss:
    """The last stage's loss of one micro batch, and sums by source beside it.

    DeepSpeed averages a batch's losses over micro batches and data-parallel ranks. The sum of token
    losses is scaled so that this average is the sum over the global batch divided by its number of
    unmasked tokens, whatever masks fall into which micro batch.

    Args:
        group: the tensor-parallel group over which the vocabulary is split.
        num_micro_batches: micro batches a data-parallel rank has in a batch.
        dp_size: data-parallel size.
        device: where the sums are kept.
    """

    def __init__(
        self, group: TensorParallelGroup, num_micro_batches: int, dp_size: int, device: torch.device
    ) -> None:
        self._group = group
        self._scale = float(num_micro_batches * dp_size)
        self._device = device
        self.sums = torch.zeros(0)
        self.reset()

    def reset(self) -> None:
        """Start new sums: rows fresh and replay of (token losses, unmasked tokens), fp64."""
        self.sums = torch.zeros(2, 2, dtype=torch.float64, device=self._device)

    def __call__(self, logits: Tensor, labels: Labels) -> Tensor:
        """The scaled loss of one micro batch.

        Args:
            logits: (B, S, V/tp), this rank's part of the vocabulary.
            labels: targets, mask, source of the rows and the global batch's unmasked tokens.

        Returns:
            A scalar, fp32. If it is not finite its gradient is not either, so that the gradient
            norm, which every rank sees, tells all ranks to leave the update out.
        """
        targets, mask, is_replay, unmasked = labels
        token_losses = vocab_parallel_cross_entropy(logits, targets, self._group) * mask
        with torch.no_grad():
            self._add(token_losses, mask, is_replay)
        loss = token_losses.sum() * (self._scale / unmasked[0])
        poison = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
        return loss * poison

    def _add(self, token_losses: Tensor, mask: Tensor, is_replay: Tensor) -> None:
        rows = torch.stack([token_losses.sum(1, dtype=torch.float64), mask.sum(1).double()], 1)
        # where, not a product: a loss that is not a number must not spread to the other source.
        for source, chosen in enumerate((~is_replay, is_replay)):
            self.sums[source] += torch.where(chosen[:, None], rows, 0.0).sum(0)

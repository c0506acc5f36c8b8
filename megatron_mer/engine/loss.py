"""The training loss: token losses summed over the unmasked tokens of the *global* batch."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mer.parallel import (
    TensorParallelGroup,
    chunked_linear_cross_entropy,
    enter_region,
    vocab_parallel_cross_entropy,
)

# (targets (B, S) int64, mask (B, S) fp32, unmasked (1,) fp32)
Labels = tuple[Tensor, Tensor, Tensor]


class GlobalTokenLoss:
    """The last stage's loss of one micro batch, and each row's loss beside it.

    DeepSpeed averages a batch's losses over micro batches and data-parallel ranks. The sum of token
    losses is scaled so that this average is the sum over the global batch divided by its number of
    unmasked tokens, whatever masks fall into which micro batch.

    Args:
        group: the tensor-parallel group over which the vocabulary is split.
        num_micro_batches: micro batches a data-parallel rank has in a batch.
        dp_size: data-parallel size.
        device: where the rows' losses are kept.
        vocab_size: V, without the padding that the ranks' logits may have.
        chunk: tokens whose logits a chunked loss makes at once; None: its own choice.
    """

    def __init__(
        self,
        group: TensorParallelGroup,
        num_micro_batches: int,
        dp_size: int,
        device: torch.device,
        vocab_size: int | None,
        chunk: int | None = None,
    ) -> None:
        self._head: Tensor | None = None
        self._chunk = chunk
        self._group = group
        self._vocab_size = vocab_size
        self._scale = float(num_micro_batches * dp_size)
        self._device = device
        self._rows: list[Tensor] = []

    def take_head(self, weight: Tensor) -> None:
        """Be called with hidden states from now on and multiply by the head, chunk by chunk.

        Args:
            weight: (ceil(V/tp), D), this rank's rows of the head.
        """
        self._head = weight

    def reset(self) -> None:
        """Forget the rows of the micro batches so far."""
        self._rows = []

    def rows(self) -> Tensor:
        """(rows, 2) fp64: summed token losses in nats and unmasked tokens of each row so far."""
        if not self._rows:
            return torch.zeros(0, 2, dtype=torch.float64, device=self._device)
        return torch.cat(self._rows)

    def __call__(self, output: Tensor, labels: Labels) -> Tensor:
        """The scaled loss of one micro batch.

        Args:
            output: the model's: (B, S, ceil(V/tp)) logits, this rank's part of the vocabulary, or
                with a head that was taken (B, S, D) hidden states.
            labels: targets, mask and the global batch's unmasked tokens.

        Returns:
            A scalar, fp32. If it is not finite its gradient is not either, so that the gradient
            norm, which every rank sees, tells all ranks to leave the update out.
        """
        targets, mask, unmasked = labels
        factors = mask * (self._scale / unmasked[0])
        if self._head is None:
            losses = vocab_parallel_cross_entropy(output, targets, self._group, self._vocab_size)
            loss = (losses * factors).sum()
        else:
            hidden = enter_region(output, self._group)
            where = (self._group, self._vocab_size, self._chunk)
            loss, losses = chunked_linear_cross_entropy(
                hidden, self._head, targets, factors, *where
            )
        with torch.no_grad():
            token_losses = losses * mask
            sums = (token_losses.sum(1, dtype=torch.float64), mask.sum(1, dtype=torch.float64))
            self._rows.append(torch.stack(sums, 1))
        poison = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
        return loss * poison

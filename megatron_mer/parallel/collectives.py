"""The two ends of a tensor-parallel region, as autograd functions (Shoeybi et al. 2019, section 3).

Outside a region all ranks of the group hold equal activations; inside, each holds its share. What
enters is copied, so its gradients add up over the ranks; what leaves is added up, so its gradient
is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TensorParallelGroup:
    """This rank's place among the ranks that share each layer's tensors."""

    group: dist.ProcessGroup | None = None
    """The process group; None with one rank, which needs no communication."""
    rank: int = 0
    """Place in the group, 0 <= rank < size."""
    size: int = 1
    """Number of ranks in the group."""
    kv_replicas: TensorParallelGroup | None = None
    """Those of its ranks that hold the same head of keys and values, neighbours, where the model
    has fewer such heads than there are ranks; None: no two hold the same."""

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """Reduces a contiguous tensor over the group, in place. Collective."""
        if self.size > 1:
            dist.all_reduce(tensor, op=op, group=self.group)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorParallelGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        # A copy: autograd may hand the same gradient to another branch, such as a residual.
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        ctx.group.all_reduce(grad)
        return grad, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorParallelGroup) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        group.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0], None


def enter_region(x: Tensor, group: TensorParallelGroup) -> Tensor:
    """Passes x on as it is; in backward its gradient is summed over the group, in its own dtype.

    With one rank it is x itself.
    """
    return x if group.size == 1 else _entered(x, group)


def reduce_from_region(x: Tensor, group: TensorParallelGroup) -> Tensor:
    """Sums x over the group, in its own dtype; in backward the gradient is passed on as it is.

    In bf16 the sum of partial results is rounded once more than in one process. With one rank it is
    x itself.
    """
    return x if group.size == 1 else _reduced(x, group)


# A compiled block is cut at its communication.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _entered(x: Tensor, group: TensorParallelGroup) -> Tensor:
    return cast(Tensor, _Enter.apply(x, group))  # type: ignore[no-untyped-call]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _reduced(x: Tensor, group: TensorParallelGroup) -> Tensor:
    return cast(Tensor, _Reduce.apply(x, group))  # type: ignore[no-untyped-call]

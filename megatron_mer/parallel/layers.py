"""Tensor-parallel layers, put into a plain model from outside by a table.

A layer is made from the plain module that it replaces, reads that module's weight for shape, dtype
and device, and holds this rank's share of it. Replace modules on the meta device, before there are
weights: values are not carried over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_mer.errors import ConfigError
from megatron_mer.parallel.collectives import (
    TensorParallelGroup,
    enter_region,
    reduce_from_region,
)
from megatron_mer.parallel.cut import Cut

ParallelKind = Literal["column", "row", "kv", "vocab", "region", "head"]
"""What becomes of a module: a linear map split by outputs (column) or by inputs (row), one to heads
of keys or values, which ranks repeat where there are fewer heads than ranks (kv), a token table
split by tokens (vocab), a module whose input enters the tensor-parallel region, or a linear map to
the vocabulary, split by tokens, whose input enters the region (head). The ranks need not divide the
vocabulary; the last ones' shares are then padded."""


class _SplitWeight(nn.Module):
    """Holds this rank's share of a matrix, marked for whoever has to know that it is split.

    The mark `cut` says which part it is. `tensor_model_parallel` is read by DeepSpeed's gradient
    norm: the weights that have it count on each rank, all others on the first rank alone.
    """

    padded = False
    """Whether the ranks need not divide the weight."""

    def __init__(self, plain: nn.Module, dim: int, group: TensorParallelGroup) -> None:
        super().__init__()
        whole = plain.weight
        if not isinstance(whole, nn.Parameter) or getattr(plain, "bias", None) is not None:
            raise TypeError(f"{plain}: only modules with a weight and no bias can be split")
        shape = list(whole.shape)
        cut = self._cut(shape[dim], dim, group)
        if shape[dim] % cut.parts and not self.padded:
            raise ConfigError(
                f"parallel.tp_size: {group.size} with a weight of shape {tuple(shape)}; dim {dim} "
                "is split evenly over the tensor-parallel ranks; take a divisor of "
                f"{shape[dim]}"
            )
        shape[dim] = -(-shape[dim] // cut.parts)
        weight = nn.Parameter(whole.new_empty(shape), requires_grad=whole.requires_grad)
        if group.size > 1:
            weight.cut = cut  # type: ignore[attr-defined]
            weight.tensor_model_parallel = cut.replica == 0  # type: ignore[attr-defined]
        self.weight = weight
        self.group = group

    def _cut(self, size: int, dim: int, group: TensorParallelGroup) -> Cut:
        return Cut(dim, size, parts=group.size, index=group.rank)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, rank {self.group.rank} of {self.group.size}"


class ColumnParallelLinear(_SplitWeight):
    """A linear map split by its outputs; takes an input that has entered the region.

    Args:
        plain: the module to replace, weight (out, in).
        group: this rank's place in its tensor-parallel group.
    """

    def __init__(self, plain: nn.Module, group: TensorParallelGroup) -> None:
        super().__init__(plain, 0, group)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in) to this rank's (..., out/tp)."""
        return functional.linear(x, self.weight)


class KeyValueLinear(ColumnParallelLinear):
    """A linear map to heads of keys or values, of which each rank holds those that its queries ask.

    With fewer heads than ranks several ranks hold the same one. Each has its own queries, hence a
    part of the head's gradient; the sum over them makes their weights move alike.

    Args:
        plain: the module to replace, weight (out, in).
        group: this rank's place in its tensor-parallel group, which knows its `kv_replicas`.
    """

    def _cut(self, size: int, dim: int, group: TensorParallelGroup) -> Cut:
        same = group.kv_replicas or TensorParallelGroup()
        parts, index = group.size // same.size, group.rank // same.size
        return Cut(dim, size, parts, index, replica=same.rank)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in) to this rank's heads, (..., max(Hkv/tp, 1) Dh)."""
        same = self.group.kv_replicas
        weight = self.weight if same is None else enter_region(self.weight, same)
        return functional.linear(x, weight)


class VocabParallelHead(ColumnParallelLinear):
    """The output projection split by tokens; the last ranks' logits may end with padding.

    Args:
        plain: the module to replace, weight (V, D).
        group: this rank's place in its tensor-parallel group.
    """

    padded = True


class RowParallelLinear(_SplitWeight):
    """A linear map split by its inputs; the partial results are summed in the activations' dtype.

    Args:
        plain: the module to replace, weight (out, in).
        group: this rank's place in its tensor-parallel group.
    """

    def __init__(self, plain: nn.Module, group: TensorParallelGroup) -> None:
        super().__init__(plain, 1, group)

    def forward(self, x: Tensor) -> Tensor:
        """Maps this rank's (..., in/tp) to (..., out), equal on all ranks."""
        return reduce_from_region(functional.linear(x, self.weight), self.group)


class VocabParallelEmbedding(_SplitWeight):
    """A token table split by tokens: each rank looks up its own, and the sum has them all.

    Args:
        plain: the module to replace, weight (V, D).
        group: this rank's place in its tensor-parallel group.
    """

    padded = True

    def __init__(self, plain: nn.Module, group: TensorParallelGroup) -> None:
        super().__init__(plain, 0, group)

    def forward(self, ids: Tensor) -> Tensor:
        """Maps token ids (B, S) int64 to (B, S, D), equal on all ranks."""
        if self.group.size == 1:
            return functional.embedding(ids, self.weight)
        share = self.weight.size(0)
        local = ids - self.group.rank * share
        foreign = (local < 0) | (local >= share)
        rows = functional.embedding(local.masked_fill(foreign, 0), self.weight)
        return reduce_from_region(rows.masked_fill(foreign.unsqueeze(-1), 0.0), self.group)

    def logits(self, x: Tensor) -> Tensor:
        """The tied head: maps (B, S, D), equal on all ranks, to this rank's (B, S, ceil(V/tp)).

        It enters the region itself, for no forward hook sees a call of this method.
        """
        return functional.linear(enter_region(x, self.group), self.weight)


_SPLIT: Mapping[str, type[ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding]] = {
    "column": ColumnParallelLinear,
    "head": VocabParallelHead,
    "kv": KeyValueLinear,
    "row": RowParallelLinear,
    "vocab": VocabParallelEmbedding,
}


def apply_plan(
    module: nn.Module, plan: Mapping[str, ParallelKind], group: TensorParallelGroup
) -> nn.Module:
    """Makes a plain layer tensor-parallel, by a table of what each of its modules becomes.

    Args:
        module: one layer of a plain model, best on the meta device.
        plan: kinds by path inside the layer; "" is the layer itself.
        group: this rank's place in its tensor-parallel group. With one rank nothing is replaced.

    Returns:
        The layer, or what replaces it where the plan names "".

    Raises:
        KeyError: the plan names a path that the layer does not have.
        ConfigError: a weight does not divide evenly.
    """
    paths = dict(module.named_modules())
    unknown = sorted(set(plan) - set(paths))
    if unknown:
        raise KeyError(f"no module {unknown} in {type(module).__name__}; it has {sorted(paths)}")
    if group.size == 1:
        return module
    for path, kind in plan.items():
        target = module.get_submodule(path)
        if kind in _SPLIT:
            target = _SPLIT[kind](target, group)
            module = _put(module, path, target)
        if kind in ("region", "head"):
            target.register_forward_pre_hook(_EnterHook(group))
    return module


def _put(module: nn.Module, path: str, replacement: nn.Module) -> nn.Module:
    if not path:
        return replacement
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, replacement)
    return module


class _EnterHook:
    """A forward pre-hook, picklable unlike a closure."""

    def __init__(self, group: TensorParallelGroup) -> None:
        self._group = group

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = inputs
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{type(module).__name__} got {type(x).__name__}, not a tensor")
        return (enter_region(x, self._group), *rest)

"""DeepSpeed's fp32 master weights, parameter by parameter, whatever ZeRO made of them.

DeepSpeed keeps one flat fp32 tensor a parameter group and data-parallel rank. ``param._hp_mapping``
says which piece of which parameter lies where in it; what reads or moves masters (Reptile,
checkpoints, the fp32 start) goes through the pieces listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_mer.continual.reptile import CHUNK, MasterShard
from megatron_mer.parallel import Cut, cut_of

Moments = Mapping[str, Sequence[Tensor]]


@dataclass(frozen=True)
class Piece:
    """Where one locally owned piece of a parameter lies."""

    name: str
    """Canonical parameter name, equal on every layout."""
    parameter: nn.Parameter
    """The weight the model computes with (this rank's tensor-parallel slice)."""
    group: int
    """Index of the optimizer's parameter group, hence of its flat master."""
    offset: int
    """Where the piece begins in the flat master, in elements."""
    start: int
    """Where the piece begins in the flattened tensor-parallel slice."""
    numel: int
    """Elements in the piece, without padding."""

    @property
    def cut(self) -> Cut | None:
        """The tensor-parallel slice, None for a weight every tensor rank repeats."""
        return cut_of(self.parameter)


@dataclass(frozen=True)
class TiedGroup:
    """The ranks that hold the copies of one tied weight, with one tensor-parallel rank."""

    process_group: Any
    copies: int
    """Number of stages that hold a copy."""


class ShardedMasters:
    """The masters of a DeepSpeed ZeRO optimizer; implements ``continual.reptile.MasterWeights``.

    Args:
        optimizer: the wrapped optimizer that ``deepspeed.initialize`` returned (BF16_Optimizer or
            DeepSpeedZeroOptimizer).
        names: canonical name of each of this rank's parameters.
        tp_rank: this rank's place in its tensor-parallel group.
        tied: the tied weights of this stage, by name.
        device: where small sums are made.
    """

    def __init__(
        self,
        optimizer: Any,
        names: Mapping[nn.Parameter, str],
        tp_rank: int,
        tied: Mapping[str, TiedGroup],
        device: torch.device,
    ) -> None:
        self._optimizer = optimizer
        self._tp_rank = tp_rank
        self._tied = tied
        self._device = device
        self.flat: list[Tensor] = [g["params"][0] for g in optimizer.optimizer.param_groups]
        self._tied_parameters = {
            name: parameter for parameter, name in names.items() if name in tied
        }
        self.pieces = list(_pieces(names))
        self._shards = [
            MasterShard(p.name, self.view(self.flat, p), self._counted(p), p.name in tied)
            for p in self.pieces
        ]

    @property
    def shards(self) -> Sequence[MasterShard]:
        """The pieces this rank owns, with views of their masters."""
        return self._shards

    def _counted(self, piece: Piece) -> bool:
        """Whether this is the one copy of its weight that counts.

        Not the later stages' copies of tied weights, and of what tensor ranks repeat only the first
        one's. Data-parallel ranks own disjoint pieces.
        """
        if getattr(piece.parameter, "ds_pipe_replicated", False):
            return False
        return (self._tp_rank if piece.cut is None else piece.cut.replica) == 0

    def view(self, flat: Sequence[Tensor], piece: Piece) -> Tensor:
        """(numel,) view of a piece in a list of flat tensors shaped like the masters."""
        return flat[piece.group].detach().narrow(0, piece.offset, piece.numel)

    @torch.no_grad()
    def fill(self, value_of: Callable[[Piece], Tensor]) -> None:
        """Write fp32 values into the masters and publish them.

        Args:
            value_of: gives the whole fp32 tensor-parallel slice of a piece's parameter.
        """
        for piece, shard in zip(self.pieces, self._shards, strict=True):
            value = value_of(piece).reshape(-1).narrow(0, piece.start, piece.numel)
            shard.tensor.copy_(value)
        self.publish()

    def publish(self) -> None:
        """Copy the masters into the model's weights and gather them over data-parallel ranks."""
        self._optimizer.update_lp_params()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The element-wise sum over all ranks. Collective."""
        total = values.detach().clone().to(self._device)
        dist.all_reduce(total)
        return total

    @torch.no_grad()
    def average_tied(self, deltas: Sequence[Tensor]) -> None:
        """Average the deltas of tied weights, in place, over their stages. Collective.

        Stages cut the same weight at different places into ZeRO shards, so the pieces are laid into
        buffers of ``CHUNK`` elements of the whole slice and summed over stages and data ranks.
        """
        owned: dict[str, list[tuple[Piece, Tensor]]] = {name: [] for name in self._tied}
        tied_pieces = [piece for piece in self.pieces if piece.name in self._tied]
        for piece, delta in zip(tied_pieces, deltas, strict=True):
            owned[piece.name].append((piece, delta))
        for name, group in sorted(self._tied.items()):
            total = self._tied_parameters[name].numel()
            for start in range(0, total, CHUNK):
                stop = min(start + CHUNK, total)
                buffer = torch.zeros(stop - start, dtype=torch.float32, device=self._device)
                overlaps = [o for p, d in owned[name] if (o := _overlap(p, d, start, stop))]
                for mine, low, high in overlaps:
                    buffer[low:high] = mine
                dist.all_reduce(buffer, group=group.process_group)
                buffer /= group.copies
                for mine, low, high in overlaps:
                    mine.copy_(buffer[low:high])

    def moments(self) -> Moments:
        """Adam's exp_avg and exp_avg_sq, flat like the masters; empty before the first update."""
        state = [self._optimizer.optimizer.state.get(flat, {}) for flat in self.flat]
        if not all("exp_avg" in entry for entry in state):
            return {}
        return {kind: [entry[kind] for entry in state] for kind in ("exp_avg", "exp_avg_sq")}

    def create_moments(self, updates: int) -> Moments:
        """Make Adam's state as after ``updates`` updates, with moments of zero to fill."""
        for flat in self.flat:
            self._optimizer.optimizer.state[flat] = {
                "step": torch.tensor(
                    float(updates), dtype=torch.float32, device=self._step_device()
                ),
                "exp_avg": torch.zeros_like(flat, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
            }
        return self.moments()

    def _step_device(self) -> torch.device:
        # torch's fused AdamW keeps its step beside the weights, the others on the CPU.
        fused = any(group.get("fused") for group in self._optimizer.optimizer.param_groups)
        return self._device if fused else torch.device("cpu")


def _pieces(names: Mapping[nn.Parameter, str]) -> Iterator[Piece]:
    for parameter, name in names.items():
        mapping: Any = getattr(parameter, "_hp_mapping")  # noqa: B009
        if mapping is None:
            continue
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        numel = min(low.numel, _held(parameter) - low.start)
        if numel <= 0:
            continue
        yield Piece(
            name=name,
            parameter=parameter,
            group=mapping.param_group_index,
            offset=high.start,
            start=low.start,
            numel=numel,
        )


def _held(parameter: nn.Parameter) -> int:
    """Elements of a slice that are no padding, which only rows at its end may be."""
    cut = cut_of(parameter)
    if cut is None or cut.dim != 0:
        return parameter.numel()
    return (cut.end - cut.begin) * (parameter.numel() // parameter.size(0))


def _overlap(piece: Piece, delta: Tensor, start: int, stop: int) -> tuple[Tensor, int, int] | None:
    """The part of a piece's delta inside [start, stop) of the slice, and its place in there."""
    low, high = max(piece.start, start), min(piece.start + piece.numel, stop)
    if low >= high:
        return None
    return delta[low - piece.start : high - piece.start], low - start, high - start

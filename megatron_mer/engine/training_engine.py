"""One Llama under DeepSpeed: a step, an evaluation, and its weights for checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_mer.checkpoint import CheckpointReader, Fragment
from megatron_mer.checkpoint.huggingface import HuggingFaceReader
from megatron_mer.config import RunConfig
from megatron_mer.data.batches import MicroBatch, RankBatch
from megatron_mer.engine.deepspeed_config import deepspeed_config
from megatron_mer.engine.distributed import device, silence_engine_prints, tensor_parallel_group
from megatron_mer.engine.kernels import choose_kernels
from megatron_mer.engine.loss import GlobalTokenLoss, Labels
from megatron_mer.engine.masters import Piece, ShardedMasters
from megatron_mer.engine.pipeline import StagedLlama
from megatron_mer.errors import TrainingError
from megatron_mer.model import init_parameter
from megatron_mer.optim.groups import parameter_groups
from megatron_mer.parallel import Layout, num_micro_batches


@dataclass(frozen=True)
class StepOutcome:
    """What one global batch gave, equal on all ranks."""

    loss: float
    """Nats a token over the unmasked tokens of the global batch."""
    rows: NDArray[np.float64]
    """(N, 2) summed token losses and unmasked tokens of each row, in the order of the batch."""
    reports: NDArray[np.float64]
    """(ranks, n) what each rank reported with the step."""
    grad_norm: float
    """L2 norm of the gradient before clipping; inf when it is not finite."""
    applied: bool
    """False when loss or gradient were not finite: no weight moved on any rank."""


class TrainingEngine:
    """Builds the model for one rank of a layout and trains it.

    Args:
        config: the resolved run (model.vocab_size included).
        layout: the rank grid.
        rank: this rank.

    Attributes:
        masters: the fp32 master weights, started from the fp32 initial weights.
        num_micro_batches: micro batches that a data-parallel rank has in a global batch.
    """

    def __init__(self, config: RunConfig, layout: Layout, rank: int) -> None:
        self.config = config
        self.layout = layout
        self.coordinate = layout.coordinate(rank)
        self._device = device()
        self._group = tensor_parallel_group(layout, rank, config.model.num_kv_heads)
        self.num_micro_batches = num_micro_batches(config, layout.dp_size)
        self._loss = GlobalTokenLoss(
            self._group,
            self.num_micro_batches,
            layout.dp_size,
            self._device,
            config.model.vocab_size,
            config.kernels.loss_chunk_tokens,
        )
        self._module = StagedLlama(config, layout, self._group, self._loss)
        choose_kernels(self._module.modules(), config.kernels, rank)
        self._names = self._module.canonical_names()
        optimizer = _adamw(config, self._names)
        settings = deepspeed_config(
            config, layout.dp_size, sum(parameter.numel() for parameter in self._names)
        )
        with silence_engine_prints():
            self._engine, wrapped, _, _ = deepspeed.initialize(
                model=self._module, optimizer=optimizer, config=settings, dist_init_required=False
            )
        self._wrapped: Any = wrapped
        self.masters = ShardedMasters(
            wrapped, self._names, self._group.rank, self._module.tied_groups(), self._device
        )
        self._start_from_fp32()

    def _start_from_fp32(self) -> None:
        """Give the masters the fp32 initial weights.

        DeepSpeed cast the model before it copied the masters, so in bf16 they would start from
        rounded values. The weights are functions of a key, so they are made again, not kept.
        """
        if self.config.precision == "bf16":
            self.masters.fill(self._initial_value)

    def _initial_value(self, piece: Piece) -> Tensor:
        return init_parameter(piece.parameter, piece.name, self.config.model, self.config.seed)

    def on_micro_batch(self, call: Callable[[], None]) -> None:
        """Call something whenever a micro batch goes forward, in training and in evaluation."""
        self._module.register_forward_pre_hook(lambda *_: call())

    @property
    def reads_data(self) -> bool:
        """Whether this rank's stage takes inputs or labels (the first and the last do)."""
        return self.coordinate.pipe in (0, self.layout.pp_size - 1)

    def train_step(
        self, batch: RankBatch | None, lr: float, report: Sequence[float] = ()
    ) -> StepOutcome:
        """Forward, backward and one update on a global batch. Collective.

        Args:
            batch: this data-parallel rank's micro batches; None on a stage that reads no data.
            lr: learning rate of this update.
            report: numbers that every rank is to hear from this one; equally many on all ranks.
        """
        for group in self._wrapped.param_groups:
            group["lr"] = lr
        self._loss.reset()
        self._engine.train_batch(
            None if batch is None else self._labelled(batch.micro_batches, batch.num_unmasked)
        )
        return self._outcome(report)

    def _outcome(self, report: Sequence[float]) -> StepOutcome:
        overflow = bool(self._wrapped.overflow)
        rows, said = self._gathered(self.num_micro_batches, (float(overflow), *report))
        overflows = int(said[:, 0].sum())
        if 0 < overflows < self.layout.world_size:
            raise TrainingError(
                "ranks disagree on whether the gradient was finite: some updated their weights and "
                "some did not; the run cannot go on from here, resume it from its last checkpoint"
            )
        return StepOutcome(
            loss=mean_loss(rows),
            rows=rows,
            reports=said[:, 1:],
            grad_norm=math.inf if overflow else float(self._wrapped._global_grad_norm),
            applied=not overflows,
        )

    def _gathered(
        self, count: int, report: Sequence[float] = ()
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Every row's loss, and what every rank has to say, on all ranks. Collective.

        One sum over all ranks, in which each number has a place of its own: so it is exact, and
        what is made of the rows has the same bits for any number of data-parallel ranks. The last
        stage's tensor ranks hold the same rows; one of them counts.

        Args:
            count: micro batches that went forward on each data-parallel rank.
            report: this rank's numbers.

        Returns:
            (rows, 2) losses and tokens in the order of the global batches, and (ranks, n).
        """
        share = self.num_micro_batches * self.config.batch.micro_batch_size
        batches = count // self.num_micro_batches
        dp_size, world_size = self.layout.dp_size, self.layout.world_size
        rows = torch.zeros(batches, dp_size, share, 2, dtype=torch.float64, device=self._device)
        if self.coordinate.pipe == self.layout.pp_size - 1 and self._group.rank == 0:
            rows[:, self.coordinate.data] = self._loss.rows().view(batches, share, 2)
        said = torch.zeros(world_size, len(report), dtype=torch.float64)
        said[dist.get_rank()] = torch.tensor(report, dtype=torch.float64)
        values = torch.cat([rows.flatten(), said.flatten().to(self._device)])
        dist.all_reduce(values)
        found = values.cpu().numpy()
        split = rows.numel()
        return found[:split].reshape(-1, 2), found[split:].reshape(world_size, len(report))

    def evaluate(self, micro_batches: Iterable[MicroBatch] | None, count: int) -> float:
        """Loss over a held-out set with the present weights. Collective; changes nothing.

        Args:
            micro_batches: this data-parallel rank's part, of the training shapes; None on a stage
                that reads no data.
            count: how many there are, the same on every rank.

        Returns:
            Nats a token over the unmasked tokens of all ranks' micro batches.
        """
        self._loss.reset()
        self._engine.eval_batch(
            None if micro_batches is None else self._labelled(micro_batches, num_unmasked=1),
            num_micro_batches=count,
            bcast_loss=False,
        )
        rows, _ = self._gathered(count)
        return mean_loss(rows)

    def _labelled(
        self, micro_batches: Iterable[MicroBatch], num_unmasked: int
    ) -> Iterator[tuple[Tensor, Labels]]:
        """Micro batches as DeepSpeed takes them: (inputs, labels with the denominator).

        On a CPU the tensors share the loader's memory, which nothing writes to any more.
        """
        unmasked = torch.full((1,), float(num_unmasked), device=self._device)
        for micro in micro_batches:
            labels = self._on_device(micro.targets), self._on_device(micro.mask), unmasked
            yield self._on_device(micro.inputs), labels

    def _on_device(self, array: NDArray[Any]) -> Tensor:
        """An array on this rank's device; its copy runs while the GPU computes what is queued."""
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":
            # Pinned memory comes from a cache, which reuses it once the copy has happened.
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def fragments(self, extra: Mapping[str, Sequence[Tensor]]) -> Iterator[Fragment]:
        """Everything of the model that this rank owns, for a checkpoint.

        Heads of keys and values that several ranks repeat are the first one's.

        Args:
            extra: further state by kind, one tensor a master shard (Reptile's).
        """
        repeated = [
            piece.cut is not None and piece.cut.replica > 0 for piece in self.masters.pieces
        ]
        return self._fragments(extra, [place for place, no in enumerate(repeated) if not no])

    def _fragments(
        self, extra: Mapping[str, Sequence[Tensor]], places: Iterable[int]
    ) -> Iterator[Fragment]:
        for index in places:
            piece = self.masters.pieces[index]
            yield self._fragment(piece, "master", self.masters.shards[index].tensor)
            for kind, flat in self.masters.moments().items():
                yield self._fragment(piece, kind, self.masters.view(flat, piece))
            for kind, tensors in extra.items():
                yield self._fragment(piece, kind, tensors[index])

    def checkpoint_bytes(self, extra: Mapping[str, Sequence[Tensor]]) -> int:
        """Bytes of this rank's part of a checkpoint, moments included before they are there.

        Args:
            extra: further state by kind, as for ``fragments``.
        """
        masters = sum(shard.tensor.nbytes for shard in self.masters.shards)
        # Adam's exp_avg and exp_avg_sq have the masters' shape.
        return 3 * masters + sum(one.nbytes for tensors in extra.values() for one in tensors)

    @torch.no_grad()
    def load(
        self, reader: CheckpointReader, updates: int, extra: Mapping[str, Sequence[Tensor]]
    ) -> None:
        """Take weights, moments and further state from a checkpoint. Collective.

        Args:
            reader: the open checkpoint.
            updates: applied updates it has behind it; without any there are no moments.
            extra: further state to fill in place, as for ``fragments``.
        """
        if updates > 0:
            self.masters.create_moments(updates)
        reader.fill_all(self._fragments(extra, range(len(self.masters.pieces))))
        self.masters.publish()

    @torch.no_grad()
    def start_from(
        self, reader: CheckpointReader | HuggingFaceReader, kind: str, updates: int
    ) -> None:
        """Take the weights of another run or folder, before anything was trained. Collective.

        Args:
            reader: the open checkpoint.
            kind: what becomes the masters: ``master`` or ``anchor``.
            updates: applied updates behind Adam's moments, which are taken too; 0: they are not.
        """
        if updates > 0:
            self.masters.create_moments(updates)
        reader.fill_all(
            fragment if fragment.kind != "master" else replace(fragment, kind=kind)
            for fragment in self._fragments({}, range(len(self.masters.pieces)))
        )
        self.masters.publish()

    def _fragment(self, piece: Piece, kind: str, tensor: Tensor) -> Fragment:
        shape, cut = list(piece.parameter.shape), piece.cut
        if cut is not None:
            shape[cut.dim] = cut.size
        return Fragment(
            name=piece.name,
            kind=kind,
            global_shape=tuple(shape),
            tp_dim=None if cut is None else cut.dim,
            tp_rank=self._group.rank if cut is None else cut.index,
            tp_size=self._group.size if cut is None else cut.parts,
            start=piece.start,
            tensor=tensor,
        )


def mean_loss(rows: NDArray[np.float64]) -> float:
    """Nats a token over rows of (summed losses, tokens); NaN without a token."""
    total, tokens = rows.sum(0)
    return float(total / tokens) if tokens else math.nan


def _adamw(config: RunConfig, names: Mapping[torch.nn.Parameter, str]) -> torch.optim.AdamW:
    named = [(name, parameter) for parameter, name in names.items()]
    return torch.optim.AdamW(
        parameter_groups(named, config.optimizer.weight_decay),
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=True,
    )

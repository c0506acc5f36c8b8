"""Reptile on the fp32 master weights: every rank moves the shard that it owns.

After every ``k`` applied updates ``theta <- anchor + epsilon * step``; with ``delta = theta -
anchor`` the step is that of an SGD with (Nesterov) momentum on ``-delta``:

    velocity <- momentum * velocity + delta
    step      = delta + momentum * velocity    (Nesterov)
              = velocity                       (otherwise; the delta itself without momentum)

The anchor is where the last Reptile update left the weights. Source: arXiv 2508.01908, algorithm 1
(momentum 0); with momentum it is the outer step of DiLoCo with one worker (arXiv 2311.08105).
Adam's moments are not touched. epsilon = 1 without momentum changes nothing, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_mer.config import ReptileConfig
from megatron_mer.errors import CheckpointError

# Elements worked on at a time: temporaries stay at 16 MiB whatever the model's size.
CHUNK = 1 << 22
# On a CPU so few that temporaries stay in the processor's caches.
CPU_CHUNK = 1 << 16


@dataclass(frozen=True)
class MasterShard:
    """The piece of one parameter's fp32 master that this rank owns."""

    name: str
    """Canonical name of the parameter, e.g. ``layers.3.attention.q_proj.weight``."""
    tensor: Tensor
    """(numel,) fp32, a view into the optimizer's master weights: writing moves the weights."""
    counted: bool
    """Whether this copy enters sums over the model (exactly one copy of each weight does)."""
    tied: bool = False
    """Whether several pipeline stages hold a copy of this weight."""


class MasterWeights(Protocol):
    """What Reptile needs of an engine. All methods are collective."""

    @property
    def shards(self) -> Sequence[MasterShard]:
        """The shards this rank owns, in an order that does not change. ZeRO padding is no shard."""

    def publish(self) -> None:
        """Bring the weights the model computes with in line with the masters, on all ranks."""

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The element-wise sum of a small tensor over all ranks."""

    def average_tied(self, deltas: Sequence[Tensor]) -> None:
        """Average, in place, the deltas of tied weights over the stages that hold a copy.

        Args:
            deltas: one (numel,) fp32 tensor for each tied shard, in the order of ``shards``.
        """


@dataclass(frozen=True)
class ReptileUpdate:
    """What one Reptile update saw, over the whole model (each weight counted once)."""

    delta_norm: float
    """L2 norm of theta - anchor before the update."""
    delta_cosine: float | None
    """Cosine between this delta and the previous one (with momentum: the velocity before this
    update); None at the first update, when tracking is off, and when one of the two is zero."""


class Reptile:
    """Counts updates and moves the masters after every ``k`` of them.

    Memory beside the model's, a rank: the anchor (4 bytes a locally owned weight); the velocity
    (4 bytes) with momentum; with ``track_cosine`` and no momentum the last delta in bf16 (2 bytes).
    With ``anchor: host`` they lie in the host's memory, and a chunk at a time is on the device.

    Args:
        config: k, epsilon, momentum, nesterov, track_cosine.
        masters: the engine's masters, holding the weights that the first window starts from.
    """

    def __init__(self, config: ReptileConfig, masters: MasterWeights) -> None:
        self.config = config
        self._masters = masters
        self._identity = config.epsilon == 1.0 and config.momentum == 0.0
        self.updates_since = 0
        self.updates_done = 0
        self.anchor = [self._place(shard.tensor).copy_(shard.tensor) for shard in masters.shards]
        self.velocity = [self._place(a).zero_() for a in self.anchor] if config.momentum else []
        keep_delta = config.track_cosine and not config.momentum
        self.last_delta = (
            [self._place(a, torch.bfloat16).zero_() for a in self.anchor] if keep_delta else []
        )

    def _place(self, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """An empty tensor where Reptile's state lies."""
        like = like.detach()
        if self.config.anchor == "device":
            return torch.empty_like(like, dtype=dtype)
        pinned = torch.cuda.is_available()
        return torch.empty(like.shape, dtype=dtype, device="cpu", pin_memory=pinned)

    @torch.no_grad()
    def after_update(self) -> ReptileUpdate | None:
        """Count one applied optimizer update; move the masters if it was the k-th.

        Returns:
            What the Reptile update saw, or None when it was not due.
        """
        self.updates_since += 1
        if self.updates_since < self.config.k:
            return None
        self.updates_since = 0
        sums = self._move()
        self._masters.publish()
        self.updates_done += 1
        return _summarise(self._masters.sum_over_ranks(sums))

    def _move(self) -> Tensor:
        """Move every shard; return this rank's part of delta.delta, delta.ref and ref.ref."""
        shards = self._masters.shards
        # A rank of a tiny model may own nothing but padding.
        where = shards[0].tensor.device if shards else None
        sums = torch.zeros(3, dtype=torch.float64, device=where)
        averaged = self._tied_deltas()
        for index, shard in enumerate(shards):
            for start, stop in _chunks(shard.tensor):
                theta = shard.tensor[start:stop]
                with _brought(self.anchor[index][start:stop], theta) as anchor:
                    tied = averaged.get(index)
                    delta = theta - anchor if tied is None else tied[start:stop]
                    if shard.counted:
                        sums += self._products(index, start, stop, delta)
                    if self.last_delta:
                        self.last_delta[index][start:stop].copy_(delta, non_blocking=True)
                    if self._identity:
                        # anchor + (theta - anchor) need not equal theta in floating point.
                        anchor.copy_(theta)
                    else:
                        step = self._step(index, start, stop, delta)
                        anchor.add_(step, alpha=self.config.epsilon)
                        theta.copy_(anchor)
        return sums

    def _tied_deltas(self) -> dict[int, Tensor]:
        """Deltas of tied copies, averaged over their stages so that copies cannot drift apart."""
        shards = self._masters.shards
        tied = {
            i: s.tensor - self.anchor[i].to(s.tensor.device) for i, s in enumerate(shards) if s.tied
        }
        self._masters.average_tied(list(tied.values()))
        return tied

    def _products(self, index: int, start: int, stop: int, delta: Tensor) -> Tensor:
        reference = self.velocity or self.last_delta
        squared = _dot(delta, delta)
        if not (reference and self.config.track_cosine):
            return torch.stack([squared, torch.zeros_like(squared), torch.zeros_like(squared)])
        previous = reference[index][start:stop].to(delta.device, delta.dtype, non_blocking=True)
        return torch.stack([squared, _dot(delta, previous), _dot(previous, previous)])

    def _step(self, index: int, start: int, stop: int, delta: Tensor) -> Tensor:
        momentum = self.config.momentum
        if not momentum:
            return delta
        with _brought(self.velocity[index][start:stop], delta) as velocity:
            velocity.mul_(momentum).add_(delta)
        return torch.add(delta, velocity, alpha=momentum) if self.config.nesterov else velocity

    @contextmanager
    def at_anchor(self) -> Iterator[None]:
        """Let the model compute with the anchor for a while. Collective.

        Masters and anchor are exchanged in place, so it takes no memory and the masters come back
        to the bit; nothing but a forward pass may happen in between.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for shard, anchor in zip(self._masters.shards, self.anchor, strict=True):
            for start, stop in _chunks(shard.tensor):
                theta = shard.tensor[start:stop]
                with _brought(anchor[start:stop], theta) as here:
                    kept = here.clone()
                    here.copy_(theta)
                    theta.copy_(kept)
        if self.config.anchor == "host" and torch.cuda.is_available():
            # A checkpoint may read the host's memory next, which no stream orders.
            torch.cuda.synchronize()
        self._masters.publish()

    def tensors(self) -> dict[str, list[Tensor]]:
        """The state that a checkpoint keeps, by kind: one (numel,) tensor a master shard."""
        state = {"anchor": self.anchor, "velocity": self.velocity, "last_delta": self.last_delta}
        return {kind: tensors for kind, tensors in state.items() if tensors}

    def counters(self) -> dict[str, int]:
        """The counters that a checkpoint keeps."""
        return {"updates_since": self.updates_since, "updates_done": self.updates_done}

    def restore_counters(self, counters: dict[str, int]) -> None:
        """Take the counters of a checkpoint.

        Raises:
            CheckpointError: the saved place in the interval is not one of this k.
        """
        since = int(counters["updates_since"])
        if not 0 <= since < self.config.k:
            raise CheckpointError(
                f"reptile.k: given {self.config.k}, but the checkpoint stands {since} updates "
                f"after its last Reptile update; resume with a k larger than {since}"
            )
        self.updates_since = since
        self.updates_done = int(counters["updates_done"])


def _summarise(sums: Tensor) -> ReptileUpdate:
    delta_squared, product, reference_squared = (float(value) for value in sums.tolist())
    scale = math.sqrt(delta_squared * reference_squared)
    cosine = product / scale if scale > 0.0 else None
    return ReptileUpdate(delta_norm=math.sqrt(delta_squared), delta_cosine=cosine)


@contextmanager
def _brought(kept: Tensor, to: Tensor) -> Iterator[Tensor]:
    """A tensor on another's device, for reading and writing; what is written goes back."""
    here = kept.to(to.device, non_blocking=True)
    yield here
    if here is not kept:
        kept.copy_(here, non_blocking=True)


def _chunks(tensor: Tensor) -> Iterator[tuple[int, int]]:
    numel, size = tensor.numel(), CPU_CHUNK if tensor.device.type == "cpu" else CHUNK
    for start in range(0, numel, size):
        yield start, min(start + size, numel)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Dot product of two fp32 vectors of one chunk; chunks are added up in fp64."""
    return torch.dot(left, right).double()

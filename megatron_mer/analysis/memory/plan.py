"""Bytes of every rank of a run: what lies there all the time, and what is added in each phase.

A rank of a pipeline stage is like any other of that stage, but for padding and for where the data
ranks' shares of the optimizer's state are cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megatron_mer.analysis.memory import activations as act
from megatron_mer.analysis.memory.shape import (
    FP32,
    Device,
    RankShape,
    Stage,
    stages,
)
from megatron_mer.config import RunConfig
from megatron_mer.parallel.topology import Layout, num_micro_batches

# As in engine/deepspeed_config.py and continual/reptile.py, which need torch.
LARGEST_BUCKET = 200_000_000
REPTILE_CHUNK = 1 << 22
REPTILE_CPU_CHUNK = 1 << 16
# DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE: elements after which a list of gradients is reduced.
REDUCED_TOGETHER = 500_000_000

Parts = Mapping[str, int]


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a stage."""

    stage: Stage
    always: Parts
    """On the device from the first update on."""
    phases: Mapping[str, Parts]
    """What each phase of a step adds to that on the device."""
    host: Parts
    """In the host's memory, beside programs and libraries; page-locked with a GPU."""

    def total(self, phase: str) -> int:
        """Bytes on the device in a phase."""
        return sum(self.always.values()) + sum(self.phases[phase].values())

    @property
    def peak_phase(self) -> str:
        """The phase that takes the most."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes on the device at most."""
        return self.total(self.peak_phase)

    @property
    def host_total(self) -> int:
        """Bytes in the host's memory."""
        return sum(self.host.values())


def plan_memory(config: RunConfig, layout: Layout, device: Device) -> list[StageMemory]:
    """The memory of a rank of each stage.

    Args:
        config: a configuration that `check_layout` accepts, its vocabulary size known.
        layout: the grid of ranks.
        device: where it trains. In a CPU run device and host are one.
    """
    shape = RankShape.of(config, layout, device)
    found = []
    for stage in stages(config, layout):
        model = _Model(config, layout, shape, stage)
        found.append(
            StageMemory(
                stage=stage,
                always=model.always(),
                phases={
                    "backward": model.backward(),
                    "reduction": model.reduction(),
                    **({"reptile": model.reptile()} if config.reptile else {}),
                },
                host={"checkpoint snapshot": model.snapshot(), **model.on_host()},
            )
        )
    return found


class _Moment(NamedTuple):
    """Bytes at a moment of the backward pass."""

    gradients: int
    """The weights' own, in their dtype."""
    buckets: int
    saved: int
    logits: int
    passing: int


class _Model:
    """The parts of one stage."""

    def __init__(self, config: RunConfig, layout: Layout, shape: RankShape, stage: Stage) -> None:
        self.config = config
        self.shape = shape
        self.stage = stage
        self.piped = layout.pp_size > 1
        self.recompute = config.parallel.activation_checkpointing == "full"
        self.micro_batches = num_micro_batches(config, layout.dp_size)
        # DeepSpeed pads each parameter group, of matrices and of norms, to a multiple of 2 dp.
        groups = (stage.matrices(shape, config.model.tie_embeddings), stage.vectors(shape))
        unit = 2 * layout.dp_size
        self.decayed, self.plain = (-(-count // unit) * unit for count in groups)
        self.weights = self.decayed + self.plain
        self.owned = self.weights // layout.dp_size

    @property
    def fp32(self) -> bool:
        return self.config.precision == "fp32"

    @property
    def bucket(self) -> int:
        """Bytes of ZeRO-1's bucket, which only the fp32 optimizer allocates."""
        return FP32 * min(self.weights, LARGEST_BUCKET) if self.fp32 else 0

    def always(self) -> dict[str, int]:
        """ZeRO-1 (Rajbhandari et al. 2020, arXiv 1910.02054): masters and moments are sharded.

        DeepSpeed's BF16_Optimizer keeps fp32 sums of all gradients on each data rank
        (`fp32_groups_gradients_flat`); the weights' own gradients are gone after the update.
        """
        parts = {
            "weights": self.weights * self.shape.width,
            "fp32 masters": self.owned * FP32,
            "Adam moments": self.owned * 2 * FP32,
        }
        if not self.fp32:
            parts["gradient sums"] = self.weights * FP32
        if not self.reptile_on_host:
            parts.update(self.reptile_state())
        if self.piped:
            # One buffer for received activations and gradients (`_allocate_or_extend_buffers`).
            parts["pipeline buffer"] = self.shape.stream
        if self.stage.last:
            parts["kept output"] = self.kept_output() if self.micro_batches > 1 else 0
        return parts

    @property
    def reptile_on_host(self) -> bool:
        """Whether Reptile's state lies in the host's memory."""
        return self.config.reptile is not None and self.config.reptile.anchor == "host"

    def on_host(self) -> dict[str, int]:
        """What lies in the host's memory all the time."""
        return self.reptile_state() if self.reptile_on_host else {}

    def reptile_state(self) -> dict[str, int]:
        """What `continual/reptile.py` keeps of each owned weight."""
        reptile = self.config.reptile
        if reptile is None:
            return {}
        parts = {"Reptile anchor": self.owned * FP32}
        if reptile.momentum:
            parts["Reptile velocity"] = self.owned * FP32
        elif reptile.track_cosine:
            parts["Reptile last delta"] = self.owned * 2
        return parts

    @property
    def output(self) -> int:
        """Bytes of what the last stage gives the loss: hidden states, or the logits whole."""
        return self.shape.stream if self.shape.chunk else self.shape.logits

    def kept_output(self) -> int:
        """Output that stays after its backward pass, and with stages what its graph holds.

        The last stage never empties its two `pipe_buffers["outputs"]`, and the graph of the output
        holds the stage's input and the gradient of it.
        """
        return self.output + (2 * self.shape.stream if self.piped else 0)

    def _last_logits(self) -> dict[str, int]:
        """Those of the step's last micro batch, once it went backward."""
        return {"logits and loss": self.kept_output()} if self.stage.last else {}

    def backward(self) -> dict[str, int]:
        """The fullest moment of forward and backward passes."""
        fullest = max(self._moments(), key=sum)
        parts = {"gradients": fullest.gradients}
        if self.fp32:
            parts["DeepSpeed's buckets"] = fullest.buckets
        return {
            **parts,
            "activations": fullest.saved + self._earlier(),
            "logits and loss": fullest.logits,
            "backward pass": fullest.passing,
        }

    def _earlier(self) -> int:
        """Activations of the micro batches that wait for their backward pass, whole."""
        return (self.stage.in_flight - 1) * (self._saved(self.stage.blocks) + self._ends())

    def _ends(self) -> int:
        """Stage input as it was received, and output, which DeepSpeed keeps beside the graph."""
        return ((not self.stage.first) + (not self.stage.last)) * self.shape.stream

    def _saved(self, blocks: int) -> int:
        """What the first blocks of the stage keep of a micro batch."""
        each = self.shape.stream if self.recompute else act.block_saved(self.shape)
        return blocks * each

    def _behind_blocks(self) -> int:
        """What the final norm keeps, as any does, and the input of the head."""
        norm = self.shape.stream if self.recompute else act.norm_saved(self.shape)
        return norm + self.shape.stream

    def _moments(self) -> Iterator[_Moment]:
        """The loss, the head and each block going backward."""
        shape = self.shape
        ends = self._ends()
        output = self.output if self.stage.last else 0
        if self.stage.last:
            saved = self._saved(self.stage.blocks) + ends + self._behind_blocks()
            there = self._gradients(self.stage.blocks, before_head=True)
            # The first gradient of a step has the bucket allocated.
            bucket = self.bucket if self.micro_batches > 1 else 0
            if shape.chunk:
                # The output is the head's input, which is counted as saved.
                yield _Moment(there, bucket, saved, act.chunked_loss(shape), 0)
                yield _Moment(there, bucket, saved, act.chunked_backward(shape), 0)
            else:
                yield _Moment(there, bucket, saved, output + act.loss_backward(shape), 0)
                yield _Moment(there, bucket, saved, output, act.head_backward(shape))
                if self.recompute:
                    # The head too: its logits are there twice, beside their gradient.
                    yield _Moment(there, bucket, saved, 2 * output, shape.logits)
        for block in range(self.stage.blocks, 0, -1):
            saved = self._saved(block - 1) + ends + act.block_saved(shape)
            there = self._gradients(block, before_head=False)
            yield _Moment(there, self.bucket, saved, output, act.block_backward(shape))

    def _gradients(self, blocks: int, before_head: bool) -> int:
        """Bytes of gradients while the first blocks still wait for their backward pass.

        From a step's second micro batch on all of them are there.
        """
        missing = 0
        if self.micro_batches == 1:
            stage, one = self.stage, self.config.model.tie_embeddings and not self.piped
            matrices = before_head if one else stage.first + (stage.last and before_head)
            missing = blocks * self.shape.block_matrices + matrices * self.shape.vocab_matrix
        return self.shape.width * (self.weights - missing)

    def reduction(self) -> dict[str, int]:
        """Gradients on their way over the data ranks; it happens with one data rank too.

        fp32, `reduce_gradients`: a second bucket; then a copy of the owned gradients as the first
        bucket is emptied. bf16, `allreduce_bucket`: a flat copy of gradients that are reduced
        together, and one in bf16.
        """
        if self.fp32:
            copies = self.bucket + max(self.bucket, self.owned * FP32)
        elif self.decayed <= REDUCED_TOGETHER:
            copies = self.weights * (FP32 + self.shape.width)
        else:
            copies = self.decayed * self.shape.width
        gradients = self.weights * self.shape.width
        return {"gradients": gradients, "DeepSpeed's buckets": copies, **self._last_logits()}

    def reptile(self) -> dict[str, int]:
        """`Reptile._move`: a delta and the last one in fp32; tied weights whole."""
        shape = self.shape
        matrices = [shape.hidden * max(shape.query_width, shape.ffn)]
        ends = self.stage.first or self.stage.last
        if ends:
            matrices.append(shape.vocab_matrix)
        copied = self.config.model.tie_embeddings and self.piped and ends
        delta = min(shape.vocab_matrix, self.owned) * FP32 if copied else 0
        largest = REPTILE_CHUNK if shape.device == "cuda" else REPTILE_CPU_CHUNK
        chunk = min(largest, max(matrices), self.owned)
        return {"Reptile update": delta + 2 * FP32 * chunk, **self._last_logits()}

    def snapshot(self) -> int:
        """`checkpoint/snapshot.py`: a copy of masters, moments and Reptile's state."""
        return self.owned * 3 * FP32 + sum(self.reptile_state().values())

"""One rank's share of a model: the widths and counts that all figures of memory are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_mer.config import RunConfig
from megatron_mer.model.dimensions import Dimensions
from megatron_mer.model.flops import layer_costs
from megatron_mer.parallel.chunk import chunk_tokens
from megatron_mer.parallel.topology import Layout, num_micro_batches, stage_bounds

Device = Literal["cuda", "cpu"]
FP32 = 4  # bytes


@dataclass(frozen=True)
class RankShape:
    """What a tensor rank holds and computes of each layer, for one micro batch."""

    rows: int
    """B, rows of a micro batch."""
    seq_length: int
    """S, tokens of a row."""
    hidden: int
    """D, whole on every rank."""
    heads: int
    """Query heads of this rank."""
    query_width: int
    """Channels of its query heads."""
    kv_width: int
    """Channels of its key heads; as many of its value heads."""
    ffn: int
    """Its channels of the feed-forward layer."""
    vocab: int
    """Its rows of the vocabulary, padded so that all ranks have equally many."""
    grouped: bool
    """Whether several query heads share a key-value head."""
    width: int
    """Bytes of a weight and of an activation: 2 in bf16, 4 in fp32."""
    device: Device
    """Whose kernels keep what for the backward pass."""
    chunk: int
    """Tokens whose logits are there at once; 0: those of the whole micro batch."""

    @classmethod
    def of(cls, config: RunConfig, layout: Layout, device: Device) -> RankShape:
        """The share of a configuration whose vocabulary size is known."""
        dims = Dimensions.of(config.model)
        heads = dims.num_heads // layout.tp_size
        # A key-value head that fewer heads than ranks leave over is there on several ranks.
        kv_heads = math.ceil(dims.num_kv_heads / layout.tp_size)
        vocab = math.ceil(dims.vocab_size / layout.tp_size)
        rows = config.batch.micro_batch_size
        chunk = 0
        if config.kernels.loss == "chunked":
            most = config.kernels.loss_chunk_tokens or chunk_tokens(vocab, device)
            chunk = min(most, rows * config.model.seq_length)
        return cls(
            rows=rows,
            seq_length=config.model.seq_length,
            hidden=dims.hidden_size,
            heads=heads,
            query_width=heads * dims.head_dim,
            kv_width=kv_heads * dims.head_dim,
            ffn=dims.ffn_hidden_size // layout.tp_size,
            vocab=vocab,
            grouped=dims.num_heads != dims.num_kv_heads,
            width=2 if config.precision == "bf16" else FP32,
            device=device,
            chunk=chunk,
        )

    @property
    def tokens(self) -> int:
        """B S, tokens of a micro batch."""
        return self.rows * self.seq_length

    @property
    def stream(self) -> int:
        """Bytes of (B, S, D), the tensor that passes from layer to layer."""
        return self.tokens * self.hidden * self.width

    @property
    def logits(self) -> int:
        """Bytes of this rank's logits of a micro batch."""
        return self.tokens * self.vocab * self.width

    @property
    def block_matrices(self) -> int:
        """Weights of a block's seven matrices: q, k, v, o, gate, up and down."""
        attention = 2 * self.query_width + 2 * self.kv_width
        return self.hidden * (attention + 3 * self.ffn)

    @property
    def vocab_matrix(self) -> int:
        """Weights of the embedding, and of the head."""
        return self.hidden * self.vocab


@dataclass(frozen=True)
class Stage:
    """The layers of one pipeline stage."""

    index: int
    blocks: int
    first: bool
    """Holds the embedding."""
    last: bool
    """Holds the final norm, the head and the loss."""
    in_flight: int
    """Micro batches whose activations it holds at once."""

    def matrices(self, shape: RankShape, tied: bool) -> int:
        """Weights in matrices, which weight decay acts on."""
        vocab_matrices = self.first + self.last
        if tied and self.first and self.last:
            vocab_matrices = 1
        return self.blocks * shape.block_matrices + vocab_matrices * shape.vocab_matrix

    def vectors(self, shape: RankShape) -> int:
        """Weights of norms."""
        return (2 * self.blocks + self.last) * shape.hidden


def stages(config: RunConfig, layout: Layout) -> list[Stage]:
    """The stages as the engine cuts them.

    DeepSpeed's schedule is 1F1B (`TrainSchedule.num_pipe_buffers`; Narayanan et al. 2021, arXiv
    2104.04473, section 2.2): stage s runs pp - s micro batches forward before its first backward.
    """
    bounds = stage_bounds(layer_costs(config.model), layout.pp_size)
    micro_batches = num_micro_batches(config, layout.dp_size)
    found = []
    for index in range(layout.pp_size):
        first, last = index == 0, index == layout.pp_size - 1
        found.append(
            Stage(
                index=index,
                # Beside blocks there are the embedding in front, final norm and head behind.
                blocks=bounds[index + 1] - bounds[index] - first - 2 * last,
                first=first,
                last=last,
                in_flight=min(layout.pp_size - index, micro_batches),
            )
        )
    return found

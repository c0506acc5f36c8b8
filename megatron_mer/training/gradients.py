"""Gradients of a run's checkpoint over chosen rows, in one process without DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from megatron_mer.analysis.alignment import Alignment, alignment
from megatron_mer.checkpoint import CheckpointReader
from megatron_mer.config import RunConfig
from megatron_mer.data.packing import RowReader
from megatron_mer.model import Llama


@dataclass(frozen=True)
class Source:
    """Rows whose gradient is wanted."""

    name: str
    reader: RowReader
    dataset: NDArray[np.int32]
    """(n,) index into the reader's datasets."""
    sample: NDArray[np.int64]
    """(n,) sample in it."""


@dataclass(frozen=True)
class Measured:
    """What the gradients of the sources gave."""

    alignment: Alignment
    losses: dict[str, float]
    """Source -> nats a token."""
    tokens: dict[str, int]
    """Source -> tokens that count."""


def load_model(
    config: RunConfig, reader: CheckpointReader, kind: str, device: torch.device
) -> Llama:
    """The whole model of a checkpoint of any layout, fp32; one parameter at a time is read.

    Args:
        config: the run, resolved.
        reader: its open checkpoint.
        kind: "master" (the fast weights) or "anchor".
        device: where the model is to be.

    Raises:
        CheckpointError: a parameter is missing or has another shape.
    """
    model = Llama(config.model, config.seed).to(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.parameter(kind, name))
    return model


def measure(
    model: Llama,
    sources: Sequence[Source],
    micro_batch_size: int,
    eod_mask_loss: bool,
) -> Measured:
    """Gradients of all sources in two halves each, and the inner products between them.

    Rows at even places are one half, those at odd places the other. Memory: two gradients of the
    model a source, fp32, beside the model's own.

    Args:
        model: on its device.
        sources: with two rows at least each.
        micro_batch_size: rows that are computed at once.
        eod_mask_loss: as in training.
    """
    gradients: list[list[Tensor]] = []
    losses, tokens = {}, {}
    for source in sources:
        total, count = 0.0, 0
        for half in (0, 1):
            rows = slice(half, None, 2)
            gradient, loss, unmasked = _gradient(
                model, source, rows, micro_batch_size, eod_mask_loss
            )
            gradients.append(gradient)
            total, count = total + loss, count + unmasked
        losses[source.name], tokens[source.name] = total / count, count
    gram = np.array([[_dot(one, other) for other in gradients] for one in gradients])
    return Measured(alignment([source.name for source in sources], gram), losses, tokens)


def _gradient(
    model: Llama, source: Source, rows: slice, micro_batch_size: int, eod_mask_loss: bool
) -> tuple[list[Tensor], float, int]:
    """Mean token-loss gradient of some rows, their summed loss and their tokens."""
    model.zero_grad(set_to_none=True)
    total, count = 0.0, 0
    dataset, sample = source.dataset[rows], source.sample[rows]
    for start in range(0, len(sample), micro_batch_size):
        part = slice(start, start + micro_batch_size)
        loss, unmasked = token_losses(
            model, source.reader, dataset[part], sample[part], eod_mask_loss
        )
        loss.backward()  # type: ignore[no-untyped-call]
        total, count = total + float(loss.detach()), count + unmasked
    scale = 1.0 / max(1, count)
    # A weight that no row reached has the gradient zero.
    gradient = [
        torch.zeros_like(p) if p.grad is None else p.grad * scale for p in model.parameters()
    ]
    model.zero_grad(set_to_none=True)
    return gradient, total, count


def token_losses(
    model: Llama,
    reader: RowReader,
    dataset: NDArray[np.int32],
    sample: NDArray[np.int64],
    eod_mask_loss: bool,
) -> tuple[Tensor, int]:
    """Summed loss of rows in nats, and how many tokens of theirs count.

    Args:
        model: on its device.
        reader: of the rows.
        dataset: (n,) index into the reader's datasets.
        sample: (n,) sample in it.
        eod_mask_loss: whether the first token of each document is no target.
    """
    where = next(model.parameters()).device
    tokens = torch.from_numpy(reader.read(dataset, sample)).to(where)
    logits = model(tokens[:, :-1]).float()
    losses = functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    mask = np.ones((len(sample), tokens.shape[1] - 1), dtype=np.float32)
    if eod_mask_loss:
        rows, positions = reader.document_ends(dataset, sample)
        mask[rows, positions] = 0
    return (losses * torch.from_numpy(mask).to(where).flatten()).sum(), int(mask.sum())


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Inner product over all parameters, summed in fp64."""
    return float(sum(torch.dot(a.flatten().double(), b.flatten().double())
                     for a, b in zip(one, other, strict=True)))  # fmt: skip


def batch_sources(
    reader: RowReader,
    batches: Iterator[tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.int64]]],
) -> list[Source]:
    """The fresh and the replayed rows of batches as two sources; one without two rows is left out.

    Args:
        reader: of the run's datasets.
        batches: kind, dataset and sample of the rows of each.
    """
    parts = list(batches)
    kinds, datasets, samples = (np.concatenate(column) for column in zip(*parts, strict=True))
    found = []
    for number, name in enumerate(("fresh", "replay")):
        chosen = kinds == number
        if chosen.sum() >= 2:
            found.append(Source(name, reader, datasets[chosen], samples[chosen]))
    return found


def task_sources(
    tasks: Mapping[str, Sequence[int]],
    reader: RowReader,
    sizes: Sequence[int],
    rows: int,
    seed: int,
) -> list[Source]:
    """Rows of each task, drawn by a key: the same for every checkpoint of every run.

    Args:
        tasks: task -> its datasets, as indices into the reader's.
        reader: of all datasets.
        sizes: samples of each dataset.
        rows: of each task, or all that it has.
        seed: key of the draw.
    """
    found = []
    for task, datasets in tasks.items():
        ends = np.cumsum([sizes[dataset] for dataset in datasets])
        total = int(ends[-1])
        generator = np.random.default_rng([seed, *task.encode()])
        chosen = generator.choice(total, size=min(rows, total), replace=False)
        place = np.searchsorted(ends, chosen, side="right")
        begins = np.concatenate(([0], ends[:-1]))
        dataset = np.array(list(datasets), dtype=np.int32)[place]
        if len(chosen) >= 2:
            found.append(Source(task, reader, dataset, (chosen - begins[place]).astype(np.int64)))
    return found

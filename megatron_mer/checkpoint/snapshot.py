"""A copy of this rank's state in host memory, that is written while training moves the original."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from megatron_mer.checkpoint.layout import Fragment
from megatron_mer.errors import CheckpointError


class Snapshot:
    """Host memory for one copy, taken once: fresh pages would double the time of each copy.

    Args:
        nbytes: bytes to take now; more are taken when a copy needs them.
        pin_memory: page-locked, so that a GPU copies into it at full speed.

    Raises:
        CheckpointError: the host has not so much memory.
    """

    def __init__(self, nbytes: int = 0, pin_memory: bool = False) -> None:
        self._pin_memory = pin_memory
        self._buffer = _allocate(nbytes, pin_memory)

    @torch.no_grad()
    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """Copy the fragments; the copies are valid until the next call.

        Returns:
            The same fragments in the order in which a file has them, their tensors in the copy.
        """
        # Wide dtypes first, as in the file: every tensor is then aligned.
        ordered = sorted(
            fragments, key=lambda one: (-one.tensor.element_size(), one.tensor.data_ptr())
        )
        total = sum(fragment.tensor.nbytes for fragment in ordered)
        if total > self._buffer.numel():
            self._buffer = _allocate(total, self._pin_memory)
        copies, offset = [], 0
        for run in _runs([fragment.tensor for fragment in ordered]):
            end = offset + run.nbytes
            held = self._buffer[offset:end].view(run.dtype)
            held.copy_(run, non_blocking=self._pin_memory)
            offset = end
        offset = 0
        for fragment in ordered:
            end = offset + fragment.tensor.nbytes
            held = self._buffer[offset:end].view(fragment.tensor.dtype)
            copies.append(replace(fragment, tensor=held))
            offset = end
        if self._pin_memory:
            torch.cuda.synchronize()
        return copies


def _runs(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Flat tensors in which those that follow each other in memory are one.

    The optimizer's state is a few large tensors and the fragments are pieces of them: a copy each
    would cost a start of the threads, or of the GPU's copy engine, for every parameter.
    """
    first: torch.Tensor | None = None
    count = 0
    for tensor in tensors:
        if first is not None and _follows(first, count, tensor):
            count += tensor.numel()
            continue
        if first is not None:
            yield first.as_strided((count,), (1,)) if count > first.numel() else first
        first, count = tensor, tensor.numel()
    if first is not None:
        yield first.as_strided((count,), (1,)) if count > first.numel() else first


def _follows(first: torch.Tensor, count: int, tensor: torch.Tensor) -> bool:
    """Whether a tensor begins in memory where `count` elements from the first one's begin end."""
    return (
        first.is_contiguous()
        and tensor.is_contiguous()
        and first.dtype == tensor.dtype
        and first.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        and first.storage_offset() + count == tensor.storage_offset()
    )


def _allocate(nbytes: int, pin_memory: bool) -> torch.Tensor:
    try:
        # Filled, so that the pages are there before the first copy.
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=pin_memory).fill_(0)
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"a checkpoint needs {nbytes / 2**30:.2f} GiB of host memory on each rank for its copy "
            f"of the state, and they cannot be had ({error}); take fewer ranks a node, or nodes "
            "with more memory"
        ) from error

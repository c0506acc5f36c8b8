"""A copy of this rank's state in host memory, that is written while training moves the original."""

from __future__ import annotations

from collections.abc import Iterable
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
        ordered = sorted(fragments, key=lambda fragment: -fragment.tensor.element_size())
        total = sum(fragment.tensor.nbytes for fragment in ordered)
        if total > self._buffer.numel():
            self._buffer = _allocate(total, self._pin_memory)
        copies, offset = [], 0
        for fragment in ordered:
            end = offset + fragment.tensor.nbytes
            held = self._buffer[offset:end].view(fragment.tensor.dtype)
            held.copy_(fragment.tensor, non_blocking=self._pin_memory)
            copies.append(replace(fragment, tensor=held))
            offset = end
        if self._pin_memory:
            torch.cuda.synchronize()
        return copies


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

"""What a step takes of the machine: speed, share of the peak, memory."""

from __future__ import annotations

import resource

import torch

from megatron_mer.config import RunConfig
from megatron_mer.model import Dimensions, flops_per_token, peak_tflops

TERA = 1e12
GIB = 2**30


class Usage:
    """Turns a step's seconds into tokens a second and model FLOPs utilisation.

    Args:
        config: the resolved run.
        world_size: number of ranks, one device each.
        device: this rank's.
    """

    def __init__(self, config: RunConfig, world_size: int, device: torch.device) -> None:
        self._device = device
        self._flops = flops_per_token(Dimensions.of(config.model), config.model.seq_length)
        gpu = device.type == "cuda"
        name = torch.cuda.get_device_name(device) if gpu else ""
        peak = config.metrics.peak_tflops or peak_tflops(name, config.precision)
        self._peak = peak * TERA * world_size if peak else None

    def memory_gib(self) -> float:
        """Peak memory of this rank so far in GiB: of its GPU's tensors, else of its process."""
        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device)) / GIB
        # Linux counts in KiB.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB

    def speed(self, tokens: int, seconds: float) -> dict[str, float]:
        """tokens_per_second of all ranks, and mfu (0 to 1) where the peak is known.

        Args:
            tokens: of the step, all ranks.
            seconds: wall time of the step.
        """
        rate = tokens / seconds
        speed = {"tokens_per_second": round(rate, 1)}
        if self._peak is not None:
            speed["mfu"] = round(rate * self._flops / self._peak, 4)
        return speed

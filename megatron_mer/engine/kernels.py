"""Faster ways to compute the same block: compiled, or with the kernels of liger-kernel.

Each is optional. What cannot be had is left out with one line in the log, and PyTorch's own kernels
compute instead; the losses agree but for rounding.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from megatron_mer.config import KernelsConfig
from megatron_mer.log import get_logger
from megatron_mer.model import MLP, Block, RMSNorm

logger = get_logger(__name__)


def choose_kernels(modules: Iterable[nn.Module], config: KernelsConfig, rank: int) -> None:
    """Give a stage's blocks and norms the kernels that the configuration asks for.

    Args:
        modules: all modules of the stage.
        config: what is asked for.
        rank: this rank; the first one says what is left out.
    """
    found = list(modules)
    device = next(parameter.device for module in found for parameter in module.parameters())
    compiles = config.compile
    if compiles and (problem := compile_problem(device)):
        _say(rank, "kernels.compile is left out: %s; blocks run as they are", problem)
        compiles = False
    if compiles:
        for module in found:
            if isinstance(module, Block):
                module.compute = torch.compile(module.compute)  # type: ignore[method-assign]
    elif config.fused == "auto" and device.type == "cuda" and (problem := use_liger(found)):
        _say(rank, "kernels.fused is left out: %s; PyTorch's kernels compute", problem)


def _say(rank: int, text: str, problem: str) -> None:
    (logger.warning if rank == 0 else logger.debug)(text, problem)


@cache
def compile_problem(device: torch.device) -> str | None:
    """Why blocks cannot be compiled here; None if they can."""
    if device.type == "cuda":
        try:
            importlib.import_module("triton")
        except ImportError as error:
            return f"triton cannot be imported ({error})"
        return None
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "there is no C++ compiler (set CXX, or install g++)"
    return None


def use_liger(modules: Iterable[nn.Module]) -> str | None:
    """Let liger-kernel compute RMSNorm and SwiGLU (Hsu et al. 2024, arXiv 2410.10989).

    Returns:
        Why it cannot; None if it does.
    """
    try:
        norm: Any = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        gate: Any = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"liger-kernel cannot be used ({error})"
    for module in modules:
        if isinstance(module, RMSNorm):
            module.normalise = _liger_norm(norm)
        elif isinstance(module, MLP):
            module.gate = gate.apply
    return None


def _liger_norm(function: Any) -> Callable[[Tensor, Tensor, float], Tensor]:
    def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # No offset; all in fp32 ("gemma"); not in place, for the input is the residual too.
        result: Tensor = function.apply(x, weight, eps, 0.0, "gemma", False)
        return result

    return normalise

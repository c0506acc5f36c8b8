"""Initial weights as functions of a key, so that every layout starts from the same model.

A weight is drawn in blocks of rows. A block's numbers depend on (seed, parameter name, block)
alone: not on the order of creation, on other weights, or on how many ranks share it. Numpy draws
them (SFC64, seeded with 256 bits), since PyTorch's CPU generator keeps only 32 bits of a seed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from megatron_mer.config import ModelConfig
from megatron_mer.model.dimensions import Dimensions

BLOCK_ROWS = 256
"""Rows that one generator draws. Part of what a seed means: another number, other weights."""

RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")
"""The projections that add to the residual stream."""


class Slice(Protocol):
    """Which part of a weight a tensor-parallel rank holds."""

    @property
    def dim(self) -> int:
        """The dim that is cut."""

    @property
    def size(self) -> int:
        """The whole weight's places along it."""

    @property
    def begin(self) -> int:
        """First place of the part."""

    @property
    def end(self) -> int:
        """The place behind its last."""


def init_tensor(
    seed: int,
    name: str,
    shape: Sequence[int],
    std: float,
    part: Slice | None = None,
) -> Tensor:
    """Draws a normal matrix, or one slice of it, from the key (seed, name).

    A slice along dim 0 draws only the blocks that it touches. Any other draws all of them but keeps
    one at a time, so that no rank holds the whole.

    Args:
        seed: the run's seed.
        name: canonical parameter name.
        shape: shape of the whole weight, two dims.
        std: standard deviation; the mean is 0.
        part: the slice; None: the whole.

    Returns:
        fp32 CPU tensor of the slice's shape.

    Raises:
        ValueError: the whole has no such slice.
    """
    rows, columns = shape
    window = [slice(0, rows), slice(0, columns)]
    if part is not None:
        fits = 0 <= part.dim < 2 and 0 <= part.begin <= part.end <= shape[part.dim]
        if not fits:
            raise ValueError(f"{name}: {part} of a weight of shape {tuple(shape)}")
        window[part.dim] = slice(part.begin, part.end)
    row_window, column_window = window
    out = np.empty([one.stop - one.start for one in window], dtype=np.float32)
    first = row_window.start // BLOCK_ROWS
    for block in range(first, math.ceil(row_window.stop / BLOCK_ROWS)):
        top = block * BLOCK_ROWS
        begin, end = max(top, row_window.start), min(top + BLOCK_ROWS, row_window.stop)
        drawn = _draw_block(seed, name, block, (min(BLOCK_ROWS, rows - top), columns))
        wanted = drawn[begin - top : end - top, column_window]
        np.multiply(wanted, np.float32(std), out=out[begin - row_window.start :][: end - begin])
    return torch.from_numpy(out)


def _draw_block(seed: int, name: str, block: int, shape: tuple[int, int]) -> np.ndarray:
    key = hashlib.sha256(f"{seed}:{name}:{block}".encode()).digest()
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(key, "little")))
    return generator.standard_normal(shape, dtype=np.float32)


def init_std(name: str, config: ModelConfig) -> float:
    """Standard deviation of a weight's initial values.

    `init_std` for every matrix, divided by sqrt(2 num_layers) for the two projections of a block
    that add to the residual stream, so that its variance does not grow with depth: Radford et al.
    2019 (GPT-2), section 2.3, as Megatron-LM does it (`scaled_init_method_normal`).

    Args:
        name: canonical parameter name.
        config: the model's section of the configuration, resolved.
    """
    if name.endswith(RESIDUAL_OUTPUTS):
        return config.init_std / math.sqrt(2 * Dimensions.of(config).num_layers)
    return config.init_std


def init_parameter(
    parameter: Tensor,
    name: str,
    config: ModelConfig,
    seed: int,
) -> Tensor:
    """Initial values of one parameter, or of this rank's share of it.

    Args:
        parameter: the parameter; its shape is read, and the mark `cut` that a tensor-parallel
            layer puts on what it splits.
        name: canonical parameter name.
        config: the model's section of the configuration, resolved.
        seed: the run's seed.

    Returns:
        fp32 CPU tensor of the parameter's shape. Vectors are norm weights and start at one; what a
        parameter has beyond its slice is padding and zero.
    """
    if parameter.dim() == 1:
        return torch.ones(parameter.shape, dtype=torch.float32)
    shape, part = list(parameter.shape), getattr(parameter, "cut", None)
    if part is None:
        return init_tensor(seed, name, shape, init_std(name, config))
    shape[part.dim] = part.size
    drawn = init_tensor(seed, name, shape, init_std(name, config), part)
    if drawn.shape == parameter.shape:
        return drawn
    padded = torch.zeros(parameter.shape, dtype=torch.float32)
    padded.narrow(part.dim, 0, part.end - part.begin).copy_(drawn)
    return padded


@torch.no_grad()
def initialise_layer(
    layer: nn.Module,
    layer_name: str,
    config: ModelConfig,
    seed: int,
    device: torch.device | str = "cpu",
) -> None:
    """Gives every parameter of a layer its initial values, in place.

    Parameters on the meta device are allocated here, as fp32; their attributes (the marks of
    tensor-parallel layers) stay.

    Args:
        layer: one layer of `build_layers`, possibly with tensor-parallel modules put in.
        layer_name: its name there.
        config: the model's section of the configuration, resolved.
        seed: the run's seed.
        device: where parameters without storage are allocated.
    """
    for path, module in layer.named_modules():
        for local_name, parameter in list(module.named_parameters(recurse=False)):
            name = ".".join(part for part in (layer_name, path, local_name) if part)
            values = init_parameter(parameter, name, config, seed)
            if parameter.is_meta:
                # Module.to_empty would make new parameters without the old ones' attributes.
                allocated = nn.Parameter(values.to(device), requires_grad=parameter.requires_grad)
                allocated.__dict__.update(parameter.__dict__)
                setattr(module, local_name, allocated)
            else:
                parameter.copy_(values)

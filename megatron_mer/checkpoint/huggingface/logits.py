"""Do the weights mean the same on both sides? Our logits beside those of transformers."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mer.config import ModelConfig
from megatron_mer.errors import CheckpointError
from megatron_mer.model import build_layers

ROWS, LENGTH = 2, 64  # tokens that are compared
TOLERANCE = 1e-4
"""Of the largest logit: fp32 sums of a few thousand terms in another order stay far below."""


@dataclass(frozen=True)
class LogitsCheck:
    """What a comparison gave."""

    difference: float
    """Largest difference of two logits."""
    largest: float
    """Largest logit."""

    def __str__(self) -> str:
        return (
            f"logits differ from transformers' by at most {self.difference:.2e} "
            f"(largest logit {self.largest:.3g}, {ROWS * LENGTH} tokens, fp32)"
        )

    def require(self) -> None:
        """Make sure that the two are one model.

        Raises:
            CheckpointError: they are not.
        """
        if not self.difference <= TOLERANCE * max(1.0, self.largest):
            raise CheckpointError(f"{self}: the conversion is wrong, do not use it")


def have_transformers() -> bool:
    """Whether the package is installed."""
    return find_spec("transformers") is not None


@torch.no_grad()
def compare_logits(
    model: ModelConfig, read: Callable[[str], Tensor], folder: Path, rows: int
) -> LogitsCheck:
    """Run both models in fp32 on the same tokens.

    transformers holds its whole model in memory; ours is read layer by layer, after that.

    Args:
        model: resolved.
        read: gives a whole parameter by its canonical name.
        folder: what transformers loads.
        rows: of the vocabulary that both know.
    """
    ids = torch.randint(0, rows, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    theirs = _their_logits(folder, ids)[..., :rows]
    ours = layer_by_layer(model, read, ids)[..., :rows]
    return LogitsCheck((ours - theirs).abs().max().item(), theirs.abs().max().item())


def layer_by_layer(model: ModelConfig, read: Callable[[str], Tensor], ids: Tensor) -> Tensor:
    """Logits (B, S, V) of token ids (B, S), with one layer in memory at a time."""
    x = ids
    for place, (name, factory) in enumerate(build_layers(model)):
        with torch.device("meta"):
            layer: Any = factory()
        state = {key: read(f"{name}.{key}").float() for key, _ in layer.named_parameters()}
        layer.load_state_dict(state, assign=True)
        x = layer.logits(x) if name == "embedding" and place else layer(x)
    return x


def _their_logits(folder: Path, ids: Tensor) -> Tensor:
    # Nothing may be looked up: what is loaded is a local folder.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    logits: Tensor = theirs.eval()(ids).logits
    return logits

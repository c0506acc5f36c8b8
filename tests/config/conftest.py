"""A small valid configuration, and what a test changes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_mer.config import load_config
from megatron_mer.errors import ConfigError

BASE = """\
name: small
seed: 1
precision: bf16
model: {size: llama-1m, seq_length: 64}
tokenizer: sentencepiece:tok.model
batch: {global_batch_size: 8, micro_batch_size: 2}
optimizer: {lr: 1e-3}
stream:
  - {task: en, train: [data/en], valid: data/en_valid, steps: 10}
  - {task: fr, train: [data/fr], valid: data/fr_valid, steps: 10}
output_dir: runs/small
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


@pytest.fixture
def refused(base: Path) -> Callable[..., list[str]]:
    """The lines of the error that overrides on the small configuration cause."""

    def lines(*overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load_config(base, overrides)
        return str(caught.value).splitlines()

    return lines

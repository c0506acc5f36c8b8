"""The paper's runs, as far as its numbers go (arXiv 2508.01908)."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from megatron_mer.config import check_layout, load_config

PAPER = Path(__file__).resolve().parents[2] / "examples/paper"
# size -> layers, hidden, heads, ffn, lr
SIZES = {
    "99m": (16, 512, 8, 1280, 4.0e-4),
    "560m": (24, 1280, 20, 3072, 2.8e-4),
    "1.1b": (24, 1792, 28, 5120, 2.2e-4),
}
METHODS = {
    "sequential": (None, False),
    "replay25": ("0.25", False),
    "replay50": ("0.5", False),
    "reptile": (None, True),
    "mer25": ("0.25", True),
    "mer50": ("0.5", True),
}


def test_every_size_with_every_method() -> None:
    expected = {f"{size}_{method}.yaml" for size in SIZES for method in METHODS}
    assert {path.name for path in PAPER.iterdir()} == expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", SIZES)
def test_run(size: str, method: str) -> None:
    config = load_config(PAPER / f"{size}_{method}.yaml")
    model, optimizer, schedule = config.model, config.optimizer, config.schedule
    shape = (model.num_layers, model.hidden_size, model.num_heads, model.ffn_hidden_size)
    assert (*shape, optimizer.lr) == SIZES[size]
    assert (model.num_kv_heads, model.tie_embeddings) == (model.num_heads, False)
    assert (model.seq_length, model.vocab_size) == (2048, 128256)
    assert (model.norm_eps, model.rope_base) == (1e-5, 10000)
    assert config.batch.global_batch_size == 4096
    assert (optimizer.betas, optimizer.eps) == ((0.9, 0.95), 1e-8)
    assert (optimizer.weight_decay, optimizer.clip) == (0.1, 1.0)
    assert (schedule.kind, schedule.warmup_steps, schedule.min_lr) == ("cosine", 357, 5e-5)
    assert schedule.total_steps is None
    assert (config.precision, config.parallel.zero_stage) == ("bf16", 1)
    assert [entry.task for entry in config.stream] == ["en", "fr", "de", "ar", "ja"]
    assert {entry.steps for entry in config.stream} == {11921}
    assert config.name == f"{size}_{method}"
    assert config.output_dir == f"runs/paper/{size}_{method}"
    assert check_layout(config, 16) == []

    alpha, reptile = METHODS[method]
    assert (config.replay is None) == (alpha is None)
    if config.replay is not None and alpha is not None:
        assert config.replay.alpha == Decimal(alpha)
        assert config.replay.include_current_task
    assert (config.reptile is None) == (not reptile)
    if config.reptile is not None:
        assert (config.reptile.k, config.reptile.epsilon) == (500, 0.1)
        assert config.reptile.momentum == 0

"""What a number of ranks allows."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mer.config import check_layout, load_config
from megatron_mer.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        ([], 1),
        ([], 4),
        (["--parallel.tp_size=2", "--parallel.pp_size=2"], 8),
        (["--parallel.pp_size=4"], 4),
    ],
)
def test_layouts_that_work(base: Path, overrides: list[str], world_size: int) -> None:
    assert check_layout(load_config(base, overrides), world_size) == []


def test_ranks_that_are_no_multiple(base: Path) -> None:
    config = load_config(base, ["--parallel.tp_size=2", "--parallel.pp_size=2"])
    for world_size in (1, 2, 6):
        (problem,) = check_layout(config, world_size)
        assert str(problem).startswith("parallel: tp_size 2 x pp_size 2 = 4 ranks a replica")
        assert f"the number of ranks, {world_size};" in str(problem)


def test_rows_and_data_parallel_ranks(base: Path) -> None:
    config = load_config(base, ["--batch={global_batch_size: 12, micro_batch_size: 4}"])
    (problem,) = check_layout(config, 2)
    expected = "12 rows do not divide into micro_batch_size 4 x dp_size 2 = 8"
    assert str(problem).startswith(f"batch.global_batch_size: {expected}; allowed: a multiple of 8")


def test_all_problems_together(base: Path) -> None:
    from dataclasses import replace

    config = load_config(base)
    config = replace(config, parallel=replace(config.parallel, tp_size=3, pp_size=5, zero_stage=3))
    paths = [problem.path for problem in check_layout(config, 16)]
    assert paths == [
        "parallel.zero_stage",
        "model.num_heads",
        "model.num_kv_heads",
        "parallel.pp_size",
        "parallel",
    ]


def test_any_vocabulary_works(base: Path) -> None:
    config = load_config(base, ["--parallel.tp_size=2", "--model.vocab_size=4097"])
    assert check_layout(config, 2) == []


@pytest.mark.parametrize(
    ("kv_heads", "fits"), [(12, True), (6, True), (3, True), (2, True), (4, False)]
)
def test_heads_of_keys_and_values_over_tensor_ranks(base: Path, kv_heads: int, fits: bool) -> None:
    overrides = [f"--model.num_kv_heads={kv_heads}", "--parallel.tp_size=6"]
    shape = "{size: llama-1m, seq_length: 64, hidden_size: 192, num_heads: 12}"
    if fits:
        assert check_layout(load_config(base, ["--model", shape, *overrides]), 6) == []
        return
    with pytest.raises(ConfigError, match="allowed: a multiple or a divisor of 6"):
        load_config(base, ["--model", shape, *overrides])

"""What a number of ranks allows."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mer.config import check_layout, load_config


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

    config = load_config(base, ["--model.vocab_size=4097"])
    config = replace(config, parallel=replace(config.parallel, tp_size=3, pp_size=5, zero_stage=3))
    paths = [problem.path for problem in check_layout(config, 16)]
    assert paths == [
        "parallel.zero_stage",
        "model.num_heads",
        "model.num_kv_heads",
        "model.vocab_size",
        "parallel.pp_size",
        "parallel",
    ]


def test_a_vocabulary_that_does_not_split_is_told_the_next_that_does(base: Path) -> None:
    from megatron_mer.config import resolve_vocab

    config = load_config(base, ["--parallel.tp_size=2"])
    assert check_layout(config, 2) == []
    (problem,) = check_layout(resolve_vocab(config, 4097), 2)
    assert "4097 does not divide into parallel.tp_size 2" in str(problem)
    assert "set model.vocab_size to 4098" in str(problem)

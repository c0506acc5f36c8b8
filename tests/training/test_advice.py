"""The warning of a pipeline that waits."""

from pathlib import Path

import pytest

from megatron_mer.config import load_config
from megatron_mer.parallel import pipeline_bubble
from megatron_mer.training.advice import bubble_advice

REFERENCE = Path(__file__).resolve().parents[2] / "examples/paper/1.1b_mer25.yaml"


def advice(pp_size, rows, micro, ranks):
    options = [
        f"--parallel.pp_size={pp_size}",
        f"--batch.global_batch_size={rows}",
        f"--batch.micro_batch_size={micro}",
    ]
    return bubble_advice(load_config(REFERENCE, options), ranks)


def test_one_stage_never_waits():
    assert pipeline_bubble(1, 1) == 0.0
    assert advice(1, 8, 8, 1) is None


def test_few_micro_batches_are_named_with_how_many_are_enough():
    said = advice(4, 32, 8, 4)  # 4 micro batches
    assert "waits for 43% of a step" in said
    assert "27 micro batches make it 10%" in said
    assert "batch.micro_batch_size (now 8)" in said
    assert pipeline_bubble(4, 27) == pytest.approx(0.1)


def test_data_ranks_share_the_micro_batches():
    assert advice(2, 32, 8, 2) is None  # 4 micro batches: a fifth
    assert "34%" not in advice(2, 32, 8, 4)
    assert "waits for 33%" in advice(2, 32, 8, 4)  # 2 of them

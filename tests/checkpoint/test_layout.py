from pathlib import Path

import pytest
import torch

from megatron_mer.checkpoint.layout import (
    Fragment,
    parse_step,
    slice_shape,
    step_directories,
    step_name,
)


def make(**changes: object) -> Fragment:
    values: dict = {
        "name": "head.weight",
        "kind": "master",
        "global_shape": (8, 3),
        "tp_dim": 0,
        "tp_rank": 1,
        "tp_size": 2,
        "start": 4,
        "tensor": torch.zeros(5),
    }
    return Fragment(**(values | changes))


def test_fragment_describes_its_range():
    fragment = make()
    assert (fragment.numel, fragment.stop, fragment.key) == (5, 9, "master/head.weight")
    assert fragment.index_entry() == {
        "name": "head.weight",
        "kind": "master",
        "global_shape": [8, 3],
        "tp_dim": 0,
        "tp_rank": 1,
        "tp_size": 2,
        "start": 4,
        "numel": 5,
        "dtype": "F32",
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "momentum"}, ["momentum", "velocity"]),
        ({"tensor": torch.zeros(1, 5)}, ["1-D", "(1, 5)"]),
        ({"tensor": torch.zeros(5, dtype=torch.bfloat16)}, ["bfloat16", "float32"]),
        ({"tp_rank": 2}, ["tp_rank 2", "0..1"]),
        ({"tp_dim": 2}, ["tp_dim 2", "(8, 3)"]),
        ({"tp_dim": 1}, ["[4, 9)", "slice of 8"]),
        ({"start": 8}, ["[8, 13)", "12"]),
        ({"start": -1}, ["[-1, 4)"]),
    ],
)
def test_contradictions_are_refused(changes: dict, words: list[str]):
    with pytest.raises(ValueError, match="fragment") as caught:
        make(**changes)
    for word in words:
        assert word in str(caught.value)


def test_only_the_last_delta_may_be_bf16():
    tensor = torch.zeros(5, dtype=torch.bfloat16)
    assert make(kind="last_delta", tensor=tensor).index_entry()["dtype"] == "BF16"


def test_a_replicated_parameter_is_not_cut():
    assert slice_shape((8, 3), 0, 4, 1) == (2, 3)
    assert slice_shape((8, 3), None, 4, 1) == (8, 3)


def test_the_last_slices_may_be_shorter():
    assert [slice_shape((8, 3), 0, 3, rank) for rank in range(3)] == [(3, 3), (3, 3), (2, 3)]
    assert [slice_shape((5, 3), 0, 4, rank)[0] for rank in range(4)] == [2, 2, 1, 0]


def test_step_names_go_beyond_nine_digits():
    assert step_name(300) == "step_000000300"
    assert step_name(12_345_678_901) == "step_12345678901"
    for step in (0, 300, 999_999_999, 1_000_000_000):
        assert parse_step(step_name(step)) == step
    assert parse_step("step_000000300.tmp") is None
    assert parse_step("steps_3") is None


def test_steps_compare_as_numbers(tmp_path: Path):
    for name in (
        "step_9510",
        "step_000010510",
        "step_1000000000",
        "step_999999999",
        "step_5.tmp",
        "x",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "step_9510.replaced").mkdir()
    assert [path.name for path in step_directories(tmp_path)] == [
        "step_1000000000",
        "step_999999999",
        "step_000010510",
        "step_9510",
        "step_9510.replaced",
    ]


def test_no_directory_has_no_steps(tmp_path: Path):
    assert step_directories(tmp_path / "absent") == []

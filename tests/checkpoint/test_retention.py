"""Which checkpoints stay."""

import os
from pathlib import Path

import pytest

from megatron_mer.checkpoint import damaged
from megatron_mer.checkpoint.layout import step_directories
from tests.checkpoint.saved import names, save, stored_value


def test_prune_keeps_the_newest_by_number(tmp_path: Path):
    for step in (9_510, 10_510, 999_999_999, 1_000_000_000):
        save(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["latest", "step_1000000000", "step_999999999"]
    assert stored_value(tmp_path) == 1_000_000_000


def test_prune_never_removes_what_latest_names(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for step in (10, 20, 30):
        save(tmp_path, step, keep_last=9)
    save(tmp_path, 15, keep_last=2)
    assert names(tmp_path) == ["latest", "step_000000010", "step_000000015"]
    assert stored_value(tmp_path) == 15


def test_a_full_cycle_of_retention(tmp_path: Path):
    written: list[int] = []
    for step in range(5, 205, 5):
        save(tmp_path, step, keep_last=2, keep_every=60, permanent=step % 35 == 0)
        written.append(step)
        kept = {*written[-2:], *(one for one in written if one % 60 == 0 or one % 35 == 0)}
        found = {path.name for path in step_directories(tmp_path)}
        assert found == {f"step_{one:09d}" for one in kept}
        assert stored_value(tmp_path) == step
    for path in step_directories(tmp_path):
        assert damaged(path) is None
    # Back at step 100: what comes after it is of another future, permanent or not.
    save(tmp_path, 100, keep_last=1, keep_every=60)
    assert names(tmp_path) == ["latest", *(f"step_{one:09d}" for one in (35, 60, 70, 100))]


def test_what_keep_every_kept_goes_when_it_is_no_longer_asked_for(tmp_path: Path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep_last=1, keep_every=10)
    assert len(step_directories(tmp_path)) == 3
    save(tmp_path, 40, keep_last=1)
    assert names(tmp_path) == ["latest", "step_000000040"]


def test_a_torn_checkpoint_is_not_counted_as_kept(tmp_path: Path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep_last=9)
    os.truncate(tmp_path / "step_000000030/rank_00000.safetensors", 20)
    save(tmp_path, 40, keep_last=2)
    assert names(tmp_path) == ["latest", "step_000000020", "step_000000040"]

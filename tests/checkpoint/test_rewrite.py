"""Another run state in a checkpoint that is there."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from megatron_mer.checkpoint import CheckpointInfo, find_latest, save
from megatron_mer.checkpoint.find import damaged, is_permanent
from megatron_mer.errors import CheckpointError
from tests.checkpoint.saved import names
from tests.checkpoint.saved import save as saved


@pytest.fixture
def path(tmp_path: Path) -> Path:
    saved(tmp_path, 3)
    return saved(tmp_path, 4)


def test_only_the_run_state_changes(path: Path):
    before = {name: (path / name).read_bytes() for name in names(path)}
    old = CheckpointInfo.read(path)
    save.rewrite_run_state(path, {**old.run_state, "batches": 77})
    assert damaged(path) is None
    assert CheckpointInfo.read(path).run_state == {**old.run_state, "batches": 77}
    changed = {name for name in names(path) if (path / name).read_bytes() != before[name]}
    assert changed == {"run_state.json", "manifest.json"}
    assert not is_permanent(path)
    assert names(path.parent) == ["latest", "step_000000003", "step_000000004"]
    older = path.with_name("step_000000003")
    save.rewrite_run_state(older, {"batches": 5})
    assert find_latest(path.parent).path == path


def test_a_file_system_without_links_gets_copies(path: Path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    before = (path / "rank_00000.safetensors").read_bytes()
    save.rewrite_run_state(path, {"batches": 1})
    assert damaged(path) is None
    assert (path / "rank_00000.safetensors").read_bytes() == before


def test_a_damaged_run_state_is_not_made_whole(path: Path):
    file = path / "run_state.json"
    file.write_bytes(file.read_bytes().replace(b"4", b"5", 1))
    with pytest.raises(CheckpointError, match=r"run_state.json: expected .*sha256.*, found"):
        save.rewrite_run_state(path, {"batches": 1})
    assert damaged(path) is not None


def test_what_a_kill_left_is_cleared_only_beside_a_whole_one(path: Path):
    aside = path.with_name(path.name + ".replaced")
    os.rename(path, aside)
    save.clear_replaced(path.parent)
    assert aside.is_dir()
    save.prepare(path.parent)
    assert not aside.exists()
    shutil.copytree(path, aside)
    content = (path / "rank_00000.json").read_bytes()
    (path / "rank_00000.json").unlink()
    with pytest.raises(CheckpointError, match=r"rank_00000.json.*remove one of the two"):
        save.clear_replaced(path.parent)
    (path / "rank_00000.json").write_bytes(content)
    save.clear_replaced(path.parent)
    assert (aside.exists(), damaged(path)) == (False, None)

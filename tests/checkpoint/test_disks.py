"""Checkpoints on a disk that is really full, or really read-only."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_mer.checkpoint import Fragment, damaged, find_latest, save_checkpoint
from megatron_mer.errors import CheckpointError
from tests.checkpoint.saved import names, save, stored_value

ROWS = 1 << 17  # of 4 fp32 numbers: 2 MiB


def large(ranks: type, root: Path, step: int) -> list[object]:
    """A checkpoint of 4 MiB by two ranks."""

    def one(rank: int, first_failure: Callable[[str | None], str | None]) -> object:
        values = torch.full((ROWS * 4,), float(step))
        part = Fragment("w", "master", (ROWS * 2, 4), None, 0, 1, rank * ROWS * 4, values)
        return save_checkpoint(
            root, step, [part], {"value": step}, rank=rank, world_size=2,
            first_failure=first_failure, keep_last=9,
        )  # fmt: skip

    return ranks(2).run(one)


def content(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("leave", [0, 4096, 1 << 20, 3 << 20])
def test_a_full_disk(small_disk, ranks: type, leave: int):
    root = small_disk.root / "checkpoints"
    large(ranks, root, 1)
    before = content(root)
    subprocess.run(small_disk.fill(leave), shell=True, check=True)
    for _ in range(2):
        errors = large(ranks, root, 2)
        assert all(isinstance(error, CheckpointError) for error in errors)
        assert "No space left on device" in str(errors[0])
        assert "older checkpoints are whole" in str(errors[0])
        assert content(root) == before
        assert names(root) == ["latest", "step_000000001"]
    small_disk.empty()
    large(ranks, root, 2)
    info = find_latest(root)
    assert info is not None
    assert (info.step, damaged(info.path)) == (2, None)


def test_a_read_only_disk(small_disk):
    root = small_disk.root / "checkpoints"
    save(root, 1)
    before = content(root)
    subprocess.run(small_disk.protect(root), shell=True, check=True)
    with pytest.raises(CheckpointError) as caught:
        save(root, 2)
    assert f"checkpoints cannot be written to {root}" in str(caught.value)
    assert "Read-only file system" in str(caught.value)
    assert content(root) == before
    assert stored_value(root) == 1

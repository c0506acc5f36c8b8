import builtins
import errno
import hashlib
import io
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_mer.checkpoint import Fragment, save_checkpoint
from megatron_mer.checkpoint.find import broken, damaged
from megatron_mer.checkpoint.layout import step_directories
from megatron_mer.errors import CheckpointError
from tests.checkpoint.saved import fragment, names, save, stored_value


def test_files_of_a_checkpoint(tmp_path: Path):
    path = save(tmp_path / "checkpoints", 300)
    assert path == tmp_path / "checkpoints" / "step_000000300"
    assert names(path) == [
        "manifest.json",
        "rank_00000.json",
        "rank_00000.safetensors",
        "run_state.json",
    ]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_000000300\n"
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["step"], manifest["world_size"]) == (300, 1)
    assert manifest["files"] == {
        name: {
            "bytes": (path / name).stat().st_size,
            "sha256": hashlib.sha256((path / name).read_bytes()).hexdigest(),
        }
        for name in names(path)
        if name != "manifest.json"
    }
    assert damaged(path) is None


def test_the_tensor_file_is_what_safetensors_reads(tmp_path: Path):
    delta = torch.arange(3, dtype=torch.bfloat16)
    exp_avg = torch.randn(8)[::2]
    fragments = [
        Fragment("norm", "last_delta", (3,), None, 0, 1, 0, delta),
        Fragment("norm", "master", (7,), None, 0, 1, 7, torch.zeros(0)),
        Fragment("é/w", "exp_avg", (4,), None, 0, 1, 0, exp_avg),
    ]
    path = save_checkpoint(
        tmp_path,
        1,
        fragments,
        {},
        rank=0,
        world_size=1,
        first_failure=lambda reason: reason,
    )
    stored = load_file(path / "rank_00000.safetensors")
    assert stored.keys() == {"last_delta/norm", "master/norm", "exp_avg/é/w"}
    assert torch.equal(stored["last_delta/norm"], delta)
    assert torch.equal(stored["exp_avg/é/w"], exp_avg)
    assert stored["master/norm"].shape == (0,)


def test_a_save_of_the_same_step_replaces(tmp_path: Path):
    save(tmp_path, 10)
    save(tmp_path, 20, 1.0)
    save(tmp_path, 20, 2.0)
    assert names(tmp_path) == ["latest", "step_000000010", "step_000000020"]
    assert stored_value(tmp_path) == 2.0


def test_a_stale_temporary_directory_leaks_nothing(tmp_path: Path):
    for name in ("step_000000010.tmp", "step_000000004.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank_00007.safetensors").write_bytes(b"old")
    path = save(tmp_path, 10)
    assert names(tmp_path) == ["latest", "step_000000010"]
    assert "rank_00007.safetensors" not in names(path)


@pytest.mark.parametrize("state", [{"value": object()}, {"value": float("nan")}])
def test_a_state_that_is_no_json_is_refused(tmp_path: Path, state: dict):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="step_000000002"):
        save_checkpoint(
            tmp_path,
            2,
            [fragment(2.0)],
            state,
            rank=0,
            world_size=1,
            first_failure=lambda reason: reason,
        )
    assert names(tmp_path) == ["latest", "step_000000001"]


def test_a_key_given_twice_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"master/head\.weight"):
        save_checkpoint(
            tmp_path,
            2,
            [fragment(2.0)] * 2,
            {},
            rank=0,
            world_size=1,
            first_failure=lambda reason: reason,
        )


def save_on(ranks: type, root: Path, step: int, world_size: int = 3) -> list[object]:
    def one(rank: int, first_failure: Callable[[str | None], str | None]) -> object:
        return save_checkpoint(
            root, step, [fragment(step, rank, world_size)], {"value": float(step)}, rank=rank,
            world_size=world_size, first_failure=first_failure,
        )  # fmt: skip

    return ranks(world_size).run(one)


def test_ranks_write_one_checkpoint(tmp_path: Path, ranks: type):
    assert save_on(ranks, tmp_path, 5) == [tmp_path / "step_000000005"] * 3
    assert len(names(tmp_path / "step_000000005")) == 2 + 3 * 2
    assert stored_value(tmp_path) == 5


class FullDisk(io.FileIO):
    """A file on a disk that has room for 100 bytes."""

    def write(self, data) -> int:  # type: ignore[no-untyped-def, override]
        if self.tell() + len(data) > 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def fill_disk(monkeypatch: pytest.MonkeyPatch, file_name: str) -> None:
    real = builtins.open

    def opening(path, mode="r", *rest, **options):  # type: ignore[no-untyped-def]
        if "w" in mode and Path(path).name == file_name:
            return io.BufferedWriter(FullDisk(path, "w"), 1)
        return real(path, mode, *rest, **options)

    monkeypatch.setattr(builtins, "open", opening)


@pytest.mark.parametrize(
    ("file_name", "rank"),
    [("rank_00001.safetensors", 1), ("rank_00002.json", 2), ("manifest.json", 0)],
)
def test_a_full_disk_on_one_rank_is_an_error_on_all(
    tmp_path: Path, ranks: type, file_name: str, rank: int
):
    save_on(ranks, tmp_path, 5)
    with pytest.MonkeyPatch.context() as monkeypatch:
        fill_disk(monkeypatch, file_name)
        errors = save_on(ranks, tmp_path, 6)
    assert all(isinstance(error, CheckpointError) for error in errors)
    causes = [getattr(error, "__cause__") for error in errors]  # noqa: B009
    assert [getattr(cause, "errno", None) for cause in causes] == [
        errno.ENOSPC if at == rank else None for at in range(3)
    ]
    assert "No space left" in str(errors[rank])
    assert "step_000000006" in str(errors[rank])
    assert stored_value(tmp_path) == 5
    assert names(tmp_path) == ["latest", "step_000000005"]
    save_on(ranks, tmp_path, 6)
    assert stored_value(tmp_path) == 6


def test_directories_that_are_not_shared_are_told(tmp_path: Path, ranks: type):
    def one(rank: int, first_failure: Callable[[str | None], str | None]) -> object:
        own = tmp_path / f"node{rank}"
        # Rank 1 on another node: its directory exists there, rank 0 does not see its files.
        (own / "step_000000001.tmp").mkdir(parents=True, exist_ok=True) if rank else None
        return save_checkpoint(
            own,
            1,
            [fragment(1.0, rank, 2)],
            {},
            rank=rank,
            world_size=2,
            first_failure=first_failure,
        )

    errors = ranks(2).run(one)
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert "rank_00001.json" in str(errors[0])
    assert "shared by all ranks" in str(errors[0])


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the save handles it."""


class Killer:
    """Ends the process, so to speak, at the n-th system call that changes the disk."""

    CALLS = ((os, "rename"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"))

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, after: bool):
        self.count, self.at, self.after = 0, at, after
        self._lock = threading.Lock()
        for module, name in self.CALLS:
            monkeypatch.setattr(module, name, self._wrap(getattr(module, name)))
        # Removal in one step, file by file, so that a kill can leave half of a directory.
        monkeypatch.setattr(shutil, "rmtree", remove_tree)
        monkeypatch.setattr(builtins, "open", self._open(builtins.open))

    def _hit(self) -> bool:
        with self._lock:
            self.count += 1
            return self.count >= self.at

    def _wrap(self, real: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            hit = self._hit()
            if hit and not self.after:
                raise Killed
            result = real(*arguments, **options)
            if hit:
                raise Killed
            return result

        return call

    def _open(self, real: Callable) -> Callable:
        def call(path, mode="r", *rest, **options):  # type: ignore[no-untyped-def]
            if "w" in mode and self._hit():
                # Killed while writing: the name is there, half of the content is not.
                real(path, mode, *rest, **options).close()
                raise Killed
            return real(path, mode, *rest, **options)

        return call


def remove_tree(path: Path, ignore_errors: bool = False) -> None:
    if not Path(path).exists():
        return
    for child in sorted(Path(path).iterdir()):
        os.unlink(child)
    os.rmdir(path)


def kills(run: Callable[[], object], after: bool, at: int) -> bool:
    """Run with a kill at the given call; False once the run makes fewer calls than that."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        killer = Killer(monkeypatch, at, after)
        try:
            run()
        except Killed:
            return True
        return killer.count >= at


def two_checkpoints(root: Path) -> None:
    save(root, 10)
    save(root, 20)


def one_torn_while_replaced(root: Path) -> None:
    """Step 20 was being replaced, and what took its name is damaged."""
    two_checkpoints(root)
    shutil.copytree(root / "step_000000020", root / "step_000000020.replaced")
    os.truncate(root / "step_000000020/rank_00000.safetensors", 20)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("prepare", "step"),
    [(two_checkpoints, 30), (two_checkpoints, 20), (one_torn_while_replaced, 20)],
    ids=["new step", "same step", "torn step"],
)
def test_a_kill_at_any_point_leaves_a_whole_checkpoint(
    tmp_path: Path, prepare: Callable[[Path], None], step: int, after: bool
):
    points, seen = 0, set()
    while True:
        root = tmp_path / f"{points}"
        prepare(root)
        if not kills(lambda root=root: save(root, step, 7.0), after, points + 1):
            break
        points += 1
        seen.add(stored_value(root))
        assert seen <= {20.0, 7.0}
        if step == 30:
            # Nothing stands there under a checkpoint's name, `latest` above all, that is not whole.
            named = [root / (root / "latest").read_text().strip(), *step_directories(root)]
            assert [broken(path) for path in named] == [None] * len(named)
        # The next run cleans up and saves as if nothing had been.
        save(root, step + 10, 8.0)
        assert stored_value(root) == 8.0
        assert [name for name in names(root) if name.endswith((".tmp", ".replaced"))] == []
        assert len(names(root)) == 3
    assert points > 20
    assert seen == {20.0, 7.0}


def test_a_checkpoint_that_was_not_replaced_gets_its_name_back(tmp_path: Path):
    two_checkpoints(tmp_path)
    (tmp_path / "step_000000020").rename(tmp_path / "step_000000020.replaced")
    save(tmp_path, 30)
    assert names(tmp_path) == ["latest", "step_000000020", "step_000000030"]


@pytest.mark.parametrize("at", range(1, 40, 4))
def test_a_kill_of_one_of_several_ranks(tmp_path: Path, ranks: type, at: int):
    save_on(ranks, tmp_path, 5)
    with pytest.MonkeyPatch.context() as monkeypatch:
        killer = Killer(monkeypatch, at, after=False)
        results = save_on(ranks, tmp_path, 6)
    if killer.count < at:
        assert results == [tmp_path / "step_000000006"] * 3
    assert stored_value(tmp_path) in (5.0, 6.0)
    save_on(ranks, tmp_path, 7)
    assert stored_value(tmp_path) == 7
    assert [name for name in names(tmp_path) if name.endswith((".tmp", ".replaced"))] == []

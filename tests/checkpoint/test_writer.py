"""Writes beside training: what the ranks may do meanwhile, and what they hear of a failure."""

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_mer.checkpoint import CheckpointWriter, Fragment, find_latest
from megatron_mer.checkpoint import writer as module
from megatron_mer.checkpoint.snapshot import Snapshot
from megatron_mer.checkpoint.writer import BUSY, FAILED, READY
from megatron_mer.errors import CheckpointError
from tests.checkpoint.saved import fragment, names, stored_value

TIMEOUT = 20.0


def a_writer(root: Path, **options) -> CheckpointWriter:
    return CheckpointWriter(
        root, **{"rank": 0, "world_size": 1, "first_failure": lambda reason: reason, **options}
    )


def begin(writer: CheckpointWriter, step: int) -> None:
    writer.save(step, [fragment(step)], {"value": float(step)})


class Gate:
    """Holds every rank's write until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail: Callable[[int], bool]):
        self.event, self.entered = threading.Event(), threading.Event()
        real = module.write_rank

        def write(temporary, fragments, rank, world_size, stop):  # type: ignore[no-untyped-def]
            self.entered.set()
            assert self.event.wait(TIMEOUT)
            if fail(rank):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(temporary, fragments, rank, world_size, stop)

        monkeypatch.setattr(module, "write_rank", write)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch, lambda rank: False)


def advance(writer: CheckpointWriter) -> float:
    """A step of training, as it were; the report that went with it."""
    report = writer.report()
    writer.advance([report])
    return report


def finish(writer: CheckpointWriter, steps: int) -> None:
    """Train until the ranks have all been ready so many times."""
    for _ in range(steps):
        assert writer._thread is not None
        writer._thread.join(TIMEOUT)
        assert advance(writer) == READY


def test_training_goes_on_while_the_disk_is_busy(tmp_path: Path, gate: Gate):
    told: list[int] = []
    writer = a_writer(tmp_path, committed=told.append)
    value = fragment(1.0)
    writer.save(10, [value], {"value": 1.0})
    # The write has not begun, and training moves the weights.
    value.tensor.fill_(2.0)
    assert [advance(writer) for _ in range(3)] == [BUSY] * 3
    assert find_latest(tmp_path) is None
    gate.event.set()
    finish(writer, 1)
    assert told == []
    finish(writer, 1)
    assert told == [10]
    assert stored_value(tmp_path) == 1.0
    assert [advance(writer) for _ in range(2)] == [READY] * 2


def test_the_next_checkpoint_waits_for_the_last(tmp_path: Path, gate: Gate):
    writer = a_writer(tmp_path)
    begin(writer, 1)
    second = threading.Thread(target=begin, args=(writer, 2), daemon=True)
    second.start()
    second.join(0.3)
    assert second.is_alive()
    gate.event.set()
    second.join(TIMEOUT)
    # The first is whole before the second one's copy overwrites its memory.
    assert stored_value(tmp_path) == 1.0
    writer.wait()
    assert stored_value(tmp_path) == 2.0


def test_a_failed_write_fails_the_next_step_of_every_rank(tmp_path: Path, ranks, monkeypatch):
    def run(rank: int, first_failure: Callable[[str | None], str | None]) -> object:
        writer = a_writer(tmp_path, rank=rank, world_size=3, first_failure=first_failure)
        writer.save(1, [fragment(1.0, rank, 3)], {"value": 1.0})
        writer.wait()
        gate = Gate(monkeypatch, lambda rank: rank == 2)
        writer.save(2, [fragment(2.0, rank, 3)], {"value": 2.0})
        gate.event.set()
        if rank == 2:
            assert writer._thread is not None
            writer._thread.join(TIMEOUT)
            assert writer.report() == FAILED
        writer.advance([READY, BUSY, FAILED])
        return None

    errors = ranks(3).run(run)
    for error in errors:
        assert isinstance(error, CheckpointError), error
        assert "step_000000002 was not written (rank 2: [Errno 28]" in str(error)
        assert "older checkpoints are whole" in str(error)
    assert isinstance(errors[2].__cause__, OSError)
    assert names(tmp_path) == ["latest", "step_000000001"]
    assert stored_value(tmp_path) == 1.0


def test_a_failed_manifest_fails_the_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(module, "write_manifest", refuse)
    writer = a_writer(tmp_path)
    begin(writer, 3)
    finish(writer, 1)
    assert writer._thread is not None
    writer._thread.join(TIMEOUT)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        advance(writer)
    assert names(tmp_path) == []


def test_a_run_that_ends_leaves_no_writer_behind(tmp_path: Path, gate: Gate):
    writer = a_writer(tmp_path)
    begin(writer, 5)
    assert gate.entered.wait(TIMEOUT)
    thread = writer._thread
    assert thread is not None
    closing = threading.Thread(target=writer.close, daemon=True)
    closing.start()
    gate.event.set()
    closing.join(TIMEOUT)
    assert not thread.is_alive()
    # Nothing was given a name, and a full disk has its space back.
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_rights_is_told_at_once(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="cannot be written to"):
        a_writer(tmp_path)


def test_a_target_that_is_a_file_is_told_at_once(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match=f"cannot be written to {tmp_path}/checkpoints"):
        a_writer(tmp_path / "checkpoints")


def test_a_snapshot_takes_its_memory_once():
    wide = Fragment("w", "master", (6,), None, 0, 1, 0, torch.arange(6.0))
    half = Fragment("w", "last_delta", (3,), None, 0, 1, 0, torch.ones(3, dtype=torch.bfloat16))
    snapshot = Snapshot(30)
    first = snapshot.take([half, wide])
    assert [one.key for one in first] == ["master/w", "last_delta/w"]
    assert torch.equal(first[0].tensor, wide.tensor)
    assert torch.equal(first[1].tensor, half.tensor)
    second = snapshot.take([half, wide])
    assert second[0].tensor.data_ptr() == first[0].tensor.data_ptr()
    # Larger than foreseen: taken all the same.
    grown = Fragment("v", "master", (60,), None, 0, 1, 0, torch.arange(60.0))
    assert torch.equal(snapshot.take([grown])[0].tensor, grown.tensor)


def test_a_snapshot_of_pieces_of_one_tensor():
    flat = torch.arange(40.0)
    # Neighbours, a gap, an empty piece, a strided one, and another tensor.
    cuts = {"b": flat[10:16], "a": flat[0:10], "c": flat[18:30], "none": flat[30:30]}
    cuts |= {"strided": flat[30:40:2], "last": flat[30:32], "other": torch.arange(5.0) + 100}
    given = [Fragment(n, "master", (40,), None, 0, 1, 0, one) for n, one in cuts.items()]
    expected = {name: one.clone() for name, one in cuts.items()}
    copies = Snapshot().take(given)
    flat.zero_()
    assert {copy.name for copy in copies} == set(cuts)
    for copy in copies:
        assert torch.equal(copy.tensor, expected[copy.name]), copy.name


def test_a_host_without_the_memory_is_told():
    with pytest.raises(CheckpointError, match="GiB of host memory on each rank"):
        Snapshot(1 << 60)


def test_a_write_shows_that_it_goes_on_and_how_long_it_took(tmp_path: Path):
    pieces: list[str] = []
    seconds: list[float] = []
    writer = a_writer(
        tmp_path,
        progress=lambda: pieces.append(threading.current_thread().name),
        measured=seconds.append,
    )
    started = time.perf_counter()
    begin(writer, 1)
    assert seconds == []
    writer.wait()
    assert 0 < seconds[0] <= time.perf_counter() - started
    assert len(seconds) == 1
    assert pieces.count("checkpoint") >= 2, "at each piece"

"""Final names: for whole datasets only, whoever interrupts or races."""

import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.indexed_writer import IndexedDatasetWriter
from megatron_mer.data.publication import Publication
from megatron_mer.errors import DataError


class Interrupted(BaseException):
    pass


@pytest.fixture
def _interruptible() -> Iterator[None]:
    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("moment", range(3))
def test_a_signal_between_the_renames_waits_for_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_document([1])
        writer.finalize()
    replace, calls = os.replace, []

    def signalled(source: Path, target: str) -> None:
        calls.append(target)
        if len(calls) == moment + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        replace(source, target)

    monkeypatch.setattr(os, "replace", signalled)
    publication = Publication(tmp_path / "c", overwrite=True)
    with publication:
        publication.bin.write(b"\x07\x00")
        publication.write_file(".idx", [(tmp_path / "c.idx").read_bytes()])
        publication.write_file(".json", [b""])
        with pytest.raises(Interrupted):
            publication.publish()
    assert publication.published
    assert len(calls) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx", "c.json"]
    os.unlink(tmp_path / "c.json")
    assert IndexedDataset(tmp_path / "c").tokens(0, 1).tolist() == [7]
    assert signal.getsignal(signal.SIGTERM).__name__ == "interrupt"  # type: ignore[union-attr]


def test_a_file_that_got_its_name_before_it_was_locked_is_not_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.bin.partial").write_bytes(b"whole")

    def finished_by_another_process(descriptor: int, operation: int) -> None:
        os.replace(tmp_path / "c.bin.partial", tmp_path / "c.bin")

    monkeypatch.setattr(fcntl, "flock", finished_by_another_process)
    with pytest.raises(DataError, match="another process is writing this dataset"):
        Publication(tmp_path / "c")
    assert (tmp_path / "c.bin").read_bytes() == b"whole"


def test_partial_files_of_a_killed_process_do_not_stay(tmp_path: Path) -> None:
    for suffix in (".bin", ".json", ".idx"):
        (tmp_path / f"c{suffix}.partial").write_bytes(b"torn")
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_document([1])
        writer.finalize()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx"]

"""Segment files: shared by processes and threads, few of them open, all on the disk when asked."""

import os
import resource
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mer.data.record_faults import RecordMissing
from megatron_mer.data.record_store import RecordStore
from megatron_mer.data.segment_files import FILES_WRITTEN_AT_ONCE
from megatron_mer.errors import DataError
from tests.data.made_records import SMALL, Rows, at

ROOT = Path(__file__).resolve().parents[2]


def open_files(directory: Path) -> list[str]:
    """Names of the files there that this process has open."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    paths = [Path(os.readlink(link)) for link in links if os.path.lexists(link)]
    return sorted(path.name for path in paths if path.parent == directory)


def write(store: RecordStore, positions: np.ndarray, seed: int = 0) -> Rows:
    rows = Rows(SMALL, len(positions), seed)
    store.write(positions, rows.identity, rows.tokens, rows.ends)
    return rows


def test_the_files_that_are_there(tmp_path: Path) -> None:
    store = RecordStore(tmp_path, SMALL, 4)
    assert store.segments() == []
    write(store, at(0, 7, 4 * 12_345_678_901))
    for name in ("segment_0000000005.rec", "segment_5.rec", "segment_000000006.tmp", "lock"):
        (tmp_path / name).touch()
    assert store.segments() == [0, 1, 12_345_678_901]
    assert (tmp_path / "segment_12345678901.rec").exists()
    store.remove([1, 3])
    store.remove([1])
    assert store.segments() == [0, 12_345_678_901]


def test_holes_take_no_space(tmp_path: Path) -> None:
    store = RecordStore(tmp_path, SMALL, 10**6)
    write(store, at(0, 999_999))
    store.sync()
    assert store.path(0).stat().st_size == 128 * 10**6
    assert 0 < store.bytes_on_disk() <= 128 * 1024
    store.remove([0])
    assert store.bytes_on_disk() == 0


def test_removed_and_released_files_are_closed(tmp_path: Path) -> None:
    writer, reader = (RecordStore(tmp_path, SMALL, 4) for _ in range(2))
    positions = np.arange(12)
    rows = write(writer, positions)
    reader.read(positions, rows.identity)
    assert len(open_files(tmp_path)) == 6
    writer.remove([1])
    assert open_files(tmp_path).count("segment_000000001.rec (deleted)") == 2
    reader.release([1, 5])
    assert open_files(tmp_path).count("segment_000000001.rec (deleted)") == 1
    writer.close_written(below=2)
    assert "segment_000000001.rec (deleted)" not in open_files(tmp_path)
    assert len(open_files(tmp_path)) == 3
    with pytest.raises(RecordMissing):
        reader.read(positions, rows.identity)
    writer.close()
    reader.close()
    reader.close()
    assert open_files(tmp_path) == []
    del writer, reader


def test_nobody_closes_a_file_that_another_thread_writes_to(tmp_path: Path) -> None:
    """Its descriptor would be another file's by the time of the write."""
    store = RecordStore(tmp_path / "records", SMALL, 4)
    store.directory.mkdir()
    core, opened = store._records, []

    class Late:
        def __getattr__(self, name: str) -> Any:
            return getattr(core, name)

        def write(self, *arguments: Any) -> None:
            store.release([0])
            store.remove([0])
            opened.append((tmp_path / "other").open("wb"))  # takes the lowest free number
            core.write(*arguments)

    store._records = Late()  # type: ignore[assignment]
    write(store, at(0, 1))
    opened[0].close()
    assert (tmp_path / "other").read_bytes() == b""


def test_a_store_that_nobody_holds_closes_its_files(tmp_path: Path) -> None:
    store = RecordStore(tmp_path, SMALL, 4)
    store.read(at(1), write(store, at(1)).identity)
    assert len(open_files(tmp_path)) == 2
    del store
    assert open_files(tmp_path) == []


def test_a_replaced_file_is_read_anew(tmp_path: Path) -> None:
    writer, reader = (RecordStore(tmp_path, SMALL, 4) for _ in range(2))
    reader.read(at(0), write(writer, at(0)).identity)
    writer.remove([0])
    positions = np.arange(4)
    rows = write(writer, positions, seed=1)
    np.testing.assert_array_equal(reader.read(positions, rows.identity)[0], rows.tokens)


def test_sync_brings_each_written_file_and_the_directory_to_the_disk_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = [], os.fsync

    def recorded(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    store = RecordStore(tmp_path, SMALL, 1)
    count = 2 * FILES_WRITTEN_AT_ONCE
    write(store, np.arange(count))
    assert len(open_files(tmp_path)) == FILES_WRITTEN_AT_ONCE
    store.remove([3])
    store.close()
    store.sync()
    names = [store.path(number).name for number in range(count) if number != 3]
    assert synced == [*names, tmp_path.name]
    assert store.segments() == [number for number in range(count) if number != 3]
    synced.clear()
    store.sync()
    assert synced == []
    write(store, at(5))
    store.copy(at(0), at(6))
    store.sync()
    assert synced == [store.path(5).name, store.path(6).name]
    synced.clear()
    store.erase(at(7, 50))
    assert synced == [store.path(7).name]


def test_one_thread_writes_while_others_read(tmp_path: Path) -> None:
    store, rows, wrong = RecordStore(tmp_path, SMALL, 16), Rows(SMALL, 600), []
    written = 0

    def read(seed: int) -> None:
        generator = np.random.default_rng(seed)
        while written < 600:
            positions = generator.integers(0, written, 20) if written else at()
            try:
                tokens, _ = store.read(positions, rows.identity[positions])
                wrong.extend([] if (tokens == rows.tokens[positions]).all() else ["tokens"])
            except DataError as error:
                wrong.append(str(error))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        for first in range(0, 600, 6):
            some = slice(first, first + 6)
            store.write(
                np.arange(first, first + 6), rows.identity[some], rows.tokens[some], rows.ends[some]
            )
            written = first + 6
    finally:
        written = 600
        for thread in threads:
            thread.join()
    assert wrong == []


WRITER = """
    import numpy as np
    from megatron_mer.data.record_store import RecordStore
    from tests.data.made_records import SMALL, Rows
    store = RecordStore({directory!r}, SMALL, 4)
    for step in range(40):
        if step == 20:
            store.remove([0, 1])
        rows = Rows(SMALL, 3, step)
        positions = 3 * (step % 20) + np.arange(3)
        store.write(positions, rows.identity, rows.tokens, rows.ends)
        print(step, flush=True)
        input()
"""


@pytest.mark.timeout(60)
def test_one_process_writes_and_another_reads(tmp_path: Path) -> None:
    program = textwrap.dedent(WRITER.format(directory=str(tmp_path)))
    store = RecordStore(tmp_path, SMALL, 4)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin
        assert child.stdout
        for step in range(40):
            assert child.stdout.readline() == f"{step}\n"
            rows, positions = Rows(SMALL, 3, step), 3 * (step % 20) + np.arange(3)
            tokens, ends = store.read(positions, rows.identity)
            np.testing.assert_array_equal(tokens, rows.tokens)
            np.testing.assert_array_equal(ends, rows.ends)
            child.stdin.write("\n")
            child.stdin.flush()
    assert child.returncode == 0


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_descriptors")
def test_ten_thousand_segments_under_a_limit_of_256_descriptors(tmp_path: Path) -> None:
    count = 10_000
    store, positions = RecordStore(tmp_path, SMALL, 1), np.random.default_rng(0).permutation(count)
    rows = write(store, positions)
    assert len(open_files(tmp_path)) == FILES_WRITTEN_AT_ONCE
    tokens, _ = store.read(positions, rows.identity)
    np.testing.assert_array_equal(tokens, rows.tokens)
    assert len(open_files(tmp_path)) <= 128 + FILES_WRITTEN_AT_ONCE
    assert store.segments() == list(range(count))
    store.copy(positions[:1000], positions[:1000] + count)
    assert store.check(positions[:1000] + count, rows.identity[:1000]) == []
    store.remove(range(2 * count))
    store.close_written(below=2 * count)
    assert (store.segments(), open_files(tmp_path)) == ([], [])

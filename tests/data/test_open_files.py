"""Open files: few of them, whatever is read, and never closed under a reader."""

import gc
import os
import random
import resource
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_mer.data import open_files
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.open_files import DataFile, OpenFiles
from megatron_mer.data.packing import RowReader
from megatron_mer.errors import DataError
from tests.data.raw_dataset import write_raw


@pytest.fixture
def make(tmp_path: Path) -> Callable[[int, OpenFiles], list[DataFile]]:
    """Files of 8 bytes, each byte the file's number."""

    def files(count: int, cache: OpenFiles) -> list[DataFile]:
        made = []
        for number in range(count):
            path = tmp_path / f"{number}.bin"
            path.write_bytes(bytes([number] * 8))
            made.append(DataFile(path, 8, cache))
        return made

    return files


def content(file: DataFile) -> bytes:
    buffer = bytearray(8)
    file.open().read_into(memoryview(buffer), 0)
    return bytes(buffer)


def open_descriptors() -> list[str]:
    """The files that this process has open."""
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return [os.readlink(link) for link in links if os.path.lexists(link)]


def kept(files: list[DataFile]) -> list[int]:
    opened = open_descriptors()
    return [number for number, file in enumerate(files) if str(file.path) in opened]


def test_the_files_used_last_stay_open(make: Callable[[int, OpenFiles], list[DataFile]]) -> None:
    cache = OpenFiles(3)
    files = make(6, cache)
    assert kept(files) == []
    for number in (0, 1, 2, 0, 3):
        assert content(files[number]) == bytes([number] * 8)
    assert kept(files) == [0, 2, 3]
    assert len(cache) == 3
    opened = files[2].open()
    assert files[2].open() is opened
    for number in (4, 5):
        content(files[number])
    assert kept(files) == [2, 4, 5]
    files[4].close()
    files[4].close()
    assert kept(files) == [2, 5]
    assert content(files[4]) == bytes([4] * 8)


def test_a_reader_keeps_its_file_open(make: Callable[[int, OpenFiles], list[DataFile]]) -> None:
    files = make(2, OpenFiles(1))
    opened = files[0].open()
    content(files[1])
    files[1].close()
    buffer = bytearray(3)
    opened.read_into(memoryview(buffer), 5)
    assert buffer == bytes(3)
    assert kept(files) == [0]
    del opened
    assert kept(files) == []


def test_threads_share_a_small_cache(make: Callable[[int, OpenFiles], list[DataFile]]) -> None:
    cache = OpenFiles(2)
    files, wrong = make(12, cache), []

    def work(seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(300):
            number = generator.randrange(len(files))
            if content(files[number]) != bytes([number] * 8):
                wrong.append(number)
            if generator.random() < 0.1:
                files[number].close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(kept(files)) == len(cache) <= 2


@pytest.mark.timeout(30)
def test_a_collection_in_the_middle_of_an_opening_does_not_lock_up(
    make: Callable[[int, OpenFiles], list[DataFile]],
) -> None:
    class Collecting(OpenFiles):
        @property
        def limit(self) -> int:
            gc.collect()
            return 2

    class Owner:
        """Closes its file when it is collected, as a dataset does."""

        def __init__(self, file: DataFile) -> None:
            self.file, self.itself = file, self

        def __del__(self) -> None:
            self.file.close()

    cache = Collecting()
    files = make(3, cache)
    content(files[0])
    owner = Owner(files[0])
    gc.disable()
    try:
        del owner  # in a cycle, so that only a collection ends it
        content(files[1])
    finally:
        gc.enable()
    assert kept(files) == [1]


@pytest.mark.parametrize(
    ("soft", "limit"), [(1024, 512), (20, 16), (10**7, 65_536), (resource.RLIM_INFINITY, 65_536)]
)
def test_the_limit_follows_the_process(
    monkeypatch: pytest.MonkeyPatch, soft: int, limit: int
) -> None:
    monkeypatch.setattr(open_files.resource, "getrlimit", lambda which: (soft, soft))
    assert OpenFiles().limit == limit


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    file = DataFile(tmp_path / "x.bin", 8, OpenFiles(2))
    with pytest.raises(DataError, match=r"x\.bin: cannot be opened: No such file"):
        file.open()
    (tmp_path / "x.bin").write_bytes(bytes(9))
    message = r"x\.bin, byte 8: the file has 9 bytes; expected 8, as when the dataset was opened"
    with pytest.raises(DataError, match=message):
        file.open()
    assert kept([file]) == []


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_descriptors")
def test_ten_thousand_datasets_under_a_limit_of_1024_descriptors(tmp_path: Path) -> None:
    corpora = 7
    for corpus in range(corpora):
        tokens = np.arange(21) + 100 * corpus
        write_raw(tmp_path / f"{corpus}", [10 + corpus, 11 - corpus], [0, 1, 2], 8, tokens)

    def opened() -> int:
        return sum(path.startswith(str(tmp_path)) for path in open_descriptors())

    # Each dataset has files of its own to open, whether or not another one has the same prefix.
    datasets = [IndexedDataset(tmp_path / f"{number % corpora}") for number in range(10_000)]
    assert opened() == 0
    reader = RowReader(datasets, 4, 1000)
    dataset = np.random.default_rng(0).permutation(len(datasets))
    sample, corpus = dataset % 5, dataset % corpora
    expected = (100 * corpus + 4 * sample)[:, None] + np.arange(5)
    np.testing.assert_array_equal(reader.read(dataset, sample), expected)
    assert opened() == 512
    rows, positions = reader.document_ends(dataset, sample)
    end = 9 + corpus - 4 * sample  # of the first document, counted from the sample
    expected_rows = np.flatnonzero((end >= 0) & (end < 4))
    np.testing.assert_array_equal(np.sort(rows), expected_rows)
    np.testing.assert_array_equal(positions, end[rows])
    assert opened() == 512
    for one in datasets:
        one.close()
    assert opened() == 0


def test_no_word_is_said_when_the_interpreter_ends(tmp_path: Path) -> None:
    write_raw(tmp_path / "c", [5], [0, 1])
    program = f"""
        from megatron_mer.data.indexed_dataset import IndexedDataset
        prefix = {str(tmp_path / "c")!r}
        first, second = IndexedDataset(prefix), IndexedDataset(prefix)
        first.itself = first
        print(first.tokens(0, 2).sum() + second.document(0).sum())
    """
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", textwrap.dedent(program)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("11\n", "")

"""Writing `.bin/.idx`: Megatron's bytes, no wrapped ids, nothing half."""

import hashlib
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_mer.data import indexed_writer
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.indexed_writer import IndexedDatasetWriter, token_dtype
from megatron_mer.data.sidecar import Provenance, Source
from megatron_mer.errors import DataError

PROVENANCE = Provenance(
    "sentencepiece", "f" * 64, 300, 2, True, (Source("a.jsonl", 2, 1, 40, "0" * 64),)
)
# Two documents, [1, 2, 3] and [258], as uint16: written out by hand from the format's description.
GOLDEN_BIN = bytes.fromhex("0100 0200 0300 0201")
GOLDEN_IDX = bytes.fromhex(
    "4d4d49444944580000"  # magic
    "0100000000000000"  # version 1
    "08"  # uint16
    "0200000000000000"  # two sequences
    "0300000000000000"  # three entries
    "03000000 01000000"  # lengths 3, 1
    "0000000000000000 0600000000000000"  # pointers 0, 6
    "0000000000000000 0100000000000000 0200000000000000"  # documents 0, 1, 2
)


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_golden_bytes(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_document([1, 2, 3])
        writer.add_document(np.array([258]))
        assert writer.finalize() is None
    assert files(tmp_path) == ["c.bin", "c.idx"]
    assert (tmp_path / "c.bin").read_bytes() == GOLDEN_BIN
    assert (tmp_path / "c.idx").read_bytes() == GOLDEN_IDX


def test_many_documents_at_once_give_the_same_bytes(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_documents(np.array([1, 2, 3, 258]), [3, 1])
        writer.finalize()
    assert (tmp_path / "c.bin").read_bytes() == GOLDEN_BIN
    assert (tmp_path / "c.idx").read_bytes() == GOLDEN_IDX


def test_index_pieces_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed_writer, "INDEX_CHUNK", 3)
    lengths = [4, 0, 1, 7, 2, 2, 3]
    with IndexedDatasetWriter(tmp_path / "c", np.int32) as writer:
        writer.add_documents(np.arange(sum(lengths)), lengths)
        writer.finalize()
    dataset = IndexedDataset(tmp_path / "c")
    dataset.verify()
    assert [len(dataset.document(i)) for i in range(7)] == lengths


def test_big_endian_input_is_stored_little_endian(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "c", np.dtype(">u2")) as writer:
        writer.add_documents(np.array([1, 2, 3, 258], dtype=">i8"), [3, 1])
        writer.finalize()
    assert (tmp_path / "c.bin").read_bytes() == GOLDEN_BIN
    assert (tmp_path / "c.idx").read_bytes() == GOLDEN_IDX


def test_sidecar_comes_back(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_documents(np.array([1, 2, 3, 258]), [3, 1])
        sidecar = writer.finalize(PROVENANCE)
    dataset = IndexedDataset(tmp_path / "c")
    assert dataset.sidecar == sidecar
    assert sidecar is not None
    assert (sidecar.documents, sidecar.tokens, sidecar.max_token_id) == (2, 4, 258)
    assert sidecar.bin_sha256 == hashlib.sha256(GOLDEN_BIN).hexdigest()
    assert sidecar.idx_sha256 == hashlib.sha256(GOLDEN_IDX).hexdigest()
    dataset.verify()


@pytest.mark.parametrize(
    ("dtype", "wrong", "limit"),
    [(np.uint16, 65_536, 65_535), (np.uint16, -1, 65_535), (np.int32, 2**31, 2**31 - 1)],
)
@pytest.mark.parametrize("as_array", [True, False])
def test_ids_never_wrap(
    tmp_path: Path, dtype: type, wrong: int, limit: int, as_array: bool
) -> None:
    ids = [1, wrong, 3]
    with IndexedDatasetWriter(tmp_path / "c", dtype) as writer:
        writer.add_document([limit])
        with pytest.raises(DataError, match=rf"document 1 .* id {wrong} does not fit .* {limit};"):
            writer.add_document(np.array(ids, dtype=np.int64) if as_array else ids)
    assert files(tmp_path) == []


@pytest.mark.parametrize("tokens", [np.ones(3), [[1, 2]], np.array(5), ["a"], [True]])
def test_only_one_dimension_of_integers(tmp_path: Path, tokens: object) -> None:
    writer = IndexedDatasetWriter(tmp_path / "c", np.uint16)
    with writer, pytest.raises(DataError, match="expected one dimension of integers"):
        writer.add_document(tokens)  # type: ignore[arg-type]


def test_lengths_must_fit_the_tokens(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        for lengths in ([2], [4, -1]):
            with pytest.raises(DataError, match="lengths sum to"):
                writer.add_documents(np.arange(3), lengths)


def test_a_document_too_long_for_the_format_is_refused_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed_writer, "MAX_SEQUENCE_TOKENS", 3)
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_document([1, 2, 3])
        with pytest.raises(DataError, match="a document of 4 tokens; the format allows 3"):
            writer.add_document([1, 2, 3, 4])
        assert (writer.num_tokens, writer.num_documents) == (3, 1)


@pytest.mark.parametrize("dtype", [np.float32, np.uint32, np.dtype("S1")])
def test_dtypes_that_the_format_lacks_are_refused(tmp_path: Path, dtype: type) -> None:
    with pytest.raises(DataError, match="cannot be stored; allowed: uint8"):
        IndexedDatasetWriter(tmp_path / "c", dtype)


def test_token_dtype_is_megatrons() -> None:
    names = [token_dtype(size).name for size in (100, 65_499, 65_500, 65_536, 128_256)]
    assert names == ["uint16", "uint16", "int32", "int32", "int32"]


def test_no_documents_is_an_error(tmp_path: Path) -> None:
    with (
        IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer,
        pytest.raises(DataError, match="no document was written"),
    ):
        writer.finalize()
    assert files(tmp_path) == []


def test_an_existing_dataset_is_kept_unless_overwriting_is_asked_for(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_document([1])
        writer.finalize(PROVENANCE)
    with pytest.raises(DataError, match=r"c\.bin, c\.json, c\.idx already there"):
        IndexedDatasetWriter(tmp_path / "c", np.uint16)
    with IndexedDatasetWriter(tmp_path / "c", np.int32, overwrite=True) as writer:
        writer.add_document([7, 8])
        assert IndexedDataset(tmp_path / "c").tokens(0, 1).tolist() == [1]
        writer.finalize()
    assert files(tmp_path) == ["c.bin", "c.idx"]  # the old sidecar is gone
    assert IndexedDataset(tmp_path / "c").tokens(0, 2).tolist() == [7, 8]


def test_an_error_leaves_the_existing_dataset_alone(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_document([1])
        writer.finalize()

    def fail() -> None:
        with IndexedDatasetWriter(tmp_path / "c", np.uint16, overwrite=True) as writer:
            writer.add_document([2])
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert files(tmp_path) == ["c.bin", "c.idx"]
    assert IndexedDataset(tmp_path / "c").tokens(0, 1).tolist() == [1]


def test_two_writers_of_one_dataset(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_document([1])
        with pytest.raises(DataError, match="another process is writing"):
            IndexedDatasetWriter(tmp_path / "c", np.uint16)
        writer.finalize()
    assert IndexedDataset(tmp_path / "c").num_tokens == 1


def test_a_finished_writer_refuses(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_document([1])
        writer.finalize()
        with pytest.raises(DataError, match="finished"):
            writer.add_document([1])


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files of this process may not grow beyond 64 KiB: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("size", [1 << 20, 1 << 16])
def test_full_disk_is_an_error_with_its_cause_and_no_half_dataset(
    tmp_path: Path, size: int
) -> None:
    # The larger array fails when it is written, the smaller one only when the buffer is flushed.
    def write() -> None:
        with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
            writer.add_document(np.ones(size, dtype=np.uint16))
            writer.finalize(PROVENANCE)

    with pytest.raises(DataError, match="cannot be written: File too large") as caught:
        write()
    assert isinstance(caught.value.__cause__, OSError)
    assert files(tmp_path) == []


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        IndexedDatasetWriter(tmp_path / "file" / "c", np.uint16)


def test_killed_writer_leaves_no_final_name_and_the_next_one_succeeds(tmp_path: Path) -> None:
    program = textwrap.dedent(f"""
        import numpy as np
        from megatron_mer.data.indexed_writer import IndexedDatasetWriter
        writer = IndexedDatasetWriter({str(tmp_path / "c")!r}, np.uint16)
        while True:
            writer.add_document(np.ones(100_000, dtype=np.uint16))
    """)
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", program], cwd=root)
    partial = tmp_path / "c.bin.partial"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (
        partial.exists() and partial.stat().st_size > 1 << 20
    ):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert files(tmp_path) == ["c.bin.partial"]
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_document([1, 2])
        writer.finalize()
    assert files(tmp_path) == ["c.bin", "c.idx"]
    assert IndexedDataset(tmp_path / "c").num_tokens == 2

"""Merging datasets: the bytes of writing all documents in one go, or a named error and nothing."""

import json
import os
import resource
import struct
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_mer.data import dataset_merge, merge_shards
from megatron_mer.data.dataset_merge import DatasetMerge
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.indexed_writer import IndexedDatasetWriter
from megatron_mer.data.prefixes import expand_prefixes
from megatron_mer.data.sidecar import Provenance, Sidecar, Source
from megatron_mer.errors import DataError

PROVENANCE = Provenance("sentencepiece", "f" * 64, 1024, 2, True)
SUFFIXES = (".bin", ".idx", ".json")
Documents = Sequence[Sequence[int]]


def write(prefix: Path, documents: Documents, provenance: Provenance | None, dtype: type) -> None:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))
        writer.finalize(provenance)


def write_raw(prefix: Path, lengths: list[int], entries: list[int], first_id: int = 0) -> None:
    """Write uint16 data by hand, independent of the library's writer."""
    pointers = [2 * sum(lengths[:i]) for i in range(len(lengths))]
    tokens = np.arange(first_id, first_id + sum(lengths)).astype("<u2")
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    Path(f"{prefix}.idx").write_bytes(
        struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(lengths), len(entries))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(lengths)}q", *pointers)
        + struct.pack(f"<{len(entries)}q", *entries)
    )


def merge(
    prefixes: Sequence[str | Path], output: Path, without_sidecar: bool = False, **options: bool
) -> Sidecar | None:
    return DatasetMerge(prefixes, output, without_sidecar, **options).write()


def content(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES]


def documents_of(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset.document(index).tolist() for index in range(len(dataset))]


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def patch(path: Path, offset: int, layout: str, value: int) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, offset, value)
    path.write_bytes(data)


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Three small datasets with sidecars, and an empty folder `out` beside them."""
    shards = [[[1, 2, 3], [], [258], [8], [9]], [[4]], [[5, 6], [7]]]
    (tmp_path / "out").mkdir()
    for number, documents in enumerate(shards):
        source = Source(f"{number}.jsonl", len(documents), 1, 40, f"{number}" * 64)
        write(tmp_path / f"s{number}", documents, replace(PROVENANCE, sources=(source,)), np.uint16)
    return [tmp_path / f"s{number}" for number in range(3)]


@pytest.fixture
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_shards, "PIECE_BYTES", 8)
    monkeypatch.setattr(merge_shards, "INDEX_PIECE", 3)


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_the_same_bytes_as_writing_everything_in_one_go(tmp_path: Path, dtype: type) -> None:
    generator = np.random.default_rng(3)
    shards, every, sources = [], [], []
    for number in range(5):
        lengths = generator.integers(0, 12, size=generator.integers(1, 9))
        # Zeros too: their pieces are holes.
        documents = [generator.integers(0, 2, size=n) * 60 * number for n in lengths]
        sources.append(Source(f"{number}.jsonl", len(documents), 0, 7, f"{number}" * 64))
        shards.append(tmp_path / f"s{number}")
        write(shards[-1], documents, replace(PROVENANCE, sources=(sources[-1],)), dtype)
        every += documents
    write(tmp_path / "once", every, replace(PROVENANCE, sources=tuple(sources)), dtype)
    sidecar = merge(shards, tmp_path / "merged")
    assert content(tmp_path / "merged") == content(tmp_path / "once")
    assert IndexedDataset(tmp_path / "merged").sidecar == sidecar
    assert not list(tmp_path.glob("*.partial"))


def test_merging_is_associative(three: list[Path], tmp_path: Path) -> None:
    first, second, third = three
    merge([first, second], tmp_path / "left")
    merge([tmp_path / "left", third], tmp_path / "out" / "a")
    merge([second, third], tmp_path / "right")
    merge([first, tmp_path / "right"], tmp_path / "out" / "b")
    merge(three, tmp_path / "out" / "c")
    expected = content(tmp_path / "out" / "c")
    assert content(tmp_path / "out" / "a") == content(tmp_path / "out" / "b") == expected
    assert documents_of(tmp_path / "out" / "c") == [
        [1, 2, 3],
        [],
        [258],
        [8],
        [9],
        [4],
        [5, 6],
        [7],
    ]
    merge(three[:1], tmp_path / "out" / "one")
    assert content(tmp_path / "out" / "one") == content(first)


@pytest.mark.usefixtures("_small_pieces")
def test_documents_of_several_sequences_and_empty_ones_stay(tmp_path: Path) -> None:
    write_raw(tmp_path / "a", [3, 2, 2, 0, 5], [0, 1, 3, 3, 4, 5])  # the third has no sequence
    write_raw(tmp_path / "none", [], [0])
    write_raw(tmp_path / "b", [1, 1, 1, 1], [0, 4], first_id=100)
    shards = [tmp_path / name for name in ("a", "none", "b")]
    expected = [document for shard in shards for document in documents_of(shard)]
    assert merge(shards, tmp_path / "m", without_sidecar=True) is None
    assert documents_of(tmp_path / "m") == expected
    assert expected[1:4] == [[3, 4, 5, 6], [], []]
    dataset = IndexedDataset(tmp_path / "m")
    dataset.verify()
    assert (dataset.num_sequences, dataset.num_tokens) == (9, 16)
    entries = np.frombuffer((tmp_path / "m.idx").read_bytes(), "<i8", offset=34 + 12 * 9)
    assert entries.tolist() == [0, 1, 3, 3, 4, 5, 9]  # never [0] alone
    assert not (tmp_path / "m.json").exists()


def test_more_datasets_than_files_may_be_open(tmp_path: Path) -> None:
    for number in range(300):
        write(tmp_path / f"s{number:03}", [[number % 7], [3]], PROVENANCE, np.uint16)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 12, limits[1]))
    try:
        sidecar = merge(expand_prefixes([f"{tmp_path}/s*.idx"]), tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert sidecar is not None
    assert (sidecar.documents, sidecar.tokens) == (600, 600)
    assert IndexedDataset(tmp_path / "m").tokens(0, 600).tolist()[::2] == [
        n % 7 for n in range(300)
    ]


def test_memory_does_not_grow_with_the_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_shards, "PIECE_BYTES", 1 << 16)
    monkeypatch.setattr(merge_shards, "INDEX_PIECE", 1 << 12)
    monkeypatch.setattr("megatron_mer.data.document_index.VERIFY_CHUNK", 1 << 12)
    with IndexedDatasetWriter(tmp_path / "s", np.uint16) as writer:
        writer.add_documents(np.ones(1 << 20, dtype=np.uint16), np.ones(1 << 20, dtype=np.int64))
        writer.finalize(PROVENANCE)
    tracemalloc.start()
    try:
        merge([tmp_path / "s"], tmp_path / "m")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert content(tmp_path / "m") == content(tmp_path / "s")  # 2 MiB of tokens, 20 MiB of index
    assert peak < 5 << 20  # buffers of 1 MiB, and the pieces


def test_holes_stay_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_shards, "PIECE_BYTES", 1 << 20)
    size = 64 << 20
    write_raw(tmp_path / "s", [size // 2], [0, 1])
    with open(tmp_path / "s.bin", "wb") as file:
        file.seek(5 << 20)
        file.write(b"\x01")
        file.truncate(size)
    merge([tmp_path / "s"], tmp_path / "m", without_sidecar=True)
    assert (tmp_path / "m.bin").stat().st_size == size
    assert (tmp_path / "m.bin").stat().st_blocks * 512 < size // 8
    assert IndexedDataset(tmp_path / "m").tokens(5 << 19, (5 << 19) + 2).tolist() == [1, 0]


DIFFERENCES = [
    ({"fingerprint": "a" * 64}, rf"fingerprint '{'a' * 64}' where 2 of 3 .* have '{'f' * 64}'"),
    ({"eod_id": 3}, r"eod_id 3 where 2 of 3 datasets, such as .*s0, have 2"),
    ({"append_eod": False}, r"append_eod False where .* have True; tokenize it again with their"),
    ({"vocab_size": 300, "tokenizer": "x"}, r"tokenizer 'x' where .*, vocab_size 300 where"),
]


@pytest.mark.parametrize(("change", "message"), DIFFERENCES)
def test_another_tokenizer_or_end_of_document_is_refused(
    three: list[Path], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    write(tmp_path / "odd", [[1]], replace(PROVENANCE, **change), np.uint16)  # type: ignore[arg-type]
    for without_sidecar in (False, True):
        with pytest.raises(DataError, match=rf"odd\.json: {message}"):
            DatasetMerge([tmp_path / "odd", *three[:2]], tmp_path / "out" / "m", without_sidecar)
    assert files(tmp_path / "out") == []


def test_a_long_list_of_problems_is_counted(three: list[Path], tmp_path: Path) -> None:
    for number in range(25):
        write(tmp_path / f"bare{number:02}", [[1]], None, np.uint16)
    bare = expand_prefixes([str(tmp_path / "bare*")])
    with pytest.raises(DataError) as caught:
        DatasetMerge([*three, *bare], tmp_path / "m")
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert lines[0].startswith(f"{tmp_path}/bare00.json: is missing")
    assert "--without-sidecar" in lines[0]
    assert lines[10] == "15 more datasets: have the same problem"
    for prefix in bare:
        os.truncate(f"{prefix}.idx", 20)
    with pytest.raises(DataError, match="15 more datasets are damaged"):
        DatasetMerge([*three, *bare], tmp_path / "m")


def test_without_sidecar_none_is_written(three: list[Path], tmp_path: Path) -> None:
    write(tmp_path / "bare", [[9]], None, np.uint16)
    assert merge([*three, tmp_path / "bare"], tmp_path / "out" / "m", without_sidecar=True) is None
    assert files(tmp_path / "out") == ["m.bin", "m.idx"]
    assert documents_of(tmp_path / "out" / "m")[-2:] == [[7], [9]]


def test_dtypes_must_be_equal(three: list[Path], tmp_path: Path) -> None:
    write(tmp_path / "wide", [[9]], PROVENANCE, np.int32)
    message = r"wide\.idx: tokens of int32, but 3 of 4 datasets have uint16, such as .*s0;"
    with pytest.raises(DataError, match=message):
        DatasetMerge([*three, tmp_path / "wide"], tmp_path / "m")


def test_multimodal_datasets_are_refused(three: list[Path], tmp_path: Path) -> None:
    path = Path(f"{three[1]}.idx")
    path.write_bytes(path.read_bytes() + bytes(1))
    with pytest.raises(DataError, match=r"s1\.idx, byte 62: sequence modes \(a multimodal"):
        DatasetMerge(three, tmp_path / "m")


def test_inputs_must_be_different_files_and_not_the_output(
    three: list[Path], tmp_path: Path
) -> None:
    for suffix in SUFFIXES:
        os.symlink(f"{three[0]}{suffix}", f"{tmp_path}/link{suffix}")
    for again in (f"{tmp_path}/./s0", f"{tmp_path}/link"):
        with pytest.raises(DataError, match=rf"{again}: is named twice \(also as .*s0\)"):
            DatasetMerge([*three, again], tmp_path / "m")
    for output in (three[2], tmp_path / "out" / ".." / "s2"):
        with pytest.raises(DataError, match=r"s2: is also the output"):
            DatasetMerge(three, output, overwrite=True)
    with pytest.raises(DataError, match="no dataset was named"):
        DatasetMerge([], tmp_path / "m")
    write_raw(tmp_path / "none", [], [0])
    with pytest.raises(DataError, match="hold no document"):
        DatasetMerge([tmp_path / "none"], tmp_path / "m", without_sidecar=True)
    with pytest.raises(DataError, match=r"nowhere\.bin: cannot be opened: No such file"):
        DatasetMerge([tmp_path / "nowhere"], tmp_path / "m")


def test_an_existing_output_is_kept_unless_overwriting_is_asked_for(
    three: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "out" / "m"
    merge(three[:1], output)
    with pytest.raises(DataError, match=r"m\.bin, m\.json, m\.idx already there"):
        merge(three, output)
    assert content(output) == content(three[0])
    merge(three[1:2], output, overwrite=True)
    assert content(output) == content(three[1])


# Bytes 42 and 110 of s0's index are the third length and the third document index.
DAMAGES = {
    "content": (".bin", 0, "<H", 9, r"s0\.bin: SHA-256 .* the file changed since it was written"),
    "length": (".idx", 42, "<i", 2, r"s0\.idx, byte 78: pointer 8; expected 10, where"),
    "document": (".idx", 110, "<q", 3, r"s0\.idx: SHA-256 .* the file changed since"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_inside_never_gets_a_new_checksum(
    three: list[Path], tmp_path: Path, name: str
) -> None:
    suffix, offset, layout, value, message = DAMAGES[name]
    patch(Path(f"{three[0]}{suffix}"), offset, layout, value)
    with pytest.raises(DataError, match=message):
        merge(three, tmp_path / "out" / "m")
    assert files(tmp_path / "out") == []


def test_the_full_check_comes_before_anything_is_written(three: list[Path], tmp_path: Path) -> None:
    patch(Path(f"{three[2]}.bin"), 0, "<H", 4)
    merging = DatasetMerge(three, tmp_path / "new" / "m")
    seen: list[tuple[int, int]] = []
    with pytest.raises(DataError, match=r"s2\.bin: SHA-256"):
        merging.verify(lambda *progress: seen.append(progress))
    assert seen == [(12, 5), (14, 6)]
    assert not (tmp_path / "new").exists()


def test_a_file_that_changes_after_it_was_opened_is_an_error(
    three: list[Path], tmp_path: Path
) -> None:
    merging = DatasetMerge(three, tmp_path / "out" / "m")
    with open(f"{three[1]}.bin", "ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=r"s1\.bin, byte 2: the file has 6 bytes; expected 2, as"):
        merging.write()
    assert files(tmp_path / "out") == []
    assert not merging.published


def test_progress_ends_at_the_whole(three: list[Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    merging = DatasetMerge(three, tmp_path / "out" / "m")
    merging.write(lambda *progress: seen.append(progress))
    assert seen == sorted(seen)
    assert seen[-1] == (20, 8)
    assert merging.published


@pytest.fixture
def _full_disk() -> Iterator[None]:
    """Files of this process may not grow beyond 64 KiB: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("_full_disk")
def test_a_full_disk_is_an_error_and_leaves_nothing(three: list[Path], tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / f"b{number}", [np.ones(30_000, dtype=int)], PROVENANCE, np.uint16)
    with pytest.raises(DataError, match="cannot be written: File too large; nothing was left"):
        merge(expand_prefixes([f"{tmp_path}/b*"]), tmp_path / "out" / "m")
    assert files(tmp_path / "out") == []


def test_too_little_room_is_said_before_copying(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = SimpleNamespace(free=100)
    monkeypatch.setattr(dataset_merge.shutil, "disk_usage", lambda folder: little)
    with pytest.raises(DataError, match=r"needs 0\.000 GB, but the disk of .*out has 0\.000 GB"):
        merge(three, tmp_path / "out" / "m")
    assert files(tmp_path / "out") == []


def test_a_sidecar_keeps_the_order_of_the_sources(three: list[Path], tmp_path: Path) -> None:
    merge([three[2], three[0]], tmp_path / "m")
    sidecar = json.loads((tmp_path / "m.json").read_text())
    assert [source["file"] for source in sidecar["sources"]] == ["2.jsonl", "0.jsonl"]
    assert (sidecar["max_token_id"], sidecar["tokens"], sidecar["documents"]) == (258, 9, 7)

"""Records that cannot be had: each fault is named, and few files stay open whatever happens."""

import errno
import os
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_mer.data.record_faults import RecordMissing
from megatron_mer.data.record_store import RecordStore
from megatron_mer.errors import DataError
from tests.data.made_records import SMALL, Rows, at
from tests.data.raw_dataset import patch

ROWS = Rows(SMALL, 10)
ALL = np.arange(10)


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    """Ten records of 128 bytes, 4 a segment."""
    store = RecordStore(tmp_path, SMALL, 4)
    store.write(ALL, ROWS.identity, ROWS.tokens, ROWS.ends)
    return store


def check_fault(
    store: RecordStore, position: int, message: str, headers_too: bool = True
) -> type[DataError]:
    """All ways to read say the same, and the other records are not touched."""
    identity = ROWS.identity[position]
    with pytest.raises(DataError, match=message) as caught:
        store.read(at(position), identity[None])
    text = str(caught.value)
    number, byte = divmod(position, 4)
    assert f"segment_{number:09d}.rec, byte {128 * byte}, record {position}: " in text
    assert store.check(ALL, ROWS.identity) == [(position, text)]
    with pytest.raises(type(caught.value)) as copied:
        store.copy(at(0, position) if position else at(1, 0), at(100, 101))
    assert "instead of" in message or str(copied.value) == text
    if headers_too:
        with pytest.raises(type(caught.value)) as counted:
            store.count_ends(ALL, ROWS.identity)
        assert str(counted.value) == text
    return type(caught.value)


def test_a_whole_store_has_no_problems(store: RecordStore) -> None:
    assert store.check(ALL, ROWS.identity) == []


@pytest.mark.parametrize(
    ("byte", "form", "value", "message"),
    [
        (0, "<4s", b"XXXX", r"magic b'XXXX'; expected b'RMER', the start of a record"),
        (0, "<4s", bytes(4), r"zeros; expected a record: it was never written, or a crash"),
        (4, "<H", 2, r"version 2; expected 1: another version of megatron_mer wrote it"),
        (8, "<I", 8, r"a bit is wrong in its header: checksum 0x\w{16}; expected 0x\w{16}"),
        (24, "<q", 5, r"a bit is wrong in its header: .* restore the file from a copy"),
    ],
)
def test_a_damaged_header(
    store: RecordStore, byte: int, form: str, value: object, message: str
) -> None:
    patch(store.path(1), 2 * 128 + byte, form, value)
    assert check_fault(store, 6, message) is DataError


def test_a_damaged_token(store: RecordStore) -> None:
    patch(store.path(1), 2 * 128 + 64, "<H", 1)
    message = r"a bit is wrong: checksum 0x\w{16}; expected 0x\w{16}, that of what stands there"
    assert check_fault(store, 6, message, headers_too=False) is DataError
    np.testing.assert_array_equal(
        store.count_ends(at(6), ROWS.identity[6:7]), ROWS.ends[6:7].sum(axis=1)
    )


def test_a_header_and_the_tokens_of_another_record(store: RecordStore) -> None:
    """As a crash can leave them where one record is written over another."""
    content = store.path(0).read_bytes()
    store.path(0).write_bytes(content[:64] + content[128 + 64 : 256] + content[128:])
    check_fault(store, 0, "a bit is wrong: checksum", headers_too=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_length": 8}, r"seq_length 7; expected 8; this directory belongs to another run"),
        ({"vocab_size": 70_000}, r"tokens of 2 bytes; expected 4: its vocabulary is another one"),
        ({"with_ends": False}, r"end bits 1; expected 0: written with another batch\.eod_mask"),
        ({"key": 5}, r"key 0xfedcba9876543210; expected 0x0000000000000005: of another run or"),
    ],
)
def test_a_record_of_another_format(
    store: RecordStore, change: dict[str, int], message: str
) -> None:
    other = RecordStore(store.directory, replace(SMALL, **change), 4)
    assert other.record_bytes == 128
    for read in (other.read, other.count_ends):
        with pytest.raises(DataError, match=rf"byte 128, record 1: {message}"):
            read(at(1), ROWS.identity[1:2])


def test_a_record_of_another_size(store: RecordStore) -> None:
    other = RecordStore(store.directory, replace(SMALL, seq_length=40), 4)
    with pytest.raises(DataError, match="record 0: seq_length 7; expected 40"):
        other.read(at(0), ROWS.identity[:1])
    with pytest.raises(DataError, match=r"byte 192, record 1: magic .* another size"):
        other.read(at(1), ROWS.identity[1:2])


@pytest.mark.parametrize("field", range(3))
def test_a_record_of_another_identity(store: RecordStore, field: int) -> None:
    identity = ROWS.identity.copy()
    identity[3] = 7, -1, 12
    store.write(at(3), identity[3:4], ROWS.tokens[3:4], ROWS.ends[3:4])
    identity[3, field] += 1
    ordinal, dataset, sample = identity[3].tolist()
    held = r"sample 12 of dataset key 0xffffffffffffffff \(live index 7\)"
    other = rf"sample {sample} of dataset key {dataset % 2**64:#018x} \(live index {ordinal}"
    for read in (store.read, store.count_ends):
        with pytest.raises(DataError, match=rf"record 3: holds {held} instead of {other}\)"):
            read(at(3), identity[3:4])


def test_a_file_that_is_not_there(store: RecordStore) -> None:
    store.read(ALL, ROWS.identity)  # the file is open, and may be read on
    store.path(2).unlink()
    np.testing.assert_array_equal(store.read(ALL, ROWS.identity)[0], ROWS.tokens)
    store.close()
    message = r"byte 0, record 8: the file is not there; expected it to hold this record"
    for read in (store.read, store.count_ends):
        with pytest.raises(RecordMissing, match=message):
            read(ALL, ROWS.identity)
    assert [position for position, _ in store.check(ALL, ROWS.identity)] == [8, 9]


@pytest.mark.parametrize("size", [256, 256 + 20, 256 + 127])
def test_a_file_that_ends_before_the_record(store: RecordStore, size: int) -> None:
    os.truncate(store.path(2), size - 128)
    message = rf"ends too early; expected {384 - size} more bytes from byte {size - 128} on"
    kind = check_fault(store, 9, message, headers_too=False)
    assert kind is RecordMissing
    if size < 256 + 64:
        with pytest.raises(RecordMissing, match="ends too early"):
            store.count_ends(at(9), ROWS.identity[9:])


def test_a_place_that_was_never_written(store: RecordStore) -> None:
    store.write(at(31), ROWS.identity[:1], ROWS.tokens[:1], ROWS.ends[:1])
    with pytest.raises(DataError, match="record 29: zeros; expected a record") as caught:
        store.read(at(29), ROWS.identity[:1])
    assert type(caught.value) is DataError


def test_an_erased_record(store: RecordStore) -> None:
    reader = RecordStore(store.directory, SMALL, 4)
    reader.read(ALL, ROWS.identity)
    sizes = [store.path(number).stat().st_size for number in store.segments()]
    store.erase(at(6, 11, 12, 400))  # the last three are not there
    assert sizes == [store.path(number).stat().st_size for number in store.segments()]
    assert store.path(1).read_bytes()[256:384] == b"ERAS" + bytes(124)
    for one in (store, reader):
        check_fault(one, 6, "it was erased when its task was dropped from the buffer")
    store.write(at(6), ROWS.identity[6:7], ROWS.tokens[6:7], ROWS.ends[6:7])
    assert reader.check(ALL, ROWS.identity) == []


def test_a_token_outside_of_the_vocabulary(store: RecordStore) -> None:
    smaller = RecordStore(store.directory, replace(SMALL, vocab_size=999), 4)
    with pytest.raises(DataError, match=r"record 0: .* token id 999 at position 7, .* 0 to 998"):
        smaller.read(at(0), ROWS.identity[:1])


@pytest.mark.parametrize("vocab_size", [1000, 65_536, 65_537, 2**32])
@pytest.mark.parametrize("token", [-1, -(2**63), 2**63 - 1, 2**48, None])
def test_a_token_outside_is_not_written(tmp_path: Path, vocab_size: int, token: int | None) -> None:
    store = RecordStore(tmp_path, replace(SMALL, vocab_size=vocab_size), 4)
    tokens, wrong = ROWS.tokens[:3].copy(), vocab_size if token is None else token
    tokens[1, 5] = wrong
    with pytest.raises(DataError, match=rf"record 7: sample .* token id {wrong} at position 5"):
        store.write(at(6, 7, 8), ROWS.identity[:3], tokens, ROWS.ends[:3])
    store.read(at(6), ROWS.identity[:1])
    with pytest.raises(RecordMissing):
        store.read(at(7), ROWS.identity[1:2])


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "none", SMALL, 4)
    with pytest.raises(DataError, match="none: cannot be read: No such file"):
        store.segments()
    with pytest.raises(FileNotFoundError, match=r"none/segment_000000000\.rec"):
        store.write(ALL, ROWS.identity, ROWS.tokens, ROWS.ends)
    with pytest.raises(RecordMissing, match="the file is not there"):
        store.read(ALL, ROWS.identity)


def test_a_read_that_fails(tmp_path: Path) -> None:
    store = RecordStore(tmp_path, SMALL, 4)
    store.path(0).mkdir()
    with pytest.raises(DataError, match=r"rec, byte 128: \[Errno 21\] Is a directory") as caught:
        store.read(at(1), ROWS.identity[:1])
    assert type(caught.value) is DataError


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    store = RecordStore(tmp_path, SMALL, 4)
    store.path(1).symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*segment_000000001\.rec") as full:
        store.write(ALL, ROWS.identity, ROWS.tokens, ROWS.ends)
    assert full.value.errno == errno.ENOSPC
    np.testing.assert_array_equal(store.read(ALL[:4], ROWS.identity[:4])[0], ROWS.tokens[:4])


def test_a_record_that_was_written_in_part_can_be_written_again(tmp_path: Path) -> None:
    store = RecordStore(tmp_path, SMALL, 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            store.write(ALL, ROWS.identity, ROWS.tokens, ROWS.ends)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.path(0).stat().st_size == 300
    np.testing.assert_array_equal(store.read(at(1), ROWS.identity[1:2])[0], ROWS.tokens[1:2])
    with pytest.raises(RecordMissing, match="record 2: the file ends too early; expected 84 more"):
        store.read(at(2), ROWS.identity[2:3])
    store.write(ALL, ROWS.identity, ROWS.tokens, ROWS.ends)
    assert store.check(ALL, ROWS.identity) == []


@pytest.mark.parametrize("positions", [at(3, -1), at(2, 5, 2), at(1, 2).reshape(1, 2)])
def test_positions_that_make_no_sense(store: RecordStore, positions: NDArray[np.int64]) -> None:
    count = positions.size
    rows = ROWS.identity[:count], ROWS.tokens[:count], ROWS.ends[:count]
    with pytest.raises(ValueError, match=r"(a position is|positions must)"):
        store.write(positions, *rows)
    with pytest.raises(ValueError, match=r"(a position is|positions must)"):
        store.copy(np.arange(count) + 6, positions)
    if positions.min() < 0 or positions.ndim > 1:
        for use in (lambda at: store.read(at, ROWS.identity[:count]), store.erase):
            with pytest.raises(ValueError, match="positions must have the shape"):
                use(positions)
    assert store.check(ALL, ROWS.identity) == []


def test_arguments_that_do_not_fit(store: RecordStore, tmp_path: Path) -> None:
    one = at(0), ROWS.identity[:1], ROWS.tokens[:1], ROWS.ends[:1]
    for place, wrong, kind in (
        (1, ROWS.identity[:2], "identity must have the shape"),
        (2, ROWS.tokens[:1, :7].copy(), r"tokens must have the shape \(1, 8\)"),
        (2, ROWS.tokens[:2], r"tokens must have the shape \(1, 8\)"),
        (3, ROWS.ends[:1, :6], r"ends of bool \(1, 6\); expected bool \(1, 7\)"),
        (3, ROWS.ends[:1].astype(int), r"ends of int64"),
        (3, None, "ends None, but the format says with_ends True"),
    ):
        with pytest.raises(ValueError, match=kind):
            store.write(*one[:place], wrong, *one[place + 1 :])
    with pytest.raises(TypeError):
        store.write(*one[:2], ROWS.tokens[:1].astype(np.int32), one[3])
    with pytest.raises(ValueError, match=r"identity must have the shape \(2, 3\)"):
        store.read(at(0, 1), ROWS.identity[:1])
    for targets in (at(6, 0), at(20)):
        with pytest.raises(ValueError, match="each source needs a target"):
            store.copy(at(0, 1), targets)
    with pytest.raises(ValueError, match="0 records a segment"):
        RecordStore(tmp_path, SMALL, 0)
    for change in ({"seq_length": 0}, {"vocab_size": 0}, {"vocab_size": 2**32 + 1}):
        with pytest.raises(ValueError, match="both must be at least 1"):
            RecordStore(tmp_path, replace(SMALL, **change), 4)
    assert store.check(ALL, ROWS.identity) == []

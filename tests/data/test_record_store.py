"""Records: what was written comes back, or a named error does."""

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_mer import _index
from megatron_mer.data.record_store import RecordFormat, RecordStore
from megatron_mer.errors import DataError
from tests.data.made_records import KEY, SMALL, Rows, at


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    """Records of 128 bytes, 4 a segment."""
    return RecordStore(tmp_path, SMALL, 4)


def check_rows(store: RecordStore, positions: NDArray[np.int64], rows: Rows) -> None:
    tokens, ends = store.read(positions, rows.identity)
    np.testing.assert_array_equal(tokens, rows.tokens)
    if rows.ends is None:
        assert ends is None
        expected = np.zeros(len(positions))
    else:
        np.testing.assert_array_equal(ends, rows.ends)
        expected = rows.ends.sum(axis=1)
    np.testing.assert_array_equal(store.count_ends(positions, rows.identity), expected)


@pytest.mark.parametrize("vocab_size", [1, 65_536, 65_537, 2**32])
@pytest.mark.parametrize("with_ends", [False, True])
@pytest.mark.parametrize("seq_length", [1, 8, 63, 300])
def test_what_is_written_comes_back(
    tmp_path: Path, vocab_size: int, with_ends: bool, seq_length: int
) -> None:
    format = RecordFormat(seq_length, vocab_size, with_ends, KEY)
    rows = Rows(format, 50)
    positions = np.random.default_rng(1).permutation(200)[:50]
    store = RecordStore(tmp_path, format, 7)
    store.write(positions, rows.identity, rows.tokens, rows.ends)
    check_rows(store, positions, rows)
    store.close()
    check_rows(store, positions, rows)
    check_rows(RecordStore(tmp_path, format, 7), positions, rows)
    assert store.segments() == sorted(set((positions // 7).tolist()))


def oracle_record(
    format: RecordFormat, identity: list[int], tokens: list[int], ends: list[int]
) -> bytes:
    """A record by the table in `record_store`, in plain Python."""
    mask = 2**64 - 1

    def constant(place: int) -> int:
        x = (place + 1) * 0x9E37_79B9_7F4A_7C15 & mask
        x = (x ^ x >> 27) * 0x3C79_AC49_2BA7_B653 & mask
        x = (x ^ x >> 33) * 0x1C69_B3F7_4AC4_AE35 & mask
        return x ^ x >> 27 | 1

    def checksum(content: bytes) -> int:
        words = struct.unpack(f"<{len(content) // 4}I", content)
        total = sum(constant(place) * word for place, word in enumerate(words))
        return (0x9E37_79B9_7F4A_7C15 + total) & mask

    size = 2 if format.vocab_size <= 65_536 else 4
    payload = b"".join(token.to_bytes(size, "little") for token in tokens)
    bits = sum(bit << place for place, bit in enumerate(ends))
    payload += bits.to_bytes((len(ends) + 7) // 8, "little")
    payload += bytes(-len(payload) % 64)
    header = struct.pack(
        "<4sHBBIIQ3q",
        *(b"RMER", 1, size, format.with_ends, format.seq_length, sum(ends), format.key),
        *identity,
    )
    header += struct.pack("<Q", checksum(header))
    return header + struct.pack("<Q", checksum(header + bytes(8) + payload)) + payload


@pytest.mark.parametrize("vocab_size", [65_536, 65_537])
@pytest.mark.parametrize("with_ends", [False, True])
def test_the_bytes_of_a_record(tmp_path: Path, vocab_size: int, with_ends: bool) -> None:
    format = RecordFormat(77, vocab_size, with_ends, KEY)
    rows, store = Rows(format, 5), RecordStore(tmp_path, format, 5)
    store.write(np.arange(5), rows.identity, rows.tokens, rows.ends)
    ends = np.empty((5, 0), dtype=int) if rows.ends is None else rows.ends.astype(int)
    columns = rows.identity.tolist(), rows.tokens.tolist(), ends.tolist()
    expected = [oracle_record(format, *row) for row in zip(*columns, strict=True)]
    assert store.path(0).name == "segment_000000000.rec"
    assert store.path(0).read_bytes() == b"".join(expected)
    assert {len(record) for record in expected} == {format.record_bytes}


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.lists(st.integers(0, 30), max_size=8, unique=True)),
        st.tuples(st.just("copy"), st.lists(st.integers(0, 30), max_size=8, unique=True)),
        st.tuples(st.just("erase"), st.lists(st.integers(0, 40), max_size=4)),
        st.tuples(st.just("remove"), st.lists(st.integers(0, 8), max_size=2)),
        st.tuples(st.sampled_from(["sync", "close"]), st.just([])),
    ),
    max_size=12,
)


@settings(max_examples=60)
@given(operations=OPERATIONS, seed=st.integers(0, 2**32))
def test_random_work_against_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, operations: list, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    directory = tmp_path_factory.mktemp("records")
    store, other = (RecordStore(directory, SMALL, 4) for _ in range(2))
    held: dict[int, tuple] = {}
    erased: set[int] = set()
    for step, (name, numbers) in enumerate(operations):
        positions = np.array(numbers, dtype=np.int64)
        if name == "write":
            rows = Rows(SMALL, len(positions), seed + step)
            store.write(positions, rows.identity, rows.tokens, rows.ends)
            held |= dict(
                zip(numbers, zip(rows.identity, rows.tokens, rows.ends, strict=True), strict=True)
            )
            erased -= set(numbers)
        elif name == "copy":
            sources = [one for one in numbers if one in held]
            targets = generator.choice(np.setdiff1d(np.arange(31), sources), len(sources), False)
            store.copy(np.array(sources, dtype=np.int64), targets)
            held |= {to: held[one] for one, to in zip(sources, targets.tolist(), strict=True)}
            erased -= set(targets.tolist())
        elif name == "erase":
            there = {one for one in numbers if one * 128 % 512 < size_of(store.path(one // 4))}
            store.erase(np.unique(positions))
            erased |= there
            held = {one: row for one, row in held.items() if one not in there}
        elif name == "remove":
            store.remove(numbers)
            held = {one: row for one, row in held.items() if one // 4 not in numbers}
            erased = {one for one in erased if one // 4 not in numbers}
        else:
            getattr(store, name)()
    kept = generator.permutation(sorted(held)).astype(np.int64)
    for reader in (store, other):
        identity = np.array([held[one][0] for one in kept.tolist()]).reshape(-1, 3)
        tokens, ends = reader.read(kept, identity)
        for row, one in enumerate(kept.tolist()):
            np.testing.assert_array_equal(tokens[row], held[one][1])
            np.testing.assert_array_equal(ends[row], held[one][2])
        gone = np.setdiff1d(np.arange(41), kept)
        problems = dict(reader.check(gone, np.zeros((len(gone), 3), dtype=np.int64)))
        assert sorted(problems) == gone.tolist()
        assert {one for one, text in problems.items() if "it was erased" in text} == erased
    store.close()
    other.close()


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.fixture
def one_record(store: RecordStore) -> Iterator[tuple[bytes, Callable[[bytes], None]]]:
    """The bytes of a record, and what verifies other ones."""
    rows, core = Rows(SMALL, 1), SMALL.records()
    store.write(at(0), rows.identity, rows.tokens, rows.ends)
    path = store.path(0)
    descriptor = os.open(path, os.O_RDWR)

    def verify(content: bytes) -> None:
        os.pwrite(descriptor, content, 0)
        out = np.empty((1, core.record_bytes), dtype=np.uint8)
        core.fetch(np.array([descriptor], dtype=np.int32), at(0), at(0), out)

    yield path.read_bytes(), verify
    os.close(descriptor)


def flipped(content: bytes, *bits: int) -> bytes:
    number = int.from_bytes(content, "little")
    for bit in bits:
        number ^= 1 << bit
    return number.to_bytes(len(content), "little")


def test_every_wrong_bit_is_found(one_record: tuple[bytes, Callable[[bytes], None]]) -> None:
    content, verify = one_record
    assert len(content) == 128
    verify(content)
    for bit in range(8 * len(content)):
        with pytest.raises(_index.RecordFault):
            verify(flipped(content, bit))


def test_the_same_wrong_bit_in_two_words_is_found(
    one_record: tuple[bytes, Callable[[bytes], None]],
) -> None:
    """As one broken line of a bus or of memory makes them."""
    content, verify = one_record
    for bit in (0, 15, 30, 31):
        for first in range(32):
            for second in range(first):
                with pytest.raises(_index.RecordFault):
                    verify(flipped(content, 32 * first + bit, 32 * second + bit))


def test_a_wrong_bit_of_a_header_is_found_without_the_tokens(store: RecordStore) -> None:
    rows = Rows(SMALL, 1)
    store.write(at(0), rows.identity, rows.tokens, rows.ends)
    content = store.path(0).read_bytes()
    for bit in range(8 * 56):
        store.path(0).write_bytes(flipped(content, bit))
        with pytest.raises(
            DataError, match=r"record 0: (magic|version|a bit is wrong in its header)"
        ):
            store.count_ends(at(0), rows.identity)

"""The C++ readers against NumPy, and what they refuse."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_mer import _index
from tests.data.raw_dataset import DTYPES, patch, write_raw

NO_LIMIT = 2**63 - 1


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[bytes], int]]:
    """Opens a file of the given content."""
    descriptors = []

    def open_(content: bytes) -> int:
        path = tmp_path / f"{len(descriptors)}"
        path.write_bytes(content)
        descriptors.append(os.open(path, os.O_RDONLY))
        return descriptors[-1]

    yield open_
    for descriptor in descriptors:
        os.close(descriptor)


def read(
    descriptor: int,
    starts: list[int],
    code: int,
    length: int,
    vocab_size: int = NO_LIMIT,
    places: list[int] | None = None,
) -> np.ndarray:
    """Rows of `length` tokens from `starts` on; places that get none hold -7."""
    count, itemsize = len(starts), np.dtype(DTYPES.get(code, "<f4")).itemsize
    out = np.full((count, length), -7, dtype=np.int64)
    _index.read_rows(
        np.full(count, descriptor, dtype=np.int32),
        np.array(starts, dtype=np.int64) * itemsize,
        np.full(count, code, dtype=np.uint8),
        np.arange(count) if places is None else np.array(places, dtype=np.int64),
        vocab_size,
        out,
    )
    return out


@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("length", [1, 7, 64, 1001])
def test_rows_of_every_dtype(opened: Callable[[bytes], int], code: int, length: int) -> None:
    dtype, generator = np.dtype(DTYPES[code]), np.random.default_rng(code)
    largest = min(int(np.iinfo(dtype).max), NO_LIMIT - 1)
    tokens = generator.integers(0, largest, 3000, dtype)
    tokens[::100] = largest
    starts = generator.integers(0, 3000 - length + 1, 20).tolist()
    found = read(opened(tokens.tobytes()), starts, code, length)
    np.testing.assert_array_equal(found, [tokens[s : s + length] for s in starts])


def test_rows_of_several_files_go_to_their_places(opened: Callable[[bytes], int]) -> None:
    codes = np.array([8, 4, 8, 1, 5], dtype=np.uint8)
    files = [np.arange(100 * i, 100 * i + 50).astype(DTYPES[code]) for i, code in enumerate(codes)]
    files[3] = np.arange(50, dtype=np.uint8)
    out = np.full((7, 4), -7, dtype=np.int64)
    places = np.array([6, 0, 3, 1, 4])
    _index.read_rows(
        np.array([opened(file.tobytes()) for file in files], dtype=np.int32),
        np.array([3 * file.itemsize for file in files]),
        codes,
        places,
        1000,
        out,
    )
    expected = np.full((7, 4), -7)
    expected[places] = [file[3:7] for file in files]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("position", [0, 1, 63, 64, 99])
def test_the_first_id_outside_is_named(
    opened: Callable[[bytes], int], code: int, position: int
) -> None:
    dtype = np.dtype(DTYPES[code])
    tokens = np.full(200, 99, dtype=dtype)
    tokens[100 + position :] = 100
    descriptor = opened(tokens.tobytes())
    assert read(descriptor, [100], code, 100, 101)[0, position] == 100
    with pytest.raises(_index.TokenOutside) as caught:
        read(descriptor, [0, 100], code, 100, 100)
    assert caught.value.args == (1, position, 100)
    if dtype.kind == "i":
        tokens[100 + position] = np.iinfo(dtype).min
        with pytest.raises(_index.TokenOutside) as caught:
            read(opened(tokens.tobytes()), [0, 100], code, 100)
        assert caught.value.args == (1, position, np.iinfo(dtype).min)


@pytest.mark.parametrize(("code", "top"), [(1, 2**8), (8, 2**16), (4, 2**31), (5, 2**63 - 1)])
def test_a_vocabulary_as_large_as_the_dtype(
    opened: Callable[[bytes], int], code: int, top: int
) -> None:
    tokens = np.array([top - 1, 0, top - 2], dtype=DTYPES[code])
    descriptor = opened(tokens.tobytes())
    for vocab_size in (top, min(top + 1, NO_LIMIT)):
        assert read(descriptor, [0], code, 3, vocab_size).tolist() == [tokens.tolist()]
    with pytest.raises(_index.TokenOutside) as caught:
        read(descriptor, [0], code, 3, top - 1)
    assert caught.value.args == (0, 0, top - 1)


def test_a_file_that_ends_is_an_error_with_its_numbers(opened: Callable[[bytes], int]) -> None:
    descriptor = opened(bytes(41))
    with pytest.raises(_index.ReadEnded) as caught:
        read(descriptor, [10, 0, 16], 8, 10)
    assert caught.value.args == (2, 41, 11)
    with pytest.raises(_index.ReadEnded) as caught:
        read(descriptor, [50], 8, 10)
    assert caught.value.args == (0, 100, 20)


def test_a_read_that_fails_is_an_error_with_its_numbers(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(_index.ReadFailed) as caught:
            read(directory, [4], 8, 10)
    finally:
        os.close(directory)
    assert caught.value.args == (0, 8, errno.EISDIR)
    with pytest.raises(_index.ReadFailed) as caught:
        read(-1, [0], 8, 10)
    assert caught.value.args == (0, 0, errno.EBADF)


def test_arguments_that_do_not_fit_are_refused(opened: Callable[[bytes], int]) -> None:
    descriptor = opened(bytes(100))
    for code in (0, 6, 7, 9):
        with pytest.raises(ValueError, match=f"dtype code {code}"):
            read(descriptor, [0], code, 4)
    for place in (-1, 2):
        with pytest.raises(ValueError, match=f"place {place} of 2 rows"):
            read(descriptor, [0, 1], 8, 4, places=[0, place])
    with pytest.raises(ValueError, match="must both be at least 1"):
        read(descriptor, [0], 8, 4, vocab_size=0)
    one, code = np.zeros(1, dtype=np.int32), np.full(1, 8, dtype=np.uint8)
    row, out = np.zeros(1, dtype=np.int64), np.zeros((1, 4), dtype=np.int64)
    with pytest.raises(ValueError, match=r"bytes must have the shape \(1,\)"):
        _index.read_rows(one, np.zeros(2, dtype=np.int64), code, row, 10, out)
    with pytest.raises(ValueError, match="out must have 2 dimensions"):
        _index.read_rows(one, row, code, row, 10, row)
    for wrong in (out.astype(np.int32), np.zeros((1, 8), dtype=np.int64)[:, ::2]):
        with pytest.raises(TypeError):  # a copy would be filled instead
            _index.read_rows(one, row, code, row, 10, wrong)
    out.setflags(write=False)
    with pytest.raises(ValueError, match="not writeable"):
        _index.read_rows(one, row, code, row, 10, out)


def ends_of(lengths: list[int], entries: list[int]) -> np.ndarray:
    """Mark each token that is the last of a document."""
    bounds = np.cumsum([0, *lengths])[entries]
    marks = np.zeros(sum(lengths), dtype=bool)
    marks[bounds[1:][np.diff(bounds) > 0] - 1] = True
    return marks


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("documents", [1, 3, 100, 2000])
@pytest.mark.parametrize("per_document", [1, 3, 40])
def test_document_ends_against_a_walk(
    tmp_path: Path, seed: int, documents: int, per_document: int
) -> None:
    """Documents are empty, of one sequence, or of so many that pointers are read one by one."""
    generator = np.random.default_rng([seed, documents, per_document])
    sequences = documents * per_document
    lengths = generator.integers(0, 5, sequences).tolist()
    entries = [0, *sorted(generator.integers(0, sequences + 1, documents - 1).tolist()), sequences]
    write_raw(tmp_path / "c", lengths, entries, 5)
    marks, total = ends_of(lengths, entries), sum(lengths)
    descriptor = os.open(tmp_path / "c.idx", os.O_RDONLY)
    try:
        for length in {0, 1, min(9, total), total // 2, total}:
            starts = generator.integers(0, total - length + 1, 20)
            table = np.tile([sequences, documents + 1, 8, total], (20, 1))
            rows, places = _index.document_ends(
                np.full(20, descriptor, dtype=np.int32), table, starts, length
            )
            expected = [marks[start : start + length] for start in starts]
            expected_rows, expected_places = np.nonzero(np.array(expected).reshape(20, length))
            np.testing.assert_array_equal(rows, expected_rows)
            np.testing.assert_array_equal(places, expected_places)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("document", "value", "args"),
    [
        (0, 7, (1, 1, 2, 8)),  # ends at token 28, after the range and after the next one
        (2, 9000, (1, 2, 9000, -1)),
        (2, -1, (1, 2, -1, -1)),
    ],
)
def test_damaged_document_indices_are_named(
    tmp_path: Path, document: int, value: int, args: tuple[int, ...]
) -> None:
    write_raw(tmp_path / "c", [4] * 300, list(range(301)))
    path = tmp_path / "c.idx"
    patch(path, 34 + 12 * 300 + 8 * (document + 1), "<q", value)
    descriptor = os.open(path, os.O_RDONLY)
    table = np.tile([300, 301, 2, 1200], (2, 1))
    starts = np.array([1190, 0])  # the first request is far from the damage
    with pytest.raises(_index.DocumentFault) as caught:
        _index.document_ends(np.full(2, descriptor, dtype=np.int32), table, starts, 10)
    os.close(descriptor)
    assert caught.value.args == args


def test_an_index_that_ends_is_an_error_with_its_numbers(tmp_path: Path) -> None:
    write_raw(tmp_path / "c", [4] * 10, list(range(11)))
    os.truncate(tmp_path / "c.idx", 34 + 12 * 10 + 8 * 4 + 3)
    descriptor = os.open(tmp_path / "c.idx", os.O_RDONLY)
    with pytest.raises(_index.ReadEnded) as caught:
        _index.document_ends(
            np.array([descriptor], dtype=np.int32), np.array([[10, 11, 2, 40]]), np.array([0]), 8
        )
    os.close(descriptor)
    assert caught.value.args == (0, 34 + 12 * 10 + 8 * 4 + 3, 8 * 6 + 5)


def test_document_ends_refuse_arguments_that_do_not_fit() -> None:
    one, start = np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.int64)
    with pytest.raises(ValueError, match=r"tables must have the shape \(1, 4\)"):
        _index.document_ends(one, np.zeros((1, 3), dtype=np.int64), start, 4)
    with pytest.raises(ValueError, match="a token of no bytes"):
        _index.document_ends(one, np.zeros((1, 4), dtype=np.int64), start, 4)
    with pytest.raises(TypeError):
        _index.document_ends(one.astype(np.int64), np.zeros((1, 4), dtype=np.int64), start, 4)

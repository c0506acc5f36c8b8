r"""The header and the arrays of a Megatron `.idx` file, and the checks that cost O(1).

Everything is little endian. S sequences, D entries of document indices (documents + 1):

| offset        | field                                                |
|---------------|------------------------------------------------------|
| 0             | magic `MMIDIDX\0\0`                                    |
| 9             | u64 version = 1                                      |
| 17            | u8 code of the token dtype                           |
| 18            | u64 S                                                |
| 26            | u64 D                                                |
| 34            | int32[S] sequence lengths, in tokens                 |
| 34 + 4 S      | int64[S] sequence pointers, byte offsets into `.bin` |
| 34 + 12 S     | int64[D] document indices, from 0 to S               |
| 34 + 12 S + 8 D | int8[S] sequence modes, multimodal files only      |

The arrays start at byte 34 and are never aligned to their own size: NumPy reads them through
unaligned views, and functions that would copy a whole unaligned array (`numpy.searchsorted`,
`numpy.take`) are avoided.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_mer.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
MAX_SEQUENCE_TOKENS = 2**31 - 1
"""Sequence lengths are int32."""

INTEGER_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
FLOAT_CODES = (6, 7)


def dtype_code(dtype: np.dtype[Any]) -> int:
    """Return the format's code of an integer dtype.

    Raises:
        DataError: the format has no such integer dtype.
    """
    for code, known in INTEGER_DTYPES.items():
        if known == dtype.newbyteorder("<"):
            return code
    allowed = ", ".join(str(known) for known in INTEGER_DTYPES.values())
    raise DataError(f"token dtype {dtype} cannot be stored; allowed: {allowed}")


def fault(path: Path, byte: int, found: str, expected: str) -> DataError:
    """Build the error for a damaged file: the file, the byte, what stands there and what should."""
    return DataError(f"{path}, byte {byte}: {found}; expected {expected}")


@dataclass(frozen=True)
class IndexHeader:
    """What the first 34 bytes of an `.idx` file say, and where its arrays lie."""

    dtype: np.dtype[Any]
    """Dtype of the tokens in the `.bin` file."""
    num_sequences: int
    """S."""
    num_entries: int
    """D: documents + 1."""

    @property
    def lengths_offset(self) -> int:
        """Byte where the int32 sequence lengths start."""
        return HEADER.size

    @property
    def pointers_offset(self) -> int:
        """Byte where the int64 sequence pointers start."""
        return HEADER.size + 4 * self.num_sequences

    @property
    def documents_offset(self) -> int:
        """Byte where the int64 document indices start."""
        return HEADER.size + 12 * self.num_sequences

    @property
    def size(self) -> int:
        """Bytes of the whole file without sequence modes."""
        return self.documents_offset + 8 * self.num_entries

    def pack(self) -> bytes:
        """Return the 34 bytes of the header."""
        code = dtype_code(self.dtype)
        return HEADER.pack(MAGIC, VERSION, code, self.num_sequences, self.num_entries)


def read_header(path: Path, file: BinaryIO, file_size: int) -> IndexHeader:
    """Read and check the header.

    Raises:
        DataError: wrong magic, version, dtype code or file size.
    """
    raw = file.read(HEADER.size)
    if len(raw) < HEADER.size:
        raise fault(path, len(raw), "the file ends", f"a header of {HEADER.size} bytes")
    magic, version, code, num_sequences, num_entries = HEADER.unpack(raw)
    if magic != MAGIC:
        raise fault(path, 0, f"magic {magic!r}", f"{MAGIC!r} (a Megatron index)")
    if version != VERSION:
        raise fault(path, 9, f"version {version}", f"version {VERSION}")
    if code in FLOAT_CODES:
        raise fault(path, 17, f"dtype code {code} (floating point)", "an integer dtype: tokens")
    if code not in INTEGER_DTYPES:
        raise fault(path, 17, f"dtype code {code}", f"one of {sorted(INTEGER_DTYPES)}")
    header = IndexHeader(INTEGER_DTYPES[code], num_sequences, num_entries)
    _check_size(path, header, file_size)
    return header


def _check_size(path: Path, header: IndexHeader, file_size: int) -> None:
    if header.num_entries < 1:
        raise fault(path, 26, "no document indices", "documents + 1 entries, at least 1")
    if file_size not in (header.size, header.size + header.num_sequences):
        raise fault(
            path,
            min(file_size, header.size),
            f"the file has {file_size} bytes",
            f"{header.size} for {header.num_sequences} sequences and {header.num_entries} document "
            f"indices (or {header.size + header.num_sequences} with sequence modes)",
        )


def _read_integer(file: BinaryIO, offset: int, num_bytes: int) -> int:
    file.seek(offset)
    return int.from_bytes(file.read(num_bytes), "little", signed=True)


def check_edges(path: Path, file: BinaryIO, header: IndexHeader, bin_size: int) -> None:
    """Check the first and last entries of each array against each other and the `.bin` file.

    A truncated `.bin`, a wrong dtype of another width, a negative length at either end and document
    indices that do not cover the sequences are found here, in a few small reads.

    Raises:
        DataError: naming the byte and what was expected there.
    """
    count, itemsize = header.num_sequences, header.dtype.itemsize
    _check_document_edges(path, file, header)
    if count == 0:
        if bin_size != 0:
            raise fault(path, 18, f"no sequences, but a .bin of {bin_size} bytes", "an empty .bin")
        return
    first = _read_integer(file, header.pointers_offset, 8)
    if first != 0:
        raise fault(path, header.pointers_offset, f"first pointer {first}", "0")
    _check_length(path, file, header, 0)
    last_length = _check_length(path, file, header, count - 1)
    last_byte = header.pointers_offset + 8 * (count - 1)
    end = _read_integer(file, last_byte, 8) + last_length * itemsize
    if end != bin_size:
        raise fault(
            path,
            last_byte,
            f"the last sequence ends at byte {end} of the .bin file ({last_length} tokens of "
            f"{header.dtype})",
            f"its size, {bin_size} bytes: the .bin is truncated, the dtype is wrong or the two "
            "files do not belong together",
        )
    if bin_size % itemsize:
        raise fault(path, 17, f"dtype {header.dtype}", f"one that divides {bin_size} bytes of .bin")
    for left in {0, count - 2} if count > 1 else set():
        _check_step(path, file, header, left)


def _check_document_edges(path: Path, file: BinaryIO, header: IndexHeader) -> None:
    first = _read_integer(file, header.documents_offset, 8)
    if first != 0:
        raise fault(path, header.documents_offset, f"first document index {first}", "0")
    last_byte = header.documents_offset + 8 * (header.num_entries - 1)
    last = _read_integer(file, last_byte, 8)
    if last != header.num_sequences:
        raise fault(
            path,
            last_byte,
            f"the document indices end at {last}",
            f"{header.num_sequences}, the number of sequences",
        )


def _check_length(path: Path, file: BinaryIO, header: IndexHeader, sequence: int) -> int:
    byte = header.lengths_offset + 4 * sequence
    length = _read_integer(file, byte, 4)
    if length < 0:
        raise fault(path, byte, f"sequence {sequence} has length {length}", "0 or more")
    return length


def _check_step(path: Path, file: BinaryIO, header: IndexHeader, left: int) -> None:
    """Sequence `left` must end where the next one starts."""
    start = _read_integer(file, header.pointers_offset + 8 * left, 8)
    length = _check_length(path, file, header, left)
    byte = header.pointers_offset + 8 * (left + 1)
    following = _read_integer(file, byte, 8)
    end = start + length * header.dtype.itemsize
    if following != end:
        raise fault(path, byte, f"pointer {following}", f"{end}, where sequence {left} ends")


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading; failing is a DataError with the reason."""
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror}") from error


def file_size(path: Path) -> int:
    """Return a file's size in bytes; failing is a DataError with the reason."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror}") from error

"""The format written by hand, independent of the library's writer, so that it can be wrong."""

import struct
from pathlib import Path

import numpy as np

HEADER = "<9sQBQQ"
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def write_raw(
    prefix: Path,
    lengths: list[int],
    entries: list[int],
    code: int = 8,
    tokens: np.ndarray | None = None,
) -> None:
    """Write sequences of these lengths; tokens are 0, 1, 2, ... unless given."""
    dtype = np.dtype(DTYPES.get(code, "<f4"))
    values = np.arange(sum(lengths)) if tokens is None else tokens
    pointers = np.cumsum([0, *lengths])[:-1] * dtype.itemsize
    Path(f"{prefix}.bin").write_bytes(values.astype(dtype).tobytes())
    Path(f"{prefix}.idx").write_bytes(
        struct.pack(HEADER, b"MMIDIDX\0\0", 1, code, len(lengths), len(entries))
        + np.array(lengths, dtype="<i4").tobytes()
        + pointers.astype("<i8").tobytes()
        + np.array(entries, dtype="<i8").tobytes()
    )


def patch(path: Path, offset: int, layout: str, value: int) -> None:
    """Overwrite one number of a file."""
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, offset, value)
    path.write_bytes(data)

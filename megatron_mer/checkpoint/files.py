"""Files that survive a power cut: written whole, flushed, and only then given their name."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_mer.checkpoint.layout import DTYPE_NAMES, TEMPORARY, Fragment


def sync_directory(path: Path) -> None:
    """Make the names inside a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Bring what was written to a file to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


_CHUNK = 1 << 20  # bytes read at once
BYTES = {"F32": 4, "BF16": 2, "F16": 2}
"""Size of an element by safetensors' name of its dtype."""


@dataclass(frozen=True)
class FileFacts:
    """What the manifest says of a file."""

    bytes: int
    """Size."""
    sha256: str
    """Checksum of the content, hexadecimal, as `sha256sum` prints it."""


def sha256_of(path: Path) -> str:
    """The checksum of a file.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_bytes(path: Path, chunks: Iterator[bytes | memoryview]) -> FileFacts:
    """Write the chunks to a new file and flush it to the disk.

    Returns:
        Size and checksum of what was meant to be written.

    Raises:
        OSError: the disk is full, or the like.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileFacts(size, digest.hexdigest())


def write_json(path: Path, value: Any) -> FileFacts:
    """Write a value as JSON and flush it to the disk; NaN and infinity, no JSON, are refused."""
    return write_bytes(path, iter([json.dumps(value, indent=1, allow_nan=False).encode()]))


def replace_text(path: Path, text: str) -> None:
    """Put a new text in the place of a small file: a reader sees the old one or the new one."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Put new content in the place of a small file: a reader sees the old one or the new one."""
    temporary = path.with_name(path.name + TEMPORARY)
    write_bytes(temporary, iter([content]))
    os.rename(temporary, path)
    sync_directory(path.parent)


def remove_directory(path: Path) -> None:
    """Remove a checkpoint so that a kill on the way leaves no half of it under its name."""
    if not path.name.endswith(TEMPORARY):
        # Not NAME.tmp: that is the checkpoint being written, perhaps to replace this one.
        doomed = path.with_name(f"{path.name}.removed{TEMPORARY}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        path = doomed
    shutil.rmtree(path)


def safetensors_chunks(
    fragments: Sequence[Fragment], read: Callable[[Fragment], torch.Tensor]
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one tensor at a time.

    Writing it here and not with `safetensors.torch.save_file` keeps the host memory at one fragment
    beyond the live state: that function first turns all tensors into bytes.

    Args:
        fragments: what goes in; of their tensors only size and dtype are looked at.
        read: gives a fragment's elements when it is its turn.
    """
    # Wide dtypes first: with a header padded to 8 bytes every tensor is then aligned.
    ordered = sorted(fragments, key=lambda fragment: -fragment.tensor.element_size())
    entries = [(one.key, DTYPE_NAMES[one.tensor.dtype], [one.numel]) for one in ordered]
    yield safetensors_header(entries)
    for fragment in ordered:
        yield raw_bytes(read(fragment))


def safetensors_header(
    entries: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """What stands before the tensors of a safetensors file.

    The format is 8 bytes of header length (little endian), a JSON header, then the tensors without
    a gap.

    Args:
        entries: name, safetensors' dtype and shape of each tensor, in the file's order.
        metadata: of the file.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for key, dtype, shape in entries:
        end = offset + math.prod(shape) * BYTES[dtype]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor; a copy only where it lies on another device or is strided."""
    host = tensor.detach().to("cpu").contiguous().view(-1)
    return memoryview(host.view(torch.uint8).numpy().data)

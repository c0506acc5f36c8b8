"""What a corpus is made from: files, patterns, directories, standard input and remote paths."""

from __future__ import annotations

import glob
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_mer.errors import DataError

STDIN = "-"
Format = Literal["jsonl", "parquet", "text"]
PACKED = (".gz", ".zst")
SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
}
"""Formats by the end of the name, before `.gz` or `.zst`; a file of another name is JSON lines."""


@dataclass(frozen=True)
class InputFile:
    """One file of text."""

    path: str
    """As it was named; `-`: standard input; with `://`: remote."""
    format: Format
    size: int
    """Bytes; 0 where it is not known."""
    stamp: str
    """Changes when the content does."""
    once: bool = False
    """Whether it can be read only once: standard input, a pipe."""

    @property
    def name(self) -> str:
        """File name without its directory."""
        return "stdin" if self.path == STDIN else self.path.rstrip("/").rpartition("/")[2]

    @property
    def is_local_file(self) -> bool:
        """Whether it can be read at any place, again and again."""
        return not self.once and not is_remote(self.path)


def is_remote(path: str) -> bool:
    """Tell whether fsspec has to open a path."""
    return "://" in path


def expand_inputs(names: Sequence[str], format: Format | None = None) -> list[InputFile]:
    """Return the files that were named, in order.

    Args:
        names: each a file, a directory (all files in it, and below, whose names end as `SUFFIXES`
            has them), a pattern with `*`, `?` or `[]`, or `-`. Files of a directory or pattern come
            in alphabetical order.
        format: of all files; None: by the names.

    Raises:
        DataError: a name stands for no file, or a file comes twice.
    """
    found = [_inspect(path, format) for name in names for path in _expand(str(name))]
    seen: dict[str, str] = {}
    for file in found:
        identity = file.path if is_remote(file.path) else os.path.realpath(file.path)
        if identity in seen:
            raise DataError(
                f"{file.path}: an input file is named twice (also as {seen[identity]}); its "
                "documents would be repeated"
            )
        seen[identity] = file.path
    return found


def stamp_of(path: str) -> str:
    """Return the stamp of a file as it is now."""
    return _inspect(path, "jsonl").stamp


def remote(path: str) -> tuple[Any, str]:
    """Return the fsspec file system of a remote path, and the path within it.

    Raises:
        DataError: the package for that kind of path is missing, it knows no such path, or its place
            cannot be reached.
    """
    from fsspec.core import url_to_fs

    try:
        system, place = url_to_fs(path)
    except ImportError as error:
        raise DataError(
            f"{path}: {error}; remote paths need the package of their kind: `make venv-corpora`, "
            "or `pip install s3fs` for s3://"
        ) from error
    except Exception as error:
        # Some file systems connect at once, and each has errors of its own.
        raise DataError(f"{path}: {error or type(error).__name__}") from error
    return system, place


def _expand(name: str) -> Iterator[str]:
    if name == STDIN:
        yield name
    elif is_remote(name):
        yield from _expand_remote(name)
    elif os.path.isdir(name):
        files = (str(path) for path in sorted(Path(name).rglob("*")) if path.is_file())
        yield from _some(name, [path for path in files if _is_corpus(path)])
    elif not os.path.exists(name) and glob.has_magic(name):
        matches = sorted(glob.glob(name, recursive=True))
        yield from _some(name, [path for path in matches if os.path.isfile(path)])
    else:
        yield name


def _expand_remote(name: str) -> Iterator[str]:
    system, place = remote(name)
    try:
        if glob.has_magic(place):
            files = sorted(system.glob(place))
        elif system.isdir(place):
            files = sorted(path for path in system.find(place) if _is_corpus(path))
        else:
            files = [place]
    except Exception as error:
        raise DataError(f"{name}: cannot be listed: {error}") from error
    yield from _some(name, [system.unstrip_protocol(path) for path in files])


def _some(name: str, files: list[str]) -> list[str]:
    if not files:
        ends = ", ".join(SUFFIXES)
        raise DataError(f"{name}: no input file there; in a directory, those that end in {ends}")
    return files


def _is_corpus(path: str) -> bool:
    return _suffix(path) in SUFFIXES and not Path(path).name.startswith(".")


def _suffix(path: str) -> str:
    for packed in PACKED:
        path = path.removesuffix(packed)
    return Path(path).suffix.lower()


def _inspect(path: str, format: Format | None) -> InputFile:
    format = format or SUFFIXES.get(_suffix(path), "jsonl")
    if path == STDIN:
        return _once(path, format)
    if is_remote(path):
        return _inspect_remote(path, format)
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not Path(path).is_file():
        return _once(path, format)
    return InputFile(path, format, stat.st_size, f"{stat.st_size} {stat.st_mtime_ns}")


def _once(path: str, format: Format) -> InputFile:
    """What a run reads from a pipe is of no use to the next one, so nothing has its stamp."""
    if format == "parquet":
        raise DataError(
            f"{path}: Parquet is read from its end, which a pipe does not show; name a file"
        )
    return InputFile(path, format, 0, uuid.uuid4().hex, once=True)


def _inspect_remote(path: str, format: Format) -> InputFile:
    system, place = remote(path)
    try:
        info = system.info(place)
    except Exception as error:
        raise DataError(f"{path}: cannot be read: {error or type(error).__name__}") from error
    told = [info.get(key) for key in ("ETag", "etag", "mtime", "LastModified", "created")]
    size = int(info.get("size") or 0)
    return InputFile(path, format, size, " ".join(str(part) for part in (size, *told) if part))

"""A second place for checkpoints, a directory or an fsspec URL, whole there at any moment too.

```
COPY_TO/
    run.json                    whose copies these are: one run a place
    latest                      the name of the newest copy, one line
    step_000000300/             as in checkpoints/, the manifest written last
    config.yaml, ...            what a resumed run wants beside its checkpoint, as of the last copy
```

An object store has no rename: there a copy is whole once its manifest is there. A directory gets
the temporary name and the rename that checkpoints have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Event
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from megatron_mer.checkpoint.files import (
    remove_directory,
    replace_bytes,
    sync_directory,
    write_bytes,
)
from megatron_mer.checkpoint.find import manifest_files
from megatron_mer.checkpoint.layout import LATEST, MANIFEST, REPLACED, TEMPORARY, parse_step
from megatron_mer.checkpoint.save import give_name, prepare, prune
from megatron_mer.errors import CheckpointError
from megatron_mer.log import get_logger

OWNER = "run.json"
"""The file that says whose copies these are."""

# These have no folders to be made, and s3fs would make a bucket that is not there.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "memory"}

_CHUNK = 8 << 20  # bytes read at once: after each a copy can be given up

logger = get_logger(__name__)


class CopyStopped(Exception):
    """A copy was given up: the run ends."""


class Place:
    """An object store, or any other file system that fsspec knows.

    Every method may raise what the file system raises: an OSError, or an error of its client.

    Args:
        url: where; the protocol's package must be installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._fs, root = url_to_fs(url)
        self._root = root.rstrip("/")
        protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else self._fs.protocol
        self._has_folders = not _OBJECT_STORES & set(protocols)
        self._permanent: dict[str, bool] = {}

    def read(self, name: str) -> bytes | None:
        """A small file's content; None where there is none."""
        try:
            return bytes(self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def owner(self) -> dict[str, Any] | None:
        """Whose copies these are, as `claim` was told; None where nobody has claimed the place."""
        text = self.read(OWNER)
        return None if text is None else dict(json.loads(text))

    def claim(self, owner: Mapping[str, Any]) -> None:
        """Say whose copies these are."""
        self._make(self._root)
        self._put(OWNER, json.dumps(dict(owner), indent=1).encode() + b"\n")

    def steps(self) -> list[str]:
        """Names of all copies, whole or not: by falling step."""
        found = [name for name in self._sizes("") if parse_step(name) is not None]
        return sorted((n for n in found if not n.endswith(REPLACED)), key=_number, reverse=True)

    def best(self) -> Iterator[str]:
        """Whole copies, the one to go on from first: `latest`, what is before it, what is not."""
        named = parse_step((self.read(LATEST) or b"").decode(errors="replace").strip())
        behind = -1 if named is None else named
        names = self.steps()
        ordered = names if named is None else sorted(names, key=lambda n: _number(n) > behind)
        return (name for name in ordered if self.problem(name) is None)

    def problem(self, name: str) -> str | None:
        """Why a copy is not whole by the sizes of its files; None if it is."""
        text = self.read(f"{name}/{MANIFEST}")
        if text is None:
            return f"{self.url}/{name} has no {MANIFEST}: it was not copied to its end"
        try:
            files = manifest_files(text, f"{self.url}/{name}")
        except (ValueError, KeyError, TypeError, CheckpointError) as error:
            return f"{self.url}/{name}/{MANIFEST}: {error}"
        sizes = self._sizes(name)
        for file, (size, _) in files.items():
            if sizes.get(file) != size:
                return f"{self.url}/{name}/{file}: expected {size} bytes, found {sizes.get(file)}"
        self._permanent[name] = bool(json.loads(text).get("permanent", False))
        return None

    def holds(self, name: str, manifest: bytes) -> bool:
        """Whether the copy of just this checkpoint is there, whole by the sizes of its files."""
        return self.read(f"{name}/{MANIFEST}") == manifest and self.problem(name) is None

    def copy(self, source: Path, manifest: bytes, stop: Event) -> None:
        """Copy a checkpoint, in the place of an older copy of the same step.

        Args:
            source: its directory.
            manifest: its manifest, with which every byte that is read is compared.
            stop: when set, the copy ends with `CopyStopped`.

        Raises:
            CheckpointError: the source is not what its manifest says.
        """
        self._permanent.pop(source.name, None)
        folder = self._begin(source.name)
        files = manifest_files(manifest, source)
        for name, (size, checksum) in files.items():
            self._write(f"{folder}/{name}", verified(source / name, size, checksum, stop))
        found = self._sizes(folder)
        for name, (size, _) in files.items():
            if found.get(name) != size:
                raise OSError(f"{self.url}: {name} has {found.get(name)} bytes there, not {size}")
        self._end(source.name, manifest)

    def put(self, name: str, path: Path) -> None:
        """Copy a small file that may grow meanwhile; none is fine."""
        if path.exists():
            self._make(self._path(name).rpartition("/")[0])
            self._put(name, path.read_bytes())

    def point(self, name: str) -> None:
        """Let `latest` name a copy."""
        self._put(LATEST, f"{name}\n".encode())

    def fetch(
        self, name: str, file: str, size: int, checksum: str | None, target: Path
    ) -> str | None:
        """Bring one file of a copy back.

        Returns:
            Why it is not what its manifest says; None if it is.
        """
        try:
            with self._fs.open(self._path(f"{name}/{file}"), "rb") as source:
                facts = write_bytes(target, iter(lambda: source.read(_CHUNK), b""))
        except FileNotFoundError as error:
            if not target.parent.is_dir():
                raise
            return f"{self.url}/{name}/{file}: {error}"
        if facts.bytes != size or checksum not in (None, facts.sha256):
            expected = f"expected {size} bytes of SHA-256 {checksum}"
            return f"{self.url}/{name}/{file}: {expected}, found {facts.bytes} of {facts.sha256}"
        return None

    def prune(self, step: int, keep_last: int, keep_every: int | None) -> None:
        """Remove what is no longer wanted, by the rule of `save.prune`; torn copies go too."""
        kept = 0
        for name in self.steps():
            number = _number(name)
            if number <= step and (name in self._permanent or self.problem(name) is None):
                kept += 1
                multiple = keep_every is not None and number % keep_every == 0
                if kept <= keep_last or multiple or self._permanent[name]:
                    continue
            if number > step:
                text = "removing %s/%s: the run went back to before step %d"
                logger.warning(text, self.url, name, number)
            self._remove(name)

    def tidy(self) -> None:
        """Clear what killed runs left behind; to be called by the owner alone."""

    def discard(self, name: str) -> None:
        """Give back the space of a copy that failed; what it replaced is gone before it."""

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _sizes(self, folder: str) -> dict[str, int | None]:
        """Name and size of all that lies in a folder."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._path(folder), detail=True)
        except FileNotFoundError:
            return {}
        return {entry["name"].rstrip("/").rpartition("/")[2]: entry["size"] for entry in found}

    def _make(self, path: str) -> None:
        if self._has_folders:
            self._fs.makedirs(path, exist_ok=True)

    def _begin(self, name: str) -> str:
        if self._sizes(name):
            self._remove(name)
        self._make(self._path(name))
        return name

    def _write(self, name: str, chunks: Iterator[bytes]) -> None:
        with self._fs.open(self._path(name), "wb") as file:
            for chunk in chunks:
                file.write(chunk)

    def _put(self, name: str, content: bytes) -> None:
        self._fs.pipe_file(self._path(name), content)

    def _end(self, name: str, manifest: bytes) -> None:
        self._put(f"{name}/{MANIFEST}", manifest)

    def _remove(self, name: str) -> None:
        """Remove a copy, its manifest first: what a kill leaves of it is not whole."""
        self._permanent.pop(name, None)
        if self._fs.exists(self._path(f"{name}/{MANIFEST}")):
            self._fs.rm_file(self._path(f"{name}/{MANIFEST}"))
        self._fs.invalidate_cache()
        if self._sizes(name):
            self._fs.rm(self._path(name), recursive=True)


class Folder(Place):
    """A directory: flushed to the disk, and named when it is whole."""

    def tidy(self) -> None:
        """Clear what killed runs left behind; to be called by the owner alone."""
        prepare(Path(self._root))

    def prune(self, step: int, keep_last: int, keep_every: int | None) -> None:
        """Remove what is no longer wanted, as in the run's own directory."""
        prune(Path(self._root), step, keep_last, keep_every)

    def discard(self, name: str) -> None:
        """Give back the space of a copy that failed."""
        temporary = self._temporary(name)
        if temporary.exists():
            remove_directory(temporary)

    def _temporary(self, name: str) -> Path:
        return Path(self._root) / f"{name}{TEMPORARY}"

    def _begin(self, name: str) -> str:
        self.discard(name)
        self._temporary(name).mkdir(parents=True)
        return self._temporary(name).name

    def _write(self, name: str, chunks: Iterator[bytes]) -> None:
        write_bytes(Path(self._path(name)), chunks)

    def _put(self, name: str, content: bytes) -> None:
        replace_bytes(Path(self._path(name)), content)

    def _end(self, name: str, manifest: bytes) -> None:
        temporary = self._temporary(name)
        write_bytes(temporary / MANIFEST, iter([manifest]))
        sync_directory(temporary)
        give_name(Path(self._root), temporary, Path(self._path(name)))

    def _remove(self, name: str) -> None:
        self._permanent.pop(name, None)
        remove_directory(Path(self._path(name)))


def open_place(url: str) -> Place:
    """The place that a path or URL names; asks no service anything.

    Raises:
        ImportError, ValueError: the protocol's package is not installed; there is no such protocol.
    """
    is_folder = isinstance(url_to_fs(url)[0], LocalFileSystem)
    return Folder(url) if is_folder else Place(url)


def verified(path: Path, size: int, checksum: str | None, stop: Event) -> Iterator[bytes]:
    """The content of a file, compared with its checksum at the end.

    Raises:
        CheckpointError: it is another.
        CopyStopped: `stop` was set.
        OSError: it cannot be read.
    """
    digest, seen = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            if stop.is_set():
                raise CopyStopped
            digest.update(chunk)
            seen += len(chunk)
            yield chunk
    if seen != size or checksum not in (None, digest.hexdigest()):
        raise CheckpointError(
            f"{path}: expected {size} bytes of SHA-256 {checksum}, found {seen} of "
            f"{digest.hexdigest()}"
        )


def _number(name: str) -> int:
    return parse_step(name) or 0

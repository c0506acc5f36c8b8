"""Writing a tokenized corpus in Megatron's `.bin/.idx` format, with its sidecar.

Everything goes to `PREFIX.bin.partial` and its siblings; only `finalize` gives the final names, the
`.idx` last, so a dataset that can be opened is whole. A writer that is killed leaves `.partial`
files, which the next writer of the same prefix reuses; one that fails removes them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_mer.data.index_format import MAX_SEQUENCE_TOKENS, IndexHeader, dtype_code
from megatron_mer.data.sidecar import Provenance, Sidecar
from megatron_mer.errors import DataError

BIN_BUFFER = 1 << 20
INDEX_CHUNK = 1 << 20
"""Sequences whose index entries are made together, so that memory stays flat."""
SUFFIXES = (".bin", ".json", ".idx")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return Megatron's dtype for a vocabulary: uint16 below 65,500 ids, else int32."""
    return np.dtype("<u2" if vocab_size < 65_500 else "<i4")


def existing_files(prefix: str | Path) -> list[Path]:
    """Return the files of a dataset that are already there under its final names."""
    paths = (Path(f"{prefix}{suffix}") for suffix in SUFFIXES)
    return [path for path in paths if path.exists()]


class IndexedDatasetWriter:
    """Writes documents one after the other; nothing has its final name before `finalize`.

    Use it as a context manager: leaving it without `finalize` removes what was written.

    Args:
        prefix: path without `.bin` and `.idx`; its directory is made when missing.
        dtype: of the stored tokens, an integer dtype of the format.
        overwrite: whether `finalize` may replace an existing dataset.

    Raises:
        DataError: the dataset exists, another process writes it, or the disk refuses.
    """

    def __init__(
        self, prefix: str | Path, dtype: np.dtype[Any] | type[Any], overwrite: bool = False
    ) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        dtype_code(self.dtype)
        self._overwrite = overwrite
        self._refuse_existing()
        self._lengths = array("i")
        self._digest = hashlib.sha256()
        self._max_token_id = -1
        self._num_tokens = 0
        self._limits = np.iinfo(self.dtype)
        self._bin: BinaryIO | None = self._open_exclusively()

    @property
    def num_documents(self) -> int:
        """Documents written so far."""
        return len(self._lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return self._num_tokens

    def add_document(self, tokens: ArrayLike) -> None:
        """Append one document of one sequence.

        Args:
            tokens: shape (n,), integers.

        Raises:
            DataError: not one dimension of integers, an id outside the dtype's range, too long, or
            the
                disk refuses.
        """
        values = np.asarray(tokens)
        if values.size == 0 and values.ndim == 1:
            values = values.astype(self.dtype)
        self.add_documents(values, [len(values) if values.ndim == 1 else -1])

    def add_documents(self, tokens: NDArray[Any], lengths: ArrayLike) -> None:
        """Append many documents, each of one sequence, from one flat array.

        Args:
            tokens: shape (n,), integers: the documents one after the other.
            lengths: shape (documents,), tokens of each; they sum to n.

        Raises:
            DataError: as `add_document`.
        """
        counts = np.asarray(lengths, dtype=np.int64)
        self._check(tokens, counts)
        data: NDArray[Any] = np.ascontiguousarray(tokens, dtype=self.dtype)
        raw = data.view(np.uint8).data
        with self._disk_errors():
            self._open_bin().write(raw)
        self._digest.update(raw)
        self._lengths.frombytes(counts.astype(np.int32).tobytes())
        self._num_tokens += data.size
        if data.size:
            self._max_token_id = max(self._max_token_id, int(data.max()))

    def finalize(self, provenance: Provenance | None = None) -> Sidecar | None:
        """Write the index, make everything durable and give the files their final names.

        Args:
            provenance: what the tokens were made from and with; None: no sidecar is written.

        Returns:
            The sidecar that was written, if any.

        Raises:
            DataError: nothing was written, the dataset appeared meanwhile, or the disk refuses.
        """
        if self.num_documents == 0:
            self.abort()
            raise DataError(f"{self.prefix}: no document was written, so there is no dataset")
        self._refuse_existing()
        with self._disk_errors():
            bin_file = self._open_bin()
            bin_file.flush()
            os.fsync(bin_file.fileno())
            idx_sha256 = self._write_index()
            sidecar = self._write_sidecar(provenance, idx_sha256)
            self._rename(with_sidecar=sidecar is not None)
            bin_file.close()
        self._bin = None
        return sidecar

    def abort(self) -> None:
        """Remove what was written; the final names stay untouched."""
        if self._bin is None:
            return
        file, self._bin = self._bin, None
        for suffix in SUFFIXES:
            self._partial(suffix).unlink(missing_ok=True)
        # On a full disk, closing tries to write the rest of the buffer and fails again.
        with contextlib.suppress(OSError):
            file.close()

    def __enter__(self) -> IndexedDatasetWriter:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove what was written unless `finalize` succeeded."""
        self.abort()

    def _partial(self, suffix: str) -> Path:
        return Path(f"{self.prefix}{suffix}.partial")

    def _refuse_existing(self) -> None:
        existing = existing_files(self.prefix)
        if existing and not self._overwrite:
            names = ", ".join(path.name for path in existing)
            raise DataError(
                f"{self.prefix}: {names} already there; choose another prefix, remove it, or "
                "--overwrite it"
            )

    def _open_exclusively(self) -> BinaryIO:
        path = self._partial(".bin")
        with self._disk_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab", buffering=BIN_BUFFER)  # noqa: SIM115 - the writer owns it
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise DataError(f"{path}: another process is writing this dataset") from error
        except OSError:
            pass  # A file system without locks: two writers at once are then the user's care.
        file.truncate(0)
        return file

    def _open_bin(self) -> BinaryIO:
        if self._bin is None:
            raise DataError(f"{self.prefix}: this writer is finished; make a new one")
        return self._bin

    def _check(self, tokens: NDArray[Any], counts: NDArray[np.int64]) -> None:
        place = f"{self.prefix}: document {self.num_documents}"
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DataError(
                f"{place}: tokens of shape {tokens.shape} and dtype {tokens.dtype}; expected one "
                "dimension of integers"
            )
        if np.any(counts < 0) or int(counts.sum()) != tokens.size:
            raise DataError(f"{place}: lengths sum to {counts.sum()}, not to {tokens.size} tokens")
        if np.any(counts > MAX_SEQUENCE_TOKENS):
            raise DataError(
                f"{place}: a document of {counts.max()} tokens; the format allows "
                f"{MAX_SEQUENCE_TOKENS}: split it"
            )
        # Before the cast: casting wraps silently.
        if tokens.size and (tokens.min() < 0 or tokens.max() > self._limits.max):
            wrong = int(tokens.max() if tokens.max() > self._limits.max else tokens.min())
            raise DataError(
                f"{place} or after it: token id {wrong} does not fit {self.dtype.name}, which "
                "holds "
                f"0 to {self._limits.max}; choose a wider dtype"
            )

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if hasattr(self, "_bin"):
                self.abort()
            raise DataError(
                f"{self.prefix}: cannot be written: {error.strerror or error}; nothing was left "
                "behind"
            ) from error

    def _write_index(self) -> str:
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        count = len(lengths)
        digest = hashlib.sha256()
        with open(self._partial(".idx"), "wb") as file:
            for piece in self._index_pieces(lengths, count):
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def _index_pieces(self, lengths: NDArray[np.int32], count: int) -> Iterator[bytes]:
        yield IndexHeader(self.dtype, count, count + 1).pack()
        for first in range(0, count, INDEX_CHUNK):
            yield lengths[first : first + INDEX_CHUNK].astype("<i4").tobytes()
        offset = 0
        for first in range(0, count, INDEX_CHUNK):
            sizes = lengths[first : first + INDEX_CHUNK].astype("<i8") * self.dtype.itemsize
            ends = np.cumsum(sizes) + offset
            yield (ends - sizes).astype("<i8").tobytes()
            offset = int(ends[-1])
        for first in range(0, count + 1, INDEX_CHUNK):
            yield np.arange(first, min(first + INDEX_CHUNK, count + 1), dtype="<i8").tobytes()

    def _write_sidecar(self, provenance: Provenance | None, idx_sha256: str) -> Sidecar | None:
        if provenance is None:
            return None
        sidecar = Sidecar(
            provenance=provenance,
            documents=self.num_documents,
            tokens=self._num_tokens,
            dtype=self.dtype.name,
            max_token_id=self._max_token_id,
            bin_sha256=self._digest.hexdigest(),
            idx_sha256=idx_sha256,
        )
        with open(self._partial(".json"), "w", encoding="utf-8") as file:
            file.write(sidecar.to_json())
            file.flush()
            os.fsync(file.fileno())
        return sidecar

    def _rename(self, with_sidecar: bool) -> None:
        """Give the final names. The old index goes first and the new one comes last.

        Between the two there is no index, so no reader can pair files of different corpora.
        """
        for suffix in (".idx", ".json"):
            Path(self.prefix + suffix).unlink(missing_ok=True)
        for suffix in SUFFIXES:
            if suffix != ".json" or with_sidecar:
                os.replace(self._partial(suffix), self.prefix + suffix)
        directory = os.open(Path(self.prefix).parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

"""Writing a tokenized corpus in Megatron's `.bin/.idx` format, with its sidecar.

Nothing has its final name before `finalize`: see `publication`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_mer.data.index_format import MAX_SEQUENCE_TOKENS, IndexHeader, dtype_code
from megatron_mer.data.publication import Publication, index_pieces
from megatron_mer.data.sidecar import Provenance, Sidecar
from megatron_mer.errors import DataError

INDEX_CHUNK = 1 << 20
"""Sequences whose index entries are made together, so that memory stays flat."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return Megatron's dtype for a vocabulary: uint16 below 65,500 ids, else int32."""
    return np.dtype("<u2" if vocab_size < 65_500 else "<i4")


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
        self._publication = Publication(prefix, overwrite)
        self._lengths = array("i")
        self._digest = hashlib.sha256()
        self._max_token_id = -1
        self._num_tokens = 0
        self._limits = np.iinfo(self.dtype)

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
                the disk refuses.
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
        with self._publication.disk_errors():
            self._publication.bin.write(raw)
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
        with self._publication.disk_errors():
            idx_sha256 = self._publication.write_file(".idx", self._index_pieces())
            sidecar = self._write_sidecar(provenance, idx_sha256)
            self._publication.publish()
        return sidecar

    def abort(self) -> None:
        """Remove what was written; the final names stay untouched."""
        self._publication.abort()

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

    def _index_pieces(self) -> Iterator[bytes]:
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        count = len(lengths)
        return index_pieces(
            IndexHeader(self.dtype, count, count + 1),
            lambda: (lengths[at : at + INDEX_CHUNK] for at in range(0, count, INDEX_CHUNK)),
            (
                np.arange(at, min(at + INDEX_CHUNK, count + 1))
                for at in range(0, count + 1, INDEX_CHUNK)
            ),
        )

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
        self._publication.write_file(".json", [sidecar.to_json().encode()])
        return sidecar

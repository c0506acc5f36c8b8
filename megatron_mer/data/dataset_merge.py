"""Many datasets to one: their documents one after the other, in bounded memory.

The merged files are the bytes that `IndexedDatasetWriter` would have written from all documents in
one go. Every index is checked entry by entry before anything is written, and the tokens are
compared with the sidecars' checksums on the way: a damaged dataset never gets a new checksum.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_mer.data.index_format import IndexHeader
from megatron_mer.data.merge_shards import common_provenance, open_shards
from megatron_mer.data.publication import Publication, index_pieces
from megatron_mer.data.sidecar import Sidecar
from megatron_mer.errors import DataError

Progress = Callable[[int, int], None]
"""Called with the bytes of `.bin` files done so far and the documents of whole datasets done."""


def silent(position: int, documents: int) -> None:
    """Show no progress."""


class DatasetMerge:
    """Datasets that are to become one. Making it opens and compares them and writes nothing.

    Args:
        prefixes: of the datasets, in the order of their documents.
        output: prefix of the merged dataset.
        without_sidecar: write none; needed where a dataset has none.
        overwrite: whether an existing dataset may be replaced.

    Raises:
        DataError: no dataset, one that is damaged, is named twice or is the output, or datasets
            that do not fit together; names each.
    """

    published = False
    """Whether the merged dataset is there, whole, under its final names."""

    def __init__(
        self,
        prefixes: Sequence[str | Path],
        output: str | Path,
        without_sidecar: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.output = str(output)
        self._overwrite = overwrite
        self.shards = open_shards([str(prefix) for prefix in prefixes], self.output)
        self._provenance = common_provenance(self.shards, without_sidecar)
        self.documents = sum(shard.dataset.num_documents for shard in self.shards)
        self.tokens = sum(shard.dataset.num_tokens for shard in self.shards)
        self.header = IndexHeader(
            self.shards[0].header.dtype,
            sum(shard.header.num_sequences for shard in self.shards),
            self.documents + 1,
        )
        if self.documents == 0:
            raise DataError(f"{self.output}: the datasets hold no document, so there is none")

    def verify(self, progress: Progress = silent) -> None:
        """Read and check everything: indexes and checksums.

        Raises:
            DataError: the first damage; names file, byte and expectation.
        """
        position = documents = 0
        for shard in self.shards:
            shard.dataset.verify(vocab_size=None, checksums=True)
            shard.dataset.close()
            position += shard.bin_size
            documents += shard.dataset.num_documents
            progress(position, documents)

    def write(self, progress: Progress = silent) -> Sidecar | None:
        """Write the merged dataset.

        Returns:
            Its sidecar, if one was written.

        Raises:
            DataError: a dataset is damaged or changed meanwhile, the output exists, another process
                writes it, or the disk refuses; nothing is left under the final names.
        """
        publication = Publication(self.output, self._overwrite)
        try:
            for shard in self.shards:
                shard.check_index()
            with publication.disk_errors():
                self._refuse_full_disk()
                tokens = _Tokens(publication.bin, self.header.dtype)
                self._copy_tokens(tokens, progress)
                idx_sha256 = publication.write_file(".idx", self._index())
                sidecar = self._sidecar(tokens, idx_sha256)
                if sidecar is not None:
                    publication.write_file(".json", [sidecar.to_json().encode()])
                publication.publish()
        finally:
            self.published = publication.published
            publication.abort()
        return sidecar

    def _refuse_full_disk(self) -> None:
        # Before hours of copying. Holes are kept, so a sparse file needs what it occupies.
        stats = (os.stat(shard.dataset.bin_path) for shard in self.shards)
        needed = sum(min(stat.st_size, stat.st_blocks * 512) for stat in stats) + self.header.size
        folder = Path(self.output).parent
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise DataError(
                f"{self.output}: the merged dataset needs {needed / 1e9:,.3f} GB, but the disk of "
                f"{folder} has {free / 1e9:,.3f} GB left; make room or choose another place"
            )

    def _copy_tokens(self, tokens: _Tokens, progress: Progress) -> None:
        position = documents = 0
        with ThreadPoolExecutor(2) as pool:
            for shard in self.shards:
                own = hashlib.sha256()
                for piece in shard.bin_pieces():
                    # Two sums and the disk at once: hashing releases the interpreter's lock.
                    waiting = [tokens.hash(piece, pool)] if self._provenance else []
                    if shard.dataset.sidecar:
                        waiting.append(pool.submit(own.update, piece.data))
                    tokens.append(piece)
                    for hashed in waiting:
                        hashed.result()  # before the piece's memory is used again
                    position += len(piece)
                    progress(position, documents)
                shard.check_content(own.hexdigest())
                documents += shard.dataset.num_documents
                progress(position, documents)
        tokens.finish()

    def _index(self) -> Iterator[bytes]:
        return index_pieces(self.header, self._lengths, self._document_indices())

    def _lengths(self) -> Iterator[NDArray[np.int32]]:
        for shard in self.shards:
            yield from shard.lengths()

    def _document_indices(self) -> Iterator[NDArray[np.int64]]:
        yield np.zeros(1, dtype=np.int64)
        sequences = 0
        for shard in self.shards:
            for ends in shard.document_ends():
                yield ends + sequences
            sequences += shard.header.num_sequences

    def _sidecar(self, tokens: _Tokens, idx_sha256: str) -> Sidecar | None:
        if self._provenance is None:
            return None
        return Sidecar(
            provenance=self._provenance,
            documents=self.documents,
            tokens=self.tokens,
            dtype=self.header.dtype.name,
            max_token_id=tokens.max_token_id,
            bin_sha256=tokens.sha256,
            idx_sha256=idx_sha256,
        )


class _Tokens:
    """The merged `.bin` file while it is written, and what its sidecar says about it.

    Args:
        file: at its start.
        dtype: of the tokens.
    """

    def __init__(self, file: BinaryIO, dtype: np.dtype[Any]) -> None:
        self._file = file
        self._dtype = dtype
        self._digest = hashlib.sha256()
        self.max_token_id = -1

    @property
    def sha256(self) -> str:
        """Of what was hashed, in hexadecimal."""
        return self._digest.hexdigest()

    def hash(self, piece: NDArray[np.uint8], pool: ThreadPoolExecutor) -> Future[None]:
        """Take the next bytes into checksum and largest id; the result is to be waited for."""
        waiting = pool.submit(self._digest.update, piece.data)
        self.max_token_id = max(self.max_token_id, int(piece.view(self._dtype).max()))
        return waiting

    def append(self, piece: NDArray[np.uint8]) -> None:
        """Write the next bytes; a piece of zeros becomes a hole in the file."""
        if piece[:64].any() or piece.any():
            self._file.write(piece.data)
        else:
            self._file.seek(len(piece), os.SEEK_CUR)

    def finish(self) -> None:
        """Give the file its size, which a hole at the end did not."""
        self._file.truncate()

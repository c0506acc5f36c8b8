"""Text to tokens: JSON lines in, a `.bin/.idx` dataset with its sidecar out.

The parent cuts the input into pieces of whole lines and writes results in their order, workers
tokenize; so the files are the same for any number of workers, and memory holds a few pieces a
worker.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mer.data.indexed_writer import IndexedDatasetWriter, token_dtype
from megatron_mer.data.jsonl import Piece, documents, read_pieces
from megatron_mer.data.sidecar import Provenance, Sidecar, Source
from megatron_mer.data.tokenizers import Tokenizer, load_tokenizer
from megatron_mer.errors import DataError

PIECES_PER_WORKER = 3
"""Pieces in flight for each worker: enough that none waits for the parent."""

Progress = Callable[[int, int], None]
"""Called with the bytes of the input files read so far and the documents written so far."""


@dataclass(frozen=True)
class TokenizedPiece:
    """What a worker sends back."""

    path: str
    """File that the piece came from."""
    tokens: NDArray[Any]
    """Shape (n,): the documents one after the other, in the dataset's dtype."""
    lengths: NDArray[np.int64]
    """Shape (documents,): tokens of each."""
    skipped: int
    """Empty documents."""
    text_bytes: int
    """UTF-8 bytes of the documents' texts."""


@dataclass(frozen=True)
class PieceTokenizer:
    """Tokenizes the documents of a piece."""

    tokenizer: Tokenizer
    """Text to ids."""
    text_key: str
    """Key of the text in each JSON object."""
    append_eod: bool
    """Whether each document ends with the tokenizer's eod_id."""

    def __call__(self, piece: Piece) -> TokenizedPiece:
        """Return the tokens of a piece.

        Raises:
            DataError: a line is no document; names file and line.
        """
        texts = [content[self.text_key] for _, content in documents(piece, self.text_key)]
        kept = [text for text in texts if text.strip()]
        encoded = self.tokenizer.encode_batch(kept)
        if self.append_eod:
            end = np.array([self.tokenizer.eod_id], dtype=np.int32)
            encoded = [np.concatenate((ids, end)) for ids in encoded]
        dtype = token_dtype(self.tokenizer.vocab_size)
        tokens = np.concatenate([np.empty(0, np.int32), *encoded])
        return TokenizedPiece(
            path=piece.path,
            tokens=tokens.astype(dtype),
            lengths=np.array([len(ids) for ids in encoded], dtype=np.int64),
            skipped=len(texts) - len(kept),
            text_bytes=sum(len(text.encode("utf-8")) for text in kept),
        )


def build_corpus(
    inputs: Sequence[str | Path],
    prefix: str | Path,
    tokenizer_name: str,
    text_key: str = "text",
    append_eod: bool = True,
    workers: int = 1,
    overwrite: bool = False,
    progress: Progress = lambda position, written: None,
) -> Sidecar:
    """Tokenize JSON-lines files into one dataset.

    Args:
        inputs: files, plain or gzip; their documents keep this order.
        prefix: of the dataset, without `.bin` and `.idx`.
        tokenizer_name: `kind:place`.
        text_key: key of the text in each JSON object.
        append_eod: whether each document ends with the tokenizer's eod_id.
        workers: processes that tokenize; 1 works in this one. The result does not depend on it.
        overwrite: whether an existing dataset may be replaced.
        progress: called after each piece.

    Returns:
        The sidecar that was written.

    Raises:
        DataError: an input, the tokenizer or the output is unusable; nothing is left under the
            final names.
        ConfigError: the tokenizer's name is unknown.
    """
    if workers < 1:
        raise DataError(f"workers {workers}; at least 1 is needed")
    tokenizer = load_tokenizer(tokenizer_name)
    sources = {str(path): Source(Path(path).name, 0, 0, 0, "") for path in inputs}
    if len(sources) != len(inputs):
        raise DataError("an input file is named twice; its documents would be repeated")
    dtype = token_dtype(tokenizer.vocab_size)
    reader = _Reader(list(sources))
    work = PieceTokenizer(tokenizer, text_key, append_eod)
    with (
        IndexedDatasetWriter(prefix, dtype, overwrite) as writer,
        _tokenized(work, tokenizer_name, workers, reader) as results,
    ):
        for result in results:
            writer.add_documents(result.tokens, result.lengths)
            sources[result.path] = _add(sources[result.path], result)
            progress(reader.position, writer.num_documents)
        provenance = Provenance(
            tokenizer=tokenizer.kind,
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
            append_eod=append_eod,
            sources=tuple(
                replace(source, sha256=reader.sha256(path)) for path, source in sources.items()
            ),
        )
        sidecar = writer.finalize(provenance)
    assert sidecar is not None  # finalize was given a provenance
    return sidecar


def _add(source: Source, result: TokenizedPiece) -> Source:
    return replace(
        source,
        documents=source.documents + len(result.lengths),
        skipped=source.skipped + result.skipped,
        text_bytes=source.text_bytes + result.text_bytes,
    )


class _Reader:
    """Iterates over the pieces of all files, hashing their content on the way."""

    def __init__(self, paths: list[str]) -> None:
        self._digests = {path: hashlib.sha256() for path in paths}
        self.position = 0

    def __iter__(self) -> Iterator[Piece]:
        finished = 0
        for path, digest in self._digests.items():
            for piece in read_pieces(path):
                digest.update(piece.data)
                self.position = finished + piece.file_position
                yield piece
            finished = self.position

    def sha256(self, path: str) -> str:
        return self._digests[path].hexdigest()


@contextmanager
def _tokenized(
    work: PieceTokenizer, tokenizer_name: str, workers: int, pieces: Iterable[Piece]
) -> Iterator[Iterator[TokenizedPiece]]:
    """Yield an iterator over the results, in order; stops the workers at the end."""
    if workers == 1:
        yield map(work, pieces)
        return
    pool = ProcessPoolExecutor(
        workers,
        # A fresh interpreter for each: forking a process that has threads can hang.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer_name, work.text_key, work.append_eod),
    )
    try:
        yield _in_order(pool, pieces, workers * PIECES_PER_WORKER)
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died, most likely killed for its memory; use fewer workers"
        ) from error
    finally:
        # Without waiting: an interrupt while a worker was being started leaves one that never ends.
        pool.shutdown(wait=False, cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, pieces: Iterable[Piece], limit: int
) -> Iterator[TokenizedPiece]:
    waiting: deque[Future[TokenizedPiece]] = deque()
    for piece in pieces:
        waiting.append(pool.submit(_work, piece))
        if len(waiting) >= limit:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_worker: list[PieceTokenizer] = []
"""A worker process's own tokenizer: loaded once, by its initializer."""


def _start_worker(tokenizer_name: str, text_key: str, append_eod: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent decides.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.append(PieceTokenizer(load_tokenizer(tokenizer_name), text_key, append_eod))


def _end_with_parent() -> None:
    """A killed parent leaves nobody to close the queue: its workers would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(piece: Piece) -> TokenizedPiece:
    return _worker[0](piece)

"""A worker's part of a job: units in, shards with manifests out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mer.data.corpus.cutting import chunks_of, parts
from megatron_mer.data.corpus.faults import EMPTY, TOO_LONG, Fault, FaultError, OnError
from megatron_mer.data.corpus.long_lines import LongText
from megatron_mer.data.corpus.parsing import ReadSettings
from megatron_mer.data.corpus.reading import Mark, Reading, Unit, UnitReader, count_lines
from megatron_mer.data.corpus.shards import Counts, Manifest, ShardWriter, stem_of
from megatron_mer.data.index_format import MAX_SEQUENCE_TOKENS
from megatron_mer.data.indexed_writer import token_dtype
from megatron_mer.data.tokenizers import Encoder, Tokenizer
from megatron_mer.data.tokenizers.base import FlatIds
from megatron_mer.data.tokenizers.fast import Choice, same_ids
from megatron_mer.errors import DataError

FORMAT_VERSION = 2
"""Of the shards: another one makes earlier shards useless."""
BATCH_DOCUMENTS = 4096
"""Documents that are encoded together, so that short ones do not cost memory."""
LEAST_PROOF, MOST_PROOF, PROOF_SHARE = 1 << 13, 1 << 15, 1 << 11
"""Characters of each shard on which the fast path's ids are compared with the library's: so many,
or one for that many bytes of the shard."""

Report = Callable[[int, int, int], None]
"""Called with the input's number, and the bytes read and documents written since the last call."""


class Cancelled(Exception):
    """The job is to end."""


@dataclass(frozen=True)
class JobSettings:
    """All that a worker needs to know, and all that the tokens depend on."""

    tokenizer: str
    """Name, see `load_tokenizer`."""
    append_eod: bool = True
    """Whether each document ends with the tokenizer's eod_id."""
    reading: ReadSettings = field(default_factory=ReadSettings)
    """How documents are found."""
    on_error: OnError = "stop"
    """stop: the first document that cannot be used is an error; skip: it is left out and noted."""
    shard_bytes: int = 64 << 20
    """Text in a shard, about."""
    piece_bytes: int = 4 << 20
    """Read at once."""
    threads: int = 1
    """Threads of a worker."""

    def key(self, tokenizer: Tokenizer, fast: bool, unit: Unit) -> str:
        """Return what a unit's shards are made from and how, as a checksum."""
        made = {
            "version": FORMAT_VERSION,
            "tokenizer": [tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id],
            "append_eod": self.append_eod,
            "reading": asdict(self.reading),
            "fast": fast,
            "file": [unit.file.path, unit.file.format, unit.file.stamp],
            "range": [unit.start, unit.stop],
        }
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()


class UnitWorker:
    """Turns units into shards.

    Args:
        settings: of the job.
        folder: for the shards.
        tokenizer: that `settings` names.
        choice: which library gives the ids.
        report: progress.
        stopped: raises `Cancelled` when the job is to end.
    """

    def __init__(
        self,
        settings: JobSettings,
        folder: Path,
        tokenizer: Tokenizer,
        choice: Choice,
        report: Report = lambda source, position, documents: None,
        stopped: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._tokenizer = tokenizer
        self._choice = choice
        self._report = report
        self._stopped = stopped
        self._dtype = token_dtype(tokenizer.vocab_size)

    def run(self, unit: Unit) -> None:
        """Make the shards of a unit that are not there yet.

        Raises:
            DataError: a document cannot be used and `on_error` is stop, the disk refuses, or the
                ids do not fit the vocabulary.
            Cancelled: the job is to end.
        """
        key = self._settings.key(self._tokenizer, self._choice.fast is not None, unit)
        shard, begin, finished = self._find_begin(unit, key)
        if finished:
            self._report(unit.source, unit.size, 0)
            return
        reader = UnitReader(
            unit,
            self._settings.reading,
            self._settings.piece_bytes,
            self._folder,
            begin,
            self._stopped,
        )
        try:
            self._make_shards(unit, reader, shard, key)
        except OSError as error:
            raise DataError(
                f"{self._folder}: cannot be written: {error.strerror or error}; shards that are "
                "finished stay there, and the same command goes on with the rest"
            ) from error

    def _find_begin(self, unit: Unit, key: str) -> tuple[int, Mark, bool]:
        """Return the first shard that is missing, where it begins, and whether there is none."""
        shard, begin = unit.first_shard, Mark()
        while True:
            stem = stem_of(self._folder, unit.source, shard)
            found = Manifest.read(stem, key, self._dtype.itemsize)
            if found is None:
                return shard, begin, False
            if found.last:
                return shard, begin, True
            shard, begin = shard + 1, Mark(found.end, found.lines)

    def _make_shards(self, unit: Unit, reader: UnitReader, shard: int, key: str) -> None:
        building: _Building | None = None
        mark, position, end = reader.begin, unit.start, unit.start + unit.size
        try:
            for reading in reader:
                self._stopped()
                building = building or self._begin(unit, shard)
                written = building.add(reading)
                # A range's last line may end beyond it; of a pipe no size is known.
                now = min(max(reading.position, position), end or reading.position)
                self._report(unit.source, now - position, written)
                mark, position = reading.mark, now
                full = building.writer.counts.text_bytes >= self._settings.shard_bytes
                if unit.stop is None and full and reading.may_end:
                    building.finish(Manifest(key, mark.offset, mark.lines, last=False))
                    building, shard = None, shard + 1
            building = building or self._begin(unit, shard)
            sha256 = reader.sha256 if unit.stop is None else ""
            last = Manifest(key, mark.offset, mark.lines, last=True, sha256=sha256)
            building.finish(last)
            self._report(unit.source, max(end - position, 0), 0)
        except BaseException:
            if building is not None:
                building.writer.abort()
            raise

    def _begin(self, unit: Unit, shard: int) -> _Building:
        writer = ShardWriter(stem_of(self._folder, unit.source, shard), self._dtype)
        return _Building(self._settings, self._tokenizer, self._choice, writer, unit)


class _Building:
    """A shard while it is made.

    Args:
        settings: of the job.
        tokenizer: of the job.
        choice: which library gives the ids, if its ids are right in this shard too.
        writer: of the shard.
        unit: that it belongs to.
    """

    def __init__(
        self,
        settings: JobSettings,
        tokenizer: Tokenizer,
        choice: Choice,
        writer: ShardWriter,
        unit: Unit,
    ) -> None:
        self.writer = writer
        self._settings = settings
        self._tokenizer = tokenizer
        self._choice = choice
        self._encoder: Encoder | None = None
        self._reason = choice.reason
        self._unit = unit

    def add(self, reading: Reading) -> int:
        """Tokenize and write documents; return how many were written."""
        before = self.writer.counts.documents
        batch = reading.batch
        for fault in batch.faults:
            self._leave_out(fault)
        if reading.long is not None:
            self._add_long(reading.long, reading.mark.lines, reading.long.language)
        self._add_texts(batch.texts, batch.languages, reading)
        return self.writer.counts.documents - before

    def finish(self, manifest: Manifest) -> None:
        """Leave the manifest."""
        manifest.encoder = self._reason
        self.writer.finish(manifest)

    def _add_texts(self, texts: list[str], languages: list[str], reading: Reading) -> None:
        """Write short documents together; a long one comes alone, in its place."""
        first = 0
        for at, line in reading.batch.long_lines.items():
            self._add_many(texts[first:at], languages[first:at])
            self._add_long(texts[at], line, languages[at] if languages else "")
            first = at + 1
        self._add_many(texts[first:], languages[first:])

    def _add_many(self, texts: list[str], languages: list[str]) -> None:
        for start in range(0, len(texts), BATCH_DOCUMENTS):
            stop = start + BATCH_DOCUMENTS
            self._add_short(texts[start:stop], languages[start:stop])

    def _add_short(self, texts: list[str], languages: list[str]) -> None:
        flat = self._encode(texts)
        tokens, lengths = flat.tokens, flat.lengths
        if self._settings.append_eod:
            tokens, lengths = self._with_ends(tokens, lengths)
        # After the tokenizer, which leaves the UTF-8 form that is only copied here.
        size = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        self.writer.add(tokens.astype(self.writer.dtype, copy=False), lengths, size)
        for name, text, length in zip(languages, texts, lengths.tolist(), strict=False):
            self.writer.add_language(name, Counts(1, len(text.encode()), length))

    def _add_long(self, text: LongText | str, line: int, language: str) -> None:
        """Write a document part by part."""
        size, before = 0, self.writer.counts.tokens
        chunks = chunks_of(text) if isinstance(text, str) else text.chunks()
        try:
            first = next(chunks, "")
            for part in parts(chain([first], chunks), self._proven([first])):
                size += len(part.encode())
                ids = self._encode([part]).tokens.astype(self.writer.dtype, copy=False)
                self._add_part(ids)
            if self._settings.append_eod:
                self._add_part(np.array([self._tokenizer.eod_id], self.writer.dtype))
            self.writer.end_document(size)
            if self._settings.reading.language_key is not None:
                tokens = self.writer.counts.tokens - before
                self.writer.add_language(language, Counts(1, size, tokens))
        except FaultError as fault:
            self.writer.drop_document()
            self._leave_out(fault.at(line))
        finally:
            if isinstance(text, LongText):
                text.close()

    def _add_part(self, ids: NDArray[Any]) -> None:
        if not self.writer.add_part(ids):
            raise FaultError(TOO_LONG, f"more than {MAX_SEQUENCE_TOKENS:,} tokens; split it")

    def _with_ends(
        self, tokens: NDArray[Any], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Put eod_id behind each document."""
        ends = np.cumsum(lengths + 1) - 1
        whole = np.empty(len(tokens) + len(lengths), dtype=self.writer.dtype)
        is_text = np.ones(len(whole), dtype=np.bool_)
        is_text[ends] = False
        whole[is_text] = tokens
        whole[ends] = self._tokenizer.eod_id
        return whole, lengths + 1

    def _encode(self, texts: list[str]) -> FlatIds:
        """Return ids that fit the vocabulary, before any cast could wrap them."""
        flat = self._proven(texts).encode_flat(texts, self._settings.threads)
        if len(flat.tokens):
            smallest, largest = int(flat.tokens.min()), int(flat.tokens.max())
            if smallest < 0 or largest >= self._tokenizer.vocab_size:
                wrong = largest if smallest >= 0 else smallest
                raise DataError(
                    f"{self._unit.file.path}: token id {wrong}; the tokenizer's vocabulary has 0 "
                    f"to {self._tokenizer.vocab_size - 1}: its file contradicts itself"
                )
        return flat

    def _proven(self, texts: list[str]) -> Encoder:
        """The encoder of this shard: the fast one if it is right on the shard's first texts."""
        if self._encoder is None:
            self._encoder = self._tokenizer
            if self._choice.fast is not None:
                sample, left = [], self._proof_characters()
                for text in texts:
                    sample.append(text[:left])
                    left -= len(sample[-1])
                    if left <= 0:
                        break
                if same_ids(self._choice.fast, self._tokenizer, sample):
                    self._encoder = self._choice.fast
                else:
                    self._reason = "the tokenizer's library: gigatoken's ids differ in this shard"
        return self._encoder

    def _proof_characters(self) -> int:
        most = self._settings.shard_bytes
        size = min(self._unit.size or most, most)
        return min(max(size // PROOF_SHARE, LEAST_PROOF), MOST_PROOF)

    def _leave_out(self, fault: Fault) -> None:
        if self._settings.on_error == "stop" and fault.kind != EMPTY:
            raise DataError(self._place(fault.line) + f": {fault.reason}")
        self.writer.add_fault(fault)

    def _place(self, line: int) -> str:
        """File and line, counted from the file's start."""
        unit = self._unit
        before = count_lines(unit.file.path, unit.start) if unit.start else 0
        word = "row" if unit.file.format == "parquet" else "line"
        return f"{unit.file.path}, {word} {before + line}"

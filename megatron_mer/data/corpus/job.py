"""A whole job: from inputs to a dataset, shard by shard."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from megatron_mer.data.corpus.assembly import Assembly, SourceTotals
from megatron_mer.data.corpus.hashing import SharedFiles
from megatron_mer.data.corpus.inputs import STDIN, Format, InputFile, expand_inputs, stamp_of
from megatron_mer.data.corpus.partition import Partition
from megatron_mer.data.corpus.pool import WorkerPool
from megatron_mer.data.corpus.reading import Unit, plan_units
from megatron_mer.data.corpus.sampling import Sample, sample_inputs
from megatron_mer.data.corpus.shards import Counts
from megatron_mer.data.corpus.streams import Torn
from megatron_mer.data.corpus.worker import JobSettings, UnitWorker
from megatron_mer.data.indexed_writer import token_dtype
from megatron_mer.data.publication import Publication
from megatron_mer.data.sidecar import Provenance, Sidecar, Source
from megatron_mer.data.tokenizers import Tokenizer, load_tokenizer
from megatron_mer.data.tokenizers.fast import Choice, Engine, choose_encoder
from megatron_mer.errors import DataError

MEGABYTE = 1 << 20
LEAST_WORKER_MEMORY = 64 * MEGABYTE
MEMORY_SHARES = 32
"""A piece is that small a part of a worker's memory: lines, texts, ids and copies of each."""
MOST_PIECE = 4 * MEGABYTE
INLINE_BYTES = 8 * MEGABYTE
"""Input below which starting processes takes longer than they save."""
PARTS_SUFFIX = ".parts"


@dataclass(frozen=True)
class Job:
    """What is to be done."""

    inputs: Sequence[str]
    """Files, directories, patterns, `-`; see `inputs.expand_inputs`."""
    prefix: str
    """Of the dataset."""
    settings: JobSettings
    """How."""
    format: Format | None = None
    """Of all inputs; None: by their names."""
    workers: int = 1
    """Processes, or threads of one process where the input cannot be split."""
    worker_memory: int = 128 * MEGABYTE
    """Bytes of text and ids that a worker may hold, beside libraries and the tokenizer's tables."""
    engine: Engine = "auto"
    """Which library gives the ids, see `choose_encoder`."""
    partition: Partition = field(default_factory=Partition)
    """Which part of the job this process does."""
    overwrite: bool = False
    """Whether an existing dataset may be replaced."""


@dataclass(frozen=True)
class Result:
    """What was done."""

    prefix: str
    """Of the dataset."""
    sidecar: Sidecar | None
    """Of the dataset; None: this part of the job has no document, and there is no dataset."""
    sources: Sequence[SourceTotals] = ()
    """What came out of each input."""
    languages: dict[str, Counts] = field(default_factory=dict)
    """The same by language, if that was asked for."""


@dataclass(frozen=True)
class Begun:
    """What is known before the first shard, for people who wait."""

    total_bytes: int
    """Of the inputs, as far as they are known."""
    units: int
    """Units of work."""
    workers: int
    """Processes."""
    encoder: str
    """Library that gives the ids, and why that one."""


Progress = Callable[[int, int], None]
"""Called with the bytes of the input files read so far and the documents written so far."""


def build_corpus(
    job: Job,
    begun: Callable[[Begun], None] = lambda begun: None,
    progress: Progress = lambda position, documents: None,
) -> Result:
    """Tokenize inputs into one dataset, or go on with that where an earlier run was killed.

    Args:
        job: what and how.
        begun: called once before the first shard.
        progress: called now and then.

    Raises:
        DataError: an input, the tokenizer or the output is unusable; nothing is left under the
            final names, and shards that are finished stay for the next run.
        ConfigError: the tokenizer's name is unknown.
    """
    settings = replace(job.settings, piece_bytes=_piece_bytes(job))
    tokenizer = load_tokenizer(settings.tokenizer, settings.append_eod)
    files = expand_inputs(job.inputs, job.format)
    by_file = plan_units(files, settings.reading, settings.shard_bytes)
    units = job.partition.choose([unit for units in by_file for unit in units])
    prefix = job.partition.prefix(job.prefix)
    if not units:
        return Result(prefix, None)
    with Publication(prefix, job.overwrite) as publication:
        sample = _sample(job, files, settings)
        documents = round(sample.density * sum(unit.size for unit in units))
        choice = choose_encoder(tokenizer, job.engine, sample.texts, documents)
        work = _Work(job, settings, tokenizer, choice, units, Path(prefix + PARTS_SUFFIX))
        begun(Begun(work.total_bytes, len(units), work.processes, choice.reason))
        try:
            return work.run(publication, progress)
        finally:
            work.remove_empty_folder()


def _piece_bytes(job: Job) -> int:
    if job.workers < 1:
        raise DataError(f"workers {job.workers}; at least 1 is needed")
    if job.worker_memory < LEAST_WORKER_MEMORY:
        raise DataError(
            f"worker memory of {job.worker_memory / MEGABYTE:g} MiB; at least "
            f"{LEAST_WORKER_MEMORY // MEGABYTE} are needed"
        )
    if job.settings.shard_bytes < 1:
        raise DataError(f"shards of {job.settings.shard_bytes} bytes; at least 1 is needed")
    return min(job.settings.piece_bytes, job.worker_memory // MEMORY_SHARES, MOST_PIECE)


def _sample(job: Job, files: list[InputFile], settings: JobSettings) -> Sample:
    return Sample([], 0) if job.engine == "library" else sample_inputs(files, settings.reading)


class _Work:
    """A job while it is done.

    Args:
        job: what and how.
        settings: for the workers.
        tokenizer: of the job.
        choice: which library gives the ids.
        units: of this part of the job.
        folder: for the shards.
    """

    def __init__(
        self,
        job: Job,
        settings: JobSettings,
        tokenizer: Tokenizer,
        choice: Choice,
        units: list[Unit],
        folder: Path,
    ) -> None:
        self._tokenizer = tokenizer
        self._choice = choice
        self._units = units
        self._folder = folder
        self._is_part = job.partition.count > 1
        self._position = self._documents = 0
        self.total_bytes = sum(unit.size for unit in units)
        small = 0 < self.total_bytes < INLINE_BYTES
        # Standard input belongs to this process.
        here = any(unit.file.path == STDIN for unit in units)
        self.processes = 1 if small or here else min(job.workers, len(units))
        self._settings = replace(settings, threads=self._threads(job.workers))

    def run(self, publication: Publication, progress: Progress) -> Result:
        """Do it, and give the dataset its final names."""
        self._make_folder()
        assembly = Assembly(
            publication,
            self._folder,
            self._units,
            lambda unit: self._settings.key(self._tokenizer, self._choice.fast is not None, unit),
            token_dtype(self._tokenizer.vocab_size),
        )
        hashes = SharedFiles(self._units)

        def advance() -> None:
            assembly.advance()
            progress(self._position, self._documents)

        try:
            self._make_shards(publication.bin, hashes.start, advance)
            if not assembly.advance():
                raise DataError(f"{self._folder}: shards vanished while the job was running")
            self._refuse_changed_inputs()
            for source, sha256 in self._sums(hashes).items():
                assembly.totals[source].sha256 = sha256
        finally:
            hashes.end()
        return self._publish(publication, assembly, progress)

    def _publish(self, publication: Publication, assembly: Assembly, progress: Progress) -> Result:
        sidecar = None
        if assembly.counts.documents:
            sidecar = assembly.publish(self._provenance)
        else:
            left_out = assembly.publish_nothing()
            if not self._is_part:
                raise DataError(
                    f"{publication.prefix}: no document was written, so there is no dataset; "
                    f"{left_out}"
                )
            publication.remove_existing()
        progress(self.total_bytes, assembly.counts.documents)
        return Result(
            publication.prefix, sidecar, list(assembly.totals.values()), assembly.languages
        )

    def remove_empty_folder(self) -> None:
        """Leave no folder where no shard was finished."""
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _threads(self, workers: int) -> int:
        """Threads a process: more than one where the input has fewer units than there are workers.

        One large unit among small ones is given the threads that it will have to itself.
        """
        largest = max(unit.size for unit in self._units)
        streams = round(self.total_bytes / largest) if largest else 1
        return max(1, workers // max(1, min(self.processes, streams)))

    def _make_shards(
        self, locked: BinaryIO, begun: Callable[[], None], advance: Callable[[], None]
    ) -> None:
        """Make all shards.

        Args:
            locked: a file that stays this process's alone.
            begun: called once the workers are there; it may start threads.
            advance: called now and then, to use what is finished.
        """
        if self.processes == 1:

            def report(source: int, position: int, documents: int) -> None:
                self._report(source, position, documents)
                advance()

            begun()
            worker = UnitWorker(self._settings, self._folder, self._tokenizer, self._choice, report)
            for unit in self._units:
                worker.run(unit)
            return
        pool = WorkerPool(
            self._settings, self._folder, self._tokenizer, self._choice, self.processes, locked
        )
        with pool:
            for _ in pool.run(self._units, self._report, begun):
                advance()

    def _report(self, source: int, position: int, documents: int) -> None:
        self._position += position
        self._documents += documents

    def _make_folder(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self._folder}: cannot be written: {error.strerror}") from error

    def _refuse_changed_inputs(self) -> None:
        for file in {unit.source: unit.file for unit in self._units}.values():
            if not file.once and stamp_of(file.path) != file.stamp:
                raise DataError(f"{file.path}: changed while it was read; start again")

    @staticmethod
    def _sums(hashes: SharedFiles) -> dict[int, str]:
        try:
            return hashes.result()
        except (OSError, Torn) as error:
            raise DataError(f"an input cannot be read any more: {error}") from error

    def _provenance(self, sources: tuple[Source, ...]) -> Provenance:
        return Provenance(
            tokenizer=self._tokenizer.kind,
            fingerprint=self._tokenizer.fingerprint,
            vocab_size=self._tokenizer.vocab_size,
            eod_id=self._tokenizer.eod_id,
            append_eod=self._settings.append_eod,
            sources=sources,
        )


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))

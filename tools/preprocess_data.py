r"""Tokenize text into a Megatron dataset: PREFIX.bin, PREFIX.idx and PREFIX.json.

Examples:
    python tools/preprocess_data.py --input fr.jsonl.gz --output-prefix data/fr \
        --tokenizer sentencepiece:tokenizer.model
    python tools/preprocess_data.py --input 's3://corpora/fr/*.parquet' --output-prefix data/fr \
        --tokenizer hf:llama3/tokenizer.json --partition slurm
    zcat fr.gz | python tools/preprocess_data.py --input - --output-prefix data/fr \
        --tokenizer tiktoken:llama3/tokenizer.model

Inputs are JSON lines, Parquet (.parquet) or plain text (.txt), plain or compressed (gzip,
Zstandard). The work is a list of shards in PREFIX.parts; a job that was killed goes on with what is
missing when it is started again, and the files are the same for any number of workers and any kill.
Nothing has its final name before it is whole.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

# Only a process without threads can fork its workers: none of numpy's (nothing here is linear
# algebra) and none of pyarrow's, which gigatoken's batches import.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
# A machine that only prepares corpora needs no installed package, no compiler and no torch.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mer.data.corpus.job import MEGABYTE, Begun, Job, Progress, Result, build_corpus
from megatron_mer.data.corpus.job import usable_cores as cores
from megatron_mer.data.corpus.parsing import ReadSettings
from megatron_mer.data.corpus.partition import Partition, parse_partition
from megatron_mer.data.corpus.shards import Counts
from megatron_mer.data.corpus.worker import JobSettings
from megatron_mer.errors import MegatronMerError

REPORT_SECONDS = 10.0
STOP_SECONDS = 5.0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, directories, quoted patterns, remote paths such as s3://..., or - for "
        "standard input",
    )
    add("--output-prefix", required=True, metavar="PREFIX", help="path without .bin and .idx")
    add(
        "--tokenizer",
        required=True,
        metavar="KIND:PATH",
        help="sentencepiece:MODEL, hf:TOKENIZER.JSON[#END_TOKEN] or tiktoken:RANKS[#SCHEME]",
    )
    _add_reading(parser)
    add(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the tokenizer's end-of-document id (default: yes)",
    )
    add(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="what a document does that is no valid text: stop the job (default), or be left out, "
        "counted, and named in PREFIX.faults.jsonl",
    )
    _add_work(parser)
    add("--overwrite", action="store_true", help="replace an existing dataset")
    return parser.parse_args(arguments)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--format",
        choices=("jsonl", "parquet", "text"),
        help="of all inputs (default: by the ends of their names, and else jsonl)",
    )
    add(
        "--text-key",
        action="append",
        metavar="KEY",
        help="key or column of the text; given several times, the texts are joined (default: text)",
    )
    add(
        "--key-separator",
        default="\n",
        metavar="TEXT",
        help="between the texts of several keys (default: a newline)",
    )
    add(
        "--text-documents",
        choices=("file", "line"),
        default="file",
        help="what a document is in plain text (default: the file)",
    )
    add("--language-key", metavar="KEY", help="key or column of the language, to count by it")


def _add_work(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--workers", type=int, default=cores(), metavar="N", help="default: the number of cores")
    add(
        "--worker-memory",
        type=float,
        default=128,
        metavar="MIB",
        help="text and ids that a worker holds at a time, beside the libraries and the tokenizer's "
        "tables; at least 64 (default: 128)",
    )
    add(
        "--shard-size",
        type=float,
        default=64,
        metavar="MIB",
        help="text in a shard, about: what a killed job has to do again (default: 64)",
    )
    add(
        "--partition",
        metavar="I/N",
        help="do the I-th of N parts (from 0) into PREFIX.part-I-of-N, which merge_datasets.py "
        "joins; slurm: the task of an array job",
    )
    add(
        "--engine",
        choices=("auto", "library", "gigatoken"),
        default="auto",
        help="auto: gigatoken, if it is installed and gives the ids of the tokenizer's own library "
        "on a sample of this input and at the beginning of each shard; library: never; gigatoken: "
        "an error where it cannot be used",
    )


def job_of(options: argparse.Namespace) -> Job:
    """Return the job that a command line describes.

    Raises:
        DataError: the partition is none.
    """
    reading = ReadSettings(
        text_keys=tuple(options.text_key or ["text"]),
        separator=options.key_separator,
        text_unit=options.text_documents,
        language_key=options.language_key,
    )
    settings = JobSettings(
        tokenizer=options.tokenizer,
        append_eod=options.append_eod,
        reading=reading,
        on_error=options.on_error,
        shard_bytes=int(options.shard_size * MEGABYTE),
    )
    return Job(
        inputs=options.input,
        prefix=options.output_prefix,
        settings=settings,
        format=options.format,
        workers=options.workers,
        worker_memory=int(options.worker_memory * MEGABYTE),
        engine=options.engine,
        partition=parse_partition(options.partition) if options.partition else Partition(),
        overwrite=options.overwrite,
    )


def progress_printer(total: int) -> Progress:
    """Return a callback: a line that renews itself in a terminal, a line now and then elsewhere.

    Args:
        total: bytes of all inputs; 0: not known.
    """
    terminal = sys.stderr.isatty()
    start = last = time.monotonic()

    def show(position: int, written: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < (0.2 if terminal else REPORT_SECONDS) and not (
            terminal and position >= total
        ):
            return
        last = now
        line = progress_line(position, total, written, now - start)
        print(
            f"\r{line}\x1b[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr
        )

    return show


def progress_line(position: int, total: int, written: int, seconds: float) -> str:
    """Return how far the job is, in words."""
    rate = position / max(seconds, 1e-9)
    parts = [f"{written:,} documents", f"{rate / 1e6:.1f} MB/s of files"]
    if total:
        share = min(position / total, 1.0)
        done = int(20 * share)
        parts.insert(0, f"[{'#' * done}{'.' * (20 - done)}] {100 * share:5.1f}%")
        if 0 < position < total:
            left = round((total - position) / rate)
            parts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
    return ", ".join(parts)


def table(head: str, entries: Iterable[tuple[str, Counts, int, int]]) -> list[str]:
    """Return lines of counts: a name, its counts, empty documents and faults."""
    rows = list(entries)
    width = max(len(head), *(len(name) for name, *_ in rows))
    titles = ("documents", "empty", "faults", "bytes", "tokens", "bytes/token")
    lines = [f"{head:<{width}} " + " ".join(f"{title:>14}" for title in titles)]
    for name, counts, empty, faults in rows:
        ratio = f"{counts.text_bytes / counts.tokens:.2f}" if counts.tokens else "-"
        numbers = (counts.documents, empty, faults, counts.text_bytes, counts.tokens)
        cells = [*(f"{number:,}" for number in numbers), ratio]
        lines.append(f"{name:<{width}} " + " ".join(f"{cell:>14}" for cell in cells))
    return lines


def left_out(result: Result) -> int:
    """Return how many documents were empty or had a fault."""
    return sum(sum(source.faults.values()) for source in result.sources)


def summary(result: Result) -> str:
    """Return what was written: a line an input, their total, and a line a language."""
    sidecar = result.sidecar
    if sidecar is None:
        left = " (what was left out is named in its .faults.jsonl)" if left_out(result) else ""
        return f"{result.prefix}: no document in this part of the job, so no dataset{left}"
    sources, total = sidecar.provenance.sources, Counts()
    for source in result.sources:
        total.add(source.counts)
    empty, faults = sum(s.skipped for s in sources), sum(s.faults for s in sources)
    rows = []
    for source in sources:
        counts = Counts(source.documents, source.text_bytes, source.tokens)
        rows.append((source.file, counts, source.skipped, source.faults))
    lines = table("source", [*rows, ("total", total, empty, faults)])
    if result.languages:
        named = sorted(result.languages.items())
        lines += table("language", [(name or "(none)", counts, 0, 0) for name, counts in named])
    lines += sorted({f"ids: {source.encoder}" for source in sources})
    if left_out(result):
        lines.append(f"what was left out is named in {result.prefix}.faults.jsonl")
    lines.append(
        f"{result.prefix}: {sidecar.tokens:,} tokens of {sidecar.dtype}, "
        f"{total.text_bytes / sidecar.tokens:.2f} bytes a token, largest id "
        f"{sidecar.max_token_id} of {sidecar.provenance.vocab_size}"
    )
    return "\n".join(lines)


def counted(number: int, what: str) -> str:
    """Return a number of things in words."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


class Stopped(BaseException):
    """The user or the system asked the run to stop.

    Args:
        number: of the signal.
    """

    asked = False
    """Whether one was raised already."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        Stopped.asked = True


def stop(number: int, frame: object) -> None:
    """Unwind, so that what is half written is removed; a second signal ends the process at once."""
    if Stopped.asked:
        os._exit(128 + number)
    raise Stopped(number)


def left_behind(job: Job) -> str:
    """Say what a run that did not end well leaves."""
    parts = Path(job.partition.prefix(job.prefix) + ".parts")
    shards = len(list(parts.glob("*.json")))
    if not shards:
        return "nothing was left behind"
    return f"{counted(shards, 'finished shard')} in {parts}: the same command goes on with the rest"


def run(job: Job) -> Result:
    """Do a job, with its progress on standard error."""
    shown: list[Callable[[int, int], None]] = []

    def begun(what: Begun) -> None:
        print(
            f"{counted(what.units, 'unit')} of work, {counted(what.workers, 'worker')}; ids: "
            f"{what.encoder}",
            flush=True,
        )
        shown.append(progress_printer(what.total_bytes))

    return build_corpus(job, begun, lambda position, written: shown[0](position, written))


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    options = parse_arguments(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    job = None
    try:
        job = job_of(options)
        result = run(job)
    except Stopped as stopped:
        left = left_behind(job) if job else "nothing was left behind"
        print(f"stopped by signal {stopped.number}; {left}", file=sys.stderr)
        # Leaving waits for the workers, and for one that was being started when the signal came it
        # would wait without end. They end by themselves when this process is gone.
        guard = threading.Timer(STOP_SECONDS, os._exit, (128 + stopped.number,))
        guard.daemon = True
        guard.start()
        return 128 + stopped.number
    except MegatronMerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(summary(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

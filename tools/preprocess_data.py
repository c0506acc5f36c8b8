r"""Tokenize JSON-lines files into a Megatron dataset: PREFIX.bin, PREFIX.idx and PREFIX.json.

Example:
    python tools/preprocess_data.py --input fr.jsonl.gz --output-prefix data/fr \
        --tokenizer sentencepiece:tokenizer.model --workers 8

The files are the same for any number of workers. Nothing has its final name before it is whole.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path

# A machine that only prepares corpora needs no installed package, no compiler and no torch.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mer.data.corpus_builder import Progress, build_corpus
from megatron_mer.data.sidecar import Sidecar
from megatron_mer.errors import MegatronMerError

REPORT_SECONDS = 10.0
STOP_SECONDS = 5.0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="JSON lines, plain or gzip")
    add("--output-prefix", required=True, metavar="PREFIX", help="path without .bin and .idx")
    add("--tokenizer", required=True, metavar="KIND:PATH", help="such as sentencepiece:tok.model")
    add("--text-key", default="text", metavar="KEY", help="key of the text (default: text)")
    add(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the tokenizer's end-of-document id (default: yes)",
    )
    add("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    add("--overwrite", action="store_true", help="replace an existing dataset")
    return parser.parse_args(arguments)


def progress_printer(inputs: list[str]) -> Progress:
    """Return a callback: a line that renews itself in a terminal, a line now and then elsewhere."""
    total = sum(Path(path).stat().st_size for path in inputs if Path(path).exists())
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
        share = 100 * position / max(total, 1)
        rate = position / 1e6 / max(now - start, 1e-9)
        line = f"{share:5.1f}% of the input, {written:,} documents, {rate:.1f} MB/s of files"
        print(
            f"\r{line}\x1b[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr
        )

    return show


def summary(sidecar: Sidecar) -> str:
    """Return the table of what was written: a line a file and their total."""
    sources = sidecar.provenance.sources
    width = max(len("total"), *(len(source.file) for source in sources))
    head = f"{'file':<{width}} {'documents':>12} {'empty':>8} {'bytes':>16}"
    lines = [head] + [
        f"{source.file:<{width}} {source.documents:>12,} {source.skipped:>8,} "
        f"{source.text_bytes:>16,}"
        for source in sources
    ]
    text_bytes = sum(source.text_bytes for source in sources)
    skipped = sum(source.skipped for source in sources)
    lines.append(f"{'total':<{width}} {sidecar.documents:>12,} {skipped:>8,} {text_bytes:>16,}")
    lines.append(
        f"{sidecar.tokens:,} tokens of {sidecar.dtype}, {text_bytes / sidecar.tokens:.2f} bytes a "
        f"token, largest id {sidecar.max_token_id} of {sidecar.provenance.vocab_size}"
    )
    return "\n".join(lines)


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
    """Unwind, so that what was written is removed; a second signal ends the process at once."""
    if Stopped.asked:
        os._exit(128 + number)
    raise Stopped(number)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    options = parse_arguments(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        sidecar = build_corpus(
            options.input,
            options.output_prefix,
            options.tokenizer,
            text_key=options.text_key,
            append_eod=options.append_eod,
            workers=options.workers,
            overwrite=options.overwrite,
            progress=progress_printer(options.input),
        )
    except Stopped as stopped:
        print(f"stopped by signal {stopped.number}; nothing was left behind", file=sys.stderr)
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
    print(summary(sidecar))
    return 0


if __name__ == "__main__":
    sys.exit(main())

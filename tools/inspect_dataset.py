r"""Look at Megatron datasets: size, documents and their lengths, sidecar, damage, and the text.

Examples:
    python tools/inspect_dataset.py data/fr
    python tools/inspect_dataset.py data/fr --check full --vocab-size 32000
    python tools/inspect_dataset.py data/fr --tokenizer sentencepiece:tok.model --samples 3
    python tools/inspect_dataset.py data/fr --tokenizer sentencepiece:tok.model --documents 5:8
    python tools/inspect_dataset.py 'data/*_train' --histogram lengths.png --json > datasets.json

All figures are exact. A length counts every token of a document, its end-of-document id too; "95 %
up to 900" means that 95 % of the documents have at most 900 tokens. Opening checks the sizes and
both ends of the index; --check full reads everything. The exit code is 2 if a dataset is damaged or
does not fit; the others are shown all the same.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

# A machine that only prepares corpora needs no installed package, no compiler and no torch.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mer.command import run_tool
from megatron_mer.data.document_lengths import (
    DocumentBounds,
    DocumentLengths,
    document_lengths,
    log_edges,
)
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.packing import num_samples
from megatron_mer.data.prefixes import expand_prefixes
from megatron_mer.data.sidecar import Sidecar
from megatron_mer.data.tokenizers import Tokenizer, load_tokenizer
from megatron_mer.errors import ConfigError, DataError, MegatronMerError

BAR = 40
"""Characters of the longest bar in the terminal."""
SOURCES = 8
"""Source files that are listed; the rest is counted."""
ESCAPES = {
    code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)] if chr(code) not in "\t\n"
}
"""What could steer the terminal is shown instead of obeyed: texts come from anywhere."""


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number, at least 1")
    return int(text)


def document_range(text: str) -> tuple[int, int | None]:
    """Read `A:B`: documents A to B - 1, counted from 0; `A:` to the last one, `A` this one."""
    first, colon, stop = text.partition(":")
    parts = [part for part in (first, stop) if part]
    if not parts or not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}; expected A:B, such as 0:3, counted from 0")
    begin = int(first or 0)
    return begin, (int(stop) if stop else None) if colon else begin + 1


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("prefixes", nargs="+", metavar="PREFIX", help="path without .bin and .idx, or a pattern")
    add("--check", choices=("open", "full"), default="open", help="default: open")
    add("--vocab-size", type=positive, metavar="N", help="ids must be below N")
    add("--tokenizer", metavar="KIND:PATH", help="to show text, such as sentencepiece:tok.model")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--samples", type=positive, metavar="N", help="show N documents, drawn")
    shown.add_argument("--documents", type=document_range, metavar="A:B", help="show A to B - 1")
    add("--seed", type=int, default=1, metavar="K", help="of the draw (default: 1)")
    add(
        "--max-tokens",
        type=int,
        default=256,
        metavar="N",
        help="show so many tokens of a document; 0: all (default: 256)",
    )
    add(
        "--seq-length",
        type=positive,
        default=2048,
        metavar="S",
        help="count the training samples of this length (default: 2048)",
    )
    add("--histogram", metavar="FILE.png", help="draw the document lengths")
    add("--json", action="store_true", help="print JSON instead of text")
    return parser.parse_args(arguments)


def inspect(
    prefix: str, options: argparse.Namespace, tokenizer: Tokenizer | None
) -> tuple[dict[str, Any], DocumentLengths]:
    """Return what `--json` prints about a dataset, and its document lengths.

    Raises:
        DataError: it is damaged, or does not fit tokenizer or vocabulary.
    """
    dataset = IndexedDataset(prefix)
    refuse_misfit(dataset, options.vocab_size, tokenizer)
    lengths = document_lengths(dataset)
    paths = [Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx", ".json")]
    edges = log_edges(max(1, lengths.maximum) if lengths.documents else 1, per_doubling=1)
    facts = {
        "prefix": prefix,
        "files": {str(path): path.stat().st_size for path in paths if path.exists()},
        "dtype": dataset.dtype.name,
        "tokens": dataset.num_tokens,
        "documents": dataset.num_documents,
        "empty_documents": lengths.empty,
        "sequences": dataset.num_sequences,
        "lengths": lengths.figures(),
        "histogram": {"edges": edges.tolist(), "documents": lengths.histogram(edges).tolist()},
        "seq_length": options.seq_length,
        "samples": (
            num_samples(dataset.num_tokens, options.seq_length)
            if dataset.num_tokens > options.seq_length
            else 0
        ),
        "sidecar": sidecar_facts(dataset.sidecar),
        "check": options.check,
        "checked": check(dataset, options, tokenizer),
        "shown": [
            show(dataset, document, options.max_tokens, tokenizer)
            for document in chosen(dataset.num_documents, options, prefix)
        ],
    }
    dataset.close()
    return facts, lengths


def refuse_misfit(
    dataset: IndexedDataset, vocab_size: int | None, tokenizer: Tokenizer | None
) -> None:
    """Raise a DataError where the sidecar contradicts the command line."""
    if dataset.sidecar is None:
        return
    own = dataset.sidecar.provenance
    if tokenizer is not None and tokenizer.fingerprint != own.fingerprint:
        raise DataError(
            f"{dataset.prefix}.json: was tokenized by a {own.tokenizer} model with SHA-256 "
            f"{own.fingerprint}, but --tokenizer has {tokenizer.fingerprint}: its text would come "
            "out wrong; name the model it was tokenized with"
        )
    if vocab_size is not None and dataset.sidecar.max_token_id >= vocab_size:
        raise DataError(
            f"{dataset.prefix}.json: the largest token id is {dataset.sidecar.max_token_id}, but "
            f"--vocab-size {vocab_size} allows 0 to {vocab_size - 1}"
        )


def sidecar_facts(sidecar: Sidecar | None) -> dict[str, Any] | None:
    """Return the sidecar with the bytes of text for each token, where it knows the sources."""
    if sidecar is None:
        return None
    text_bytes = sum(source.text_bytes for source in sidecar.provenance.sources)
    known = bool(sidecar.provenance.sources) and sidecar.tokens > 0
    return {**asdict(sidecar), "bytes_per_token": text_bytes / sidecar.tokens if known else None}


def check(
    dataset: IndexedDataset, options: argparse.Namespace, tokenizer: Tokenizer | None
) -> list[str]:
    """Check a dataset as far as asked for and say what was checked.

    Raises:
        DataError: damage; names file, byte and expectation.
    """
    done = ["sizes, dtype and both ends of the index"]
    sidecar = dataset.sidecar
    if options.check == "open":
        if options.vocab_size is not None and sidecar is None:
            done.append("not the ids: without a sidecar only --check full compares --vocab-size")
        return done
    vocab_size = options.vocab_size
    if vocab_size is None and (known := tokenizer or (sidecar and sidecar.provenance)):
        vocab_size = known.vocab_size
    if not options.json:
        print(f"checking {dataset.prefix} ...", file=sys.stderr)
    dataset.verify(vocab_size=vocab_size, checksums=True)
    done.append(f"all {dataset.num_sequences:,} lengths and pointers of the index")
    done.append(f"all {dataset.num_documents + 1:,} document indices")
    if vocab_size is None:
        done.append("not the ids: no vocabulary is known (--vocab-size)")
    else:
        done.append(f"all {dataset.num_tokens:,} ids, which are in 0 to {vocab_size - 1:,}")
    if sidecar is None:
        done.append("no checksums: there is no sidecar")
    else:
        done.append("the SHA-256 of both files")
    return done


def chosen(documents: int, options: argparse.Namespace, prefix: str) -> Sequence[int]:
    """Return the documents to show.

    Raises:
        DataError: there are no such documents.
    """
    if options.samples is not None:
        drawn = random.Random(options.seed).sample(
            range(documents), min(options.samples, documents)
        )
        return sorted(drawn)
    if options.documents is None:
        return []
    first, stop = options.documents
    stop = documents if stop is None else stop
    if not 0 <= first < stop <= documents:
        raise DataError(
            f"{prefix}: --documents {first}:{stop} was asked for; it has {documents} documents, "
            "counted from 0, and the range ends before its second number"
        )
    return range(first, stop)


def show(
    dataset: IndexedDataset, document: int, max_tokens: int, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Return the beginning of a document: its text, or its ids where there is no tokenizer."""
    start, stop = DocumentBounds(dataset).of(document, document + 1).tolist()
    end = min(stop, start + max_tokens) if max_tokens > 0 else stop
    ids = dataset.tokens(start, end)
    shown = {"document": document, "tokens": stop - start, "left_out": stop - end}
    if tokenizer is None:
        return {**shown, "ids": ids.tolist()}
    try:
        text = tokenizer.decode(ids)
    except DataError as error:
        raise DataError(f"{dataset.prefix}: document {document}: {error}") from error
    # A character of several byte tokens may be cut in its middle.
    return {**shown, "text": text.rstrip("\ufffd") if stop > end else text}


def describe(facts: dict[str, Any]) -> str:
    """Return the report on one dataset for a terminal."""
    files = ", ".join(f"{Path(path).name} {size(count)}" for path, count in facts["files"].items())
    lines = [
        facts["prefix"],
        row("files", files),
        row("tokens", f"{facts['tokens']:,} of {facts['dtype']}"),
        row(
            "documents",
            f"{facts['documents']:,} ({facts['empty_documents']:,} empty) in "
            f"{facts['sequences']:,} sequences",
        ),
    ]
    if (lengths := facts["lengths"]) is not None:
        lines.append(
            row(
                "length",
                f"min {lengths['min']:,}, median {lengths['median']:,}, mean "
                f"{lengths['mean']:,.1f}, 95 % up to {lengths['p95']:,}, max {lengths['max']:,}",
            )
        )
    lines.append(row("samples", f"{facts['samples']:,} of --seq-length {facts['seq_length']:,}"))
    lines += describe_sidecar(facts["sidecar"])
    lines += [row("" if at else "checked", what) for at, what in enumerate(facts["checked"])]
    return "\n".join([*lines, "", *bars(facts), *map(describe_document, facts["shown"])])


def row(name: str, value: str) -> str:
    """Return a line of the table."""
    return f"  {name:<10} {value}"


def size(count: int) -> str:
    """Return a number of bytes in few letters."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def describe_sidecar(sidecar: dict[str, Any] | None) -> list[str]:
    """Return the lines on tokenizer and sources."""
    if sidecar is None:
        return [row("sidecar", "none: tokenizer, sources and checksums are unknown")]
    known = sidecar["provenance"]
    end = "end with" if known["append_eod"] else "do not end with"
    lines = [
        row("tokenizer", f"{known['tokenizer']}, SHA-256 {known['fingerprint']}"),
        row(
            "",
            f"{known['vocab_size']:,} ids, largest used {sidecar['max_token_id']:,}; documents "
            f"{end} id {known['eod_id']}",
        ),
    ]
    for at, source in enumerate(known["sources"][:SOURCES]):
        line = f"{source['file']}: {source['documents']:,} documents, {size(source['text_bytes'])}"
        lines.append(row("" if at else "sources", line.translate(ESCAPES)))
    if (rest := len(known["sources"]) - SOURCES) > 0:
        lines.append(row("", f"and {rest:,} more"))
    if sidecar["bytes_per_token"] is not None:
        lines.append(row("text", f"{sidecar['bytes_per_token']:.2f} bytes a token"))
    return lines


def bars(facts: dict[str, Any]) -> list[str]:
    """Return the histogram of document lengths, a line for each doubling."""
    edges, counts = facts["histogram"]["edges"], facts["histogram"]["documents"]
    names = ["empty"] + [
        f"{left:,}" if right == left + 1 else f"{left:,} - {right - 1:,}"
        for left, right in pairwise(edges)
    ]
    table = list(zip(names, [facts["empty_documents"], *counts], strict=True))
    used = [at for at, (_, count) in enumerate(table) if count and at]
    kept = table[used[0] : used[-1] + 1] if used else []
    kept = (table[:1] if facts["empty_documents"] else []) + kept
    if not kept:
        return []
    most = max(count for _, count in kept)
    width = max(len(name) for name, _ in [("tokens", 0), *kept])
    block = "█" if (sys.stdout.encoding or "").lower() in ("utf-8", "utf8") else "#"
    lines = [f"  {'tokens':>{width}}  {'documents':>13}"]
    for name, count in kept:
        bar = block * max(round(BAR * count / most), 1 if count else 0)
        lines.append(f"  {name:>{width}}  {count:>13,}  {bar}".rstrip())
    return [*lines, ""]


def describe_document(shown: dict[str, Any]) -> str:
    """Return one document under its heading."""
    text = shown["text"].translate(ESCAPES) if "text" in shown else str(shown["ids"])
    end = f"\n... {shown['left_out']:,} more tokens (--max-tokens)" if shown["left_out"] else ""
    return f"--- document {shown['document']:,}: {shown['tokens']:,} tokens ---\n{text}{end}\n"


def draw(lengths: dict[str, DocumentLengths], path: str) -> None:
    """Draw the picture; drawing is imported only here, since it takes a while."""
    from megatron_mer.analysis.length_picture import length_picture

    names = [Path(prefix).name for prefix in lengths]
    if len(set(names)) < len(names):
        names = list(lengths)
    try:
        length_picture(dict(zip(names, lengths.values(), strict=True)), path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"--histogram {path}: {error}") from error


def run(options: argparse.Namespace) -> int:
    """Inspect every dataset; returns the exit code."""
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    prefixes = expand_prefixes(options.prefixes)
    code, reports, lengths = 0, [], {}
    for prefix in dict.fromkeys(prefixes):
        try:
            facts, lengths[prefix] = inspect(prefix, options, tokenizer)
        except MegatronMerError as error:
            print(f"error: {error}", file=sys.stderr)
            reports.append({"prefix": prefix, "error": str(error)})
            code = error.exit_code
            continue
        reports.append(facts)
        if not options.json:
            print(describe(facts), flush=True)
    if options.json:
        print(json.dumps(reports, indent=2, ensure_ascii=False))
    if options.histogram and lengths:
        draw(lengths, options.histogram)
    return code


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    options = parse_arguments(arguments)
    logging.getLogger("megatron_mer").setLevel(logging.ERROR)  # the table says what is missing
    return run_tool(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())

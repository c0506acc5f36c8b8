r"""Train a SentencePiece tokenizer on the texts of JSON-lines files.

Example:
    python tools/train_tokenizer.py --input corpus/*/train-*.jsonl.gz --output tokenizer.model \
        --vocab-size 4096

Text comes back unchanged from its ids: nothing is normalised, spaces are kept, a newline is a token
and what the vocabulary lacks is spelled in bytes. One exception lies in SentencePiece itself, which
writes a space as U+2581: that character comes back as a space. The same input gives the same model.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# A machine that only prepares corpora needs no installed package, no compiler and no torch.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mer.data.jsonl import documents, read_pieces
from megatron_mer.errors import DataError, MegatronMerError

MAX_LINE_BYTES = 4096
"""Longer lines are cut: SentencePiece would leave them out."""
SAMPLE_SCALE = 2**64


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="JSON lines, plain or gzip")
    add("--output", required=True, metavar="PATH", help="model file to write")
    add("--vocab-size", type=int, required=True, metavar="N", help="number of ids, exactly")
    add("--model-type", choices=("unigram", "bpe"), default="unigram", help="default: unigram")
    add(
        "--byte-fallback",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="256 ids that spell what the vocabulary lacks (default: yes)",
    )
    add(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="SHARE",
        help="share of the text whose characters get ids of their own (default: 0.9995)",
    )
    add("--text-key", default="text", metavar="KEY", help="key of the text (default: text)")
    add(
        "--share",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the documents to train on, chosen by their hash; SentencePiece holds the "
        "text in memory (default: 1)",
    )
    add("--overwrite", action="store_true", help="replace an existing model")
    return parser.parse_args(arguments)


def cut(line: str, limit: int = MAX_LINE_BYTES) -> Iterator[str]:
    """Yield a line in parts of at most `limit` UTF-8 bytes, cut at spaces where there are any."""
    while len(line.encode("utf-8")) > limit:
        # A character has at most four bytes.
        part = line[: limit // 4]
        space = part.rfind(" ")
        end = space if space > 0 else len(part)
        yield line[:end]
        line = line[end:]
    if line:
        yield line


def is_chosen(text: str, share: float) -> bool:
    """Tell whether a document belongs to the share to train on: by its hash, not by its place."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, person=b"tokenizer").digest()
    return int.from_bytes(digest, "big") < share * SAMPLE_SCALE


class Sentences:
    """The lines to train on, and how many there were."""

    def __init__(self, paths: list[str], text_key: str, share: float) -> None:
        self._paths = paths
        self._text_key = text_key
        self._share = share
        self.documents = 0
        self.text_bytes = 0
        self.failure: MegatronMerError | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for path in self._paths:
                for piece in read_pieces(path):
                    for _, content in documents(piece, self._text_key):
                        yield from self._lines(content[self._text_key])
        except MegatronMerError as error:
            # SentencePiece replaces an iterator's error by one of its own.
            self.failure = error
            raise

    def _lines(self, text: str) -> Iterator[str]:
        if not is_chosen(text, self._share):
            return
        self.documents += 1
        self.text_bytes += len(text.encode("utf-8"))
        # SentencePiece leaves lines with tabs out; a newline is a token of its own.
        for line in text.replace("\t", "\n").split("\n"):
            yield from cut(line)


def train(options: argparse.Namespace, sentences: Sentences) -> bytes:
    """Return the trained model.

    Raises:
        DataError: an input is unusable, or the text does not allow this vocabulary size.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.Train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=options.vocab_size,
            model_type=options.model_type,
            byte_fallback=options.byte_fallback,
            character_coverage=options.character_coverage,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            user_defined_symbols=["\n"],
            max_sentence_length=MAX_LINE_BYTES,
            # Sums of floats depend on how they are spread over threads.
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError, MegatronMerError) as error:
        if sentences.failure is not None:
            raise sentences.failure from error
        raise DataError(
            f"no {options.model_type} model of {options.vocab_size} ids from {sentences.documents} "
            f"documents ({sentences.text_bytes:,} bytes): {error}"
        ) from error
    return model.getvalue()


def write(path: Path, content: bytes) -> None:
    """Write a file so that its final name never stands for half of it.

    Raises:
        DataError: the disk refuses.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error


def check(options: argparse.Namespace) -> None:
    """Refuse values that cannot work before anything is read.

    Raises:
        DataError: naming the option, its value and what is allowed.
    """
    for name, value in (
        ("--share", options.share),
        ("--character-coverage", options.character_coverage),
    ):
        if not 0 < value <= 1:
            raise DataError(f"{name} {value}; allowed: more than 0, at most 1")
    if Path(options.output).exists() and not options.overwrite:
        raise DataError(f"{options.output} already exists; choose another path or add --overwrite")


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    options = parse_arguments(arguments)
    try:
        check(options)
        sentences = Sentences(options.input, options.text_key, options.share)
        model = train(options, sentences)
        write(Path(options.output), model)
    except MegatronMerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(
        f"{options.output}: {options.model_type}, {options.vocab_size} ids, from "
        f"{sentences.documents:,} documents, {sentences.text_bytes:,} bytes; SHA-256 "
        f"{hashlib.sha256(model).hexdigest()}"
    )
    if not options.byte_fallback:
        print("without byte fallback, characters outside the vocabulary are lost", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

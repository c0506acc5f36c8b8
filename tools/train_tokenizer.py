r"""Train a tokenizer: SentencePiece (unigram, BPE), or byte-level BPE (a tokenizer.json).

Examples:
    python tools/train_tokenizer.py --input corpus/*/train-*.jsonl.gz --output tokenizer.model \
        --vocab-size 4096
    python tools/train_tokenizer.py --input corpus/ --output tokenizer.json --vocab-size 128000 \
        --model-type byte-bpe

Text comes back unchanged from its ids: nothing is normalised, spaces are kept, a newline is a token
and what the vocabulary lacks is spelled in bytes. One exception lies in SentencePiece itself, which
writes a space as U+2581: that character comes back as a space. byte-bpe splits text as Llama-3
does. The same input gives the same model. Inputs are those of tools/preprocess_data.py.
SentencePiece holds the text in memory (see --share); byte-bpe holds its words and their counts.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A machine that only prepares corpora needs no installed package, no compiler and no torch.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mer.data.corpus.faults import FaultError
from megatron_mer.data.corpus.parsing import ReadSettings
from megatron_mer.data.corpus.texts import read_texts
from megatron_mer.data.tokenizers.tiktoken import LLAMA3
from megatron_mer.errors import DataError, MegatronMerError

MAX_LINE_BYTES = 4096
"""Longer lines are cut: SentencePiece would leave them out."""
SAMPLE_SCALE = 2**64
BYTE_BPE = "byte-bpe"
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>")
"""Of byte-bpe; the last one ends documents."""
LEAST_BYTE_BPE = 256 + len(SPECIAL_TOKENS)


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
        help="files, directories, quoted patterns, remote paths, or - for standard input",
    )
    add("--output", required=True, metavar="PATH", help="model file to write")
    add("--vocab-size", type=int, required=True, metavar="N", help="number of ids, exactly")
    add(
        "--model-type",
        choices=("unigram", "bpe", BYTE_BPE),
        default="unigram",
        help="unigram (default) and bpe: SentencePiece; byte-bpe: a Hugging Face tokenizer.json",
    )
    add(
        "--byte-fallback",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="256 ids that spell what the vocabulary lacks (default: yes; always in byte-bpe)",
    )
    add(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="SHARE",
        help="SentencePiece: share of the text whose characters get ids of their own (default: "
        "0.9995)",
    )
    add(
        "--format",
        choices=("jsonl", "parquet", "text"),
        help="of all inputs (default: by the ends of their names, and else jsonl)",
    )
    add("--text-key", action="append", metavar="KEY", help="key of the text (default: text)")
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


class Texts:
    """The texts to train on, and how many there were. A long one comes in pieces.

    Args:
        paths: of the inputs.
        settings: how documents are found.
        share: of the documents.
        format: of all inputs; None: by their names.
    """

    def __init__(
        self, paths: list[str], settings: ReadSettings, share: float, format: Any = None
    ) -> None:
        self._paths = paths
        self._settings = settings
        self._share = share
        self._format = format
        self.documents = 0
        self.text_bytes = 0
        self.failure: MegatronMerError | None = None

    def __iter__(self) -> Iterator[str]:
        """Yield the texts."""
        try:
            for pieces in read_texts(self._paths, self._settings, self._format):
                yield from self._chosen(pieces)
        except MegatronMerError as error:
            # The libraries replace an iterator's error by one of their own.
            self.failure = error
            raise
        except FaultError as fault:
            self.failure = DataError(f"a long document: {fault.reason}")
            raise self.failure from fault

    def lines(self) -> Iterator[str]:
        """Yield the texts as SentencePiece wants them."""
        for text in self:
            # SentencePiece leaves lines with tabs out; a newline is a token of its own.
            for line in text.replace("\t", "\n").split("\n"):
                yield from cut(line)

    def _chosen(self, pieces: Iterator[str]) -> Iterator[str]:
        """Yield a document's pieces; what its first one says decides whether it is chosen."""
        for number, text in enumerate(pieces):
            if number == 0 and not is_chosen(text, self._share):
                return
            self.documents += number == 0
            self.text_bytes += len(text.encode("utf-8"))
            yield text


def train_sentencepiece(options: argparse.Namespace, texts: Texts) -> bytes:
    """Return a SentencePiece model.

    Raises:
        RuntimeError, ValueError: the text does not allow this vocabulary size.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.Train(
        sentence_iterator=texts.lines(),
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
    return model.getvalue()


def train_byte_bpe(options: argparse.Namespace, texts: Texts) -> bytes:
    """Return a tokenizer.json of byte-level BPE.

    Raises:
        ValueError: the text does not allow this vocabulary size.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    if model.get_vocab_size() != options.vocab_size:
        raise ValueError(f"the text gives {model.get_vocab_size()} ids and no more")
    return model.to_str(pretty=True).encode()


def train(options: argparse.Namespace, texts: Texts) -> bytes:
    """Return the trained model.

    Raises:
        DataError: an input is unusable, or the text does not allow this vocabulary size.
    """
    how = train_byte_bpe if options.model_type == BYTE_BPE else train_sentencepiece
    try:
        return how(options, texts)
    except Exception as error:
        # The libraries raise nothing narrower.
        if texts.failure is not None:
            raise texts.failure from error
        raise DataError(
            f"no {options.model_type} model of {options.vocab_size} ids from {texts.documents} "
            f"documents ({texts.text_bytes:,} bytes): {error}"
        ) from error


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
    if options.model_type == BYTE_BPE and options.vocab_size < LEAST_BYTE_BPE:
        raise DataError(
            f"--vocab-size {options.vocab_size}; byte-bpe needs at least {LEAST_BYTE_BPE}: 256 "
            f"bytes, {' and '.join(SPECIAL_TOKENS)}"
        )
    if Path(options.output).exists() and not options.overwrite:
        raise DataError(f"{options.output} already exists; choose another path or add --overwrite")


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    options = parse_arguments(arguments)
    try:
        check(options)
        settings = ReadSettings(text_keys=tuple(options.text_key or ["text"]))
        texts = Texts(options.input, settings, options.share, options.format)
        model = train(options, texts)
        write(Path(options.output), model)
    except MegatronMerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(
        f"{options.output}: {options.model_type}, {options.vocab_size} ids, from "
        f"{texts.documents:,} documents, {texts.text_bytes:,} bytes; SHA-256 "
        f"{hashlib.sha256(model).hexdigest()}"
    )
    if not options.byte_fallback and options.model_type != BYTE_BPE:
        print("without byte fallback, characters outside the vocabulary are lost", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

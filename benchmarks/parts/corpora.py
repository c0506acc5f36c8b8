"""Datasets to measure with: true bytes where they are read, holes where only their size matters."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.parts.measure import ROOT
from megatron_mer.data.index_format import IndexHeader
from megatron_mer.data.sidecar import Provenance, Sidecar

U16 = np.dtype("<u2")
VOCAB = 32_000
EOD = 0


def random_dataset(prefix: Path, tokens: int, mean_document: int, seed: int) -> None:
    """Write about `tokens` random ids in documents of log-normal length (sigma 1).

    The readers compared here copy ids and look at none but the end-of-document id, so that random
    ones cost what real ones do.
    """
    generator = np.random.default_rng(seed)
    lengths = document_lengths(generator, tokens // mean_document, mean_document)
    ids = generator.integers(1, VOCAB, int(lengths.sum()), dtype=U16)
    ids[np.cumsum(lengths) - 1] = EOD
    ids.tofile(f"{prefix}.bin")
    write_index(prefix, lengths)
    write_sidecar(prefix, len(lengths), len(ids), _provenance("random", "0" * 64, VOCAB))


def document_lengths(
    generator: np.random.Generator, documents: int, mean: int
) -> NDArray[np.int64]:
    """Log-normal lengths of a given mean, at least 2: shape (documents,)."""
    drawn = generator.lognormal(np.log(mean) - 0.5, 1.0, documents)
    return np.maximum(drawn.astype(np.int64), 2)


def write_index(prefix: Path, lengths: NDArray[np.int64]) -> None:
    """Write the `.idx` file of documents of one sequence each."""
    count = len(lengths)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(IndexHeader(U16, count, count + 1).pack())
        lengths.astype("<i4").tofile(file)
        ((np.cumsum(lengths) - lengths) * U16.itemsize).astype("<i8").tofile(file)
        np.arange(count + 1, dtype="<i8").tofile(file)


def sparse_dataset(prefix: Path, documents: int, length: int, provenance: Provenance) -> None:
    """Make files of the true size for equally long documents; only what opening reads is written.

    All else is a hole of the file system, so that thousands of them take no space.
    """
    header = IndexHeader(U16, documents, documents + 1)
    with open(f"{prefix}.idx", "wb") as file:
        file.truncate(header.size)
        file.write(header.pack())
        for sequence in (0, 1, documents - 2, documents - 1):
            file.seek(header.lengths_offset + 4 * sequence)
            file.write(struct.pack("<i", length))
            file.seek(header.pointers_offset + 8 * sequence)
            file.write(struct.pack("<q", sequence * length * U16.itemsize))
        for document in (0, 1, documents - 1, documents):
            file.seek(header.documents_offset + 8 * document)
            file.write(struct.pack("<q", document))
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(documents * length * U16.itemsize)
    write_sidecar(prefix, documents, documents * length, provenance)


def write_sidecar(prefix: Path, documents: int, tokens: int, provenance: Provenance) -> None:
    """Write `PREFIX.json`; its checksums are not those of the files, and nothing here asks."""
    sidecar = Sidecar(
        provenance=provenance,
        documents=documents,
        tokens=tokens,
        dtype=U16.name,
        max_token_id=provenance.vocab_size - 1,
        bin_sha256="0" * 64,
        idx_sha256="0" * 64,
    )
    Path(f"{prefix}.json").write_text(sidecar.to_json(), encoding="utf-8")


def small_tokenizer(folder: Path) -> tuple[str, Provenance]:
    """Train a tokenizer of 512 pieces on the quick start's text.

    Returns:
        Its name for a configuration, and the provenance of datasets that it tokenized.
    """
    import sentencepiece

    from megatron_mer.data.tokenizers import load_tokenizer

    source = ROOT / "examples" / "quickstart" / "data" / "en.jsonl.gz"
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"][:600] for line, _ in zip(lines, range(100), strict=False)]
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=512,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    name = f"sentencepiece:{folder / 'tokenizer.model'}"
    tokenizer = load_tokenizer(name)
    return name, _provenance("sentencepiece", tokenizer.fingerprint, tokenizer.vocab_size)


def _provenance(kind: str, fingerprint: str, vocab_size: int) -> Provenance:
    return Provenance(kind, fingerprint, vocab_size, EOD, append_eod=True)

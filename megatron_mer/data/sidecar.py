"""The sidecar `PREFIX.json`: what a tokenized corpus was made from and with.

Megatron's two files say neither which tokenizer wrote them nor whether they are whole. The sidecar
does. A dataset without one (made by other tools) can be read, with a warning.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_mer.errors import DataError, Problem

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Source:
    """One input file of a corpus."""

    file: str
    """File name, without its directory."""
    documents: int
    """Documents that were written from it."""
    skipped: int
    """Empty documents that were left out."""
    text_bytes: int
    """UTF-8 bytes of the texts that were written."""
    sha256: str
    """Of the file's (decompressed) content; of a Parquet file's footer."""
    tokens: int = 0
    """Tokens that were written; 0: not known."""
    faults: int = 0
    """Other documents that were left out, which `PREFIX.faults.jsonl` names."""
    encoder: str = ""
    """Library that gave the ids, and why that one."""


@dataclass(frozen=True)
class Provenance:
    """Where the tokens come from: what the writer cannot know by itself."""

    tokenizer: str
    """Kind of the tokenizer, such as `sentencepiece`."""
    fingerprint: str
    """SHA-256 of the tokenizer's model."""
    vocab_size: int
    """Ids are in [0, vocab_size)."""
    eod_id: int
    """Id that ends documents."""
    append_eod: bool
    """Whether each document ends with eod_id."""
    sources: tuple[Source, ...] = field(default=())
    """Input files, in order."""


@dataclass(frozen=True)
class Sidecar:
    """Content of `PREFIX.json`."""

    provenance: Provenance
    """Tokenizer and sources."""
    documents: int
    """Number of documents."""
    tokens: int
    """Number of tokens."""
    dtype: str
    """NumPy name of the token dtype."""
    max_token_id: int
    """Largest id in the corpus."""
    bin_sha256: str
    """Of the `.bin` file."""
    idx_sha256: str
    """Of the `.idx` file."""

    def to_json(self) -> str:
        """Return the text of the file; equal sidecars give equal bytes."""
        provenance = asdict(self.provenance)
        tokenizer = {"kind": provenance.pop("tokenizer")}
        tokenizer["fingerprint"] = provenance.pop("fingerprint")
        sources = provenance.pop("sources")
        counts = {name: value for name, value in asdict(self).items() if name != "provenance"}
        content = {
            "format_version": FORMAT_VERSION,
            "tokenizer": tokenizer,
            **provenance,
            **counts,
            "sources": sources,
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def problems(self, fingerprint: str | None, vocab_size: int | None) -> list[str]:
        """Say why a run with this tokenizer and model vocabulary cannot read the corpus.

        Args:
            fingerprint: of the run's tokenizer; None: not compared.
            vocab_size: rows of the model's embedding; None: not compared.

        Returns:
            One sentence a problem; empty when it fits.
        """
        found = []
        if fingerprint is not None and fingerprint != self.provenance.fingerprint:
            found.append(
                f"was tokenized by a {self.provenance.tokenizer} model with SHA-256 "
                f"{self.provenance.fingerprint[:16]}..., the run's tokenizer has "
                f"{fingerprint[:16]}...; "
                "use the same model file, or tokenize the corpus again"
            )
        if vocab_size is not None and self.max_token_id >= vocab_size:
            found.append(
                f"holds token id {self.max_token_id}, the model's vocabulary has ids 0 to "
                f"{vocab_size - 1}; raise model.vocab_size to {self.max_token_id + 1} or more"
            )
        return found


def merged_provenance(sidecars: Mapping[str, Sidecar]) -> Provenance:
    """Return the provenance of datasets that are put one after the other: all their sources.

    Args:
        sidecars: by the datasets' prefixes, in order; at least one.

    Raises:
        DataError: tokenizer or end-of-document settings differ; a problem for each dataset that
            deviates from what most have.
    """
    settings = {
        prefix: replace(sidecar.provenance, sources=()) for prefix, sidecar in sidecars.items()
    }
    ((usual, count),) = Counter(settings.values()).most_common(1)
    example = next(prefix for prefix, own in settings.items() if own == usual)
    others = f"{count} of {len(settings)} datasets, such as {example},"
    problems = [
        Problem(
            f"{prefix}.json",
            _difference(own, usual, others),
            remedy="tokenize it again with their tokenizer and settings, or merge it apart",
        )
        for prefix, own in settings.items()
        if own != usual
    ]
    if problems:
        raise DataError(problems)
    sources = (source for sidecar in sidecars.values() for source in sidecar.provenance.sources)
    return replace(usual, sources=tuple(sources))


def _difference(own: Provenance, usual: Provenance, others: str) -> str:
    mine, theirs = asdict(own), asdict(usual)
    return ", ".join(
        f"{name} {mine[name]!r} where {others} have {theirs[name]!r}"
        for name in mine
        if mine[name] != theirs[name]
    )


def read_sidecar(prefix: str) -> Sidecar | None:
    """Read `PREFIX.json`.

    Returns:
        None where there is no such file.

    Raises:
        DataError: it cannot be read, is not JSON, or has another version or other keys.
    """
    path = Path(prefix + ".json")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        version = content.get("format_version") if isinstance(content, dict) else None
        raise DataError(f"{path}: format_version {version!r}; expected {FORMAT_VERSION}")
    return _parse(path, content)


def _parse(path: Path, content: dict[str, Any]) -> Sidecar:
    reader = _Reader(path, content)
    tokenizer = _Reader(path, reader.get("tokenizer", dict))
    return Sidecar(
        provenance=Provenance(
            tokenizer=tokenizer.get("kind", str),
            fingerprint=tokenizer.get("fingerprint", str),
            vocab_size=reader.get("vocab_size", int),
            eod_id=reader.get("eod_id", int),
            append_eod=reader.get("append_eod", bool),
            sources=tuple(_parse_source(path, entry) for entry in reader.get("sources", list)),
        ),
        documents=reader.get("documents", int),
        tokens=reader.get("tokens", int),
        dtype=reader.get("dtype", str),
        max_token_id=reader.get("max_token_id", int),
        bin_sha256=reader.get("bin_sha256", str),
        idx_sha256=reader.get("idx_sha256", str),
    )


def _parse_source(path: Path, entry: Any) -> Source:
    if not isinstance(entry, dict):
        raise DataError(f"{path}: sources holds {entry!r}; expected objects")
    reader = _Reader(path, entry)
    return Source(
        file=reader.get("file", str),
        documents=reader.get("documents", int),
        skipped=reader.get("skipped", int),
        text_bytes=reader.get("text_bytes", int),
        sha256=reader.get("sha256", str),
        **{key: reader.get(key, kind) for key, kind in LATER_KEYS.items() if key in entry},
    )


LATER_KEYS = {"tokens": int, "faults": int, "encoder": str}
"""Keys of a source that sidecars of before lack."""


@dataclass(frozen=True)
class _Reader:
    """Typed access to a JSON object whose errors name the file and the key."""

    path: Path
    content: Mapping[str, Any]

    def get(self, key: str, kind: type) -> Any:
        if key not in self.content:
            raise DataError(f"{self.path}: key {key!r} is missing")
        value = self.content[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise DataError(f"{self.path}: {key} is {value!r}; expected {kind.__name__}")
        return value


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal.

    Raises:
        DataError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()

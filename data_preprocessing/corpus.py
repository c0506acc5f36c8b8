"""Raw JSON lines to the train and valid shards of one corpus, in bounded memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_preprocessing.buckets import Buckets
from data_preprocessing.keys import is_valid, order_key
from data_preprocessing.normalise import Normaliser
from data_preprocessing.shards import ShardWriter
from megatron_mer.data.jsonl import documents, read_pieces
from megatron_mer.errors import DataError

FORMAT_VERSION = 1
GZIP_RATIO = 5
"""Text is about that much larger than its gzip file: only the number of buckets depends on it."""
BUCKET_BYTES = 128 << 20
MAX_BUCKETS = 512
"""Open files; a usual limit is 1,024."""


@dataclass(frozen=True)
class Settings:
    """How a corpus is prepared; written into its counts."""

    text_key: str = "text"
    """Key of the text in each JSON object; other keys are kept as they are."""
    normaliser: Normaliser = field(default_factory=Normaliser)
    """What is done to each text."""
    valid_share: float = 0.05
    """Share of the documents that are held out, in [0, 1); 0: none."""
    seed: int = 1
    """Of the order; the split does not depend on it."""
    shard_bytes: int = 256 << 20
    """Text in a shard, in bytes."""

    def check(self) -> None:
        """Refuse values outside their range.

        Raises:
            DataError: naming the value and what is allowed.
        """
        if not 0 <= self.valid_share < 1:
            raise DataError(f"valid share {self.valid_share}; allowed: at least 0, less than 1")
        if self.shard_bytes < 1:
            raise DataError(f"shard size {self.shard_bytes} bytes; at least 1 is needed")
        if not -(2**63) <= self.seed < 2**63:
            raise DataError(f"seed {self.seed}; allowed: 64 bits with a sign")


def prepare_corpus(
    inputs: Sequence[str | Path], output: str | Path, settings: Settings, overwrite: bool = False
) -> dict[str, Any]:
    """Prepare a corpus: normalise, drop exact duplicates, split, shuffle, write shards and counts.

    Args:
        inputs: JSON-lines files, plain, gzip or Zstandard.
        output: directory to make; it has its name only when it is whole.
        settings: how.
        overwrite: whether an existing directory made by this function may be replaced.

    Returns:
        The content of `counts.json`.

    Raises:
        DataError: an input is unusable, one side of the split would be empty, or the disk refuses.
    """
    settings.check()
    target = Path(output)
    _refuse_existing(target, overwrite)
    partial = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        counts = _write_corpus(inputs, partial, settings)
        _refuse_existing(target, overwrite)
        if target.exists():
            shutil.rmtree(target)
        os.rename(partial, target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return counts


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise DataError(f"{target} already exists; choose another directory or --overwrite it")
    if not (target / "counts.json").is_file():
        raise DataError(f"{target} holds no counts.json, so it is not overwritten; remove it first")


def _write_corpus(
    inputs: Sequence[str | Path], directory: Path, settings: Settings
) -> dict[str, Any]:
    with Buckets(directory, _num_buckets(inputs)) as buckets:
        sources = [_read_source(path, buckets, settings) for path in inputs]
        sides = {name: ShardWriter(directory, name, settings.shard_bytes) for name in SIDES}
        duplicates = _write_shards(buckets, sides, settings.text_key)
    counts = {
        "format_version": FORMAT_VERSION,
        "settings": asdict(settings),
        "sources": sources,
        "documents_read": sum(source["documents"] for source in sources),
        "empty": sum(source["empty"] for source in sources),
        "duplicates": duplicates,
        **{name: _side_counts(writer) for name, writer in sides.items()},
    }
    _refuse_empty_sides(counts, settings)
    with open(directory / "counts.json", "w", encoding="utf-8") as file:
        file.write(json.dumps(counts, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return counts


SIDES = ("train", "valid")


def _num_buckets(inputs: Sequence[str | Path]) -> int:
    size = 0
    for path in map(Path, inputs):
        try:
            size += path.stat().st_size * (GZIP_RATIO if path.suffix == ".gz" else 1)
        except OSError as error:
            raise DataError(f"{path}: cannot be opened: {error.strerror}") from error
    return min(MAX_BUCKETS, 1 + size // BUCKET_BYTES)


def _read_source(path: str | Path, buckets: Buckets, settings: Settings) -> dict[str, Any]:
    read = empty = 0
    for piece in read_pieces(path):
        for _, content in documents(piece, settings.text_key):
            read += 1
            text = settings.normaliser(content[settings.text_key])
            if not text.strip():
                empty += 1
                continue
            content[settings.text_key] = text
            line = _json_line(content)
            held_out = is_valid(text, settings.valid_share)
            buckets.add(order_key(text, settings.seed), held_out, line)
    return {"file": Path(path).name, "documents": read, "empty": empty}


def _json_line(content: dict[str, Any]) -> bytes:
    try:
        return json.dumps(content, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:  # Half a surrogate pair under another key than the text's.
        return json.dumps(content).encode("ascii")


def _write_shards(buckets: Buckets, sides: dict[str, ShardWriter], text_key: str) -> int:
    """Write every document once, the first of equal ones; return how many were dropped."""
    duplicates, last = 0, b""
    for key, held_out, line in buckets.in_order():
        if key == last:
            duplicates += 1
            continue
        last = key
        text_bytes = len(json.loads(line)[text_key].encode("utf-8"))
        sides["valid" if held_out else "train"].write(line, text_bytes)
    for writer in sides.values():
        writer.close()
    return duplicates


def _side_counts(writer: ShardWriter) -> dict[str, Any]:
    return {
        "documents": sum(shard.documents for shard in writer.shards),
        "text_bytes": sum(shard.text_bytes for shard in writer.shards),
        "shards": [asdict(shard) for shard in writer.shards],
    }


def _refuse_empty_sides(counts: dict[str, Any], settings: Settings) -> None:
    total = counts["train"]["documents"] + counts["valid"]["documents"]
    for name in SIDES:
        wanted = name == "train" or settings.valid_share > 0
        if wanted and counts[name]["documents"] == 0:
            raise DataError(
                f"the {name} side got none of {total} documents at valid share "
                f"{settings.valid_share}; give more documents or another share"
            )

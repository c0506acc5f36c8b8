"""Which steps a wandb offline file holds.

The file is a LevelDB log (github.com/google/leveldb, doc/log_format.md) behind seven bytes of
wandb's own: blocks of 32 KiB, in them fragments of records with a head of 7 bytes (checksum,
length, type). A record is a protobuf message.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER, _BLOCK, _HEAD = 7, 32 * 1024, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[bytes]:
    """The whole records of a file; what a crash tore at its end is left out."""
    content = path.read_bytes()
    at, parts = _HEADER, b""
    while at + _HEAD <= len(content):
        if _BLOCK - at % _BLOCK < _HEAD:
            at += _BLOCK - at % _BLOCK  # No head fits into the rest of a block.
            continue
        length = int.from_bytes(content[at + 4 : at + 6], "little")
        kind, body = content[at + 6], content[at + _HEAD : at + _HEAD + length]
        at += _HEAD + length
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or len(body) < length:
            return
        parts = body if kind in (_FULL, _FIRST) else parts + body
        if kind in (_FULL, _LAST):
            yield parts


def history(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file's history: name -> value, `_step` among them."""
    # Not at the top: reading records needs no wandb. Its messages are made when it is imported.
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    for content in records(path):
        record = messages.Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            yield {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }


def last_step(folder: Path, run_id: str) -> int:
    """The last step that the offline files of a run hold; -1: none.

    Args:
        folder: wandb's folder, which holds the `offline-run-*` folders.
        run_id: of the run.
    """
    steps = [
        int(row["_step"])
        for path in sorted(folder.glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
        for row in history(path)
        if "_step" in row
    ]
    return max(steps, default=-1)

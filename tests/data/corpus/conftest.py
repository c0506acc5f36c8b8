"""What the tests of building corpora share."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_mer.data.corpus.job import Job, Result, build_corpus
from megatron_mer.data.corpus.parsing import ReadSettings
from megatron_mer.data.corpus.worker import JobSettings

Build = Callable[..., Result]
SUFFIXES = (".bin", ".idx", ".json")


def line(text: object, **more: object) -> bytes:
    return json.dumps({"text": text, **more}, ensure_ascii=False).encode() + b"\n"


def content(prefix: object) -> list[bytes]:
    """The files of a dataset."""
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES]


@pytest.fixture
def build(tokenizer_path: Path) -> Build:
    """Builds a corpus with small shards and pieces; settings by their names."""

    def run(inputs: list[Any], prefix: object, callback: Any = None, **given: Any) -> Result:
        settings = JobSettings(f"sentencepiece:{tokenizer_path}", shard_bytes=4000, piece_bytes=500)
        reading = ReadSettings()
        for name in list(given):
            if hasattr(reading, name):
                reading = replace(reading, **{name: given.pop(name)})
            elif hasattr(settings, name):
                settings = replace(settings, **{name: given.pop(name)})
        settings = replace(settings, reading=reading)
        job = Job([str(path) for path in inputs], str(prefix), settings, **given)
        return build_corpus(job, **({"progress": callback} if callback else {}))

    return run

"""Write a Hugging Face folder: safetensors in shards, one tensor in memory at a time."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_mer.checkpoint.files import (
    BYTES,
    raw_bytes,
    remove_directory,
    safetensors_header,
    sync_directory,
    sync_file,
    write_bytes,
    write_json,
)
from megatron_mer.checkpoint.huggingface.folder import DTYPES, INDEX, SINGLE
from megatron_mer.checkpoint.huggingface.names import Shapes, hf_name
from megatron_mer.checkpoint.huggingface.tokenizer_files import TokenizerFiles
from megatron_mer.checkpoint.layout import REPLACED, TEMPORARY
from megatron_mer.checkpoint.save import WriteStopped
from megatron_mer.config.huggingface import CONFIG_JSON

GENERATION = "generation_config.json"
SHARD_BYTES = 5 * 10**9
"""Largest file by default, as transformers has it; a larger tensor gets a file of its own."""

Read = Callable[[str], torch.Tensor]


def write_folder(
    target: Path,
    shapes: Shapes,
    read: Read,
    dtype: str,
    config: Mapping[str, Any],
    generation: Mapping[str, Any] | None,
    tokenizer: TokenizerFiles | None,
    shard_bytes: int = SHARD_BYTES,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Write a folder and then give it its name; one that is there is replaced.

    Args:
        target: the folder.
        shapes: of the parameters by canonical name, in the order of the files.
        read: gives a whole parameter by its canonical name, of any dtype.
        dtype: torch's name of what is written.
        config: config.json.
        generation: generation_config.json; None: none.
        tokenizer: its files; None: none.
        shard_bytes: largest file, in bytes of tensors.
        stop: asked before each tensor; when true, the write ends.

    Raises:
        WriteStopped: it was to end.
        OSError: the disk is full, or the like; nothing new is there then.
    """
    # Hidden, so that it is nobody else's folder.
    temporary = target.with_name(f".{target.name}{TEMPORARY}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)

    def read_unless_stopped(name: str) -> torch.Tensor:
        if stop():
            raise WriteStopped
        return read(name)

    try:
        _write_weights(temporary, shapes, read_unless_stopped, dtype, shard_bytes)
        write_json(temporary / CONFIG_JSON, dict(config))
        if generation is not None:
            write_json(temporary / GENERATION, dict(generation))
        for path in tokenizer.write(temporary) if tokenizer else ():
            sync_file(path)
        sync_directory(temporary)
        _give_name(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _give_name(temporary: Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}{REPLACED}")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        os.rename(target, aside)
    os.rename(temporary, target)
    sync_directory(target.parent)
    if aside.exists():
        remove_directory(aside)


def _write_weights(folder: Path, shapes: Shapes, read: Read, dtype: str, shard_bytes: int) -> None:
    shards = list(_shards(shapes, _size(dtype), shard_bytes))
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_bytes(folder / file, _chunks(names, shapes, read, dtype))
        weight_map.update({hf_name(name): file for name in names})
    if len(shards) > 1:
        count = sum(math.prod(shape) for shape in shapes.values())
        metadata = {"total_parameters": count, "total_size": count * _size(dtype)}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})


def _shards(shapes: Shapes, size: int, shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        more = math.prod(shape) * size
        if names and filled + more > shard_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += more
    yield names


def _chunks(
    names: Sequence[str], shapes: Shapes, read: Read, dtype: str
) -> Iterator[bytes | memoryview]:
    stored = _stored_name(dtype)
    entries = [(hf_name(name), stored, shapes[name]) for name in names]
    yield safetensors_header(entries, {"format": "pt"})
    for name in names:
        yield raw_bytes(read(name).to(getattr(torch, dtype)))


def _stored_name(dtype: str) -> str:
    return next(stored for stored, name in DTYPES.items() if name == dtype)


def _size(dtype: str) -> int:
    return BYTES[_stored_name(dtype)]

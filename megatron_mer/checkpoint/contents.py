"""What a checkpoint holds, from its JSON files: for tools that look at one."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from megatron_mer.checkpoint.find import broken, damaged
from megatron_mer.checkpoint.layout import DTYPE_NAMES, MANIFEST, RUN_STATE, parse_step, rank_name

_BYTES = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class CheckpointContents:
    """One checkpoint, whole or not; what could not be read is None or empty."""

    path: str
    """Its directory."""
    step: int | None
    """Applied optimizer updates, by its name."""
    problem: str | None
    """Why it is not whole; None if it is."""
    every_byte: bool
    """Whether every byte was read for that, not only the sizes."""
    batches: int | None = None
    """Global batches drawn."""
    format: int | None = None
    """Version of the format."""
    world_size: int | None = None
    """Ranks that wrote it."""
    tp_size: int | None = None
    """Tensor-parallel ranks."""
    bytes: int | None = None
    """Size of all files but the manifest."""
    parameters: int | None = None
    """Elements of the model's parameters; a tied one counts once."""
    kinds: tuple[tuple[str, int, int], ...] = ()
    """Each kind of tensor with its stored elements and bytes; copies count."""
    tensors: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Name and global shape of each parameter."""


def contents(path: Path, every_byte: bool = True) -> CheckpointContents:
    """Look at one checkpoint.

    Args:
        path: its directory.
        every_byte: compare every file's checksum, not only its size.

    Raises:
        CheckpointError: another format version.
    """
    problem = damaged(path) if every_byte else broken(path)
    known = CheckpointContents(str(path), parse_step(path.name), problem, every_byte)
    if problem is not None:
        return known
    manifest = json.loads((path / MANIFEST).read_text())
    run_state = json.loads((path / RUN_STATE).read_text())
    elements: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    shapes: dict[str, tuple[int, ...]] = {}
    tp_size = 0
    for rank in range(manifest["world_size"]):
        for entry in json.loads((path / f"{rank_name(rank)}.json").read_text())["fragments"]:
            elements[entry["kind"]] += entry["numel"]
            sizes[entry["kind"]] += entry["numel"] * _BYTES[entry["dtype"]]
            shapes[entry["name"]] = tuple(entry["global_shape"])
            # Heads of keys and values may have fewer slices than there are ranks.
            tp_size = max(tp_size, entry["tp_size"])
    stored = manifest["files"].values()
    return CheckpointContents(
        path=str(path),
        step=known.step,
        problem=None,
        every_byte=every_byte and manifest["format"] > 1,  # Format 1 has no checksums.
        batches=run_state.get("batches"),
        format=manifest["format"],
        world_size=manifest["world_size"],
        tp_size=tp_size or None,
        bytes=sum(one if isinstance(one, int) else one["bytes"] for one in stored),
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        kinds=tuple((kind, elements[kind], sizes[kind]) for kind in sorted(elements)),
        tensors=tuple(sorted(shapes.items())),
    )

"""The numbers of two checkpoints, compared fragment by fragment or parameter by parameter."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_mer.checkpoint import CheckpointReader, Fragment
from megatron_mer.checkpoint.layout import DTYPE_NAMES, MANIFEST, rank_name
from megatron_mer.training.check_resume.figures import Difference

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_INTEGERS = {4: torch.int32, 2: torch.int16}


@dataclass
class WeightComparison:
    """What came out of comparing two checkpoints."""

    fragments: Counter[str] = field(default_factory=Counter)
    """Fragments of each kind."""
    numbers: int = 0
    """Elements of all of them."""
    first: Difference | None = None
    """The first element that differs."""
    differing: int = 0
    """Elements that differ."""


def compare_fragments(mine: Path, other: Path, same_layout: bool = True) -> WeightComparison:
    """Compare every fragment of a checkpoint with another checkpoint, to the bit.

    Args:
        mine: the one whose fragments are looked at.
        other: the other one.
        same_layout: each rank has to have the same fragments there; else they are put together.

    Raises:
        CheckpointError: one cannot be read, or lacks what the other has.
    """
    found = WeightComparison()
    for rank in range(_world_size(mine)):
        # With a rank's number a reader gives what that rank wrote, also where others have a copy.
        one, two = (CheckpointReader(path, rank=rank) for path in (mine, other))
        entries = _entries(mine, rank)
        others = _entries(other, rank) if same_layout else entries
        for key in [*entries, *(key for key in others if key not in entries)]:
            entry = entries.get(key)
            if entry is None or entry != others.get(key):
                place = f"index of rank {rank}, {key}"
                found.first = found.first or Difference(place, entry, others.get(key))
                found.differing += 1
                continue
            found.fragments[entry["kind"]] += 1
            found.numbers += entry["numel"]
            _note(found, entry, _fragment(one, entry), _fragment(two, entry))
    return found


def _world_size(path: Path) -> int:
    return int(json.loads((path / MANIFEST).read_text())["world_size"])


def _entries(path: Path, rank: int) -> dict[str, dict[str, Any]]:
    """What a rank wrote, by kind and name."""
    file = path / f"{rank_name(rank)}.json"
    listed = json.loads(file.read_text())["fragments"] if file.exists() else []
    return {f"{one['kind']} of {one['name']}": one for one in listed}


def _fragment(reader: CheckpointReader, entry: dict[str, Any]) -> torch.Tensor:
    values = torch.empty(entry["numel"], dtype=_DTYPES[entry["dtype"]])
    reader.fill(
        Fragment(
            entry["name"],
            entry["kind"],
            tuple(entry["global_shape"]),
            entry["tp_dim"],
            entry["tp_rank"],
            entry["tp_size"],
            entry["start"],
            values,
        )
    )
    return values


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Integers of the same bits: a NaN equals itself, and 0 is not -0."""
    return values.view(_INTEGERS[values.element_size()])


def _note(
    found: WeightComparison, entry: dict[str, Any], one: torch.Tensor, two: torch.Tensor
) -> None:
    differing = _bits(one) != _bits(two)
    count = int(differing.sum())
    if count and found.first is None:
        at = int(differing.nonzero()[0])
        place = _element(entry, at)
        found.first = Difference(place, one[at].item(), two[at].item())
    found.differing += count


def _element(entry: dict[str, Any], at: int) -> str:
    """Where element `at` of a fragment stands in its whole parameter."""
    shape, dim = list(entry["global_shape"]), entry["tp_dim"]
    if dim is not None:
        shape[dim] = -(-shape[dim] // entry["tp_size"])
    place = _unravel(entry["start"] + at, shape)
    if dim is not None:
        place[dim] += entry["tp_rank"] * shape[dim]
    return _named(entry["kind"], entry["name"], place)


def _unravel(flat: int, shape: list[int]) -> list[int]:
    place = []
    for size in reversed(shape):
        flat, rest = divmod(flat, size)
        place.append(rest)
    return place[::-1]


def _named(kind: str, name: str, place: list[int]) -> str:
    return f"parameter {name} ({kind}), element {place}"


def parameters(path: Path) -> Iterator[tuple[str, str, torch.Size]]:
    """Kind, name and global shape of all that a checkpoint holds, each once."""
    seen = set()
    for rank in range(_world_size(path)):
        for entry in _entries(path, rank).values():
            key = (entry["kind"], entry["name"])
            if key not in seen:
                seen.add(key)
                yield (*key, torch.Size(entry["global_shape"]))


def furthest(mine: Path, other: Path) -> dict[str, tuple[float, Difference]]:
    """The largest difference of each kind between two checkpoints of any layouts.

    Returns:
        Kind -> the difference relative to the parameter's largest magnitude, and where it is.

    Raises:
        CheckpointError: one lacks what the other has.
    """
    one, two = CheckpointReader(mine), CheckpointReader(other)
    worst: dict[str, tuple[float, Difference]] = {}
    for kind, name, shape in parameters(mine):
        values = one.parameter(kind, name).float().view(-1)
        others = two.parameter(kind, name).float().view(-1)
        apart = (values - others).abs()
        at = int(apart.argmax())
        largest = float(torch.maximum(values.abs().max(), others.abs().max()))
        share = float(apart[at]) / largest if largest else 0.0
        if not math.isfinite(share):
            share = math.inf
        if kind not in worst or share > worst[kind][0]:
            place = _named(kind, name, _unravel(at, list(shape)))
            worst[kind] = (share, Difference(place, values[at].item(), others[at].item()))
    return worst

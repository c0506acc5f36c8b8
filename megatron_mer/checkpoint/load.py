"""Fill fragments from a checkpoint, whatever layout wrote it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_mer.checkpoint.find import broken
from megatron_mer.checkpoint.layout import (
    DTYPE_NAMES,
    MANIFEST,
    Fragment,
    rank_name,
    slice_shape,
)
from megatron_mer.errors import CheckpointError
from megatron_mer.parallel import slice_bounds

Range = tuple[int, int]

_SHOWN_PROBLEMS = 8
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class _Stored:
    """An index entry: where a piece lies, and what it is a piece of."""

    rank: int
    global_shape: tuple[int, ...]
    tp_dim: int | None
    tp_rank: int
    tp_size: int
    start: int
    stop: int
    dtype: str


@dataclass(frozen=True)
class Parameter:
    """One quantity of one parameter, as a checkpoint holds it."""

    name: str
    """Canonical name."""
    kind: str
    """One of `KINDS`."""
    global_shape: tuple[int, ...]
    """Shape of the whole parameter."""
    tp_dim: int | None
    """Dim that tensor parallelism cut; None: it was whole on every tensor rank."""
    dtype: torch.dtype
    """Of the stored numbers."""

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.global_shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole parameter."""
        return self.numel * self.dtype.itemsize


class CheckpointReader:
    """Fills fragments from a checkpoint.

    A fragment's range is put together from every stored piece that overlaps it, so the layout
    (tensor, pipeline, data) may differ from the one that wrote. Indices and tensors are read when
    they are needed: with an unchanged layout a rank opens its own two files only.
    """

    def __init__(self, path: str | os.PathLike[str], rank: int = 0, verified: bool = False) -> None:
        """Open a whole checkpoint.

        Args:
            path: The directory of one checkpoint, as `CheckpointInfo.path`.
            rank: Whose files to look at first; any rank gives the same result.
            verified: Rank 0 just found it whole, so not every rank has to `stat` every file.

        Raises:
            CheckpointError: the checkpoint is not whole.
        """
        self._path = Path(path)
        problem = None if verified else broken(self._path)
        if problem:
            raise CheckpointError(f"the checkpoint is not whole: {problem}")
        manifest = json.loads((self._path / MANIFEST).read_text())
        self.world_size: int = manifest["world_size"]
        """Number of ranks that wrote the checkpoint."""
        others = (other for other in range(self.world_size) if other != rank)
        self._order = [*range(rank, min(rank + 1, self.world_size)), *others]
        self._indices: dict[int, dict[str, _Stored]] = {}
        self._files: dict[int, Any] = {}

    def contains(self, kind: str, name: str) -> bool:
        """Whether any piece of a parameter's quantity was saved."""
        return any(True for _ in self._pieces(f"{kind}/{name}"))

    def parameter(self, kind: str, name: str) -> torch.Tensor:
        """A whole parameter's quantity, put together from all slices of any layout.

        Args:
            kind: One of `KINDS`.
            name: Canonical parameter name.

        Returns:
            Of the parameter's global shape, in the stored dtype, on the CPU.

        Raises:
            CheckpointError: It was not saved, or not whole, or cannot be read.
        """
        piece = next(self._pieces(f"{kind}/{name}"), None)
        if piece is None:
            raise CheckpointError(f"{self._path} has no {kind} of {name}")
        shape = piece.global_shape
        flat = torch.empty(math.prod(shape), dtype=_DTYPES[piece.dtype])
        self.fill(Fragment(name, kind, shape, piece.tp_dim, 0, 1, 0, flat))
        return flat.view(shape)

    def parameters(self) -> Iterator[Parameter]:
        """Every quantity of every parameter, once, in the order of the ranks that wrote them."""
        seen = set()
        for rank in range(self.world_size):
            for key, piece in self._index(rank).items():
                if key in seen:
                    continue
                seen.add(key)
                kind, _, name = key.partition("/")
                dtype = _DTYPES[piece.dtype]
                yield Parameter(name, kind, piece.global_shape, piece.tp_dim, dtype)

    def fill(self, fragment: Fragment) -> None:
        """Copy the stored elements into `fragment.tensor`.

        Raises:
            CheckpointError: another global shape, tp_dim or dtype was saved (both are printed);
                elements are missing (parameter, kind and range are printed); a file cannot be read.
        """
        if fragment.numel == 0:
            return
        piece = next(self._pieces(fragment.key), None)
        if piece is not None and piece.tp_size != fragment.tp_size:
            _check_same(self._path, fragment, piece)
            # What one rank holds whole carries no dim, though more ranks would cut it.
            dim = piece.tp_dim if fragment.tp_dim is None else fragment.tp_dim
            if dim is not None:
                self._fill_recut(replace(fragment, tp_dim=dim), dim, piece.tp_size)
                return
        self._fill_same_cut(fragment)

    def _fill_recut(self, fragment: Fragment, dim: int, saved_size: int) -> None:
        """Fill a fragment of one tensor-parallel cut from slices of another.

        Only the rows (places in the first dim) that the fragment lies in are read, so beside it
        there is never more in memory than one parameter.
        """
        whole = fragment.global_shape
        mine = slice_shape(whole, dim, fragment.tp_size, fragment.tp_rank)
        row = math.prod(mine[1:])
        first, last = fragment.start // row, -(-fragment.stop // row)
        band = torch.empty((last - first, *mine[1:]), dtype=fragment.tensor.dtype)
        # What is wanted of the whole parameter's dim, and where the band begins in it.
        begin, _ = slice_bounds(whole[dim], fragment.tp_size, fragment.tp_rank)
        begin += first if dim == 0 else 0
        end = begin + band.shape[dim]
        for rank in range(saved_size):
            base, stop = slice_bounds(whole[dim], saved_size, rank)
            low, high = max(begin, base), min(end, stop)
            if low >= high:
                continue
            theirs = slice_shape(whole, dim, saved_size, rank)
            rows = (low - base, high - base) if dim == 0 else (first, last)
            part = self._rows(fragment, rank, saved_size, theirs, rows)
            if dim != 0:
                part = part.narrow(dim, low - base, high - low)
            band.narrow(dim, low - begin, high - low).copy_(part)
        start = fragment.start - first * row
        with torch.no_grad():
            fragment.tensor.copy_(band.view(-1)[start : start + fragment.numel])

    def _rows(
        self,
        fragment: Fragment,
        rank: int,
        size: int,
        shape: tuple[int, ...],
        rows: Range,
    ) -> torch.Tensor:
        """Some rows of the slice of this shape that tensor-parallel rank `rank` of `size` saved."""
        row = math.prod(shape[1:])
        flat = torch.empty((rows[1] - rows[0]) * row, dtype=fragment.tensor.dtype)
        cut = (fragment.tp_dim, rank, size, rows[0] * row)
        self._fill_same_cut(
            Fragment(fragment.name, fragment.kind, fragment.global_shape, *cut, flat)
        )
        return flat.view(rows[1] - rows[0], *shape[1:])

    def _fill_same_cut(self, fragment: Fragment) -> None:
        gaps = [(fragment.start, fragment.stop)]
        for piece in self._pieces(fragment.key):
            _check_same(self._path, fragment, piece)
            cut = (piece.tp_rank, piece.tp_size)
            if fragment.tp_dim is None or cut == (fragment.tp_rank, fragment.tp_size):
                gaps = self._copy(fragment, piece, gaps)
            if not gaps:
                break
        else:
            ranges = ", ".join(f"[{start}, {stop})" for start, stop in gaps)
            slices = "" if fragment.tp_dim is None else f" of tensor slice {fragment.tp_rank}"
            raise CheckpointError(
                f"{self._path} has no {fragment.kind} of {fragment.name}, elements {ranges}{slices}"
            )

    def fill_all(self, fragments: Iterable[Fragment]) -> None:
        """Fill many fragments; what is wrong with any of them is told at once.

        Raises:
            CheckpointError: as `fill`, one line a fragment, the first few of them.
        """
        problems = []
        for fragment in fragments:
            try:
                self.fill(fragment)
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            more = len(problems) - _SHOWN_PROBLEMS
            shown = problems[:_SHOWN_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
            raise CheckpointError("\n".join(shown))

    def _pieces(self, key: str) -> Iterator[_Stored]:
        """Every stored piece with this key, the preferred rank's first."""
        for rank in self._order:
            piece = self._index(rank).get(key)
            if piece is not None:
                yield piece

    def _index(self, rank: int) -> dict[str, _Stored]:
        if rank not in self._indices:
            path = self._path / f"{rank_name(rank)}.json"
            try:
                entries = json.loads(path.read_text())["fragments"]
                self._indices[rank] = {
                    f"{e['kind']}/{e['name']}": _stored(rank, e) for e in entries
                }
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{path} is no index of a checkpoint: {error!r}") from error
        return self._indices[rank]

    def _copy(self, fragment: Fragment, piece: _Stored, gaps: list[Range]) -> list[Range]:
        """Copy what a piece has of the gaps; returns the gaps that remain."""
        remaining: list[Range] = []
        for start, stop in gaps:
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low >= high:
                remaining.append((start, stop))
                continue
            values = self._read(fragment.key, piece, low, high)
            with torch.no_grad():
                fragment.tensor[low - fragment.start : high - fragment.start].copy_(values)
            remaining += [gap for gap in ((start, low), (high, stop)) if gap[0] < gap[1]]
        return remaining

    def _read(self, key: str, piece: _Stored, low: int, high: int) -> torch.Tensor:
        path = self._path / f"{rank_name(piece.rank)}.safetensors"
        try:
            if piece.rank not in self._files:
                self._files[piece.rank] = safe_open(path, framework="pt")
            stored = self._files[piece.rank].get_slice(key)
            values: torch.Tensor = stored[low - piece.start : high - piece.start]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read at {key}: {error}") from error
        if values.numel() != high - low:
            raise CheckpointError(
                f"{path}: {key} should hold {piece.stop - piece.start} elements by its index, "
                f"found {stored.get_shape()}"
            )
        return values


def _stored(rank: int, entry: dict[str, Any]) -> _Stored:
    return _Stored(
        rank=rank,
        global_shape=tuple(entry["global_shape"]),
        tp_dim=entry["tp_dim"],
        tp_rank=entry["tp_rank"],
        tp_size=entry["tp_size"],
        start=entry["start"],
        stop=entry["start"] + entry["numel"],
        dtype=entry["dtype"],
    )


def _check_same(path: Path, fragment: Fragment, piece: _Stored) -> None:
    """A copy is only right between equal parameters, cut along the same dim."""
    cut = piece.tp_size > 1 and fragment.tp_size > 1
    pairs = {
        "global shape": (piece.global_shape, fragment.global_shape),
        "tp_dim": (piece.tp_dim, fragment.tp_dim) if cut else (None, None),
        "dtype": (piece.dtype, DTYPE_NAMES[fragment.tensor.dtype]),
    }
    for what, (saved, wanted) in pairs.items():
        if saved != wanted:
            raise CheckpointError(
                f"{path}: {fragment.kind} of {fragment.name} was saved with {what} {saved}, "
                f"this run has {wanted}; give it the saved one"
            )

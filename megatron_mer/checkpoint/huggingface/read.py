"""Fill a run's weights from a Hugging Face folder, at any layout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_mer.checkpoint.huggingface.folder import HuggingFaceFolder
from megatron_mer.checkpoint.huggingface.names import EMBEDDING, HEAD, VOCABULARY, hf_name
from megatron_mer.checkpoint.layout import Fragment, slice_shape
from megatron_mer.errors import ForeignCheckpointError, Problem
from megatron_mer.parallel import slice_bounds

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class NewRows:
    """The vocabulary that a model gets: the checkpoint's rows, and others made of them."""

    rows: int
    """Rows of the embedding then, at least those of the checkpoint."""
    known: int
    """Tokens of the checkpoint's own tokenizer, whose rows stay as they are."""
    sources: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """New row -> the known rows whose mean it is; those of no other row: the mean of all known."""

    @classmethod
    def none(cls, rows: int) -> NewRows:
        """The vocabulary as it is."""
        return cls(rows, rows)


class HuggingFaceReader:
    """Fills fragments from a folder, each rank only what it owns.

    Args:
        folder: its headers, checked.
        vocabulary: what rows the model has; None: those of the folder.
    """

    def __init__(self, folder: HuggingFaceFolder, vocabulary: NewRows | None = None) -> None:
        self._folder = folder
        self._vocabulary = vocabulary or NewRows.none(folder.rows)
        self._shapes = folder.shapes
        self._files: dict[Path, Any] = {}
        self._means: dict[tuple[str, int, int], Tensor] = {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter that can be read, new rows included."""
        rows = self._vocabulary.rows
        return {
            name: (rows, *shape[1:]) if name in VOCABULARY else shape
            for name, shape in self._shapes.items()
        }

    def parameter(self, name: str) -> Tensor:
        """A whole parameter, fp32, on the CPU.

        Args:
            name: canonical.
        """
        shape = self.shapes[name]
        return self._window(name, 0, shape[0], None if len(shape) == 1 else (0, shape[1]))

    def fill_all(self, fragments: Iterable[Fragment]) -> None:
        """Fill many fragments of master weights.

        Raises:
            ForeignCheckpointError: as `fill`.
        """
        for fragment in fragments:
            self.fill(fragment)

    @torch.no_grad()
    def fill(self, fragment: Fragment) -> None:
        """Read the rows that a fragment lies in, and copy its elements.

        Raises:
            ForeignCheckpointError: there is no such parameter of that shape, or it cannot be read.
        """
        if fragment.numel == 0:
            return
        name, shape = fragment.name, self.shapes.get(fragment.name)
        if shape != fragment.global_shape:
            given = f"has the shape {shape}, the run wants {fragment.global_shape}"
            raise ForeignCheckpointError([Problem(f"{self._folder.path}: {name}", given)])
        dim, cut = fragment.tp_dim, (fragment.tp_size, fragment.tp_rank)
        part = slice_shape(shape, dim, *cut)
        begin = [0] * len(shape)
        if dim is not None:
            begin[dim], _ = slice_bounds(shape[dim], *cut)
        width = math.prod(part[1:])
        first, last = fragment.start // width, -(-fragment.stop // width)
        columns = None if len(shape) == 1 else (begin[1], begin[1] + part[1])
        band = self._window(name, begin[0] + first, begin[0] + last, columns)
        start = fragment.start - first * width
        fragment.tensor.copy_(band.reshape(-1)[start : start + fragment.numel])

    def check_tied(self) -> None:
        """Make sure that a stored head of a tied model is the embedding.

        Raises:
            ForeignCheckpointError: the two differ.
        """
        if HEAD in self._shapes or hf_name(HEAD) not in self._folder.tensors:
            return
        for top in range(0, self._folder.rows, _ROWS_AT_ONCE):
            bottom = min(top + _ROWS_AT_ONCE, self._folder.rows)
            one, other = (self._stored(hf_name(n), top, bottom, None) for n in VOCABULARY)
            if not torch.equal(one, other):
                given = f"tie_word_embeddings is true, but {hf_name(HEAD)} is not "
                given += f"{hf_name(EMBEDDING)}, in rows {top} to {bottom - 1}"
                remedy = "set it to false in config.json, or remove the one that is not used"
                raise ForeignCheckpointError([Problem(str(self._folder.path), given, "", remedy)])

    def _window(self, name: str, top: int, bottom: int, columns: tuple[int, int] | None) -> Tensor:
        """Rows [top, bottom) and these columns of a parameter, fp32."""
        theirs = hf_name(name)
        if name not in VOCABULARY or columns is None:
            return self._stored(theirs, top, bottom, columns).float()
        known = min(bottom, self._folder.rows)
        out = torch.empty(bottom - top, columns[1] - columns[0])
        if top < known:
            out[: known - top] = self._stored(theirs, top, known, columns)
        sources = self._vocabulary.sources
        for row in range(max(top, min(self._vocabulary.known, self._folder.rows)), bottom):
            if row in sources or row >= self._folder.rows:
                out[row - top] = self._mean(theirs, sources.get(row, ()), columns)
        return out

    def _mean(self, name: str, rows: tuple[int, ...], columns: tuple[int, int]) -> Tensor:
        """The mean of some rows; element by element in fp64, so that no cut changes a bit."""
        if rows:
            parts = [self._stored(name, row, row + 1, columns)[0].double() for row in rows]
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            return (total / len(parts)).float()
        key = (name, *columns)
        if key not in self._means:
            known = min(self._vocabulary.known, self._folder.rows)
            total = torch.zeros(columns[1] - columns[0], dtype=torch.float64)
            for top in range(0, known, _ROWS_AT_ONCE):
                for row in self._stored(name, top, min(top + _ROWS_AT_ONCE, known), columns):
                    total += row.double()
            self._means[key] = (total / known).float()
        return self._means[key]

    def _stored(self, name: str, top: int, bottom: int, columns: tuple[int, int] | None) -> Tensor:
        """A window of a stored tensor, in its own dtype."""
        file = self._folder.tensors[name].file
        try:
            if file not in self._files:
                self._files[file] = safe_open(file, framework="pt")
            stored = self._files[file].get_slice(name)
            found: Tensor = (
                stored[top:bottom] if columns is None else stored[top:bottom, slice(*columns)]
            )
        except (OSError, SafetensorError) as error:
            given = f"cannot be read at {name}: {error}"
            raise ForeignCheckpointError([Problem(str(file), given)]) from error
        return found

"""What a checkpoint is made of: names, the fragment, and the arithmetic of tensor-parallel slices.

```
checkpoints/
    latest                      the name of the newest checkpoint, one line
    step_000000300/
        manifest.json           format, step, world size, size and SHA-256 of every other file,
                                SHA-256 of its own values
        run_state.json          whatever the caller wants back: counters, plan history, layout
        rank_00000.json         index: one entry a fragment of rank 0; checksum of the next file
        rank_00000.safetensors  the fragments' numbers, keys "kind/name"
        ...
```

A *fragment* is a flat piece of one quantity of one parameter as one rank owned it. Nothing in it
refers to pipeline stages or data-parallel ranks, so any other such layout can be filled from the
same files.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_mer.parallel import slice_bounds

FORMAT_VERSION = 2
LATEST = "latest"
MANIFEST = "manifest.json"
CHECKSUM = "sha256"
"""The manifest's checksum of its own values."""
RUN_STATE = "run_state.json"
TEMPORARY = ".tmp"
REPLACED = ".replaced"

KINDS = ("master", "exp_avg", "exp_avg_sq", "anchor", "velocity", "last_delta")

# safetensors' own dtype names. Only the delta, which serves a cosine, may be stored at half width.
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
HALF_WIDTH_KINDS = ("last_delta",)

_STEP_DIRECTORY = re.compile(rf"step_([0-9]{{1,18}})({re.escape(REPLACED)})?")
_LEFT_OVER = re.compile(
    rf"step_([0-9]{{1,18}}({re.escape(REPLACED)})?(\.removed)?|probe){re.escape(TEMPORARY)}"
)
_OWN_FILE = re.compile(r"manifest\.json|run_state\.json|rank_[0-9]+\.(json|safetensors)")


@dataclass(frozen=True)
class Fragment:
    """A flat piece of one quantity of one parameter.

    The parameter is first cut along `tp_dim` into `tp_size` slices (not at all if `tp_dim` is None:
    then every tensor-parallel rank holds an equal copy), all of the same size but the last ones,
    which may be shorter or empty; slice `tp_rank` is flattened in row-major order; the fragment is
    elements [start, start + numel) of that.

    Raises:
        ValueError: the values contradict each other.
    """

    name: str
    """Canonical parameter name, independent of the layout: "layers.3.attention.q_proj.weight"."""
    kind: str
    """Which quantity of the parameter, one of `KINDS`."""
    global_shape: tuple[int, ...]
    """Shape of the whole parameter before any cut."""
    tp_dim: int | None
    """Dim that tensor parallelism cuts; None: replicated."""
    tp_rank: int
    """Which slice, 0 <= tp_rank < tp_size."""
    tp_size: int
    """Number of slices: the run's tensor-parallel ranks, or its heads of keys and values where
    those are fewer."""
    start: int
    """Offset of the first element in the flattened slice."""
    tensor: torch.Tensor
    """The elements, 1-D, on any device: a view of the live state, which loading fills in place."""

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ValueError(f"fragment {self.kind}/{self.name}: {problem}")

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.tensor.numel()

    @property
    def stop(self) -> int:
        """Offset past the last element."""
        return self.start + self.numel

    @property
    def key(self) -> str:
        """Name of the tensor in the file."""
        return f"{self.kind}/{self.name}"

    def index_entry(self) -> dict[str, Any]:
        """What the index file says of this fragment."""
        return {
            "name": self.name,
            "kind": self.kind,
            "global_shape": list(self.global_shape),
            "tp_dim": self.tp_dim,
            "tp_rank": self.tp_rank,
            "tp_size": self.tp_size,
            "start": self.start,
            "numel": self.numel,
            "dtype": DTYPE_NAMES[self.tensor.dtype],
        }

    def _problem(self) -> str | None:
        if self.kind not in KINDS:
            return f"unknown kind; known: {', '.join(KINDS)}"
        if self.tensor.ndim != 1:
            return f"the tensor must be 1-D, its shape is {tuple(self.tensor.shape)}"
        allowed = list(DTYPE_NAMES) if self.kind in HALF_WIDTH_KINDS else [torch.float32]
        if self.tensor.dtype not in allowed:
            return f"dtype {self.tensor.dtype}, allowed: {allowed}"
        if not 0 <= self.tp_rank < self.tp_size:
            return f"tp_rank {self.tp_rank} is not in 0..{self.tp_size - 1}"
        return self._range_problem()

    def _range_problem(self) -> str | None:
        if self.tp_dim is not None and not 0 <= self.tp_dim < len(self.global_shape):
            return f"tp_dim {self.tp_dim} is no dim of the shape {self.global_shape}"
        length = math.prod(slice_shape(self.global_shape, self.tp_dim, self.tp_size, self.tp_rank))
        if self.start < 0 or self.stop > length:
            return f"elements [{self.start}, {self.stop}) of a slice of {length}"
        return None


def slice_shape(
    global_shape: tuple[int, ...], tp_dim: int | None, tp_size: int, tp_rank: int
) -> tuple[int, ...]:
    """Shape of one tensor-parallel slice; that of the whole if nothing is cut."""
    if tp_dim is None:
        return global_shape
    begin, end = slice_bounds(global_shape[tp_dim], tp_size, tp_rank)
    return (*global_shape[:tp_dim], end - begin, *global_shape[tp_dim + 1 :])


def step_name(step: int) -> str:
    """Directory name of a checkpoint: nine digits, more where the number needs them."""
    return f"step_{step:09d}"


def rank_name(rank: int) -> str:
    """File name of a rank's part, without its extension."""
    return f"rank_{rank:05d}"


def parse_step(name: str) -> int | None:
    """The step of a directory name, None if the name is not a checkpoint's."""
    match = _STEP_DIRECTORY.fullmatch(name)
    return int(match.group(1)) if match else None


def is_left_over(name: str) -> bool:
    """Whether a name is one of those that a killed write leaves behind."""
    return _LEFT_OVER.fullmatch(name) is not None


def is_foreign(path: Path) -> bool:
    """Whether something with a checkpoint's name has no file of one: another program's, or a file.

    Raises:
        OSError: it cannot be read.
    """
    return not path.is_dir() or not any(_OWN_FILE.fullmatch(one.name) for one in path.iterdir())


def step_directories(directory: Path) -> list[Path]:
    """All checkpoints below a directory, whole or not, newest first.

    Steps compare as numbers: step 10510 is newer than 9510. Of two with the same step the one that
    was about to be replaced comes second.
    """
    if not directory.is_dir():
        return []
    found = [(parse_step(path.name), path) for path in directory.iterdir() if path.is_dir()]
    steps = [(step, path) for step, path in found if step is not None]
    steps.sort(key=lambda item: (-item[0], item[1].name.endswith(REPLACED)))
    return [path for _, path in steps]

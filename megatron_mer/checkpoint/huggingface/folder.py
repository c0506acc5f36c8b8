"""A Hugging Face folder: what its headers say, and whether that is a whole Llama.

Only headers are read here, and no torch is needed for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_mer.checkpoint.huggingface.names import (
    EMBEDDING,
    HEAD,
    canonical_shapes,
    hf_name,
    is_buffer,
)
from megatron_mer.config.huggingface import OF_SHAPES, model_keys, no_llama, read_config_json
from megatron_mer.errors import ForeignCheckpointError, Problem

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""safetensors' names of the dtypes that weights may have -> torch's."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LONGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
_POINTER = b"version "  # the first bytes of what Git LFS puts in a file's place
_SHOWN = 8  # names of tensors in a message


@dataclass(frozen=True)
class StoredTensor:
    """A tensor by its file's header."""

    file: Path
    dtype: str
    """safetensors' name, as "BF16"."""
    shape: tuple[int, ...]


class HuggingFaceFolder:
    """The headers of a folder, without its weights.

    Args:
        path: the folder.

    Raises:
        ForeignCheckpointError: config.json or the weights are not there, are pickles, torn, or not
            those that the index names.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config_json(path)
        files, index = _files(path)
        problems: list[Problem] = []
        self.tensors: dict[str, StoredTensor] = {}
        for file in files:
            try:
                self.tensors.update(_header(file))
            except ForeignCheckpointError as error:
                problems += error.problems
        if problems:
            raise ForeignCheckpointError(problems)
        _check_index(path, index, self.tensors)

    @cached_property
    def keys(self) -> dict[str, Any]:
        """What config.json says of the model, by our keys; see `check`."""
        return model_keys(self.config)

    @property
    def rows(self) -> int:
        """Rows of the vocabulary."""
        return int(self.config["vocab_size"])

    @property
    def dtype(self) -> str:
        """The dtype, by torch's name, that most weights have."""
        found = [DTYPES[one.dtype] for one in self.tensors.values() if one.dtype in DTYPES]
        return max(sorted(set(found)), key=found.count)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, by our names."""
        return canonical_shapes(self.keys)

    def check(self) -> None:
        """Make sure that this is a Llama, with every weight of it and no other.

        Raises:
            ForeignCheckpointError: with all that is wrong, the tensors by name.
        """
        problems = [_of_config(one) for one in no_llama(self.config)]
        if not any(one.path.rpartition(" ")[2] in OF_SHAPES for one in problems):
            problems += self._tensor_problems(canonical_shapes(model_keys(self.config)))
        if problems:
            raise ForeignCheckpointError(
                [Problem(f"{self.path}: {one.path}", one.given, one.allowed, one.remedy)
                 for one in problems]
            )  # fmt: skip

    def _tensor_problems(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Problem]:
        wanted = {hf_name(name): shape for name, shape in shapes.items()}
        if missing := [name for name in wanted if name not in self.tensors]:
            untied = missing == [hf_name(HEAD)]
            remedy = (
                "tie_word_embeddings: true in config.json, if the two are one" if untied else ""
            )
            yield Problem("missing tensors", _listed(missing), "every weight of a Llama", remedy)
        copy = {hf_name(HEAD)} if HEAD not in shapes else set()  # Of the tied embedding.
        extra = [n for n in self.tensors if n not in wanted and n not in copy and not is_buffer(n)]
        if extra:
            yield Problem("extra tensors", _listed(extra), "the weights of a Llama, no biases")
        if copy & self.tensors.keys():
            wanted[hf_name(HEAD)] = shapes[EMBEDDING]
        misshaped = [
            f"{name} {list(self.tensors[name].shape)} instead of {list(shape)}"
            for name, shape in wanted.items()
            if name in self.tensors and self.tensors[name].shape != shape
        ]
        if misshaped:
            allowed = "the shapes that config.json means"
            yield Problem("misshaped tensors", _listed(misshaped), allowed)
        other = [
            f"{name} {self.tensors[name].dtype}"
            for name in wanted
            if name in self.tensors and self.tensors[name].dtype not in DTYPES
        ]
        if other:
            yield Problem("dtypes", _listed(other), ", ".join(DTYPES))


def _of_config(problem: Problem) -> Problem:
    return Problem(f"config.json, {problem.path}", problem.given, problem.allowed, problem.remedy)


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more


def _files(path: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The files of the weights, and the index where there is one."""
    if (path / INDEX).exists():
        try:
            index = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(index.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            given = f"is no index of safetensors: {error!r}"
            raise ForeignCheckpointError([Problem(str(path / INDEX), given)]) from error
        if outside := [name for name in names if Path(name).name != name]:
            given = f"names files outside of the folder: {_listed(outside)}"
            allowed = "names of files that lie beside it"
            raise ForeignCheckpointError([Problem(str(path / INDEX), given, allowed)])
        if gone := [name for name in names if not (path / name).is_file()]:
            lost = [tensor for tensor, name in index.items() if name in gone]
            given = f"names files that are not there: {_listed(gone)}; with {_listed(lost)}"
            remedy = "fetch the checkpoint again"
            raise ForeignCheckpointError([Problem(str(path / INDEX), given, remedy=remedy)])
        return [path / name for name in names], index
    if (path / SINGLE).is_file():
        return [path / SINGLE], {}
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    allowed = f"{SINGLE}, or {INDEX} and the files that it names"
    if pickles:
        given = f"holds {_listed(pickles)}: pickles, which can run any program and are never read"
        remedy = "let whoever trusts them write safetensors, with save_pretrained of transformers"
        raise ForeignCheckpointError([Problem(str(path), given, allowed, remedy)])
    raise ForeignCheckpointError([Problem(str(path), "holds no weights", allowed)])


def _header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file.

    Raises:
        ForeignCheckpointError: it is none, or ends early.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length == int.from_bytes(_POINTER, "little"):
                raise ValueError("it is a pointer of Git LFS, whose file was not fetched")
            if not 2 <= length <= _LONGEST_HEADER:
                raise ValueError("it does not begin with a header")
            text = stream.read(length)
        if len(text) < length:
            raise _torn(file, f"ends after {size:,} bytes, in its header of {length:,}")
        entries = json.loads(text)
        if not isinstance(entries, dict):
            raise ValueError("its header is no JSON object")
        entries.pop("__metadata__", None)
        found = {
            name: StoredTensor(file, entry["dtype"], tuple(map(int, entry["shape"])))
            for name, entry in entries.items()
        }
        ends = {name: 8 + length + int(entry["data_offsets"][1]) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        given = f"is no safetensors file: {error}"
        raise ForeignCheckpointError([Problem(str(file), given)]) from error
    if max(ends.values(), default=size) != size:
        lost = _listed(name for name, end in ends.items() if end > size)
        given = f"has {size:,} bytes, its header needs {max(ends.values()):,}"
        given += f"; not whole: {lost}" if lost else ""
        raise _torn(file, given)
    return found


def _torn(file: Path, given: str) -> ForeignCheckpointError:
    return ForeignCheckpointError([Problem(str(file), given, remedy="fetch the file again")])


def _check_index(path: Path, index: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    """An index and the headers must say the same."""
    lost = [
        f"{name} in {file}"
        for name, file in index.items()
        if name not in tensors or tensors[name].file.name != file
    ]
    unlisted = [name for name in tensors if name not in index] if index else []
    problems = []
    if lost:
        problems.append(Problem(str(path / INDEX), f"names what is not there: {_listed(lost)}"))
    if unlisted:
        problems.append(Problem(str(path / INDEX), f"does not name {_listed(unlisted)}"))
    if problems:
        raise ForeignCheckpointError(problems)

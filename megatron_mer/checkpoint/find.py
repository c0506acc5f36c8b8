"""Find the newest whole checkpoint: by the sizes of its files, or by every byte of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mer.checkpoint.files import sha256_of
from megatron_mer.checkpoint.layout import (
    CHECKSUM,
    FORMAT_VERSION,
    LATEST,
    MANIFEST,
    RUN_STATE,
    parse_step,
    step_directories,
)
from megatron_mer.errors import CheckpointError
from megatron_mer.log import get_logger

logger = get_logger(__name__)

# Format 1 is the same without checksums.
_READ_FORMATS = (1, FORMAT_VERSION)


@dataclass(frozen=True)
class CheckpointInfo:
    """A whole checkpoint."""

    step: int
    """Applied optimizer updates."""
    path: Path
    """Its directory."""
    run_state: dict[str, Any]
    """What the run that wrote it gave as its state."""

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> CheckpointInfo:
        """One checkpoint by its directory.

        Raises:
            CheckpointError: it is not whole, or its name is not step_NUMBER.
        """
        directory = Path(path)
        problem = broken(directory)
        if problem:
            raise CheckpointError(f"the checkpoint is not whole: {problem}")
        step = parse_step(directory.name)
        if step is None:
            raise CheckpointError(f"{directory} is no checkpoint: its name is not step_NUMBER")
        return cls(step, directory, json.loads((directory / RUN_STATE).read_text()))


def candidates(directory: str | os.PathLike[str]) -> list[Path]:
    """What to resume from, best first: the one that `latest` names, then by falling step.

    `latest` comes first though a whole one may be newer: a kill came between its name and `latest`,
    and what it lacks is trained again; or `latest` was written by hand, to go back.

    Raises:
        CheckpointError: `latest` is no such name, and there is no checkpoint beside it.
        OSError: the directory cannot be read.
    """
    root = Path(directory)
    found = step_directories(root)
    pointer = root / LATEST
    try:
        name = pointer.read_text(errors="replace").strip()
    except FileNotFoundError:
        return found
    except OSError as error:
        problem = f"{pointer} cannot be read ({error.strerror})"
    else:
        if parse_step(name) is not None:
            named = root / name
            return [named, *(path for path in found if path != named)]
        # Nor a path: a run goes on from its own checkpoints only.
        problem = f"{pointer}: expected step_NUMBER, found {name[:80]!r}"
    if not found:
        raise CheckpointError(
            f"{problem}, and there is no checkpoint beside it. Restore one, or begin anew"
        )
    logger.warning("%s; the newest whole checkpoint is taken", problem)
    return found


def first_whole(
    paths: Iterable[Path],
    problem_of: Callable[[Path], str | None],
    say: Callable[[str], None] = logger.warning,
) -> Path | None:
    """The first checkpoint without a problem.

    Args:
        paths: in the order of `candidates`.
        problem_of: why one is not whole, None if it is: `broken`, `damaged`, or what ranks found
            together.
        say: called with a line for each that was passed over.

    Returns:
        None where there is no checkpoint at all.

    Raises:
        CheckpointError: there are some, but none is whole.
    """
    problems: list[str] = []
    for path in paths:
        problem = problem_of(path)
        if problem is None:
            for line in problems:
                say(f"not a whole checkpoint, resuming from {path.name}: {line}")
            return path
        problems.append(problem)
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointError(
            f"no checkpoint in {path.parent} is whole:\n  {listed}\n"
            "Restore one of them, or begin anew."
        )
    return None


def find_latest(directory: str | os.PathLike[str]) -> CheckpointInfo | None:
    """The checkpoint to resume from: the one `latest` names, else the newest whole one.

    Whole means here: every file of the manifest has its size. A fallback is a warning that says
    what is wrong.

    Returns:
        None where nothing was ever saved.

    Raises:
        CheckpointError: there are checkpoints, but none is whole; or another version of this
            program wrote them.
    """
    path = first_whole(candidates(directory), broken)
    return None if path is None else CheckpointInfo.read(path)


def broken(path: Path) -> str | None:
    """Why a checkpoint is not whole: the file, what was expected, what is there; None if whole.

    Costs one `stat` a file.

    Raises:
        CheckpointError: another format version.
    """
    try:
        files = _files(path)
        json.loads((path / RUN_STATE).read_text())
    except FileNotFoundError as error:
        return f"{error.filename}: expected a file, found none"
    except _Mismatch as error:
        return str(error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path}: expected JSON of a checkpoint, found {error!r}"
    problems = (_size(path / name, size) for name, (size, _) in files.items())
    return next((problem for problem in problems if problem), None)


def is_permanent(path: Path) -> bool:
    """Whether a whole checkpoint was saved to stay; format 1 knew no such."""
    return bool(json.loads((path / MANIFEST).read_text()).get("permanent", False))


def damaged(path: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """Why a checkpoint is not whole, every byte of it read; None if each file has its checksum.

    Args:
        path: its directory.
        rank: whose share of the files to read; rank 0 also does what `broken` does.
        world_size: number of ranks that share the reading. A rank's share has its own two files
            when as many ranks wrote, so they are in the page cache when they are loaded.

    Raises:
        CheckpointError: another format version.
    """
    if rank == 0 and (problem := broken(path)):
        return problem
    try:
        files = _files(path)
        for name, (size, checksum) in files.items():
            if reader_of(name, world_size) != rank:
                continue
            problem = _size(path / name, size)
            if problem:
                return problem
            found = sha256_of(path / name) if checksum else None
            if found != checksum:
                return f"{path / name}: expected SHA-256 {checksum}, found {found}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path}: cannot be read: {error!r}"
    return None


def reader_of(name: str, world_size: int) -> int:
    """The rank that checks a file: the one that wrote it, if as many ranks did."""
    number = name.removeprefix("rank_").split(".")[0]
    return int(number) % world_size if number.isdecimal() else 0


def _files(path: Path) -> dict[str, tuple[int, str | None]]:
    """Size and checksum of every file by the manifest.

    Raises:
        CheckpointError: another format version.
        OSError, ValueError, KeyError, TypeError, AttributeError: it is not there, or no manifest.
    """
    return manifest_files((path / MANIFEST).read_bytes(), path)


def manifest_files(text: bytes, where: object) -> dict[str, tuple[int, str | None]]:
    """Size and SHA-256 of every file by a manifest's text; format 1 has no SHA-256.

    Args:
        text: the manifest.
        where: the checkpoint, for the error.

    Raises:
        CheckpointError: another format version.
        ValueError, KeyError, TypeError: it is no manifest.
    """
    manifest = json.loads(text)
    version = manifest["format"]
    if version not in _READ_FORMATS:
        raise CheckpointError(
            f"{where} has checkpoint format {version}, this program reads "
            f"{' and '.join(map(str, _READ_FORMATS))}; use the version that wrote it"
        )
    if version == 1:
        return {name: (int(size), None) for name, size in manifest["files"].items()}
    _check_manifest(str(where), manifest)
    return {
        name: (int(facts["bytes"]), str(facts["sha256"]))
        for name, facts in manifest["files"].items()
    }


class _Mismatch(ValueError):
    """The manifest is not as it was written; says what was expected and what is there."""


def _check_manifest(where: str, manifest: dict[str, Any]) -> None:
    file, step = f"{where}/{MANIFEST}", parse_step(where.rpartition("/")[2])
    # Manifests had no checksum of their own at first.
    expected = manifest.get(CHECKSUM)
    found = manifest_checksum(manifest)
    if expected not in (None, found):
        raise _Mismatch(f"{file}: expected SHA-256 {expected} of its values, found {found}")
    if step not in (None, manifest["step"]):
        raise _Mismatch(f"{file}: expected step {step} by its name, found {manifest['step']}")


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """The checksum of a manifest's values, its own aside; hexadecimal."""
    values = {key: value for key, value in manifest.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _size(path: Path, expected: int) -> str | None:
    try:
        found = path.stat().st_size
    except OSError:
        return f"{path}: expected {expected} bytes, found no file"
    return None if found == expected else f"{path}: expected {expected} bytes, found {found}"

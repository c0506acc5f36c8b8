"""The way back: a run whose directory lost its checkpoints goes on from their copies."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_mer.checkpoint import open_place
from megatron_mer.checkpoint.files import (
    remove_directory,
    replace_bytes,
    sync_directory,
    write_bytes,
)
from megatron_mer.checkpoint.find import manifest_files, reader_of
from megatron_mer.checkpoint.layout import MANIFEST, RUN_STATE, TEMPORARY
from megatron_mer.checkpoint.save import commit
from megatron_mer.engine.distributed import first_failure
from megatron_mer.errors import CheckpointError, ConfigError, Problem
from megatron_mer.training.copies import (
    FOREIGN,
    KEY,
    OTHER_PLACE,
    SECONDS_TO_LOOK,
    check_owner,
    look,
    newest_here,
    number_of,
    take_over,
    warn_unreachable,
    within,
)
from megatron_mer.training.outputs import RunDirectory
from megatron_mer.training.preflight import Prepared
from megatron_mer.training.rank_0 import from_rank_0
from megatron_mer.training.resume import resumed

_BESIDE = ("metrics.jsonl", "evaluations.jsonl", *FOREIGN)
_TRIES, _PAUSE = 3, 2.0  # of one file; seconds

T = TypeVar("T")


def bring_back(
    prepared: Prepared,
    outputs: RunDirectory,
    rank: int,
    world_size: int,
    accept: Collection[str],
) -> list[str]:
    """Bring the newest copy back where it is ahead of what the run's directory holds. Collective.

    Args:
        prepared: the checked run.
        outputs: its directory.
        rank: this rank; each fetches a share of the files.
        world_size: number of ranks.
        accept: kinds of changes that the resumed run takes up.

    Returns:
        Lines for the log.

    Raises:
        ConfigError: the copies are another run's, or this configuration may not continue them.
        CheckpointError: there are copies, but none can be brought back; or the directory has lost
            its checkpoints and the place does not answer.
    """
    url = prepared.config.checkpoint.copy_to
    if url is None:
        return []
    damaged: dict[str, str] = {}
    while True:
        found = from_rank_0(rank, lambda: _to_bring_back(prepared, outputs, accept, damaged))
        if found is None:
            return list(damaged.values())
        name, manifest = found
        temporary = outputs.checkpoints / f"{name}{TEMPORARY}"
        fetched = _fetch(url, name, manifest, temporary, rank, world_size)
        if reason := first_failure(fetched.unreachable):
            raise CheckpointError(
                f"{name} could not be brought back from {url} ({reason}); start again when there "
                "is room here and the place answers"
            )
        if damage := first_failure(fetched.damage):
            damaged[name] = f"not a whole copy, {name} is not brought back: {damage}"
            continue
        from_rank_0(rank, functools.partial(_name, outputs, url, temporary, manifest))
        text = f"{name} was brought back from {url}: it is ahead of what {outputs.checkpoints} held"
        return [*damaged.values(), text]


def _to_bring_back(
    prepared: Prepared, outputs: RunDirectory, accept: Collection[str], damaged: Mapping[str, str]
) -> tuple[str, bytes] | None:
    """Name and manifest of the copy to bring back; the place is this run's from here on.

    Args:
        prepared: the checked run.
        outputs: its directory.
        accept: kinds of changes that the resumed run takes up.
        damaged: copies that were tried, each with what is wrong.
    """
    config = prepared.config
    place = open_place(str(config.checkpoint.copy_to))
    here = newest_here(outputs)
    try:
        found = within(SECONDS_TO_LOOK, lambda: look(place, damaged))
        wanted = found.best is not None and number_of(found.best) > here
        names = (MANIFEST, RUN_STATE) if wanted else ()
        texts = [place.read(f"{found.best}/{name}") or b"{}" for name in names]
    except Exception as error:
        if here < 0 and outputs.read_status().get("step", 0) > 0:
            raise CheckpointError(
                f"{outputs.checkpoints} has lost its checkpoints, and {place.url}, where copies "
                f"are, cannot be looked at ({type(error).__name__}: {error}); start again when it "
                "can, or begin anew with --fresh"
            ) from error
        warn_unreachable(place, error)
        return None
    check_owner(found, config, outputs)
    if wanted:
        _check_continuation(prepared, accept, *texts)
    elif damaged and here < 0:
        listed = "\n  ".join(damaged.values())
        raise CheckpointError(f"no copy in {place.url} is whole:\n  {listed}")
    take_over(place, found, config, outputs)
    if damaged and found.best is not None:
        place.point(found.best)  # Else the damaged ones would count as ahead of the run.
    if not wanted:
        return None
    temporary = outputs.checkpoints / f"{found.best}{TEMPORARY}"
    if temporary.exists():
        remove_directory(temporary)
    temporary.mkdir(parents=True)
    return str(found.best), texts[0]


def _check_continuation(
    prepared: Prepared, accept: Collection[str], manifest: bytes, state: bytes
) -> None:
    """Find out before gigabytes are fetched whether the run may go on from a copy.

    Raises:
        ConfigError: it may not.
    """
    _, checksum = manifest_files(manifest, KEY).get(RUN_STATE, (0, None))
    if checksum not in (None, hashlib.sha256(state).hexdigest()):
        return  # Damaged, as will be found when it is fetched.
    try:
        resumed(prepared, json.loads(state), accept)
    except ConfigError as error:
        given = f"given {prepared.config.checkpoint.copy_to}, with copies that this configuration "
        problem = Problem(KEY, given + "may not continue", remedy=f"see below, or {OTHER_PLACE}")
        raise ConfigError([problem, *error.problems]) from error


@dataclass(frozen=True)
class _Fetched:
    """What became of this rank's share of a copy."""

    unreachable: str | None = None
    """Why it could not be fetched."""
    damage: str | None = None
    """Why it is not what its manifest says."""


def _fetch(
    url: str, name: str, manifest: bytes, target: Path, rank: int, world_size: int
) -> _Fetched:
    """Fetch this rank's share of a copy: the files it would read if as many ranks wrote it."""
    try:
        place = open_place(url)
        for file, (size, checksum) in manifest_files(manifest, f"{place.url}/{name}").items():
            if reader_of(file, world_size) != rank:
                continue
            one = functools.partial(place.fetch, name, file, size, checksum, target / file)
            if (damage := _again(one)) is not None:
                return _Fetched(damage=damage)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
        return _Fetched(unreachable=f"rank {rank}: {type(error).__name__}: {error}")
    return _Fetched()


def _again(work: Callable[[], T]) -> T:
    """Try a few times."""
    for _ in range(_TRIES - 1):
        with contextlib.suppress(Exception):
            return work()
        time.sleep(_PAUSE)
    return work()


def _name(outputs: RunDirectory, url: str, temporary: Path, manifest: bytes) -> None:
    """Give what was fetched its name; with it comes what lies beside the checkpoints.

    Raises:
        CheckpointError: a file cannot be read there, or written here.
    """
    try:
        place = open_place(url)
        for name in _BESIDE:
            path, text = outputs.root / name, place.read(name)
            # A directory that is older than the copies lacks lines.
            if text is not None and (not path.exists() or path.stat().st_size < len(text)):
                path.parent.mkdir(exist_ok=True)
                replace_bytes(path, text)
        write_bytes(temporary / MANIFEST, iter([manifest]))
        sync_directory(temporary)
        commit(outputs.checkpoints, temporary, temporary.with_suffix(""))
    except Exception as error:
        what = f"{temporary.stem} could not be brought back from {url}: {error}; start again"
        raise CheckpointError(what) from error

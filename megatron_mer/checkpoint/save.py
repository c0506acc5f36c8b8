"""What a checkpoint's write does on the disk: a temporary name, one rename, then `latest`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import Any

import torch

from megatron_mer.checkpoint.files import (
    FileFacts,
    remove_directory,
    replace_text,
    safetensors_chunks,
    sha256_of,
    sync_directory,
    sync_file,
    write_bytes,
    write_json,
)
from megatron_mer.checkpoint.find import broken, is_permanent, manifest_checksum
from megatron_mer.checkpoint.layout import (
    CHECKSUM,
    FORMAT_VERSION,
    LATEST,
    MANIFEST,
    REPLACED,
    RUN_STATE,
    TEMPORARY,
    Fragment,
    is_foreign,
    is_left_over,
    parse_step,
    rank_name,
    step_directories,
)
from megatron_mer.errors import CheckpointError
from megatron_mer.log import get_logger

logger = get_logger(__name__)


_CHUNK = 64 << 20  # bytes written at once: after each a write can be given up


class WriteStopped(Exception):
    """A write was given up: another rank's failed, or the run ends."""


def prepare(root: Path) -> None:
    """Make the directory ready, and clear what killed runs left behind.

    Raises:
        OSError: it cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    for path in list(root.iterdir()):
        if is_left_over(path.name):
            logger.info("removing %s, left by a run that ended while writing it", path)
            remove_directory(path)
    for path in root.glob(f"step_*{REPLACED}"):
        if parse_step(path.name) is None:
            continue
        name = path.with_name(path.name.removesuffix(REPLACED))
        if not name.exists():
            os.rename(path, name)
    # A target that takes no file is told now and not when the first checkpoint is due.
    probe = root / f"step_probe{TEMPORARY}"
    probe.mkdir()
    probe.rmdir()


def write_rank(
    temporary: Path,
    fragments: Sequence[Fragment],
    rank: int,
    world_size: int,
    stop: Event,
    read: Callable[[Fragment], torch.Tensor] = lambda fragment: fragment.tensor,
) -> None:
    """Write one rank's part and flush it to the disk.

    Args:
        temporary: the checkpoint's directory before it has its name; made when missing.
        fragments: what this rank owns, on the host.
        rank: this rank.
        world_size: number of ranks.
        stop: when set, the write ends with `WriteStopped`.
        read: gives a fragment's elements when they are written; default: they are there.

    Raises:
        OSError: the disk is full, or the like.
        ValueError: two fragments have one key.
    """
    repeated = [key for key, count in Counter(f.key for f in fragments).items() if count > 1]
    if repeated:
        raise ValueError(f"two fragments of one rank share a key: {', '.join(repeated)}")
    temporary.mkdir(parents=True, exist_ok=True)
    chunks = _stoppable(safetensors_chunks(fragments, read), stop)
    facts = write_bytes(temporary / f"{rank_name(rank)}.safetensors", chunks)
    index = {
        "format": FORMAT_VERSION,
        "rank": rank,
        "world_size": world_size,
        "tensors": asdict(facts),
        "fragments": [fragment.index_entry() for fragment in fragments],
    }
    if stop.is_set():
        raise WriteStopped
    write_json(temporary / f"{rank_name(rank)}.json", index)
    sync_directory(temporary)


def _stoppable(chunks: Iterator[bytes | memoryview], stop: Event) -> Iterator[bytes | memoryview]:
    for chunk in chunks:
        for start in range(0, len(chunk), _CHUNK):
            if stop.is_set():
                raise WriteStopped
            yield chunk[start : start + _CHUNK]


def write_manifest(
    temporary: Path, step: int, world_size: int, run_state: bytes, permanent: bool
) -> None:
    """Write the run state, and the manifest of what all ranks have written.

    Args:
        temporary: the checkpoint's directory before it has its name.
        step: applied optimizer updates.
        world_size: number of ranks.
        run_state: JSON.
        permanent: the checkpoint stays for good.

    Raises:
        OSError: the disk is full, or a rank's file is not there as that rank wrote it.
    """
    files = {RUN_STATE: asdict(write_bytes(temporary / RUN_STATE, iter([run_state])))}
    for rank in range(world_size):
        index, tensors = (
            temporary / f"{rank_name(rank)}{suffix}" for suffix in (".json", ".safetensors")
        )
        for path in (index, tensors):
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is not visible on rank 0: the directory must be shared by all ranks"
                )
        content = index.read_bytes()
        files[index.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        files[tensors.name] = json.loads(content)["tensors"]
        size, written = tensors.stat().st_size, files[tensors.name]["bytes"]
        if size != written:
            raise OSError(f"rank 0 sees {size} bytes of {tensors}, rank {rank} wrote {written}")
    manifest = {
        "format": FORMAT_VERSION,
        "step": step,
        "world_size": world_size,
        "permanent": permanent,
        "files": files,
    }
    _seal(temporary, manifest)


def _seal(temporary: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, which makes the directory a checkpoint."""
    write_json(temporary / MANIFEST, {**manifest, CHECKSUM: manifest_checksum(manifest)})
    sync_directory(temporary)


def rewrite_run_state(path: Path, run_state: Mapping[str, Any]) -> None:
    """Give a checkpoint another run state; its tensors stay the files that they are.

    A kill at any moment leaves it whole with the old state, under its name or with `.replaced`
    behind it, or with the new one. `prepare` makes good what it leaves.

    Args:
        path: of a whole checkpoint, which no run writes or reads meanwhile.
        run_state: JSON types.

    Raises:
        CheckpointError: its old run state is damaged.
        OSError: the disk is full, or the like.
    """
    manifest = json.loads((path / MANIFEST).read_bytes())
    old = asdict(FileFacts((path / RUN_STATE).stat().st_size, sha256_of(path / RUN_STATE)))
    if manifest["files"][RUN_STATE] != old:
        written = manifest["files"][RUN_STATE]
        raise CheckpointError(f"{path / RUN_STATE}: expected {written}, found {old}")
    temporary = path.with_name(path.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name in manifest["files"]:
        if name != RUN_STATE:
            _link(path / name, temporary / name)
    manifest["files"][RUN_STATE] = asdict(write_json(temporary / RUN_STATE, run_state))
    _seal(temporary, manifest)
    give_name(path.parent, temporary, path)
    remove_directory(path.with_name(path.name + REPLACED))


def _link(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where the file system knows no such."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync_file(target)


def clear_replaced(root: Path) -> None:
    """Remove what a kill left of checkpoints that were written anew, once those are whole.

    Raises:
        CheckpointError: of one nothing else is whole.
    """
    for aside in root.glob(f"step_*{REPLACED}"):
        path = aside.with_name(aside.name.removesuffix(REPLACED))
        if parse_step(aside.name) is None or not path.exists():
            continue
        if problem := broken(path):
            raise CheckpointError(f"{problem}, but {aside} is there; remove one of the two")
        remove_directory(aside)


def commit(root: Path, temporary: Path, final: Path) -> None:
    """Give the checkpoint its name, then point `latest` at it."""
    give_name(root, temporary, final)
    replace_text(root / LATEST, final.name + "\n")


def give_name(root: Path, temporary: Path, final: Path) -> None:
    """Rename what is whole; an older one of the same name can be found until then."""
    if final.exists():
        _step_aside(final)
    os.rename(temporary, final)
    sync_directory(root)


def _step_aside(final: Path) -> None:
    """Keep an older checkpoint of the same step findable until the new one has its name."""
    if is_foreign(final):
        raise FileExistsError(f"{final} is there and is no checkpoint; move it to another place")
    if broken(final):
        remove_directory(final)
        return
    aside = final.with_name(final.name + REPLACED)
    if aside.exists():
        remove_directory(aside)
    os.rename(final, aside)


def prune(
    root: Path, step: int, keep_last: int, keep_every: int | None, in_use: str | None = None
) -> None:
    """Remove what is no longer wanted; a failure here costs space, not the checkpoint.

    Args:
        root: where checkpoints live.
        step: of the newest one; those behind it are of a future that the run has left.
        keep_last: newest ones to keep.
        keep_every: those whose step is a multiple stay.
        in_use: name of one that somebody reads: it stays until the next time.
    """
    kept = 0
    for path in step_directories(root):
        number = parse_step(path.name)
        try:
            if number is None or is_foreign(path):
                continue
            if number <= step and not path.name.endswith(REPLACED) and not broken(path):
                kept += 1
                multiple = keep_every is not None and number % keep_every == 0
                stays = kept <= keep_last or multiple or path.name == in_use
                if stays or is_permanent(path):
                    continue
            if number > step:
                logger.warning("removing %s: the run went back to before step %d", path, number)
            remove_directory(path)
        except (OSError, CheckpointError) as error:
            logger.warning("could not remove the old checkpoint %s: %s", path, error)

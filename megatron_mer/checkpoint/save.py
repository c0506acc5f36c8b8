"""Write a checkpoint: all of it under a temporary name, then one rename, then `latest`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_mer.checkpoint.files import (
    remove_directory,
    replace_text,
    safetensors_chunks,
    sync_directory,
    write_bytes,
    write_json,
)
from megatron_mer.checkpoint.find import broken, is_permanent
from megatron_mer.checkpoint.layout import (
    FORMAT_VERSION,
    LATEST,
    MANIFEST,
    REPLACED,
    RUN_STATE,
    TEMPORARY,
    Fragment,
    parse_step,
    rank_name,
    step_directories,
    step_name,
)
from megatron_mer.errors import CheckpointError
from megatron_mer.log import get_logger

logger = get_logger(__name__)


def save_checkpoint(
    directory: str | os.PathLike[str],
    step: int,
    fragments: Iterable[Fragment],
    run_state: Mapping[str, Any],
    *,
    rank: int,
    world_size: int,
    barrier: Callable[[], None],
    first_failure: Callable[[str | None], str | None],
    keep_last: int = 2,
    keep_every: int | None = None,
    permanent: bool = False,
) -> Path:
    """Write this rank's part of a checkpoint; returns when all of it is on the disk. Collective.

    At any moment `find_latest` gives the previous checkpoint or this one, whole. A failure on one
    rank (a full disk) is an error on all of them; older checkpoints stay as they are.

    Args:
        directory: Where checkpoints live, on a file system that all ranks share.
        step: Applied optimizer updates, >= 0. A checkpoint of the same step is replaced: a skipped
            batch advances the data but not the step.
        fragments: What this rank owns; one a kind and parameter.
        run_state: JSON values that are the same on all ranks; rank 0's are written.
        rank: This rank.
        world_size: Number of ranks.
        barrier: A collective that returns when every rank has called it.
        first_failure: A collective: every rank gives why it failed, or None, and gets the reason of
            the first rank that did.
        keep_last: Newest checkpoints to keep, >= 1. Those with a larger step than this one are of a
            future that this run has left, and go.
        keep_every: Checkpoints whose step is a multiple stay too.
        permanent: This one stays for good.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: on all ranks when any failed; its cause is the failing rank's exception.
    """
    root = Path(directory)
    final = root / step_name(step)
    temporary = root / (final.name + TEMPORARY)
    together = _Together(first_failure, final, temporary, rank)
    barrier()  # no rank still reads a checkpoint that the next lines may rename
    with together:
        if rank == 0:
            _prepare(root, temporary, keep_last)
    with together:
        _write_rank(temporary, list(fragments), rank, world_size)
    with together:
        if rank == 0:
            _write_manifest(temporary, step, world_size, run_state, permanent)
            _commit(root, temporary, final)
            _prune(root, step, keep_last, keep_every)
    return final


class _Together:
    """A piece of work whose failure on one rank is a failure on all.

    The collective does not run when the exception is not an `Exception`: a rank that is being
    stopped does not wait for the others.
    """

    def __init__(
        self,
        first_failure: Callable[[str | None], str | None],
        final: Path,
        temporary: Path,
        rank: int,
    ) -> None:
        self._first_failure = first_failure
        self._final = final
        self._temporary = temporary
        self._rank = rank

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, cause: BaseException | None, trace: object) -> None:
        if cause is not None and not isinstance(cause, Exception):
            return
        reason = self._first_failure(f"rank {self._rank}: {cause}" if cause else None)
        if reason is None:
            return
        # No rank writes any more: give a full disk its space back.
        if self._rank == 0 and self._temporary.exists():
            with contextlib.suppress(OSError):
                remove_directory(self._temporary)
        raise CheckpointError(
            f"{self._final} was not written ({reason}); older checkpoints are whole. "
            "Check the space and the rights there, then start again: the run resumes."
        ) from cause


def _prepare(root: Path, temporary: Path, keep_last: int) -> None:
    """Clear what killed runs left behind, so that no old file gets into the new checkpoint."""
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}, it must be at least 1")
    root.mkdir(parents=True, exist_ok=True)
    for path in root.glob(f"step_*{TEMPORARY}"):
        logger.info("removing %s, left by a run that ended while writing it", path)
        remove_directory(path)
    for path in root.glob(f"step_*{REPLACED}"):
        name = path.with_name(path.name.removesuffix(REPLACED))
        if not name.exists():
            os.rename(path, name)
    temporary.mkdir()


def _write_rank(temporary: Path, fragments: list[Fragment], rank: int, world_size: int) -> None:
    repeated = [key for key, count in Counter(f.key for f in fragments).items() if count > 1]
    if repeated:
        raise ValueError(f"two fragments of one rank share a key: {', '.join(repeated)}")
    chunks = safetensors_chunks(fragments)
    facts = write_bytes(temporary / f"{rank_name(rank)}.safetensors", chunks)
    index = {
        "format": FORMAT_VERSION,
        "rank": rank,
        "world_size": world_size,
        "tensors": asdict(facts),
        "fragments": [fragment.index_entry() for fragment in fragments],
    }
    write_json(temporary / f"{rank_name(rank)}.json", index)
    sync_directory(temporary)


def _write_manifest(
    temporary: Path, step: int, world_size: int, run_state: Mapping[str, Any], permanent: bool
) -> None:
    files = {RUN_STATE: asdict(write_json(temporary / RUN_STATE, dict(run_state)))}
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
    write_json(temporary / MANIFEST, manifest)
    sync_directory(temporary)


def _commit(root: Path, temporary: Path, final: Path) -> None:
    """Give the checkpoint its name, then point `latest` at it."""
    if final.exists():
        _step_aside(final)
    os.rename(temporary, final)
    sync_directory(root)
    replace_text(root / LATEST, final.name + "\n")


def _step_aside(final: Path) -> None:
    """Keep an older checkpoint of the same step findable until the new one has its name."""
    if broken(final):
        remove_directory(final)
        return
    aside = final.with_name(final.name + REPLACED)
    if aside.exists():
        remove_directory(aside)
    os.rename(final, aside)


def _prune(root: Path, step: int, keep_last: int, keep_every: int | None) -> None:
    """Remove what is no longer wanted; a failure here costs space, not the checkpoint."""
    kept = 0
    for path in step_directories(root):
        number = parse_step(path.name)
        ours = number is not None and number <= step and not path.name.endswith(REPLACED)
        if ours and not broken(path):
            kept += 1
            multiple = keep_every is not None and number is not None and number % keep_every == 0
            if kept <= keep_last or multiple or is_permanent(path):
                continue
        if number is not None and number > step:
            logger.warning("removing %s: the run went back to before step %d", path, number)
        try:
            remove_directory(path)
        except OSError as error:
            logger.warning("could not remove the old checkpoint %s: %s", path, error)

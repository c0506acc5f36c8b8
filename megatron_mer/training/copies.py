"""A run's copies in a second place: whose they are, and what of them a start has to know.

A place belongs to one run directory, by an id that lies in both. A start finds there: nothing, its
own copies, those of a run that lost its directory and goes on here, or another run's, which it
refuses to touch.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_mer.checkpoint import Copier, open_place
from megatron_mer.checkpoint.copier import NoCopies, describe_owner
from megatron_mer.checkpoint.files import replace_text
from megatron_mer.checkpoint.find import broken
from megatron_mer.checkpoint.huggingface import KEPT, KEPT_FILES
from megatron_mer.checkpoint.layout import parse_step, step_directories
from megatron_mer.checkpoint.place import Place
from megatron_mer.config import RunConfig
from megatron_mer.errors import CheckpointError, ConfigError, Problem
from megatron_mer.log import get_logger
from megatron_mer.training.dropped import NAME as DROPPED
from megatron_mer.training.outputs import RunDirectory

SECONDS_AT_THE_END = 300.0
"""How long a run that is done waits for the copy of its last checkpoint."""

KEY = "checkpoint.copy_to"
_RUN_ID = "run_id"
_BESIDE = ("config.yaml", "metrics.jsonl", "evaluations.jsonl", DROPPED)
FOREIGN = tuple(f"{KEPT}/{name}" for name in KEPT_FILES)
"""What an export needs of the folder that the weights came from, where they came from one."""
SECONDS_TO_LOOK = 60.0

OTHER_PLACE = "give this run a place of its own with --checkpoint.copy_to PATH_OR_URL"

logger = get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """What a place holds, as far as a start has to know."""

    owner: Mapping[str, Any] | None
    """Whose copies they are."""
    steps: tuple[str, ...]
    """Names of all copies, whole or not."""
    best: str | None
    """The whole one to go on from."""


def copier(config: RunConfig, outputs: RunDirectory) -> Copier | NoCopies:
    """What copies this run's checkpoints; not started. For rank 0, which has the lock."""
    url = config.checkpoint.copy_to
    if url is None:
        return NoCopies()
    return Copier(
        outputs.checkpoints,
        open_place(url),
        _owner(config, outputs),
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        beside={name: outputs.root / name for name in (*_BESIDE, *FOREIGN)},
    )


def refuse_fresh(config: RunConfig) -> None:
    """Make sure that a run that begins anew finds no copies in its place. For rank 0.

    Raises:
        ConfigError: there are some, and they would be removed.
    """
    if config.checkpoint.copy_to is None:
        return
    place = open_place(config.checkpoint.copy_to)
    try:
        steps = within(SECONDS_TO_LOOK, place.steps)
    except Exception as error:  # noqa: BLE001 - whatever a file system raises
        warn_unreachable(place, error)
        return
    if steps:
        given = f"given {place.url}, which holds {steps[0]}, and --fresh begins anew"
        remedy = f"move or remove the copies, or {OTHER_PLACE}"
        raise ConfigError([Problem(KEY, given, "a place without copies", remedy)])


def describe_copies(config: RunConfig, outputs: RunDirectory) -> str | None:
    """What a start would find in the place of its copies, for a dry run."""
    if config.checkpoint.copy_to is None:
        return None
    place = open_place(config.checkpoint.copy_to)
    try:
        found = within(SECONDS_TO_LOOK, lambda: look(place))
    except Exception as error:  # noqa: BLE001 - whatever a file system raises
        return f"{place.url} cannot be looked at: {type(error).__name__}: {error}"
    try:
        check_owner(found, config, outputs)
    except ConfigError as error:
        return f"a start would be refused: {error}"
    if found.best is None:
        return f"{place.url} holds no copy yet"
    if number_of(found.best) > newest_here(outputs):
        return f"{found.best} would first be brought back from {place.url}, and gone on from"
    return f"the newest copy in {place.url} is {found.best}"


def look(place: Place, damaged: Collection[str] = ()) -> Found:
    """Look at a place, past the copies that proved damaged."""
    best = next((name for name in place.best() if name not in damaged), None)
    return Found(place.owner(), tuple(place.steps()), best)


def check_owner(found: Found, config: RunConfig, outputs: RunDirectory) -> None:
    """Make sure that the copies are this run's, or of one that lost its directory.

    Raises:
        ConfigError: they are not.
    """
    url, owner = config.checkpoint.copy_to, found.owner
    allowed = "an empty place, or one with copies of this run"
    if owner is None:
        if found.steps:
            given = f"given {url}, which holds {found.steps[0]}, which no run has copied there"
            raise ConfigError([Problem(KEY, given, allowed, OTHER_PLACE)])
        return
    if owner.get("id") == _id(outputs.root):
        return
    alive = owner.get("id") == _id(Path(str(owner.get("output_dir"))))
    lost = newest_here(outputs) < 0 and owner.get("name") == config.name
    if alive or (found.steps and not lost):
        given = f"given {url}, which has the copies of {describe_owner(owner)}"
        raise ConfigError([Problem(KEY, given, allowed, OTHER_PLACE)])


def take_over(place: Place, found: Found, config: RunConfig, outputs: RunDirectory) -> None:
    """Put this run's id into a place that was another directory's."""
    owner = _owner(config, outputs)
    if found.owner is None or found.owner.get("id") == owner["id"]:
        return
    try:
        place.claim(owner)
    except Exception as error:  # noqa: BLE001 - whatever a file system raises
        warn_unreachable(place, error)


def _owner(config: RunConfig, outputs: RunDirectory) -> dict[str, str]:
    """What the place says of this run, which gets its id if it has none."""
    if not _id(outputs.root):
        replace_text(outputs.root / _RUN_ID, uuid.uuid4().hex + "\n")
    root = str(outputs.root.absolute())
    return {"id": _id(outputs.root), "name": config.name, "output_dir": root}


def _id(root: Path) -> str:
    """The id of the run in a directory, empty if it has none."""
    try:
        return (root / _RUN_ID).read_text().strip()
    except OSError:
        return ""


def newest_here(outputs: RunDirectory) -> int:
    """Step of the newest checkpoint that is whole by its sizes; -1 where there is none."""
    for path in step_directories(outputs.checkpoints):
        with contextlib.suppress(CheckpointError):
            if broken(path) is None:
                return number_of(path.name)
    return -1


def number_of(name: str) -> int:
    """The step of a checkpoint's name."""
    number = parse_step(name)
    return -1 if number is None else number


def warn_unreachable(place: Place, error: Exception) -> None:
    """Say that the run goes on although its place does not answer."""
    logger.warning(
        "%s: %s cannot be looked at (%s: %s); the run goes on without it, and copies are tried "
        "again and again",
        KEY,
        place.url,
        type(error).__name__,
        error,
    )


def within(seconds: float, work: Callable[[], T]) -> T:
    """Do it in a thread, and give up waiting after a while: a dead host may not answer for long.

    Raises:
        TimeoutError: it took longer.
        Exception: what the work raises.
    """
    made: list[T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            made.append(work())
        except Exception as error:  # noqa: BLE001 - raised below
            failed.append(error)

    thread = threading.Thread(target=run, name="copies, a look", daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not made:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return made[0]

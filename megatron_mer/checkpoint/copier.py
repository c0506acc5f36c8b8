"""Copies of checkpoints to a second place, made in the background and never in the way of the run.

One thread of rank 0 does it: rank 0 alone knows when a checkpoint is whole under its name, and so
no rank waits for another. There is no queue: what is to be copied is what lies in the directory of
checkpoints and not in the place, newest first, so that a long outage leaves no backlog.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mer.checkpoint.find import broken, is_permanent
from megatron_mer.checkpoint.layout import (
    LATEST,
    MANIFEST,
    REPLACED,
    parse_step,
    step_directories,
    step_name,
)
from megatron_mer.checkpoint.place import CopyStopped, Place
from megatron_mer.errors import CheckpointError
from megatron_mer.log import get_logger

FIRST_PAUSE, LONGEST_PAUSE = 5.0, 600.0
"""Seconds between a failure and the next try: doubled from the first to the longest."""
TRIES_AT_THE_END = 5
"""Failures in a row after which the run's end waits no longer."""
_PAUSE_AT_THE_END = 1.0
_SECONDS_TO_STOP = 5.0

REMEDY = "start the run again, also if it is done: a start copies what is missing"

logger = get_logger(__name__)


class Copier:
    """Copies each whole checkpoint of a directory to a place; errors are warnings, tried again.

    Args:
        checkpoints: The directory.
        place: Where copies go.
        owner: Whose they are: "id", and what people want to know. A place of another is left alone.
        keep_last: Newest copies to keep in the place; the rule is that of `save.prune`.
        keep_every: Copies whose step is a multiple stay too.
        beside: Small files that are copied with each checkpoint, before it, by their name there.
        first_pause: Seconds before the second try.
    """

    def __init__(
        self,
        checkpoints: Path,
        place: Place,
        owner: Mapping[str, Any],
        *,
        keep_last: int,
        keep_every: int | None = None,
        beside: Mapping[str, Path] | None = None,
        first_pause: float = FIRST_PAUSE,
    ) -> None:
        self._root = checkpoints
        self._place = place
        self._owner = owner
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._beside = beside or {}
        self._first_pause = first_pause
        self._change = threading.Condition()
        self._stop = threading.Event()
        self._wanted = True
        self._finishing = False
        self._told = False
        self._offered: set[str] = set()
        self._done: dict[str, bytes] = {}
        self._damaged: dict[str, bytes] = {}
        self._in_hand: str | None = None
        self._tidied = False
        self._settled = ""
        self._failures = 0
        # A daemon: a process that is being stopped does not wait for a service.
        self._thread = threading.Thread(target=self._work, name="copies", daemon=True)

    def start(self) -> None:
        """Begin, with what is missing in the place."""
        self._thread.start()

    def offer(self, step: int) -> None:
        """A checkpoint is whole in the directory. Returns at once."""
        with self._change:
            self._offered.add(step_name(step))
            self._wanted = True
            self._change.notify_all()

    def in_hand(self) -> str | None:
        """Name of the checkpoint that is being copied, which therefore must stay for now.

        Else a place that is slower than the checkpoints come would never get a whole one.
        """
        return self._in_hand

    def missing(self) -> list[str]:
        """Names of whole checkpoints that are not in the place, newest first."""
        try:
            return [path.name for path in self._sources() if not self._is_done(path)]
        except OSError as error:
            logger.warning("%s cannot be read: %s", self._root, error)
            return []

    def finish(self, seconds: float | None) -> None:
        """Return when all is copied, when the time is over, or when it fails again and again.

        Args:
            seconds: how long to wait; None: as long as it takes.
        """
        left = self.missing()
        if left and self._thread.is_alive():
            most = "" if seconds is None else f" (at most {seconds:.0f} s)"
            logger.info("waiting until %s is in %s%s", ", ".join(left), self._url, most)
        with self._change:
            self._finishing = True
            self._failures = 0
            self._change.notify_all()
        if self._thread.is_alive():
            self._thread.join(seconds)
        self.close()

    def close(self) -> None:
        """Give up what is not copied, and say what that is."""
        with self._change:
            self._stop.set()
            self._change.notify_all()
        if self._thread.is_alive():
            self._thread.join(_SECONDS_TO_STOP)
        if not self._told and (left := self.missing()):
            self._told = True
            logger.warning(
                "not known to be copied to %s: %s; %s", self._url, ", ".join(left), REMEDY
            )

    @property
    def _url(self) -> str:
        return self._place.url

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                self._copy_all()
                self._failures = 0
            except CopyStopped:
                return
            except CheckpointError as error:
                logger.warning("nothing more is copied by this start: %s", error)
                return
            except Exception as error:  # noqa: BLE001 - whatever a file system raises
                if not self._pause(f"{type(error).__name__}: {error}"):
                    return
                continue
            with self._change:
                self._change.wait_for(lambda: self._wanted or self._ends())
                if not self._wanted:
                    return

    def _ends(self) -> bool:
        return self._finishing or self._stop.is_set()

    def _pause(self, cause: str) -> bool:
        """Say what failed and wait; returns whether to try again."""
        with self._change:
            self._failures += 1
            hurries = self._finishing
            if hurries and self._failures >= TRIES_AT_THE_END:
                logger.warning("copying to %s failed, and the run ends: %s", self._url, cause)
                return False
            first = min(self._first_pause, _PAUSE_AT_THE_END) if hurries else self._first_pause
            seconds = min(first * 2.0 ** (self._failures - 1), LONGEST_PAUSE)
            next_try = f"{seconds:.0f} s" if hurries else f"{seconds:.0f} s, training goes on"
            logger.warning(
                "copying to %s failed: %s; trying again in %s", self._url, cause, next_try
            )
            self._change.wait_for(
                lambda: self._stop.is_set() or self._finishing != hurries, timeout=seconds
            )
        return True

    def _copy_all(self) -> None:
        """Copy until nothing is missing.

        Raises:
            CheckpointError: the place is another run's.
            CopyStopped: it was given up.
            Exception: what the file system raises.
        """
        self._wanted = False
        self._claim()
        while (source := self._next()) is not None:
            if self._stop.is_set():
                raise CopyStopped
            if self._copy(source):
                self._settle()
        self._settle()

    def _claim(self) -> None:
        found = self._place.owner()
        if found is None and self._place.steps():
            raise CheckpointError(f"{self._url} holds checkpoints that no run has copied there")
        if found is not None and found.get("id") != self._owner["id"]:
            raise CheckpointError(f"{self._url} now has the copies of {describe_owner(found)}")
        if found != self._owner:
            self._place.claim(self._owner)
        if not self._tidied:
            self._check_ahead()
            self._place.tidy()
            self._tidied = True

    def _check_ahead(self) -> None:
        """Where the start could not look at the place, there may be copies it should go on from."""
        newest = max((parse_step(path.name) or 0 for path in self._sources()), default=-1)
        best = next(self._place.best(), None)
        if best is not None and (parse_step(best) or 0) > newest:
            raise CheckpointError(
                f"{self._url} holds {best}, which is ahead of this run and would be removed; stop "
                "and start again to go on from there, or remove it"
            )

    def _sources(self) -> list[Path]:
        """Whole checkpoints, newest first."""
        found = (p for p in step_directories(self._root) if not p.name.endswith(REPLACED))
        return [path for path in found if _is_whole(path)]

    def _is_done(self, path: Path) -> bool:
        return self._done.get(path.name, b"") == _manifest(path)

    def _next(self) -> Path | None:
        """What to copy next: the newest, then those that stay for good, then the rest."""
        found = self._sources()
        names = {path.name for path in found}
        with self._change:
            skipped = sorted(self._offered - names - self._done.keys())
            self._offered &= names
        for name in skipped:
            logger.info("%s was removed before it could be copied to %s", name, self._url)
        self._done = {name: text for name, text in self._done.items() if name in names}
        for path in [*found[:1], *sorted(found[1:], key=lambda path: not _stays(path))]:
            manifest = _manifest(path)
            if manifest is None or manifest in (
                self._done.get(path.name),
                self._damaged.get(path.name),
            ):
                continue
            if not self._place.holds(path.name, manifest):
                return path
            self._done[path.name] = manifest
        return None

    def _copy(self, source: Path) -> bool:
        """Copy one checkpoint; returns whether it is there now."""
        begin = time.perf_counter()
        self._in_hand = source.name
        manifest = _manifest(source) or b""
        try:
            for name, path in self._beside.items():
                self._place.put(name, path)
            self._place.copy(source, manifest, self._stop)
        except Exception as error:
            self._give_up(source.name)
            if isinstance(error, CopyStopped):
                raise
            if _manifest(source) != manifest:
                text = "%s was removed or replaced while it was copied to %s"
                logger.info(text, source.name, self._url)
                return False
            if not isinstance(error, CheckpointError):
                raise
            self._damaged[source.name] = manifest
            logger.warning("%s is not copied, it is damaged: %s", source.name, error)
            return False
        finally:
            self._in_hand = None
        self._done[source.name] = manifest
        self._settled = ""
        seconds = time.perf_counter() - begin
        logger.info("%s is copied to %s: %.1f s", source.name, self._url, seconds)
        return True

    def _give_up(self, name: str) -> None:
        try:
            self._place.discard(name)
        except OSError as error:
            logger.warning("%s: half a copy of %s was not removed: %s", self._url, name, error)

    def _settle(self) -> None:
        """Point to the newest copy, and remove what is no longer wanted."""
        newest = next((path.name for path in self._sources() if self._is_done(path)), "")
        if not newest or newest == self._settled:
            return
        if self._place.read(LATEST) != f"{newest}\n".encode():
            self._place.point(newest)
        self._place.prune(parse_step(newest) or 0, self._keep_last, self._keep_every)
        self._settled = newest


class NoCopies:
    """Stands for the copier of a run that asks for none."""

    def start(self) -> None:
        """Begin."""

    def offer(self, step: int) -> None:
        """A checkpoint is whole in the directory."""

    def in_hand(self) -> str | None:
        """No checkpoint is being copied."""
        return None

    def finish(self, seconds: float | None) -> None:
        """Return when all is copied."""

    def close(self) -> None:
        """Give up what is not copied."""


def describe_owner(owner: Mapping[str, Any]) -> str:
    """Whose copies a place has, for people."""
    return f"another run, {owner.get('name')} (output_dir {owner.get('output_dir')})"


def _is_whole(path: Path) -> bool:
    try:
        return broken(path) is None
    except CheckpointError:
        return False  # Another version's.


def _manifest(path: Path) -> bytes | None:
    try:
        return (path / MANIFEST).read_bytes()
    except OSError:
        return None


def _stays(path: Path) -> bool:
    try:
        return is_permanent(path)
    except (OSError, ValueError):
        return False  # It has just been removed.

"""One live run a directory: a lock that tells who has it, and that a dead owner cannot keep."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from megatron_mer.errors import ConfigError, TrainingError
from megatron_mer.log import get_logger

NAME = ".lock"
BEAT_SECONDS = 5.0
"""From one heartbeat of a live run to the next."""
DEAD_AFTER = 6
"""Heartbeats that a run must miss to count as dead, where its host cannot be asked."""
_SIZE = 512  # bytes of the record, padded, so that a new one always covers the last

logger = get_logger(__name__)


class RunLock:
    """Keeps a directory for this process until it ends or lets go.

    Two things guard it. The system's lock (`flock`) ends with its process, but on some shared file
    systems other nodes do not see it, or there is none. So the file also says whose it is, and a
    thread counts a number up in it: a start that finds the record of a run on another host watches
    whether the number still moves.

    Args:
        root: the directory; the lock is its file `.lock`.
        beat: seconds from one heartbeat to the next.
        key: of the configuration, which gave the directory.
    """

    def __init__(self, root: Path, beat: float = BEAT_SECONDS, key: str = "output_dir") -> None:
        self._root = root
        self._key = key
        self._beat = beat
        self._id = uuid.uuid4().hex
        self._file = -1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beats, name="run lock", daemon=True)
        self._taken_by = ""

    def take(self) -> None:
        """Take the lock; takes seconds where a run on another host died without letting go.

        Raises:
            ConfigError: another live run has it.
            OSError: the directory cannot be written.
        """
        self._file = os.open(self._root / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError as error:
            raise self._alive(self._read()) from error
        except OSError as error:
            logger.warning("%s has no file locks (%s); heartbeats guard it", self._root, error)
            locked = False
        owner = self._read()
        if owner.get("id") and self._lives(owner, locked):
            raise self._alive(owner)
        if owner.get("id"):
            logger.info("the run of %s is dead: its lock is taken over", _name(owner))
        self._write(0)
        self._thread.start()

    def check(self) -> None:
        """Make sure that nobody took the directory from this run.

        Raises:
            TrainingError: another run did, because this one gave no sign of life for long.
        """
        if self._taken_by:
            raise TrainingError(
                f"{self._root} was taken over by {self._taken_by}: this run had stood still for "
                "so long that it counted as dead. It ends here, so that no file is written twice"
            )

    def release(self) -> None:
        """Let go, so that the next start need not find out that this run is over."""
        if self._file < 0:
            return
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
            with contextlib.suppress(OSError):
                if self._read().get("id") == self._id:
                    os.ftruncate(self._file, 0)
        os.close(self._file)
        self._file = -1

    def _alive(self, owner: dict[str, Any]) -> ConfigError:
        with contextlib.suppress(OSError):
            os.close(self._file)
        self._file = -1
        return ConfigError(
            f"{self._key}: given {self._root}, where a run is alive ({_name(owner)}); wait for it, "
            f"stop it, or choose another directory with --{self._key} PATH"
        )

    def _lives(self, owner: dict[str, Any], locked: bool) -> bool:
        """Whether the run of a record that is still there is alive."""
        if owner.get("host") == platform.node():
            # Its lock would still be there; without locks the process itself is asked.
            return not locked and _is_process(owner.get("pid"))
        beat = float(owner.get("beat_seconds", BEAT_SECONDS))
        logger.info("is the run of %s alive? Watching its heartbeat", _name(owner))
        # Not by the file's time: the clocks of two hosts need not agree.
        end = time.monotonic() + DEAD_AFTER * beat
        while time.monotonic() < end:
            time.sleep(min(1.0, beat / 4))
            if os.fstat(self._file).st_size == 0:
                return False
            now = self._read()
            # Half a record says nothing.
            if now and (now.get("id"), now.get("beats")) != (owner["id"], owner.get("beats")):
                return True
        return False

    def _beats(self) -> None:
        beats = 0
        while not self._stop.wait(self._beat):
            try:
                now = self._read()
                if now.get("id") and now["id"] != self._id:
                    self._taken_by = _name(now)
                    return
                beats += 1
                self._write(beats)
            except OSError as error:
                logger.warning("%s: no heartbeat could be written: %s", self._root / NAME, error)

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(os.pread(self._file, _SIZE, 0))
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def _write(self, beats: int) -> None:
        record = {
            "host": platform.node(),
            "pid": os.getpid(),
            "id": self._id,
            "beats": beats,
            "beat_seconds": self._beat,
        }
        os.pwrite(self._file, (json.dumps(record) + "\n").ljust(_SIZE).encode(), 0)
        os.fsync(self._file)


def _name(owner: dict[str, Any]) -> str:
    if "host" not in owner:
        return "another process"
    return f"host {owner['host']}, process {owner.get('pid')}"


def _is_process(pid: object) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

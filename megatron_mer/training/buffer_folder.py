"""The folder of a run's replay buffer: whose it is, and what in it is still needed."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_mer.checkpoint.files import replace_text
from megatron_mer.checkpoint.find import broken
from megatron_mer.checkpoint.layout import RUN_STATE, step_directories
from megatron_mer.config import RunConfig
from megatron_mer.continual.segments import batches_of, ranges_of
from megatron_mer.data.record_store import RecordFormat
from megatron_mer.errors import CheckpointError, ConfigError, Problem
from megatron_mer.log import get_logger
from megatron_mer.training.lock import RunLock

logger = get_logger(__name__)

ABOUT = "buffer.json"
KEY = "replay.dir"
FORMAT_VERSION = 1

_BEING_BUILT = 2**62
_OTHER = "give this run a folder of its own with --replay.dir PATH"
_MOST_RECORDS = 4096  # of a segment
_SEGMENTS = 64  # of a buffer, about, while it is small


@dataclass(frozen=True)
class About:
    """What the folder says of the buffer in it."""

    format: int
    id: str
    """Of the buffer; checkpoints that need it have it too."""
    name: str
    """Of the run."""
    output_dir: str
    """Of the run, absolute."""
    segment_records: int
    seq_length: int
    vocab_size: int
    with_ends: bool
    tokenizer: str
    """Fingerprint."""
    built_tail: int = 0
    """Its log's tail when it was built from the datasets: what only earlier states need is not
    there. While that is going on, a tail that no log has."""

    @classmethod
    def read(cls, folder: Path) -> About | None:
        """Of the buffer in a folder; None: there is none.

        Raises:
            ConfigError: it is no buffer of this version.
        """
        path = folder / ABOUT
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            about = cls(**values)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            given = f"given {folder}, whose {ABOUT} cannot be read: {error}"
            raise ConfigError([Problem(KEY, given, "the folder of a buffer")]) from error
        if about.format != FORMAT_VERSION:
            given = f"given {folder}, which has format {about.format}"
            raise ConfigError([Problem(KEY, given, f"format {FORMAT_VERSION}")])
        return about

    def record_format(self) -> RecordFormat:
        """Of its records."""
        digest = hashlib.sha256(f"{self.id} {self.tokenizer}".encode()).digest()
        key = int.from_bytes(digest[:8], "little")
        return RecordFormat(self.seq_length, self.vocab_size, self.with_ends, key)


def folder_of(config: RunConfig) -> Path:
    """Where the buffer of a run lies."""
    given = config.replay.dir if config.replay else None
    return Path(given or f"{config.output_dir}/buffer")


def segment_records(capacity: int) -> int:
    """Records of a segment: many enough for few files, and few enough for short copies."""
    return min(max(capacity // _SEGMENTS, 1), _MOST_RECORDS)


def set_aside(config: RunConfig) -> Path | None:
    """Rename the folder of the run that a fresh one takes the place of: it may still be wanted.

    Returns:
        Where it lies now; None: it lies inside of the run's directory, or there is none.

    Raises:
        ConfigError: it cannot be renamed.
    """
    folder = folder_of(config)
    there = About.read(folder) if config.replay and config.replay.dir else None
    if there is None or there.output_dir != os.path.abspath(config.output_dir):
        return None
    aside = folder.with_name(f"{folder.name}.before_{there.id[:8]}")
    try:
        folder.rename(aside)
    except OSError as error:
        given = f"given {folder}, which --fresh cannot rename to {aside.name} ({error.strerror})"
        raise ConfigError([Problem(KEY, given, remedy=_OTHER)]) from error
    return aside


class BufferFolder:
    """The folder on rank 0: its lock, what it is, and which segments kept checkpoints need.

    Args:
        config: the run, its vocabulary size resolved.
        tokenizer: the tokenizer's fingerprint.
        checkpoints: folder of the run's checkpoints.
    """

    def __init__(self, config: RunConfig, tokenizer: str, checkpoints: Path) -> None:
        self.path = folder_of(config)
        self._config = config
        self._tokenizer = tokenizer
        self._checkpoints = checkpoints
        self._needs: dict[str, tuple[set[int], int]] = {}
        self._lock = RunLock(self.path, key=KEY)

    def open(self, saved: Mapping[str, Any] | None, capacity: int) -> tuple[About, bool]:
        """Take the folder for this run.

        Args:
            saved: what the checkpoint to resume from says of the buffer; None: it begins now.
            capacity: rows that the buffer holds.

        Returns:
            What lies there, and whether its records have to be built from the datasets.

        Raises:
            ConfigError: the folder is another run's, or cannot be used.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.take()
            there = About.read(self.path)
            return self._begin(there, capacity) if saved is None else self._go_on(there, saved)
        except OSError as error:
            given = f"given {self.path}, which cannot be written ({error.strerror})"
            raise ConfigError([Problem(KEY, given, remedy=_OTHER)]) from error

    def built(self, about: About, tail: int) -> None:
        """What the state with this tail needs is there now."""
        self._write(about.id, about.segment_records, tail)

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.release()

    def note(self, name: str, live_segments: list[int], tail: int) -> None:
        """A checkpoint that is being written needs these segments."""
        self._needs[name] = (set(live_segments), tail)

    def needed(self) -> tuple[set[int], int]:
        """Segments that the checkpoints which are there need, and the newest one's tail."""
        there = step_directories(self._checkpoints)
        for path in there:
            if path.name not in self._needs and broken(path) is None:
                self._needs[path.name] = _needs_of(path)
        found = [self._needs[path.name] for path in there if path.name in self._needs]
        self._needs = {p.name: self._needs[p.name] for p in there if p.name in self._needs}
        segments = set().union(*(one for one, _ in found)) if found else set()
        return segments, max((tail for _, tail in found), default=0)

    def _begin(self, there: About | None, capacity: int) -> tuple[About, bool]:
        if there is None and any(self.path.glob("*.rec")):
            given = f"given {self.path}, which holds records but no {ABOUT}"
            raise ConfigError([Problem(KEY, given, "an empty folder", _OTHER)])
        if there is not None:
            if there.output_dir != self._output_dir() and not self._inside():
                raise self._foreign(there)
            self._refuse_needed(there)
        for path in self.path.glob("*.rec"):
            path.unlink()
        return self._write(uuid.uuid4().hex, segment_records(capacity), _BEING_BUILT), True

    def _go_on(self, there: About | None, saved: Mapping[str, Any]) -> tuple[About, bool]:
        if there is not None and there.id != saved["id"]:
            raise self._later(saved) if self._inside() else self._foreign(there)
        if there is not None and shared_with(self.path, there, Path(self._config.output_dir)):
            raise self._foreign(there)
        records, missing = int(saved["segment_records"]), None
        for number in batches_of(saved["segments"]):
            if missing is None and not (self.path / f"segment_{number:09d}.rec").exists():
                missing = number
        if there is not None and missing is None and there.built_tail <= int(saved["tail"]):
            return self._write(there.id, records, there.built_tail), False
        what = "the buffer" if there is None else "what the checkpoint needs of the buffer"
        logger.warning(
            "%s is not in %s (it was written to %s): it is built again from the datasets",
            what,
            self.path,
            saved["dir"],
        )
        return self._write(saved["id"], records, _BEING_BUILT), True

    def _write(self, id: str, records: int, built_tail: int) -> About:
        about = About(
            format=FORMAT_VERSION,
            id=id,
            name=self._config.name,
            output_dir=self._output_dir(),
            segment_records=records,
            seq_length=self._config.model.seq_length,
            vocab_size=self._config.model.vocab_size or 0,
            with_ends=self._config.batch.eod_mask_loss,
            tokenizer=self._tokenizer,
            built_tail=built_tail,
        )
        replace_text(self.path / ABOUT, json.dumps(asdict(about), indent=1) + "\n")
        return about

    def _inside(self) -> bool:
        """Whether the folder lies in the run's directory, wherever that was moved or copied to."""
        return inside(self.path, Path(self._config.output_dir))

    def _refuse_needed(self, there: About) -> None:
        """Keep a buffer that the run had before it replayed from elsewhere.

        Raises:
            ConfigError: a checkpoint that is kept needs it.
        """
        names = [
            path.name
            for path in step_directories(self._checkpoints)
            if broken(path) is None and (_saved(path) or {}).get("id") == there.id
        ]
        if names:
            given = f"given {self.path}, which has an earlier buffer of this run that checkpoint "
            given += f"{names[0]} needs"
            raise ConfigError([Problem(KEY, given, "an empty folder", _OTHER)])

    def _later(self, saved: Mapping[str, Any]) -> ConfigError:
        given = f"given {self.path}, which has another buffer of this run than the checkpoint "
        given += f"needs; that was in {saved['dir']}"
        remedy = "give that folder with --replay.dir PATH, or an empty one, to build it again there"
        return ConfigError([Problem(KEY, given, remedy=remedy)])

    def _output_dir(self) -> str:
        return os.path.abspath(self._config.output_dir)

    def _foreign(self, there: About) -> ConfigError:
        given = f"given {self.path}, which has the buffer of run {there.name!r} of "
        given += there.output_dir
        allowed = "an empty folder, or this run's own buffer"
        return ConfigError([Problem(KEY, given, allowed, _OTHER)])


def saved_buffer(about: About, folder: Path, live_segments: list[int], tail: int) -> dict[str, Any]:
    """What a checkpoint says of the buffer, for its run state."""
    return {
        "id": about.id,
        "dir": os.path.abspath(folder),
        "segment_records": about.segment_records,
        "tail": tail,
        "segments": ranges_of(live_segments),
    }


def inside(folder: Path, root: Path) -> bool:
    """Whether a buffer's folder lies in a run's directory."""
    return folder.resolve().is_relative_to(root.resolve())


def shared_with(folder: Path, about: About, root: Path) -> str | None:
    """Another run that has the buffer in a folder; None: it is that of the run in `root` alone."""
    other = Path(about.output_dir)
    if inside(folder, root) or other.resolve() == root.resolve():
        return None
    return about.output_dir if (other / "status.json").exists() else None


def _saved(path: Path) -> dict[str, Any] | None:
    """What a checkpoint says of the buffer."""
    try:
        state: dict[str, Any] = json.loads((path / RUN_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / RUN_STATE} cannot be read: {error}") from error
    return state.get("buffer")


def _needs_of(path: Path) -> tuple[set[int], int]:
    saved = _saved(path)
    return (set(batches_of(saved["segments"])), int(saved["tail"])) if saved else (set(), 0)

"""What a run leaves in its output directory; other programs read it, so the shapes are stable."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from megatron_mer.errors import ConfigError, TrainingError
from megatron_mer.launch.freeze import COMMIT_FILE
from megatron_mer.log import get_logger
from megatron_mer.training.lock import NAME as LOCK
from megatron_mer.training.lock import RunLock

Status = Literal["running", "done", "stopped", "failed", "requeue"]

logger = get_logger(__name__)

_LONGEST_REASON = 2000

_RECORDED_PACKAGES = ("torch", "deepspeed", "numpy", "sentencepiece", "safetensors", "megatron_mer")


class RunDirectory:
    """Paths and writers of one ``output_dir``.

    Only rank 0 writes, except for a failure's status.

    Args:
        root: the directory; made when missing.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(os.path.abspath(root)) if Path(root).name in ("", "..") else Path(root)
        self.checkpoints = self.root / "checkpoints"
        self.report = self.root / "report"
        self.log_file = self.root / "train.log"
        self._metrics = self.root / "metrics.jsonl"
        self._evaluations = self.root / "evaluations.jsonl"
        self._lock: RunLock | None = None

    def has_checkpoint(self) -> bool:
        """Whether a start would look for something to resume from."""
        return any(self.checkpoints.glob("step_*"))

    def make(self) -> None:
        """Make the directory.

        Raises:
            ConfigError: it cannot be made or written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"output_dir: given {self.root}, which cannot be written ({error.strerror}); "
            "make space or restore the rights there, or choose another with --output_dir PATH"
        )

    def set_aside(self) -> Path | None:
        """Rename an earlier run's directory, so that a fresh one begins and nothing is lost.

        Returns:
            Where it lies now; None when there was none.

        Raises:
            ConfigError: the directory holds no run, or cannot be renamed.
        """
        if not self.root.exists() or not any(self.root.iterdir()):
            return None
        if not any((self.root / name).exists() for name in ("status.json", LOCK)):
            raise ConfigError(
                f"output_dir: given {self.root}, which holds files but no run that --fresh could "
                "set aside (no status.json); choose another directory"
            )
        self.lock()
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        aside = self.root.with_name(f"{self.root.name}.before_{stamp}")
        serial = 1
        while aside.exists():
            serial += 1
            aside = self.root.with_name(f"{self.root.name}.before_{stamp}_{serial}")
        try:
            self.root.rename(aside)
        except OSError as error:
            raise ConfigError(
                f"output_dir: given {self.root}, which --fresh cannot rename to {aside.name} "
                f"({error.strerror}); choose another directory with --output_dir PATH"
            ) from error
        finally:
            self.unlock()
        return aside

    def lock(self) -> None:
        """Keep the directory for this process until it ends.

        Raises:
            ConfigError: another live run has it, or it cannot be written.
        """
        lock = RunLock(self.root)
        try:
            lock.take()
        except OSError as error:
            raise self._refused(error) from error
        self._lock = lock

    def unlock(self) -> None:
        """Let another process have the directory; nothing where this one has no lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def check_lock(self) -> None:
        """Make sure that the directory is still this process's.

        Raises:
            TrainingError: another run has it.
        """
        if self._lock is not None:
            self._lock.check()

    def write_text(self, name: str, text: str) -> None:
        """Replace a file whole: readers see the old one or the new one."""
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{platform.node()}.{os.getpid()}.tmp")
        with _writing(target):
            try:
                temporary.write_text(text, encoding="utf-8")
                temporary.replace(target)
            except OSError:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise

    def write_json(self, name: str, content: Any) -> None:
        """Replace a JSON file whole."""
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_status(self, status: Status, step: int, reason: str = "") -> None:
        """Say where the run stands; scripts read this, not exit codes.

        Args:
            status: running, done, stopped, failed or requeue.
            step: the step of the newest checkpoint, which a new start resumes from.
            reason: why, for a run that ended early.
        """
        self.write_json(
            "status.json",
            {
                "status": status,
                "step": step,
                "reason": reason[:_LONGEST_REASON],
                "host": platform.node(),
                "pid": os.getpid(),
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
        )

    def read_status(self) -> dict[str, Any]:
        """The last status, an empty dict when there is none (or a torn one)."""
        try:
            content = json.loads((self.root / "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def write_environment(self, world_size: int, device: str) -> None:
        """Record code version, packages, machine and command line of this and earlier starts.

        Args:
            world_size: number of ranks.
            device: what rank 0 computes on.
        """
        name = "environment.json"
        try:
            last = json.loads((self.root / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            last = None
        earlier = [*last.pop("earlier_starts", []), last] if last else []
        now = {**describe_environment(), "world_size": world_size, "device": device}
        self.write_json(name, {**now, "earlier_starts": earlier})

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one step's line."""
        _append(self._metrics, line)

    def append_evaluation(self, line: Mapping[str, Any]) -> None:
        """Append one evaluation's line."""
        _append(self._evaluations, line)

    def sync(self) -> None:
        """Force metrics and evaluations to disk; a checkpoint must not outlive their lines."""
        for path in (self._metrics, self._evaluations):
            if path.exists():
                with _writing(path), path.open("a", encoding="utf-8") as file:
                    os.fsync(file.fileno())

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of all batches so far, read as they are asked for; a torn one is left out."""
        if not self._metrics.exists():
            return
        with self._metrics.open(encoding="utf-8") as file:
            for text in file:
                with contextlib.suppress(ValueError):
                    yield json.loads(text)

    def evaluations(self) -> list[dict[str, Any]]:
        """All evaluations so far, oldest first."""
        return read_lines(self._evaluations)

    def cut_to(self, batches: int, evaluated: bool = True) -> None:
        """Move lines of batches that a resumed run does again into ``*.lost.jsonl``.

        Args:
            batches: number of batches the checkpoint has behind it; metrics of a later batch and
                evaluations after a later batch are cut, as is a last line torn by a kill. Without a
                checkpoint it is 0, and the evaluation before the first step is done again too.
            evaluated: what was to be evaluated right after them was; else that is done again.
        """
        last = batches if evaluated else batches - 1
        _cut(self._metrics, lambda line: int(line["batch"]) < batches)
        _cut(self._evaluations, lambda line: batches > 0 and int(line["batches"]) <= last)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; a torn last line is left out."""
    if not path.exists():
        return []
    lines = []
    texts = path.read_text(encoding="utf-8").splitlines()
    for number, text in enumerate(texts, 1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            if number < len(texts):
                logger.warning("%s: line %d is no JSON and is left out", path, number)
    return lines


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Makes a full or read-only disk an error that says what to do.

    Raises:
        TrainingError: the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be written ({error}). Make space or restore the rights there, then "
            "start again: the run resumes from its newest checkpoint"
        ) from error


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with _writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(line), ensure_ascii=False) + "\n")


def _cut(path: Path, keep: Any) -> None:
    if not path.exists():
        return
    kept: list[str] = []
    lost: list[str] = []
    content = path.read_text(encoding="utf-8")
    for text in content.splitlines():
        try:
            (kept if keep(json.loads(text)) else lost).append(text)
        except (ValueError, KeyError, TypeError):
            lost.append(text)
    if not lost and (not content or content.endswith("\n")):
        return
    with _writing(path):
        with path.with_name(f"{path.stem}.lost.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(text + "\n" for text in lost)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(text + "\n" for text in kept), encoding="utf-8")
        temporary.replace(path)
    logger.info("%s: moved %d lines past the checkpoint aside", path.name, len(lost))


def describe_environment() -> dict[str, Any]:
    """Code version, package versions, machine and command line; no environment variables."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _RECORDED_PACKAGES},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the code, with ``+changes`` when the tree differs from it."""
    here = Path(__file__).parent
    # A copy that was frozen with a run says what it is of: what git would find is another project.
    frozen = here.parents[1] / COMMIT_FILE
    if frozen.is_file():
        return frozen.read_text(encoding="utf-8").strip()
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")

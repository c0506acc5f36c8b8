"""Errors that a user can cause and mend, each with the exit code a program ends with.

A program catches `MegatronMerError` at its top, prints it and exits with `exit_code`; a traceback
is left for mistakes of the program itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, printed as one line."""

    path: str
    """Where it is: a key such as `batch.global_batch_size`, an environment variable, a file."""
    given: str
    """What was given, with its numbers."""
    allowed: str = ""
    """What is allowed there."""
    remedy: str = ""
    """What to do."""
    where: str = ""
    """Where it was written: `run.yaml:12`, or the command line option."""

    def __str__(self) -> str:
        allowed = f"allowed: {self.allowed}" if self.allowed else ""
        text = "; ".join(part for part in (self.given, allowed, self.remedy) if part)
        where = f" ({self.where})" if self.where else ""
        return f"{self.path}: {text}{where}".replace("\n", " ")


class MegatronMerError(Exception):
    """Something that the user can mend.

    Args:
        what: a message, or every problem that was found, each of which becomes one line.
    """

    exit_code = 1

    def __init__(self, what: str | Sequence[Problem]) -> None:
        # The one positional argument is kept as it is, so that the error survives pickling
        # between processes.
        super().__init__(what)
        self.problems: tuple[Problem, ...] = () if isinstance(what, str) else tuple(what)
        self._message = what if isinstance(what, str) else "\n".join(map(str, self.problems))

    def __str__(self) -> str:
        return self._message


class ConfigError(MegatronMerError):
    """The configuration is refused; holds all of its problems."""

    exit_code = 2


class DataError(MegatronMerError):
    """A dataset or tokenizer is missing, damaged, or does not fit the run."""

    exit_code = 2


class LaunchError(MegatronMerError):
    """The variables of the launcher do not describe one consistent set of ranks."""

    exit_code = 2


class NodeError(MegatronMerError):
    """A node is not fit for the run."""


class CheckpointError(MegatronMerError):
    """A checkpoint cannot be written, is damaged, or does not fit the run."""


class ForeignCheckpointError(CheckpointError):
    """A Hugging Face folder is no Llama, is damaged, or does not fit the run."""

    exit_code = 2


class RunStopped(MegatronMerError):
    """A run ended early, as it was asked to, with a checkpoint to go on from."""

    exit_code = 3
    status: Literal["stopped", "requeue"] = "stopped"
    """What ``status.json`` says then."""


class RunRequeued(RunStopped):
    """A run ended early because its time is over; whoever started it starts it again."""

    exit_code = 4
    status = "requeue"


class TrainingError(MegatronMerError):
    """Training cannot go on."""


class PeerError(TrainingError):
    """Another rank failed, and this one cannot go on without it."""

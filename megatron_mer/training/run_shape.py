"""What a run is going to do, from the `config.yaml` and `plan.json` of its directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mer.analysis.run_logs import whole
from megatron_mer.analysis.snapshot import TaskSpan, TaskState
from megatron_mer.analysis.tail import WholeFile
from megatron_mer.config.yaml12 import read_yaml
from megatron_mer.continual.entries import Entry
from megatron_mer.continual.plan import Plan
from megatron_mer.errors import MegatronMerError


class RunShape:
    """Configuration and plan of a run, read again when they change.

    A run of another version is shown as far as it is understood, so the configuration is not
    checked: only the few keys that are asked for must be what they are here.

    Args:
        root: the run's output_dir; need not be there yet.
    """

    def __init__(self, root: Path) -> None:
        self._config_file = WholeFile(root / "config.yaml")
        self._plan_file = WholeFile(root / "plan.json")
        self._config: Mapping[str, Any] = {}
        self._config_note = self._plan_note = ""
        self._layout: object = None
        self._entries: tuple[Entry, ...] = ()
        self.total_batches: int | None = None
        """Of the whole stream; None without a plan."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be read."""
        return tuple(note for note in (self._config_note, self._plan_note) if note)

    @property
    def name(self) -> str:
        """The run's name; empty without a configuration."""
        return str(self._config.get("name") or "")

    def read(self) -> None:
        """Take what has changed."""
        content = self._config_file.changed()
        if content is not None:
            self._read_config(content)
        content = self._plan_file.changed()
        if content is not None:
            self._read_plan(content)

    def _read_config(self, content: bytes) -> None:
        self._config, self._config_note = {}, ""
        try:
            self._config = _mapping(read_yaml(content.decode("utf-8"), "config.yaml").data)
        except (MegatronMerError, UnicodeDecodeError) as error:
            self._config_note = f"config.yaml cannot be read: {error}"

    def _read_plan(self, content: bytes) -> None:
        try:
            history = json.loads(content) if content else []
            # It is written at each checkpoint, and mostly nothing but these has changed.
            layout = [
                {key: value for key, value in one.items() if key not in ("skipped", "cursors")}
                for one in history
            ]
            if layout == self._layout:
                return
            plan = Plan.from_history(history) if history else None
        except (MegatronMerError, ValueError, TypeError, AttributeError) as error:
            self._layout, plan = None, None
            self._plan_note = f"plan.json cannot be read: {error}"
        else:
            self._layout, self._plan_note = layout, ""
        self._entries = plan.entries if plan else ()
        self.total_batches = plan.total_batches if plan else None

    def number(self, section: str, key: str) -> float | None:
        """A number of the configuration: `number("reptile", "k")`, `number("evaluate.bounds", …)`.

        Returns:
            None where there is no such key, or no number there.
        """
        values: Mapping[str, Any] = self._config
        for part in section.split("."):
            values = _mapping(values.get(part))
        try:
            return None if values.get(key) is None else float(values[key])
        except (TypeError, ValueError):
            return None

    def whole(self, section: str, key: str) -> int | None:
        """A whole number of the configuration; None where there is none."""
        return whole(_mapping(self._config.get(section)).get(key))

    def _stream(self) -> list[Mapping[str, Any]]:
        stream = self._config.get("stream")
        return [_mapping(entry) for entry in stream] if isinstance(stream, list) else []

    @property
    def set_tasks(self) -> dict[str, str]:
        """Held-out set -> its task."""
        found = {}
        for entry in self._stream():
            task, valid = str(entry.get("task")), entry.get("valid")
            for name in [task] if isinstance(valid, str) else _mapping(valid):
                found[str(name)] = task
        return found

    @property
    def trained_before(self) -> set[str]:
        """Tasks that were trained before this run."""
        return {str(entry.get("task")) for entry in self._stream() if entry.get("trained_before")}

    def tasks(self, batches: int, done: bool) -> tuple[TaskSpan, ...]:
        """The entries of the stream, where so many batches are drawn.

        Args:
            batches: drawn so far.
            done: the run has ended well: nothing is in training any more.
        """
        spans = []
        for entry in self._entries:
            state: TaskState = "future"
            if entry.trained_before:
                state = "before"
            elif entry.last_batch == entry.first_batch:
                continue
            elif batches >= entry.last_batch:
                state = "past"
            elif batches >= entry.first_batch and not done:
                state = "current"
            spans.append(
                TaskSpan(entry.index, entry.task, entry.first_batch, entry.last_batch, state)
            )
        return tuple(spans)

    def evaluations_left(self, batches: int) -> int:
        """How many evaluations come after so many batches, if each of them gives an update."""
        ends = {entry.last_batch for entry in self._entries if entry.last_batch > batches}
        every = self.whole("evaluate", "every_steps")
        if every is not None and every > 0 and self.total_batches is not None:
            between = self.total_batches // every - batches // every
            return len(ends) + between - sum(end % every == 0 for end in ends)
        return len(ends)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}

"""Reads what a run left, also where it is torn, old, or still being written.

What cannot be read becomes a note in words, never an exception: a report of half a run is better
than none. Nothing is written, and files that are not there are no fault of a young run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import groupby
from pathlib import Path
from typing import Any, TypeGuard

from megatron_mer.config.yaml12 import read_yaml
from megatron_mer.errors import ConfigError, DataError, Problem

JSON_FILES = ("status.json", "summary.json", "ledger.json", "environment.json", "plan.json")
TRACES = (*JSON_FILES, "config.yaml", "metrics.jsonl", "evaluations.jsonl", "train.log")
"""Files of which any makes a directory a run's."""

Line = dict[str, Any]
Losses = dict[str, float | None]


@dataclass(frozen=True)
class RunRecord:
    """A run, as far as its directory could be read; what is not there is empty."""

    path: Path
    name: str
    """From summary or configuration, else the directory's."""
    status: Mapping[str, Any]
    config: Mapping[str, Any]
    """config.yaml as JSON types."""
    config_text: str
    environment: Mapping[str, Any]
    ledger: Mapping[str, Any]
    summary: Mapping[str, Any]
    """summary.json, also one that the run has gone beyond since: see `finished`."""
    metrics: tuple[Line, ...]
    """A line a batch, ascending; each has an int "batch"; numbers that JSON has not are None."""
    evaluations: tuple[Line, ...]
    """In the order of training; each has an int "step" and "batches", a "moment" and "losses"."""
    planned_batches: int | None
    notes: tuple[str, ...]
    """What a reader of a report must know first, worst first."""

    @property
    def step(self) -> int:
        """Updates that are known to have been applied."""
        steps = [line.get("step") for line in (*self.metrics, *self.evaluations)]
        return max((step for step in steps if isinstance(step, int)), default=0)

    @property
    def finished(self) -> bool:
        """Whether summary.json describes all that was trained."""
        return _summary_is_last(self.summary, self.status, self.evaluations, self.step)

    @property
    def boundaries(self) -> list[tuple[int, str]]:
        """(step at its end, task) of each entry that began; the last may not have ended."""
        ends = [
            (line["step"], line["task"])
            for line in self.evaluations
            if line["moment"] == "entry_end" and isinstance(line["task"], str)
        ]
        reached = ends[-1][0] if ends else 0
        rest = [line for line in self.metrics if _int(line.get("step"), -1) > reached]
        for task, lines in groupby(rest, key=lambda line: line.get("task")):
            if isinstance(task, str):
                ends.append((max(line["step"] for line in lines), task))
        return ends

    @property
    def set_tasks(self) -> dict[str, str]:
        """Held-out set -> its task, from the configuration, else sets are named after tasks."""
        known = _text_mapping(self.summary.get("set_tasks"))
        for task in self._stream():
            name, valid = task.get("task"), task.get("valid")
            if not isinstance(name, str):
                continue
            sets: Iterable[Any] = valid if isinstance(valid, Mapping) else [name] if valid else []
            known |= {one: name for one in sets if isinstance(one, str)}
        seen = {one: None for line in self.evaluations for one in line["losses"]}
        return {one: known.get(one, one) for one in seen} if seen else known

    @property
    def trained_before(self) -> list[str]:
        """Tasks that were trained before this run."""
        named = [task.get("task") for task in self._stream() if task.get("trained_before") is True]
        return [name for name in named if isinstance(name, str)]

    def _stream(self) -> list[Mapping[str, Any]]:
        stream = self.config.get("stream")
        return [one for one in stream if isinstance(one, Mapping)] if _is_list(stream) else []


def read_run(path: str | Path) -> RunRecord:
    """Read a run's directory.

    Args:
        path: its output_dir.

    Raises:
        DataError: there is no such directory, or nothing in it is of a run.
    """
    root = Path(path)
    _check(root)
    notes: list[str] = []
    status, summary, ledger, environment = (
        _mapping(_read_json(root / name, notes), name, notes) for name in JSON_FILES[:4]
    )
    plan = _read_json(root / "plan.json", notes)
    config, text = _read_config(root / "config.yaml", notes)
    metrics = _distinct(_read_lines(root / "metrics.jsonl", _metric, notes), "metrics.jsonl", notes)
    evaluations = _distinct(
        _read_lines(root / "evaluations.jsonl", _evaluation, notes), "evaluations.jsonl", notes
    )
    for lost in sorted(root.glob("*.lost.jsonl")):
        notes.append(
            f"{lost.name}: the run was resumed from a checkpoint; the lines of batches that it did "
            "again lie there and are not shown"
        )
    name = next(
        (one for one in (summary.get("name"), config.get("name")) if isinstance(one, str) and one),
        root.resolve().name,
    )
    planned = _planned(plan)
    record = RunRecord(
        root, name, status, config, text, environment, ledger, summary,
        tuple(metrics), tuple(evaluations), planned, (),
    )  # fmt: skip
    first = _state_notes(record)
    return RunRecord(**{**record.__dict__, "notes": (*first, *notes)})


def _check(root: Path) -> None:
    try:
        found = root.is_dir() and any((root / name).is_file() for name in TRACES)
    except OSError as error:
        raise DataError(f"{root}: cannot be read: {error.strerror}") from error
    if not found:
        given = "is no directory" if not root.is_dir() else f"has none of {', '.join(TRACES)}"
        allowed = "the directory (output_dir) of a run that was started"
        raise DataError([Problem(str(root), given, allowed)])


def _state_notes(run: RunRecord) -> list[str]:
    """Where a run stands that is not done, or whose summary is not of all of it."""
    of = "" if run.planned_batches is None else f" of {run.planned_batches:,}"
    state, where = run.status.get("status"), f"step {run.step:,}{of}"
    ended = sum(line["moment"] == "entry_end" for line in run.evaluations)
    matrix = f"the matrix holds the {ended} {'entry' if ended == 1 else 'entries'} that ended"
    notes = []
    if not run.status:
        notes.append(f"no status.json that could be read: {where}")
    elif state == "running":
        notes.append(f"still running, or killed: {where}; {matrix}")
    elif state != "done":
        reason = run.status.get("reason")
        notes.append(f"{state}: {where}; {matrix}" + (f"; {reason}" if reason else ""))
    if not run.finished:
        if run.summary:
            notes.append(
                "summary.json is of an earlier end of this run; the measures are computed from "
                "evaluations.jsonl"
            )
        elif ended:
            notes.append("no summary.json: the measures are computed from evaluations.jsonl")
        else:
            notes.append("no entry has ended: there are no measures yet")
    if not run.metrics:
        notes.append("no step was recorded: metrics.jsonl is missing or empty")
    if run.set_tasks and not run.evaluations:
        notes.append("no held-out loss was recorded: evaluations.jsonl is missing or empty")
    return notes


def _summary_is_last(
    summary: Mapping[str, Any], status: Mapping[str, Any], lines: Iterable[Line], step: int
) -> bool:
    """A summary of fewer steps, or of fewer entries, is of before the run went on."""
    if not summary:
        return False
    if status.get("status", "done") != "done" and step > _int(summary.get("steps"), step):
        return False
    matrix = summary.get("matrix")
    rows = matrix.get("rows") if isinstance(matrix, Mapping) else None
    known = len(rows) - 1 if _is_list(rows) else None
    return known is None or known >= sum(line["moment"] == "entry_end" for line in lines)


def _planned(plan: Any) -> int | None:
    """Batches of the whole run, from the last segment of its history."""
    try:
        return int(plan[-1]["first_batch"]) + sum(int(count) for count in plan[-1]["batches"])
    except (LookupError, TypeError, ValueError):
        return None


def _read_text(path: Path, notes: list[str]) -> str:
    """A file's text; bytes that are no UTF-8 are replaced."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
        return ""


def _read_json(path: Path, notes: list[str]) -> Any:
    text = _read_text(path, notes)
    if not text.strip():
        if path.exists():
            notes.append(f"{path.name} is empty")
        return None
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        notes.append(f"{path.name} is no JSON, perhaps torn, and is left out")
        return None


def _mapping(content: Any, name: str, notes: list[str]) -> dict[str, Any]:
    if content is not None and not isinstance(content, dict):
        notes.append(f"{name} holds no object and is left out")
    return content if isinstance(content, dict) else {}


def _read_config(path: Path, notes: list[str]) -> tuple[dict[str, Any], str]:
    text = _read_text(path, notes)
    try:
        content = _plain(read_yaml(text, path.name).data)
    except ConfigError as error:
        notes.append(f"the configuration is left out: {error}")
        return {}, text
    if not text:
        notes.append(f"{path.name} is missing or empty")
    return _mapping(content, path.name, notes), text


def _plain(value: Any) -> Any:
    """JSON types; the reader's exact decimals become floats."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return float(value) if isinstance(value, Decimal) else value


def _read_lines(path: Path, clean: Callable[[Line], Line | None], notes: list[str]) -> list[Line]:
    """The lines of a file that `clean` accepts, in its order."""
    kept, bad, torn = [], 0, False
    texts = _read_text(path, notes).split("\n")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            # What Python writes for a number that is none is no JSON; it is no number here either.
            line = json.loads(text, parse_constant=lambda _: None)
        except (ValueError, RecursionError):
            line = None
        cleaned = clean(line) if isinstance(line, dict) else None
        if cleaned is not None:
            kept.append(cleaned)
        elif number == len(texts):
            torn = True  # Only the last line has no newline behind it.
        else:
            bad += 1
    if torn:
        notes.append(f"{path.name}: the last line is torn, perhaps being written, and is left out")
    if bad:
        notes.append(f"{path.name}: {_times(bad, 'line')} that could not be read left out")
    return kept


def _metric(line: Line) -> Line | None:
    """A line of metrics with a batch; text where a number belongs becomes None."""
    if not _is_int(line.get("batch")):
        return None
    texts = ("task", "loss_by_task", "loss_by_dataset")
    numbers = {key: _number(value) for key, value in line.items() if key not in texts}
    whole = {key: line[key] if _is_int(line.get(key)) else None for key in ("batch", "step")}
    tables = {key: line[key] for key in texts[1:] if isinstance(line.get(key), dict)}
    task = line.get("task")
    return {**numbers, **whole, **tables, "task": task if isinstance(task, str) else None}


def _evaluation(line: Line) -> Line | None:
    """A line of evaluations with a step and losses; the first format had no "batches"."""
    losses, step, task = line.get("losses"), line.get("step"), line.get("task")
    if not isinstance(losses, dict) or not _is_int(step):
        return None
    moment = line.get("moment")
    cleaned = {
        **line,
        "batches": _int(line.get("batches"), _int(step)),
        "moment": moment if moment in ("start", "entry_end") else "interval",
        "entry": line["entry"] if _is_int(line.get("entry")) else None,
        "task": task if isinstance(task, str) else None,
        "losses": _losses(losses),
    }
    cleaned.pop("losses_anchor", None)
    if isinstance(line.get("losses_anchor"), dict):
        cleaned["losses_anchor"] = _losses(line["losses_anchor"])
    # A row of the matrix needs its task.
    if cleaned["moment"] == "entry_end" and cleaned["task"] is None:
        return None
    return cleaned


def _distinct(lines: list[Line], name: str, notes: list[str]) -> list[Line]:
    """Lines in the order of training; of several of one moment the one that was written last."""

    def key(line: Line) -> tuple[int, bool]:
        if "moment" in line:
            return line["batches"], line["moment"] != "start"
        return line["batch"], False

    last = {key(line): line for line in lines}
    if len(last) < len(lines):
        count = _times(len(lines) - len(last), "line")
        notes.append(f"{name}: {count} of a batch that comes again; the last one counts")
    return [last[at] for at in sorted(last)]


def _times(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def _losses(values: Mapping[str, Any]) -> Losses:
    return {name: _number(value) for name, value in values.items()}


def _number(value: Any) -> float | None:
    """A finite number as it stands, else None; a whole number stays one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # An int beyond all floats.
        return None


def _int(value: Any, default: int = 0) -> int:
    return value if _is_int(value) else default


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _text_mapping(value: Any) -> dict[str, str]:
    pairs = value.items() if isinstance(value, Mapping) else ()
    return {key: text for key, text in pairs if isinstance(text, str)}

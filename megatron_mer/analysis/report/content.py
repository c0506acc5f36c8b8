"""What a report says of one run, as JSON: the page shows these very values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_mer.analysis.report.curves import machine_use, run_curves
from megatron_mer.analysis.run_reader import RunRecord

MEASURES = ("retained", "learned", "forgetting", "backward_transfer", "forward_transfer")
COUNTS = ("steps", "batches", "skipped_batches", "tokens", "wall_seconds")
LEDGER_COUNTS = ("fresh", "replayed", "skipped", "epochs")


def run_content(run: RunRecord, computed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All that the page shows of a run.

    Args:
        run: As it was read.
        computed: The losses' measures and matrix, of a run whose summary.json is missing or is not
            of all of it; shaped as there.

    Returns:
        JSON types: "name", "directory", "state", "notes", "measured" (the file that the measures
        are from, None without any), "summary" (as in summary.json), "use" of the machine,
        "curves", "ledger", "config" and "config_text", "environment".
    """
    notes = list(run.notes)
    source = run.summary if run.finished else {**progress(run), **(computed or {})}
    summary = clean_summary(source, notes)
    has_losses = any(key in summary for key in MEASURES)
    measured = "summary.json" if run.finished else "evaluations.jsonl" if has_losses else None
    if run.finished and not has_losses:
        notes.append("this run evaluated no held-out set: there is no matrix")
    return {
        "name": run.name,
        "directory": str(run.path),
        "state": {
            "status": _text(run.status.get("status")) or "unknown",
            "reason": _text(run.status.get("reason")),
            "step": run.step,
            "planned_batches": run.planned_batches,
        },
        "notes": notes,
        "measured": measured,
        "summary": summary,
        "use": machine_use(run.metrics),
        "curves": run_curves(run),
        "ledger": _ledger(run.ledger),
        "config": dict(run.config),
        "config_text": run.config_text,
        "environment": dict(run.environment),
    }


def progress(run: RunRecord) -> dict[str, Any]:
    """What summary.json would say of the work done so far; keys that are not known are left out."""
    found: dict[str, Any] = {"name": run.name, "steps": run.step}
    if not run.metrics:
        return found
    found["batches"] = run.metrics[-1]["batch"] + 1
    found["skipped_batches"] = sum(line["step"] is None for line in run.metrics)
    model = run.config.get("model")
    length = model.get("seq_length") if isinstance(model, Mapping) else None
    rows = run.metrics[-1].get("consumed_samples")
    if rows is not None and isinstance(length, int):
        found["tokens"] = rows * length
    seconds = [line.get("step_seconds") or 0 for line in run.metrics]
    evaluated = [_number(line.get("seconds")) or 0 for line in run.evaluations]
    found["wall_seconds"] = round(math.fsum([*seconds, *evaluated]), 1)
    return found


def clean_summary(summary: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """A summary's known keys that have the shape they should; a note names the others."""
    cleaned: dict[str, Any] = {"name": _text(summary.get("name"))}
    for key in COUNTS:
        if (value := _number(summary.get(key))) is not None:
            cleaned[key] = value
    cleaned |= _losses(summary, notes)
    if isinstance(summary.get("anchor"), Mapping):
        cleaned["anchor"] = _losses(summary["anchor"], notes)
    if isinstance(bits := summary.get("bits_per_byte"), Mapping):
        tables = {key: _measure(bits.get(key)) for key in ("retained", "learned")}
        cleaned["bits_per_byte"] = {key: one for key, one in tables.items() if one}
    for key in ("unigram_entropy", "replay_share"):
        if numbers := _numbers(summary.get(key)):
            cleaned[key] = numbers
    held_out = summary.get("held_out")
    if isinstance(held_out, Mapping):
        cleaned["held_out"] = {name: _numbers(sizes) for name, sizes in held_out.items()}
    tasks = summary.get("set_tasks")
    if isinstance(tasks, Mapping):
        cleaned["set_tasks"] = {name: _text(task) for name, task in tasks.items()}
    before = summary.get("trained_before")
    cleaned["trained_before"] = list(map(_text, before)) if isinstance(before, list) else []
    return cleaned


def _losses(summary: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The measures and the matrix, each if it has its shape."""
    found: dict[str, Any] = {}
    for key in MEASURES:
        table = _measure(summary.get(key))
        if table:
            found[key] = table
        elif key in summary:
            notes.append(f"{key} of the summary is not what it should be and is left out")
    matrix = _matrix(summary.get("matrix"))
    if matrix:
        found["matrix"] = matrix
    elif "matrix" in summary:
        notes.append("the matrix of the summary is not what it should be and is left out")
    return found


def _measure(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, Mapping) or not isinstance(value.get("sets"), Mapping):
        return None
    return {"mean": _number(value.get("mean")), "sets": _numbers(value["sets"])}


def _matrix(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, Mapping):
        return None
    rows, sets, losses = (value.get(key) for key in ("rows", "sets", "losses"))
    if not (isinstance(rows, list) and isinstance(sets, list) and isinstance(losses, list)):
        return None
    whole = all(isinstance(row, Mapping) for row in rows) and len(rows) == len(losses)
    if not whole or any(not isinstance(row, list) or len(row) != len(sets) for row in losses):
        return None
    return {
        "rows": [
            {"label": _text(row.get("label")), "entry": row.get("entry"), "task": row.get("task")}
            for row in rows
        ],
        "sets": list(map(_text, sets)),
        "losses": [[_number(loss) for loss in row] for row in losses],
    }


def _ledger(ledger: Mapping[str, Any]) -> dict[str, Any]:
    """Counts by dataset and by entry; empty before the end of a run."""
    datasets, tasks = ledger.get("datasets"), ledger.get("tasks")
    counts = datasets.items() if isinstance(datasets, Mapping) else ()
    entries = [one for one in tasks if isinstance(one, Mapping)] if isinstance(tasks, list) else []
    keys = ("entry", "replay_rows", "pool_batches", "replay_share")
    return {
        "datasets": {
            name: {key: _number(one.get(key)) for key in LEDGER_COUNTS}
            for name, one in counts
            if isinstance(one, Mapping)
        },
        "tasks": [
            {
                "task": _text(one.get("task")),
                "trained_before": one.get("trained_before") is True,
                **{key: _number(one.get(key)) for key in keys},
            }
            for one in entries
        ],
    }


def _numbers(value: Any) -> dict[str, Any]:
    pairs = value.items() if isinstance(value, Mapping) else ()
    return {name: _number(one) for name, one in pairs}


def _number(value: Any) -> Any:
    """A finite number as it stands; None for anything else."""
    return value if type(value) is int or (type(value) is float and math.isfinite(value)) else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)

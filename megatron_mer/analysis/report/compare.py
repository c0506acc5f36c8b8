"""Several runs side by side: differences to the first, and runs that differ only in their seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mer.analysis.report.interval import mean_interval

MEASURES = {
    "retained": ("retained", "mean"),
    "learned": ("learned", "mean"),
    "forgetting": ("forgetting", "mean"),
    "backward transfer": ("backward_transfer", "mean"),
    "forward transfer": ("forward_transfer", "mean"),
    "retained, bits a byte": ("bits_per_byte", "retained", "mean"),
    "learned, bits a byte": ("bits_per_byte", "learned", "mean"),
    "retained, anchor": ("anchor", "retained", "mean"),
    "learned, anchor": ("anchor", "learned", "mean"),
    "forgetting, anchor": ("anchor", "forgetting", "mean"),
    "steps": ("steps",),
    "skipped batches": ("skipped_batches",),
    "tokens": ("tokens",),
    "wall time": ("wall_seconds",),
}
"""What is compared -> where it stands in a summary."""

NOT_COMPARED = ("seed", "name", "output_dir", "wandb", "tensorboard")
"""Keys of a configuration in which runs of one group may differ: only the first changes results."""


def compare(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a page says of several runs.

    Args:
        runs: At least two, as `content.run_content` gives them.

    Returns:
        "measures" {measure: {"values": [number by run], "differences": [to the first run]}}, only
        those that a run has; "sets", the same of retained, learned and forgetting for each set;
        "groups" of runs that differ only in the seed; "notes".
    """
    summaries = [run["summary"] for run in runs]
    measures = {name: _row([_at(one, *path) for one in summaries])
                for name, path in MEASURES.items()}  # fmt: skip
    names = list(dict.fromkeys(name for one in summaries for name in _sets(one)))
    sets = {
        measure: {
            name: _row([_at(one, measure, "sets", name) for one in summaries]) for name in names
        }
        for measure in ("retained", "learned", "forgetting")
    }
    groups, notes = seed_groups(runs)
    unfinished = [run["name"] for run in runs if run["measured"] != "summary.json"]
    if unfinished:
        notes.append(
            f"not done: {', '.join(unfinished)}. Their measures are of the entries that ended so "
            "far and do not compare with those of whole runs"
        )
    return {
        "measures": {name: row for name, row in measures.items() if _any(row)},
        "sets": {name: table for name, table in sets.items() if any(map(_any, table.values()))},
        "groups": groups,
        "notes": [*held_out_notes(runs), *notes],
    }


def seed_groups(runs: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Groups runs that are done and differ in nothing but the seed.

    Returns:
        For each group of two and more {"runs": their places, "seeds", "measures": {measure:
        {"n", "mean", "half_width"}}}; then notes. A measure that a run of the group has not is
        left out, and of runs with the same seed only the first counts: they are one sample.
    """
    found: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        if run["config"] and run["measured"] == "summary.json":
            kept = {key: one for key, one in run["config"].items() if key not in NOT_COMPARED}
            found.setdefault(json.dumps(kept, sort_keys=True), []).append(place)
    groups, notes = [], []
    for places in found.values():
        by_seed: dict[str, int] = {}
        for place in places:
            seed = json.dumps(runs[place]["config"].get("seed"))
            if by_seed.setdefault(seed, place) != place:
                notes.append(
                    f"{runs[place]['name']} (run {place + 1}) repeats the seed {seed} of run "
                    f"{by_seed[seed] + 1}: it is no further sample and is in no mean"
                )
        if len(by_seed) > 1:
            groups.append(_group(runs, list(by_seed.values())))
    return groups, notes


def _group(runs: Sequence[Mapping[str, Any]], places: list[int]) -> dict[str, Any]:
    measures = {}
    for name, path in MEASURES.items():
        values = [_at(runs[place]["summary"], *path) for place in places]
        if None not in values:
            measures[name] = mean_interval(values)
    seeds = [runs[place]["config"].get("seed") for place in places]
    return {"runs": places, "seeds": seeds, "measures": measures}


def held_out_notes(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """How the held-out text of runs differs from the first one's: their losses do not compare."""
    notes: list[str] = []
    first, *others = runs
    unknown = [run["name"] for run in runs if not run["summary"].get("held_out")]
    if unknown:
        notes.append(
            f"{', '.join(unknown)}: the run does not say how much held-out text it was measured on"
        )
    for place, run in enumerate(others, 2):
        label = f"run {place} ({run['name']})"
        ours, theirs = _sets(first["summary"]), _sets(run["summary"])
        if ours and theirs and set(ours) != set(theirs):
            only = [
                f"only run 1: {_list(ours, theirs)}",
                f"only run {place}: {_list(theirs, ours)}",
            ]
            notes.append(
                f"{label} was measured on other held-out sets than run 1, so the means do not "
                f"compare ({'; '.join(one for one in only if not one.endswith(': '))})"
            )
        notes += _size_notes(label, first["summary"], run["summary"])
    return notes


def _size_notes(label: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    left, right = ours.get("held_out") or {}, theirs.get("held_out") or {}
    texts = []
    for name in [name for name in left if name in right]:
        keys = ("samples", "tokens", "bytes")
        differ = [key for key in keys if left[name].get(key) != right[name].get(key)]
        if differ:
            pairs = (f"{left[name].get(key)} and {right[name].get(key)} {key}" for key in differ)
            texts.append(f"{name} ({', '.join(pairs)})")
    if not texts:
        return []
    return [
        f"{label} was measured on other held-out text or with another tokenizer than run 1, so "
        f"losses in nats a token do not compare: {'; '.join(texts)}"
    ]


def _list(names: Sequence[str], others: Sequence[str]) -> str:
    return ", ".join(name for name in names if name not in others)


def _sets(summary: Mapping[str, Any]) -> list[str]:
    return list(summary.get("retained", {}).get("sets", {}))


def _row(values: list[Any]) -> dict[str, Any]:
    """Values by run, and by how much each differs from the first; None where one is missing."""
    first = values[0]
    differences = [None if None in (one, first) else one - first for one in values[1:]]
    return {"values": values, "differences": [None, *differences]}


def _any(row: Mapping[str, Any]) -> bool:
    return any(value is not None for value in row["values"])


def _at(content: Any, *path: str) -> Any:
    for key in path:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mer.analysis.report.content import run_content
from megatron_mer.analysis.report.curves import MOST_POINTS, run_curves
from megatron_mer.analysis.run_reader import read_run
from tests.made_run import made_run, metrics, write


def test_the_summary_is_the_files(tmp_path: Path):
    root = made_run(tmp_path / "run")
    found = run_content(read_run(root))["summary"]
    assert found == json.loads((root / "summary.json").read_text())


@pytest.mark.parametrize(
    "change",
    [
        {"retained": 5},
        {"learned": {"mean": "x", "sets": []}},
        {"matrix": {"rows": [1, 2, 3], "sets": ["en"], "losses": [[1.0]] * 3}},
        {"matrix": {"rows": [{}] * 3, "sets": ["en", "fr"], "losses": [[1.0]] * 3}},
        {"anchor": {"matrix": None, "retained": None}},
    ],
)
def test_a_summary_of_another_shape_leaves_a_note(tmp_path: Path, change: dict[str, Any]):
    root = made_run(tmp_path / "run")
    content = json.loads((root / "summary.json").read_text())
    write(root, "summary.json", {**content, **change})
    found = run_content(read_run(root))
    assert any("is not what it should be" in note for note in found["notes"])


def test_training_curves_weigh_with_tokens(tmp_path: Path):
    root = made_run(tmp_path / "run")
    lines = metrics(("en", "fr"))
    long = [{**line, "batch": at, "step": at + 1, "task": "en"}
            for at, line in enumerate(lines * 10)]  # fmt: skip
    for at, line in enumerate(long):
        heavy = at % 2
        line["loss_fresh"] = 6.0 if heavy else 3.0
        line["loss_by_task"] = {"en": {"fresh": [line["loss_fresh"], 20 if heavy else 10]}}
    long[7]["loss_fresh"] = None
    write(root, "metrics.jsonl", *long)
    curves = run_curves(read_run(root))
    assert curves["batches_a_point"] == 5
    fresh = curves["training"]["fresh"]
    assert len(fresh) == 120
    # Batches 0 to 4: three of 3 nats over 10 tokens, two of 6 over 20.
    assert fresh[0] == (5, pytest.approx((3 * 10 * 3 + 2 * 20 * 6) / (3 * 10 + 2 * 20)))
    # Batches 5 to 9 without batch 7: 5 and 9 heavy, 6 and 8 light.
    assert fresh[1] == (10, pytest.approx((2 * 20 * 6 + 2 * 10 * 3) / (2 * 20 + 2 * 10)))
    assert curves["by_task"]["en"]["fresh"][0] == fresh[0]


def test_curves_of_a_long_run_stay_short(tmp_path: Path):
    root = made_run(tmp_path / "run")
    line = metrics(("en", "fr"))[0]
    many = [{**line, "batch": at, "step": at + 1, "reptile_delta_norm": 1.0} for at in range(5000)]
    write(root, "metrics.jsonl", *many)
    curves = run_curves(read_run(root))
    sizes = {key: len(curves[key]) for key in ("learning_rate", "mfu", "reptile_delta_norm")}
    assert all(0 < size <= MOST_POINTS + 1 for size in sizes.values()), sizes
    assert curves["reptile_delta_norm"][-1][0] == 5000


def test_old_lines_without_the_new_keys(tmp_path: Path):
    root = made_run(tmp_path / "run")
    kept = ("step", "batch", "task", "lr", "loss", "loss_fresh", "loss_replay")
    write(root, "metrics.jsonl", *({key: line[key] for key in kept}
                                   for line in metrics(("en", "fr"))))  # fmt: skip
    found = run_content(read_run(root))
    assert found["use"] == {}
    assert found["curves"]["by_task"] == {}
    assert found["curves"]["training"]["replay"]


def test_sources_of_another_shape_are_left_out(tmp_path: Path):
    root = made_run(tmp_path / "run")
    lines = metrics(("en", "fr"))
    lines[0]["loss_by_task"] = {"en": 5, "fr": {"fresh": [None, 3]}, "de": {"fresh": "x"}}
    lines[1]["loss_by_task"] = {"en": {"fresh": [7.5, 48]}}
    write(root, "metrics.jsonl", *lines[:2])
    assert run_curves(read_run(root))["by_task"] == {"en": {"fresh": [(2, 7.5)]}}

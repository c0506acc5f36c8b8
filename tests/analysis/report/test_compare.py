from pathlib import Path
from typing import Any

import pytest

from megatron_mer.analysis.report.compare import compare
from megatron_mer.analysis.report.content import run_content
from megatron_mer.analysis.run_reader import read_run
from tests.made_run import made_run, summary, write


def content(folder: Path, name: str, seed: int = 1, last: float = 5.5, **config: Any) -> Any:
    matrix = ((8.0, 8.5), (5.0, 7.0), (last, 4.0))
    changed = {"seed": seed, "output_dir": f"runs/{name}", **config}
    return run_content(read_run(made_run(folder / name, matrix, name=name, config=changed)))


def test_differences_are_to_the_first_run(tmp_path: Path):
    runs = [content(tmp_path, "a"), content(tmp_path, "b", last=6.0, replay={"alpha": 0.1})]
    found = compare(runs)
    assert found["measures"]["retained"] == {"values": [4.75, 5.0], "differences": [None, 0.25]}
    assert found["measures"]["forgetting"] == {"values": [0.5, 1.0], "differences": [None, 0.5]}
    assert found["sets"]["retained"]["en"]["differences"] == [None, 0.5]
    assert found["measures"]["tokens"]["differences"] == [None, 0]
    assert found["groups"] == []
    assert found["notes"] == []


def test_seeds_are_grouped_with_mean_and_interval(tmp_path: Path):
    runs = [
        content(tmp_path, "a", 1, 5.0),
        content(tmp_path, "other", 1, 5.0, replay={"alpha": 0.1}),
        content(tmp_path, "b", 2, 5.4),
        content(tmp_path, "c", 3, 5.8, wandb={"project": "x"}),
    ]
    (group,) = compare(runs)["groups"]
    assert group["runs"] == [0, 2, 3]
    assert group["seeds"] == [1, 2, 3]
    # Retained: 4.5, 4.7, 4.9, so mean 4.7, s = 0.2, t = 4.302653.
    assert group["measures"]["retained"]["n"] == 3
    assert group["measures"]["retained"]["mean"] == pytest.approx(4.7)
    assert group["measures"]["retained"]["half_width"] == pytest.approx(0.4968276, abs=1e-6)
    # Forgetting of en: 0.0, 0.4, 0.8.
    assert group["measures"]["forgetting"]["mean"] == pytest.approx(0.4)
    assert group["measures"]["forgetting"]["half_width"] == pytest.approx(0.9936552, abs=1e-6)


def test_the_same_seed_twice_is_one_sample(tmp_path: Path):
    runs = [content(tmp_path, "a", 1), content(tmp_path, "b", 1), content(tmp_path, "c", 2)]
    found = compare(runs)
    assert found["groups"][0]["runs"] == [0, 2]
    assert "b (run 2) repeats the seed 1 of run 1" in "\n".join(found["notes"])
    assert compare(runs[:2])["groups"] == []


def test_a_run_that_goes_on_is_in_no_mean(tmp_path: Path):
    runs = [content(tmp_path, "a", 1), content(tmp_path, "b", 2)]
    assert len(compare(runs)["groups"]) == 1
    (tmp_path / "b" / "summary.json").unlink()
    runs[1] = run_content(read_run(tmp_path / "b"), summary(((8.0, 8.5), (5.0, 7.0)), ("en", "fr"),
                                                            "b"))  # fmt: skip
    found = compare(runs)
    assert found["groups"] == []
    assert "not done: b" in "\n".join(found["notes"])


def test_other_held_out_text_is_named(tmp_path: Path):
    first = content(tmp_path, "a")
    other = summary(((8.0, 8.5), (5.0, 7.0), (5.5, 4.0)), ("en", "fr"), "b")
    other["held_out"]["fr"]["tokens"] = 50
    content(tmp_path, "b")
    write(tmp_path / "b", "summary.json", other)
    third = run_content(read_run(made_run(tmp_path / "c", tasks=("en", "日本語"), name="c")))
    old = {**other, "name": "d"}
    del old["held_out"]
    content(tmp_path, "d")
    write(tmp_path / "d", "summary.json", old)
    runs = [first, *(run_content(read_run(tmp_path / name)) for name in "bd"), third]
    notes = "\n".join(compare(runs)["notes"])
    assert "run 2 (b)" in notes
    assert "fr (48 and 50 tokens)" in notes
    assert "d: the run does not say" in notes
    assert "run 4 (c) was measured on other held-out sets" in notes
    assert "only run 1: fr; only run 4: 日本語" in notes


def test_runs_without_losses(tmp_path: Path):
    for name in "ab":
        made_run(tmp_path / name)
        for file in ("summary.json", "evaluations.jsonl", "metrics.jsonl", "config.yaml"):
            (tmp_path / name / file).unlink()
    found = compare([run_content(read_run(tmp_path / name)) for name in "ab"])
    assert found["groups"] == []
    assert found["sets"] == {}
    assert set(found["measures"]) == {"steps"}

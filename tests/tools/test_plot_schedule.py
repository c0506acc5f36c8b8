"""The picture and the table of a schedule."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mer.analysis.schedule_picture import MOST_POINTS, schedule_figure, thinned

ROOT = Path(__file__).resolve().parents[2]


def plot(*arguments):
    return subprocess.run(
        [sys.executable, "tools/plot_schedule.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def rows(text):
    """The table without its head and the line that names the picture."""
    lines = [line.split() for line in text.splitlines() if not line.startswith(("picture", "-"))]
    return lines[1:]


def test_every_kind_with_its_phases(tmp_path):
    said = plot("--kinds", "--steps", 2000, "--lr", "1e-3", "--out", tmp_path / "kinds.png")
    assert said.returncode == 0, said.stderr
    assert rows(said.stdout) == [
        ["cosine", "warm-up", "0", "5e-05"],
        ["cosine", "decay", "20", "0.001"],
        ["cosine", "end", "2,000", "0.0001"],
        ["wsd", "warm-up", "0", "5e-05"],
        ["wsd", "constant", "20", "0.001"],
        ["wsd", "decay", "1,800", "0.001"],
        ["wsd", "end", "2,000", "0.0001"],
        ["infinite", "warm-up", "0", "5e-05"],
        ["infinite", "cooldown", "20", "0.001"],
        ["infinite", "constant", "1,220", "0.00055"],
        ["infinite", "decay", "1,500", "0.00055"],
        ["infinite", "end", "2,000", "0.0001"],
        ["constant", "warm-up", "0", "5e-05"],
        ["constant", "constant", "20", "0.001"],
    ]
    assert (tmp_path / "kinds.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_with_a_schedule_for_each_task(tiny):
    schedule = {"kind": "wsd", "per_task": True, "warmup_steps": 2, "min_lr": 1e-4}
    config = tiny.write("run", lambda c: c.update(schedule={**schedule, "decay_steps": 3}))
    out = tiny.folder / "made/run.png"
    said = plot("--config", config, "--out", out)
    assert said.returncode == 0, said.stderr
    assert rows(said.stdout) == [
        ["en", "warm-up", "0", "0.0005"],
        ["en", "constant", "2", "0.001"],
        ["en", "decay", "4", "0.001"],
        ["fr", "warm-up", "7", "0.00055"],
        ["fr", "constant", "9", "0.001"],
        ["fr", "decay", "11", "0.001"],
        ["de", "warm-up", "14", "0.00055"],
        ["de", "constant", "16", "0.001"],
        ["de", "decay", "17", "0.001"],
        ["the", "last", "step", "19", "0.0002652"],
    ]
    assert out.is_file()
    assert not (tiny.folder / "run").exists()


def test_segments_that_follow(tiny):
    then = "[{kind: cosine, steps: 5, lr: 5e-4}, {kind: constant, lr: 2e-4}]"
    said = plot(
        "--config", tiny.write("run"), "--out", tiny.folder / "run.png",
        "--schedule.total_steps", 10, "--schedule.then", then,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert ["all", "then.0:", "cosine", "10", "0.0005"] in rows(said.stdout)
    assert ["all", "then.1:", "constant", "15", "0.0002"] in rows(said.stdout)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "neither --config nor --kinds"),
        (("--kinds", "--steps", "5"), "at least 100 steps"),
        (("--kinds", "--lr", "0"), "a rate above 0"),
        (("--kinds", "--seed", "1"), "--seed: given with --kinds"),
        (("--config", "missing.yaml"), "missing.yaml"),
        (("--kinds", "--out", "/proc/no/picture.png"), "the picture cannot be written"),
    ],
)
def test_bad_input_is_one_message(arguments, text):
    said = plot(*arguments)
    assert said.returncode == 2
    assert text in said.stderr
    assert "Traceback" not in said.stderr


def test_a_long_run_is_drawn_with_few_points():
    for steps in (1, 2, MOST_POINTS, MOST_POINTS + 1, 10**9 + 7):
        chosen = thinned(steps)
        assert chosen[0] == 0
        assert chosen[-1] == steps - 1
        assert len(chosen) <= min(steps, MOST_POINTS + 1)


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="no learning rate"):
        schedule_figure({"run": []})

"""The benchmarks of a step run; what they measure is no test's business."""

import json
import subprocess
import sys

import pytest


def run(project_root, program, *options):
    done = subprocess.run(
        [sys.executable, project_root / "benchmarks" / program, "--toy", *options],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def cells(text, first):
    """The cells of the tables' lines that begin so."""
    lines = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[c.strip() for c in line] for line in lines if line[0].strip() == first]


def test_the_rehearsal_of_the_gpu_benchmark(project_root) -> None:
    text = run(project_root, "gpu.py", "--sizes", "99m", "--repetitions", "2")
    lines = cells(text, "99m")
    assert [line[1] for line in lines] == ["ours", "plain loop, compiled", "torchtitan"]
    assert float(lines[0][3].split(" ")[0].replace(",", "")) > 0
    assert "not measured" in lines[2][2]
    kept = json.loads((project_root / "build/benchmarks/gpu.json").read_text())
    assert len(kept["sizes"]["99m"]["ours"]["seconds"]["it"]) == 2


@pytest.mark.slow
def test_the_rehearsal_of_all_parts_of_the_step(project_root) -> None:
    text = run(project_root, "train_step.py", "--no-compile", "--repetitions", "2")
    for name in ("ours", "eager", "pp 2", "tp 2", "dp 2"):
        assert float(cells(text, name)[0][1].split(" ")[0].replace(",", "")) > 0
    for part in ("step", "forward", "backward", "optimizer", "reptile"):
        assert float(cells(text, part)[0][1]) > 0
    assert "planning and reading a batch" in text
    assert "bf16 takes" in text

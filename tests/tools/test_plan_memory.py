"""The tool that says how much memory a run takes."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAPER = ("--config", "examples/paper/1.1b_mer25.yaml")


def plan(*arguments):
    return subprocess.run(
        [sys.executable, "tools/plan_memory.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def as_json(*arguments, code=0):
    said = plan(*arguments, "--json")
    assert said.returncode == code, said.stderr
    return json.loads(said.stdout)


def test_the_parts_add_up_and_the_fullest_stage_is_named():
    said = as_json(*PAPER, "--ranks", 16, "--parallel.pp_size=4")
    assert said["layout"] == {"tp": 1, "pp": 4, "dp": 4}
    for stage in said["stages"]:
        sums = {
            name: sum(stage["always"].values()) + sum(parts.values())
            for name, parts in stage["phases"].items()
        }
        assert stage["device_bytes"] == max(sums.values()) == sums[stage["peak_phase"]]
        assert stage["host_bytes"] == sum(stage["host"].values())
    peaks = [stage["device_bytes"] for stage in said["stages"]]
    assert said["needed_bytes"] == max(peaks) == peaks[said["worst_stage"]]
    assert said["fits"] is None


def test_the_cheapest_change_does_what_is_said_of_it():
    said = as_json(*PAPER, "--ranks", 16, "--fits", 12, code=3)
    assert said["fits"] is False
    first = said["changes"][0]
    ranks = first["settings"].pop("ranks", 16)
    options = [f"--{key}={value}" for key, value in first["settings"].items()]
    changed = as_json(*PAPER, *options, "--ranks", ranks, "--fits", 12)
    assert changed["fits"] is True
    assert changed["needed_bytes"] == first["needed_bytes"] <= 12 << 30


def test_a_small_model_is_not_nothing():
    said = plan("--config", "examples/quickstart/run.yaml", "--ranks", 2, "--model.vocab_size=4096")
    assert said.returncode == 0, said.stderr
    rows = [line.split() for line in said.stdout.splitlines()[3:]]
    weights = next(row for row in rows if row[0] == "weights")
    assert 0.001 < float(weights[-1]) < 0.01
    assert not any(row[0] == "backward" and set(row[3:]) == {"0.00"} for row in rows if row)


def test_text_says_what_lies_where_stage_by_stage():
    said = plan(*PAPER, "--ranks", 16, "--parallel.pp_size=4", "--fits", 500)
    assert said.returncode == 0, said.stderr
    lines = said.stdout.splitlines()
    assert all(len(line) <= 100 for line in lines[1:])
    heads = [line.split("  ")[0] for line in lines]
    for name in ("weights", "fp32 masters", "Adam moments", "gradients", "Reptile anchor"):
        assert name in heads
    [snapshot] = [line for line in lines if line.startswith("checkpoint snapshot")]
    assert "host, pinned" in snapshot
    assert [head for head in map(str.strip, heads) if head.isdecimal()] == ["0", "1", "2", "3"]
    assert lines[-1].startswith("fits: ")


def test_on_a_cpu_the_host_counts():
    gpu = as_json(*PAPER, "--ranks", 2)
    cpu = as_json(*PAPER, "--ranks", 2, "--device", "cpu")
    [stage] = cpu["stages"]
    assert cpu["needed_bytes"] == stage["device_bytes"] + stage["host_bytes"]
    assert gpu["needed_bytes"] == gpu["stages"][0]["device_bytes"]


def test_what_cannot_be_planned_is_named():
    said = plan(*PAPER, "--ranks", 3, "--parallel.tp_size=2")
    assert said.returncode == 2
    assert "a divisor of the number of ranks, 3" in said.stderr
    said = plan(*PAPER, "--ranks", 8, "--model.vocab_size=null")
    assert said.returncode not in (0, 3)
    assert said.stderr.startswith("error: data/paper/tokenizer.model")


def test_a_tokenizer_gives_the_vocabulary(tiny):
    said = as_json("--config", tiny.write("run"), "--ranks", 2, "--device", "cpu")
    block = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64 + 2 * 32
    assert said["stages"][0]["always"]["weights"] == 4 * (512 * 32 + 4 * block + 32)

"""What the tool says of checkpoints is what was saved, and what is damaged is named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mer.checkpoint import Copier, Fragment, open_place, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def inspect(*arguments):
    """Run the program; its exit code, what it printed and its errors."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools/inspect_checkpoint.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def run(tmp_path):
    """Two checkpoints of a weight (4, 6), with a bf16 delta, and a norm (3,)."""
    for step in (9, 10):
        fragments = [
            Fragment("w", "master", (4, 6), None, 0, 1, 0, torch.randn(24)),
            Fragment("w", "last_delta", (4, 6), None, 0, 1, 0, torch.randn(24).bfloat16()),
            Fragment("n", "master", (3,), None, 0, 1, 0, torch.randn(3)),
        ]
        save_checkpoint(
            tmp_path / "checkpoints", step, fragments, {"batches": step + 2}, rank=0, world_size=1,
            first_failure=lambda reason: reason,
        )  # fmt: skip
    return tmp_path


def test_all_of_a_run(run):
    code, said, errors = inspect(run)
    assert (code, errors) == (0, "")
    rows = [line.split() for line in said.splitlines()[2:]]
    assert [row[0] for row in rows] == ["step_000000009", "step_000000010"]
    assert rows[1][1:6] == ["(latest)", "12", "1", "1", "0.0"]
    assert {tuple(row[-2:]) for row in rows} == {("yes", "checksums")}
    assert inspect(run / "checkpoints") == (code, said, errors)


def test_one_in_full_and_as_json(run):
    path = run / "checkpoints/step_000000010"
    code, said, _ = inspect(path)
    assert code == 0
    lines = [line.split() for line in said.splitlines()]
    assert ["last_delta", "24", "48"] in lines
    assert ["master", "27", "108"] in lines
    assert ["w", "4", "x", "6"] in lines
    assert "step 10, batch 12, format 2" in said
    assert "27 parameters" in said
    code, said, _ = inspect(path, "--json")
    (one,) = json.loads(said)
    assert (one["step"], one["batches"], one["parameters"]) == (10, 12, 27)
    assert one["kinds"] == [["last_delta", 24, 48], ["master", 27, 108]]
    assert one["bytes"] == sum(
        file.stat().st_size for file in path.iterdir() if file.name != "manifest.json"
    )


def test_damage_is_named(run):
    path = run / "checkpoints/step_000000010/rank_00000.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, said, errors = inspect(run)
    assert code == 1
    assert said.splitlines()[-1].split()[-2:] == ["no", "checksums"]
    assert f"{path}: expected SHA-256 " in errors
    assert inspect(run, "--sizes")[0] == 0
    path.unlink()
    code, said, errors = inspect(run, "--sizes")
    assert code == 1
    assert f"{path}: expected {len(content)} bytes, found no file" in errors
    manifest = path.with_name("manifest.json")
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 99'))
    code, said, errors = inspect(run)
    assert code == 1
    assert "checkpoint format 99, this program reads 1 and 2" in errors


def test_a_directory_of_copies(run, tmp_path):
    there = tmp_path / "there"
    copier = Copier(run / "checkpoints", open_place(str(there)), {"id": "a"}, keep_last=2)
    copier.start()
    copier.finish(20.0)
    code, said, errors = inspect(there)
    assert (code, errors) == (0, "")
    lines = said.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["step_000000009", "step_000000010"]
    assert "(latest)" in lines[-1]
    assert lines[-1].split()[-2:] == ["yes", "checksums"]


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_no_checkpoint_is_a_clear_error(tmp_path, name):
    code, said, errors = inspect(tmp_path / name)
    assert (code, said) == (2, "")
    assert "PATH: given " in errors
    assert "Traceback" not in errors

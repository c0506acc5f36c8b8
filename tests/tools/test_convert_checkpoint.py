"""Resharding offline gives what loading at another layout gives."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mer.checkpoint import CheckpointReader
from megatron_mer.checkpoint.find import damaged

pytestmark = pytest.mark.dist


def convert(project_root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(project_root / "tools/convert_checkpoint.py"), "reshard"]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def killed(tiny, name: str, *options: str) -> Path:
    """A run whose newest checkpoint is step 10, inside a Reptile interval."""
    config = tiny.write(name)
    tiny.train(config, *options, world_size=2, kill_after=11, expect_failure=True)
    return tiny.folder / name


def content(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    reader = CheckpointReader(checkpoint)
    return {(p.kind, p.name): reader.parameter(p.kind, p.name) for p in reader.parameters()}


def equal(one: Path, other: Path) -> bool:
    a, b = content(one), content(other)
    assert a.keys() == b.keys()
    assert len({kind for kind, _ in a}) >= 5
    return all(torch.equal(a[key], b[key]) for key in a)


def test_there_and_back_to_the_bit(tiny, project_root):
    """From two pipeline stages with a tied embedding, over tp 2 x 3 parts, to one file."""
    source = killed(tiny, "run", "--parallel.pp_size=2")
    there, back = tiny.folder / "there", tiny.folder / "back"
    done = convert(project_root, source, there, "--tp-size", 2, "--ranks", 6)
    assert done.returncode == 0, done.stderr
    name = "step_000000010"
    assert (there / "latest").read_text() == f"{name}\n"
    assert damaged(there / name) is None
    assert len(list((there / name).glob("rank_*.safetensors"))) == 6
    sizes = [path.stat().st_size for path in (there / name).glob("rank_*.safetensors")]
    assert max(sizes) < 1.2 * min(sizes)
    assert convert(project_root, there / name, back, "--tp-size", 1).returncode == 0
    before = source / "checkpoints" / name
    assert equal(before, there / name)
    assert equal(before, back / name)
    states = [json.loads((p / "run_state.json").read_text()) for p in (before, back / name)]
    assert states[0] == states[1]


def test_repeated_heads_and_padded_rows_are_written_once_or_never(tiny, project_root):
    """One head of keys and values on four ranks, a vocabulary that four does not divide."""
    uneven = ("--model.num_kv_heads=1", "--model.vocab_size=517")
    source, there = killed(tiny, "run", *uneven), tiny.folder / "there"
    done = convert(project_root, source, there, "--tp-size", 4, "--ranks", 8)
    assert done.returncode == 0, done.stderr
    name = "step_000000010"
    before = source / "checkpoints" / name
    assert equal(before, there / name)
    owners = {"layers.0.attention.k_proj.weight": 0, "embedding.weight": 0}
    for path in (there / name).glob("rank_*.json"):
        for entry in json.loads(path.read_text())["fragments"]:
            if entry["kind"] == "master" and entry["name"] in owners:
                owners[entry["name"]] += entry["numel"]
    assert owners == {"layers.0.attention.k_proj.weight": 8 * 32, "embedding.weight": 517 * 32}
    back = tiny.folder / "back"
    assert convert(project_root, there / name, back, "--tp-size", 1).returncode == 0
    assert equal(before, back / name)


def test_a_run_resumes_from_it_as_from_the_original(tiny, project_root):
    source = killed(tiny, "run")
    other = tiny.folder / "other"
    shutil.copytree(source, other)
    shutil.rmtree(other / "checkpoints")
    done = convert(project_root, source, other / "checkpoints", "--tp-size", 2)
    assert done.returncode == 0, done.stderr
    layout = ("--parallel.tp_size=2",)
    tiny.train(tiny.write("run"), *layout, world_size=2)
    tiny.train(tiny.write("other"), *layout, world_size=2)
    assert tiny.results("other") == tiny.results("run")
    assert "resuming after batch 10" in (other / "train.log").read_text()


@pytest.mark.slow
def test_bad_input_is_told(tiny, project_root):
    source, dest = killed(tiny, "run"), tiny.folder / "dest"
    for arguments, words in (
        (("--tp-size", 3), "a divisor of num_heads, which is 4"),
        (("--tp-size", 3), "a divisor or a multiple of num_kv_heads, which is 2"),
        (("--tp-size", 2, "--ranks", 3), "ranks: given 3; allowed: a multiple of tp_size 2"),
        (("--tp-size", 0), "tp_size: given 0"),
    ):
        done = convert(project_root, source, dest, *arguments)
        assert done.returncode == 2
        assert words in done.stderr, done.stderr
    nothing = convert(project_root, tiny.folder / "nothing", dest, "--tp-size", 1)
    assert "which does not exist" in nothing.stderr
    taken = convert(project_root, source, source / "checkpoints", "--tp-size", 1)
    assert "holds a checkpoint already" in taken.stderr
    (tiny.folder / "file").write_text("")
    blocked = convert(project_root, source, tiny.folder / "file", "--tp-size", 1)
    assert "was not written" in blocked.stderr
    path = source / "checkpoints/step_000000010/rank_00001.safetensors"
    flipped = bytearray(path.read_bytes())
    flipped[-4] ^= 1
    path.write_bytes(flipped)
    damage = convert(project_root, path.parent, dest, "--tp-size", 1)
    assert "expected SHA-256" in damage.stderr
    assert not dest.exists()

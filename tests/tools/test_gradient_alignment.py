"""Gradients of real checkpoints: the weights are the run's, the figures the same for any layout."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mer.checkpoint import CheckpointReader
from megatron_mer.config import load_config
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.packing import RowReader
from megatron_mer.training.gradients import load_model, token_losses

pytestmark = pytest.mark.dist

ROOT = Path(__file__).resolve().parents[2]
NAME = "gradient_alignment_tool"
spec = importlib.util.spec_from_file_location(NAME, ROOT / "tools/gradient_alignment.py")
tool = importlib.util.module_from_spec(spec)
sys.modules[NAME] = tool  # its dataclasses look their module up
spec.loader.exec_module(tool)


def align(*arguments):
    """Run the program; its exit code, what it printed and its errors."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools/gradient_alignment.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def held_out_loss(folder, step, kind, samples=16):
    """The loss of `fr` as the run evaluates it, with the weights of a checkpoint."""
    config = load_config(folder / "config.yaml", [])
    path = folder / f"checkpoints/step_{step:09d}"
    model = load_model(config, CheckpointReader(path), kind, torch.device("cpu"))
    data = RowReader(
        [IndexedDataset(config.stream[1].valid_sets["fr"])],
        config.model.seq_length,
        config.model.vocab_size,
    )
    numbers = np.arange(samples, dtype=np.int64)
    with torch.no_grad():
        loss, tokens = token_losses(model, data, np.zeros(samples, np.int32), numbers, False)
    return float(loss) / tokens


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, ()),
        pytest.param(8, ("--parallel.tp_size=2", "--parallel.pp_size=2"), marks=pytest.mark.slow),
    ],
    ids=["one", "tp2_pp2_dp2"],
)
def test_the_weights_have_the_losses_that_the_run_logged(tiny, ranks, options):
    # k = 6 divides no entry's end but the second one's beginning: anchor and fast weights differ.
    tiny.train(tiny.write("run"), "--reptile.k=6", *options, world_size=ranks)
    last = tiny.lines("run", "evaluations.jsonl")[-1]
    assert last["updates_since_reptile"] == 2
    folder = tiny.folder / "run"
    assert held_out_loss(folder, 20, "master") == pytest.approx(last["losses"]["fr"], abs=1e-5)
    anchor = last["losses_anchor"]["fr"]
    assert held_out_loss(folder, 20, "anchor") == pytest.approx(anchor, abs=1e-5)
    assert abs(anchor - last["losses"]["fr"]) > 1e-4


@pytest.mark.slow
def test_a_run_from_the_command_line(tiny):
    tiny.train(tiny.write("run"))
    folder = tiny.folder / "run"
    before = sorted(path for path in folder.rglob("*") if path.is_file())
    code, said, errors = align(f"{folder}@all", "--rows", 8)
    assert code == 0, errors
    assert "Fresh and replayed rows" in said
    assert "Over the steps" in said
    made = sorted({path for path in folder.rglob("*") if path.is_file()} - set(before))
    assert {path.name for path in made} == {
        f"gradient_alignment_step_{step}.{end}"
        for step in (7, 14, 15, 20)
        for end in ("json", "png")
    }
    content = json.loads((folder / "report/gradient_alignment_step_20.json").read_text())
    assert content["fresh_and_replay"]["sources"] == ["fresh", "replay"]
    tasks = content["tasks"]
    assert tasks["sources"] == ["en", "fr", "de"]
    cosines = np.array(tasks["cosines"])
    np.testing.assert_allclose(cosines, cosines.T)
    assert (np.diag(cosines) == 1).all()
    assert (np.abs(cosines) <= 1 + 1e-9).all()
    assert f"{cosines[0, 1]:+.3f}" in said

    again = tiny.folder / "again.json"
    assert align(f"{folder}@20", "--rows", 8, "--json", again)[0] == 0
    repeated = json.loads(again.read_text())
    np.testing.assert_allclose(repeated["tasks"]["cosines"], cosines, atol=1e-5)
    assert repeated["tasks"]["losses"] == pytest.approx(tasks["losses"])
    other = tiny.folder / "valid.json"
    options = ("--data", "valid", "--weights", "anchor", "--json", other)
    assert align(folder, "--rows", 8, *options)[0] == 0
    assert json.loads(other.read_text())["tasks"]["losses"] != tasks["losses"]


def test_gradients_equal_autograd_over_all_rows(tiny):
    """The two halves weigh alike, so without masks their mean is the gradient of the mean loss."""
    tiny.train(tiny.write("run"), "--batch.eod_mask_loss=false")
    folder = tiny.folder / "run"
    assert align(folder, "--rows", 6)[0] == 0
    content = json.loads((folder / "report/gradient_alignment_step_20.json").read_text())["tasks"]
    run = tool.open_run(str(folder))
    own = tool._parse([str(folder), "--rows", "6"])
    (english, *_) = tool._tasks(run, own)
    model = load_model(
        run.config, CheckpointReader(run.checkpoints[0]), "master", torch.device("cpu")
    )
    loss, tokens = token_losses(model, english.reader, english.dataset, english.sample, False)
    (loss / tokens).backward()
    squares = sum(float((p.grad.double() ** 2).sum()) for p in model.parameters())
    assert content["norms"][0] == pytest.approx(squares**0.5, rel=1e-5)
    assert content["losses"]["en"] == pytest.approx(float(loss.detach()) / tokens, rel=1e-6)


@pytest.mark.slow
def test_bad_input_is_one_message(tiny):
    def refused(*arguments):
        code, _, errors = align(*arguments)
        assert code in (1, 2)
        assert "Traceback" not in errors
        return errors

    config = tiny.write("run", lambda c: (c.pop("reptile"), c.pop("replay")))
    tiny.train(config)
    folder = tiny.folder / "run"
    assert "holds no config.yaml of a run" in refused(tiny.folder / "nothing")
    assert "given step 7777; allowed: 7, 14, 15, 20, or all" in refused(f"{folder}@7777")
    assert "without Reptile: it has no anchor" in refused(folder, "--weights", "anchor")
    code, said, _ = align(folder, "--rows", 4)
    assert code == 0
    assert "no replayed rows" in said
    (weights,) = (folder / "checkpoints/step_000000020").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "not whole" in refused(folder)

"""A run that starts from another run's weights."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from megatron_mer.checkpoint import CheckpointReader, Fragment

pytestmark = pytest.mark.dist


def keep_task(*tasks):
    def change(config):
        config["stream"] = [entry for entry in config["stream"] if entry["task"] in tasks]

    return change


def weights(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Every parameter's whole numbers of one kind, of a checkpoint without tensor cuts."""
    index = [json.loads(path.read_text()) for path in sorted(folder.glob("rank_*.json"))]
    entries = {e["name"]: e for one in index for e in one["fragments"] if e["kind"] == kind}
    reader, found = CheckpointReader(folder), {}
    for name, entry in entries.items():
        numel = int(torch.tensor(entry["global_shape"]).prod())
        found[name] = torch.zeros(numel)
        reader.fill(Fragment(name, kind, tuple(entry["global_shape"]), None, 0, 1, 0, found[name]))
    return found


def old(tiny) -> Path:
    """A run over en and fr on two data-parallel ranks; its step 10 lies inside fr."""
    tiny.train(tiny.write("old", keep_task("en", "fr")), world_size=2)
    return tiny.folder / "old"


def new(tiny, name: str, root: Path, *options: str, step: int = 10, **how):
    config = tiny.write(name, keep_task("de"))
    init = f"--checkpoint.init_from={root}@{step}"
    return tiny.train(config, init, *options, **how)


def state(root: Path, step: int) -> dict:
    return json.loads((root / f"checkpoints/step_{step:09d}/run_state.json").read_text())


@pytest.mark.parametrize(
    ("taken", "kind"),
    [
        ("anchor", "anchor"),
        pytest.param("fast", "master", marks=pytest.mark.slow),
        pytest.param("fast_and_moments", "master", marks=pytest.mark.slow),
    ],
)
def test_what_is_taken_of_the_old_run(tiny, taken, kind):
    root = old(tiny)
    # Without a rate nothing moves, so the first checkpoint has what was taken.
    still = (f"--checkpoint.init_weights={taken}", "--optimizer.lr=1e-30", "--schedule.min_lr=0")
    new(tiny, "new", root, *still, "--checkpoint.every_steps=1", "--checkpoint.keep_last=9")
    began = weights(root / "checkpoints/step_000000010", kind)
    first = tiny.folder / "new/checkpoints/step_000000001"
    for kind_now in ("master", "anchor"):
        taken_now = weights(first, kind_now)
        assert taken_now.keys() == began.keys()
        assert all(torch.equal(taken_now[name], began[name]) for name in began)
    # One update keeps 0.95 of each old second moment; from none it would be 0.05 of a square.
    was, now = (
        weights(folder, "exp_avg_sq") for folder in (root / "checkpoints/step_000000010", first)
    )
    kept = all(bool((now[name] >= 0.949 * was[name]).all()) for name in was)
    assert kept == (taken == "fast_and_moments")
    assert state(tiny.folder / "new", 1)["updates_before"] == (10 if "moments" in taken else 0)
    assert state(tiny.folder / "new", 1)["updates"] == 1
    log = (tiny.folder / "new/train.log").read_text()
    assert f"starting with the {taken.replace('_', ' ')} of {root}@10" in log


def test_it_replays_what_the_old_run_was_trained_on(tiny):
    root = old(tiny)
    new(tiny, "new", root)
    written = yaml.safe_load((tiny.folder / "new/config.yaml").read_text())["stream"]
    assert [(e["task"], e["trained_before"]) for e in written] == [
        ("en", True),
        ("fr", True),
        ("de", False),
    ]
    assert written[0]["valid"] == {"en": str(tiny.corpus / "en_valid")}
    lines = tiny.lines("new")
    assert lines[0]["replay_rows"] == 2
    replayed = {task for line in lines for task, k in line["loss_by_task"].items() if "replay" in k}
    assert replayed == {"en", "fr"}
    assert set(tiny.lines("new", "evaluations.jsonl")[0]["losses"]) == {"en", "fr", "de"}
    # The losses begin where the old run's ended, not at those of new weights.
    before = tiny.lines("old", "evaluations.jsonl")[-1]["losses"]
    assert tiny.lines("new", "evaluations.jsonl")[0]["losses"]["en"] < before["en"] + 0.2


def test_a_task_that_had_not_begun_is_not_replayed(tiny):
    root = old(tiny)
    new(tiny, "new", root, step=7)
    written = yaml.safe_load((tiny.folder / "new/config.yaml").read_text())["stream"]
    assert [entry["task"] for entry in written] == ["en", "de"]
    new(tiny, "alone", root, "--checkpoint.init_stream=none")
    written = yaml.safe_load((tiny.folder / "alone/config.yaml").read_text())["stream"]
    assert [entry["task"] for entry in written] == ["de"]


def test_it_is_resumed_without_the_old_run_and_to_the_bit(tiny):
    root = old(tiny)
    options = ("--checkpoint.init_weights=fast_and_moments", "--checkpoint.every_steps=2")
    new(tiny, "alone", root, *options)
    new(tiny, "killed", root, *options, kill_after=3, expect_failure=True)
    root.rename(root.with_name("elsewhere"))
    new(tiny, "killed", root, *options)
    assert tiny.results("killed") == tiny.results("alone")
    assert "resuming after batch 4" in (tiny.folder / "killed/train.log").read_text()


@pytest.mark.slow
def test_any_layout_starts_from_any_other(tiny):
    root = old(tiny)
    new(tiny, "one", root)
    new(tiny, "four", root, "--parallel.tp_size=2", "--parallel.pp_size=2", world_size=4)
    one, four = tiny.lines("one"), tiny.lines("four")
    for a, b in zip(one[:4], four[:4], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


def said(tiny, config: Path, *options: str) -> str:
    output = tiny.train(config, *options, expect_failure=True, output=True)
    return " ".join(output.split())


def test_bad_starts_are_refused_before_anything_is_written(tiny):
    root = old(tiny)
    config = tiny.write("new", keep_task("de"))
    init = f"--checkpoint.init_from={root}"
    assert "RUN@STEP" in said(tiny, config, init)
    assert "allowed: 7, 10, 14" in said(tiny, config, f"{init}@11")
    assert "does not exist" in said(tiny, config, f"{init}s@10")
    assert "without init_from has no effect" in said(
        tiny, config, "--checkpoint.init_weights=anchor"
    )
    other = said(tiny, config, f"{init}@10", "--model.hidden_size=64", "--reptile=null")
    assert "model.hidden_size" in other
    assert "has weights for 32" in other
    assert not (tiny.folder / "new").exists()


@pytest.mark.slow
def test_a_flipped_bit_in_the_old_checkpoint_is_told(tiny):
    root = old(tiny)
    path = root / "checkpoints/step_000000010/rank_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    config = tiny.write("new", keep_task("de"))
    output = said(tiny, config, f"--checkpoint.init_from={root}@10")
    assert "which is not whole" in output
    assert "expected SHA-256" in output


def test_another_start_on_resume_is_refused(tiny):
    root = old(tiny)
    options = ("--checkpoint.every_steps=2",)
    new(tiny, "killed", root, *options, kill_after=3, expect_failure=True)
    config = tiny.write("killed", keep_task("de"))
    assert "but the run began with fast of" in said(
        tiny, config, f"--checkpoint.init_from={root}@5", *options
    )

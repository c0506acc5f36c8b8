"""Held-out losses of real runs: the same for any number of ranks, and training never sees them."""

import json
import math

import pytest

pytestmark = pytest.mark.dist


def losses(tiny, name, key="losses"):
    return [line.get(key) for line in tiny.lines(name, "evaluations.jsonl")]


@pytest.mark.slow
def test_training_is_the_same_to_the_bit_with_and_without_evaluation(tiny):
    def never(config):
        config.pop("evaluate")
        for task in config["stream"]:
            task.pop("valid")

    options = ("--precision=bf16", "--parallel.pp_size=2", "--reptile.k=3")
    tiny.train(tiny.write("never", never), *options, world_size=2)
    # k = 3 divides no entry's end (7, 14, 20), so the anchor is put in place at each of them.
    tiny.train(tiny.write("often"), *options, "--evaluate.every_steps=1", world_size=2)
    assert not (tiny.folder / "never/evaluations.jsonl").exists()
    assert len(losses(tiny, "often")) == 21
    assert tiny.results("often") == tiny.results("never")


@pytest.mark.slow
def test_eight_processes_evaluate_as_one(tiny):
    # No step moves the weights, so whatever differs comes from the evaluation itself.
    def still(config):
        config["optimizer"]["lr"] = 1e-30
        config["optimizer"]["weight_decay"] = 0.0
        config["schedule"] = {"kind": "constant"}
        # The last batch is padded, and its padding falls to other ranks in each layout.
        config["evaluate"] = {"max_samples": 13}

    tiny.train(tiny.write("one", still))
    tiny.train(tiny.write("dp8", still), world_size=8)
    assert losses(tiny, "dp8") == losses(tiny, "one"), "data ranks change the bits"
    layout = ("--parallel.tp_size=2", "--parallel.pp_size=2")
    tiny.train(tiny.write("mixed", still), *layout, world_size=8)
    for mine, reference in zip(losses(tiny, "mixed"), losses(tiny, "one"), strict=True):
        assert mine == pytest.approx(reference, abs=2e-6)
    # Sizes are those asked for, whatever the layout.
    for name in ("one", "dp8", "mixed"):
        summary = json.loads((tiny.folder / name / "summary.json").read_text())
        assert {held["samples"] for held in summary["held_out"].values()} == {13}


def test_the_anchor_is_evaluated_at_the_ends_of_entries(tiny):
    tiny.train(tiny.write("run"), "--reptile.k=5")
    lines = tiny.lines("run", "evaluations.jsonl")
    assert [line["moment"] for line in lines] == ["start", *["entry_end"] * 3]
    assert [line["updates_since_reptile"] for line in lines] == [0, 2, 4, 0]
    assert "losses_anchor" not in lines[0]
    assert lines[1]["losses_anchor"] != lines[1]["losses"]
    # The last entry ends with a Reptile update: both are the same weights.
    assert lines[3]["losses_anchor"] == lines[3]["losses"]
    # The anchor at step 7 is what Reptile left at step 5: a run that ends an entry there agrees.
    shorter = tiny.write("shorter", lambda c: c["stream"][0].update(steps=5))
    tiny.train(shorter, "--reptile.k=5", "--schedule.total_steps=20")
    assert tiny.lines("shorter", "evaluations.jsonl")[1]["losses"] == lines[1]["losses_anchor"]

    summary = json.loads((tiny.folder / "run/summary.json").read_text())
    anchor = summary["anchor"]
    wanted = [list(lines[0]["losses"].values())]
    wanted += [list(line["losses_anchor"].values()) for line in lines[1:]]
    assert anchor["matrix"]["losses"] == wanted
    assert anchor["retained"]["sets"] == lines[3]["losses_anchor"]
    assert anchor["learned"]["sets"]["en"] == lines[1]["losses_anchor"]["en"]
    assert summary["learned"]["sets"]["en"] == lines[1]["losses"]["en"]


def test_bits_per_byte_by_hand(tiny, corpus):
    tiny.train(tiny.write("run"))
    summary = json.loads((tiny.folder / "run/summary.json").read_text())
    for name, held in summary["held_out"].items():
        retained = summary["retained"]["sets"][name]
        bits = retained * held["tokens"] / held["bytes"] / math.log(2)
        assert summary["bits_per_byte"]["retained"]["sets"][name] == pytest.approx(bits)
        assert 0.3 < held["bytes"] / held["tokens"] < 20
    mean = sum(summary["bits_per_byte"]["learned"]["sets"].values()) / len(summary["held_out"])
    assert summary["bits_per_byte"]["learned"]["mean"] == pytest.approx(mean)


def test_losses_by_source_add_up_to_the_loss(tiny):
    def two_datasets(config):
        stream = config["stream"]
        train = [*stream[0]["train"], *stream[1]["train"]]
        stream[2]["train"] = [{**one, "weight": 0.5} for one in [*train, *stream[2]["train"]]]

    config = tiny.write("run", two_datasets)
    options = ("--parallel.pp_size=2", "--metrics.by_dataset_every_steps=2")
    tiny.train(config, *options, "--metrics.peak_tflops=0.001", world_size=4)
    lines = tiny.lines("run")
    assert [line["step"] for line in lines if "loss_by_dataset" in line] == list(range(2, 21, 2))
    for line in lines:
        parts = [part for kinds in line["loss_by_task"].values() for part in kinds.values()]
        tokens = sum(count for _, count in parts)
        total = sum(loss * count for loss, count in parts)
        assert total / tokens == pytest.approx(line["loss"], rel=1e-12)
        fresh = line["loss_by_task"][line["task"]]["fresh"]
        assert fresh[0] == pytest.approx(line["loss_fresh"], rel=1e-12)
        replayed = [kinds["replay"] for kinds in line["loss_by_task"].values() if "replay" in kinds]
        assert bool(replayed) == (line["replay_rows"] > 0)
        assert line["task"] not in {
            task for task, kinds in line["loss_by_task"].items() if "replay" in kinds
        }
        if "loss_by_dataset" in line:
            parts = [part for kinds in line["loss_by_dataset"].values() for part in kinds.values()]
            assert sum(count for _, count in parts) == tokens
        assert 0 <= line["data_wait_seconds"] <= line["step_seconds"]
        assert 0.1 < line["memory_gib"] < 8
        assert line["mfu"] > 0
    assert {"en", "fr"} <= set(lines[-1]["loss_by_dataset"]) | set(lines[-3]["loss_by_dataset"])

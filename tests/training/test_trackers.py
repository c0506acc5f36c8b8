"""Metric services: each step once after crashes, no secret, and never in the way of training."""

import json
import os
import time
from pathlib import Path

import pytest

from megatron_mer.config import load_config
from megatron_mer.errors import ConfigError
from megatron_mer.training import preflight
from megatron_mer.training import trackers as module
from megatron_mer.training.tracker_rows import evaluation_row, metrics_row, summary_rows
from megatron_mer.training.trackers import Trackers
from megatron_mer.training.wandb_file import history, last_step, records


class Fake:
    """A service that keeps its rows, and may know some steps already."""

    def __init__(self, name="fake", last_step=-1, fail_at=None):
        self.name, self.last_step, self.fail_at = name, last_step, fail_at
        self.rows, self.flushes, self.ends = [], 0, []

    def log(self, step, row):
        if step == self.fail_at:
            raise ConnectionError("the service is away")
        self.rows.append((step, dict(row)))

    def flush(self):
        self.flushes += 1

    def finish(self, summary):
        self.ends.append(summary)


def line(step, **more):
    return {"step": step, "batch": step - 1 if step else 0, "loss": 1.0 * (step or 9), **more}


def evaluation(step):
    return {"step": step, "losses": {"fr": 2.0 * step, "de": None}}


def steps(fake):
    return [step for step, _ in fake.rows]


def test_names_of_the_numbers():
    row = metrics_row(
        {
            "step": 3,
            "task": "fr",
            "loss": 2.5,
            "loss_replay": None,
            "reptile_delta_norm": 0.5,
            "loss_by_task": {"fr": {"fresh": [2.0, 10]}, "en": {"replay": [None, 0]}},
            "loss_by_dataset": {"fr_web": {"fresh": [2.0, 10]}},
        }
    )
    assert row == {
        "train/loss": 2.5,
        "reptile/delta_norm": 0.5,
        "by_task/fr/fresh": 2.0,
        "by_dataset/fr_web/fresh": 2.0,
    }
    anchored = {"losses": {"fr": 1.0, "de": None}, "losses_anchor": {"fr": 1.5}}
    assert evaluation_row(anchored) == {"eval/fr": 1.0, "eval_anchor/fr": 1.5}
    measures = {"retained": {"mean": 2.0, "sets": {"fr": 2.0, "de": None}}, "steps": 4}
    assert dict(summary_rows({**measures, "anchor": measures})) == {
        "retained/mean": 2.0,
        "retained/fr": 2.0,
        "anchor/retained/mean": 2.0,
        "anchor/retained/fr": 2.0,
        "steps": 4.0,
    }


def test_a_step_goes_out_once_with_its_evaluation():
    fake = Fake()
    trackers = Trackers([fake])
    trackers.evaluation(evaluation(0))
    trackers.metrics(line(1))
    trackers.metrics(line(None))
    trackers.metrics(line(2))
    trackers.evaluation(evaluation(2))
    trackers.flush()
    assert steps(fake) == [0, 1, 2]
    assert fake.rows[2][1]["eval/fr"] == 4.0
    assert fake.rows[2][1]["train/loss"] == 2.0
    trackers.metrics(line(3))
    trackers.finish({"steps": 3})
    trackers.finish()
    assert steps(fake) == [0, 1, 2, 3]
    assert (fake.flushes, fake.ends) == (1, [{"steps": 3}])


def test_catching_up_sends_what_a_service_lacks():
    knows_two, knows_none = Fake(last_step=2), Fake()
    trackers = Trackers([knows_two, knows_none])
    trackers.catch_up(map(line, [1, None, 2, 3, 4]), [evaluation(0), evaluation(3), evaluation(4)])
    trackers.metrics(line(5))
    trackers.finish()
    assert steps(knows_two) == [3, 4, 5]
    assert steps(knows_none) == [0, 1, 2, 3, 4, 5]
    assert knows_none.rows[3][1].keys() >= {"train/loss", "eval/fr"}
    assert knows_two.ends == [None]


def test_a_service_that_fails_is_left_out_and_the_others_go_on(monkeypatch):
    said = []
    monkeypatch.setattr(module.logger, "warning", lambda text, *given: said.append(text % given))
    broken, whole = Fake("broken", fail_at=2), Fake("whole")
    trackers = Trackers([broken, whole])
    for step in range(1, 5):
        trackers.metrics(line(step))
    trackers.flush()
    trackers.finish()
    assert steps(whole) == [1, 2, 3, 4]
    assert steps(broken) == [1]
    assert len(said) == 1
    assert said[0].startswith("broken is left out from here on: ConnectionError: the service is")


def test_a_slow_service_holds_no_step_up():
    class Slow(Fake):
        def log(self, step, row):
            time.sleep(0.02)
            super().log(step, row)

    slow = Slow()
    trackers = Trackers([slow])
    begin = time.perf_counter()
    for step in range(50):
        trackers.metrics(line(step + 1))
    assert time.perf_counter() - begin < 0.5  # 50 calls of 20 ms would take a second
    trackers.finish()
    assert steps(slow) == list(range(1, 51))


def test_a_package_that_is_not_installed(tiny, monkeypatch):
    config = tiny.write("run", lambda c: c.update(wandb={"project": "p"}, tensorboard={}))
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        preflight.prepare(load_config(config, []), world_size=1)
    assert "wandb: given, but the package wandb is not installed" in str(error.value)
    assert "tensorboard: given, but" in str(error.value)
    assert "make venv-trackers" in str(error.value)


def both(config):
    config["tensorboard"] = {}
    config["wandb"] = {"project": "tests", "mode": "offline", "tags": ["a", "b"]}


def wandb_rows(folder):
    """Rows of all offline files of the run, in the order in which they were written."""
    run_id = (folder / "wandb_id").read_text().strip()
    files = sorted(folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    return [row for path in files for row in history(path)]


def tensorboard_values(folder):
    """Name -> [(step, value)] as TensorBoard itself reads the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


@pytest.mark.dist
def test_each_step_stands_once_after_a_kill_and_two_restarts(tiny, monkeypatch):
    secret = "hunter2-is-no-password"
    monkeypatch.setenv("MY_SERVICE_TOKEN", secret)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    config = tiny.write("run", both)
    options = ("--parallel.pp_size=2", "--evaluate.every_steps=2")
    for kill_after in (7, 16):
        tiny.train(config, *options, world_size=2, kill_after=kill_after, expect_failure=True)
        time.sleep(1.1)  # wandb names its folders by the second
    tiny.train(config, *options, world_size=2)
    folder = tiny.folder / "run"
    lines, evaluations = tiny.lines("run"), tiny.lines("run", "evaluations.jsonl")

    rows = wandb_rows(folder)
    assert [row["_step"] for row in rows] == list(range(21))
    assert [row["train/loss"] for row in rows[1:]] == [line["loss"] for line in lines]
    for evaluation in evaluations:
        for name, loss in evaluation["losses"].items():
            assert rows[evaluation["step"]][f"eval/{name}"] == loss
    assert len(list(folder.glob("wandb/offline-run-*"))) == 3

    values = tensorboard_values(folder)
    assert [step for step, _ in values["train/loss"]] == list(range(1, 21))
    wanted = [line["loss"] for line in lines]
    assert [value for _, value in values["train/loss"]] == pytest.approx(wanted)
    assert [step for step, _ in values["eval/fr"]] == [line["step"] for line in evaluations]
    retained = json.loads((folder / "summary.json").read_text())["retained"]["mean"]
    assert values["summary/retained/mean"] == [(20, pytest.approx(retained))]

    for path in [*folder.glob("wandb/**/*"), *folder.glob("tensorboard/*"), folder / "wandb_id"]:
        if path.is_file():
            content = path.read_bytes()
            assert secret.encode() not in content, path
            assert b"0123456789" * 4 not in content, path
            assert str(Path.home()).encode() + b"/." not in content, path


@pytest.mark.dist
def test_a_service_added_in_mid_run_gets_the_steps_before(tiny):
    shorter = tiny.write("run", lambda c: c.update(stream=c["stream"][:1]))
    tiny.train(shorter, "--schedule.total_steps=20")
    config = tiny.write("run", both)
    tiny.train(config, "--schedule.total_steps=20")
    assert [row["_step"] for row in wandb_rows(tiny.folder / "run")] == list(range(21))
    losses = tensorboard_values(tiny.folder / "run")["train/loss"]
    assert [step for step, _ in losses] == list(range(1, 21))


@pytest.mark.slow
@pytest.mark.dist
def test_trackers_change_no_bit(tiny):
    tiny.train(tiny.write("with", both))
    tiny.train(tiny.write("without"))
    assert tiny.results("with") == tiny.results("without")


def test_a_torn_file_is_read_as_far_as_it_is_whole(tmp_path):
    body = [os.urandom(size) for size in (10, 40_000, 0, 32_743, 70_000, 5)]
    content = bytearray(b":W&B" + bytes(3))
    for part in body:
        at, kind = 0, 1
        while True:
            room = 32768 - len(content) % 32768
            if room < 7:
                content += bytes(room)
                continue
            piece = part[at : at + room - 7]
            last = at + len(piece) == len(part)
            kind = (1 if last else 2) if at == 0 and kind == 1 else (4 if last else 3)
            content += bytes(4) + len(piece).to_bytes(2, "little") + bytes([kind]) + piece
            at += len(piece)
            if last:
                break
    path = tmp_path / "run.wandb"
    path.write_bytes(content)
    assert list(records(path)) == body
    for cut in (1, 12, 13, 30_000):
        path.write_bytes(content[:-cut])
        found = list(records(path))
        assert found == body[: len(found)]
        assert len(found) < len(body)
    path.write_bytes(b"")
    assert list(records(path)) == []
    assert last_step(tmp_path, "none") == -1

"""The bound on forgetting: what is over it by hand, and runs that warn and stop."""

import json
import math

import pytest

from megatron_mer.config import DatasetConfig, TaskConfig
from megatron_mer.training.bounds import bound_text, over_bound


def entry(task, valid, **options):
    return TaskConfig(task=task, train=(DatasetConfig(prefix=task),), valid=valid, **options)


STREAM = (
    entry("base", "base_valid", trained_before=True),
    entry("en", {"en": "a", "en-law": "b"}, steps=2),
    entry("fr", "fr_valid", steps=2),
    entry("de", "de_valid", steps=2),
)


def line(moment, task, **losses):
    names = {"base": "base", "en": "en", "law": "en-law", "fr": "fr", "de": "de"}
    return {"moment": moment, "task": task, "losses": {names[k]: v for k, v in losses.items()}}


BEFORE = [
    line("start", None, base=3.0, en=9.0, law=9.0, fr=9.0, de=9.0),
    line("interval", "en", base=2.0, en=1.0, law=1.0, fr=1.0, de=1.0),
    line("entry_end", "en", base=3.5, en=4.0, law=5.0, fr=8.0, de=8.0),
]


def test_only_tasks_that_were_trained_and_are_not_in_training_count():
    now = line("interval", "fr", base=3.25, en=4.5, law=4.0, fr=20.0, de=20.0)
    assert over_bound([*BEFORE, now], STREAM, 0.2) == {"base": 0.25, "en": 0.5}
    assert over_bound([*BEFORE, now], STREAM, 0.25) == {"en": 0.5}
    assert over_bound([*BEFORE, now], STREAM, 0.5) == {}


def test_the_best_end_of_an_entry_counts():
    later = line("entry_end", "fr", base=2.5, en=3.0, law=6.0, fr=4.0, de=8.0)
    now = line("entry_end", "de", base=3.0, en=4.0, law=5.5, fr=4.0, de=3.0)
    assert over_bound([*BEFORE, later, now], STREAM, 0.3) == {"base": 0.5, "en": 1.0, "en-law": 0.5}


def test_a_loss_that_is_not_finite_is_over_any_bound():
    now = line("interval", "fr", base=None, en=4.0, law=5.0, fr=1.0, de=1.0)
    assert over_bound([*BEFORE, now], STREAM, 1e9) == {"base": math.inf}


def test_nothing_is_forgotten_before_the_first_step():
    assert over_bound([BEFORE[0]], STREAM, 0.0) == {}


def test_the_text_names_the_worst_first():
    text = bound_text({"en": 0.5, "fr": 0.75}, 0.25, 12)
    assert text.startswith("forgetting at step 12 is above evaluate.bounds.max_forgetting 0.25: ")
    assert text.endswith("fr 0.750, en 0.500")


def forgetful(action):
    def change(config):
        # Without replay, at a high rate, with a bound that any rise of a loss is above.
        config.pop("replay")
        config["optimizer"]["lr"] = 2e-2
        config["evaluate"]["every_steps"] = 1
        config["evaluate"]["bounds"] = {"max_forgetting": 0.0, "action": action}

    return change


@pytest.mark.dist
def test_a_run_over_its_bound_warns_or_stops_and_goes_on_to_the_same_end(tiny):
    options = ("--parallel.pp_size=2",)
    tiny.train(tiny.write("warned", forgetful("warn")), *options, world_size=2)
    log = (tiny.folder / "warned/train.log").read_text()
    assert "is above evaluate.bounds.max_forgetting 0: en" in log

    config = tiny.write("stopped", forgetful("stop"))
    codes = tiny.train(config, *options, world_size=2, expect_failure=True)
    assert codes == [3, 3]
    status = json.loads((tiny.folder / "stopped/status.json").read_text())
    assert status["status"] == "stopped"
    assert "above evaluate.bounds.max_forgetting 0: en" in status["reason"]
    assert 7 < status["step"] < 20
    assert (tiny.folder / f"stopped/checkpoints/step_{status['step']:09d}").is_dir()
    assert len(tiny.lines("stopped")) == status["step"]

    # Without the bound it goes on from there, to the end of a run that was never stopped.
    tiny.train(config, *options, "--evaluate.bounds=null", world_size=2)
    assert tiny.results("stopped") == tiny.results("warned")
    stopped, warned = (tiny.results(name, "evaluations.jsonl") for name in ("stopped", "warned"))
    assert stopped == warned

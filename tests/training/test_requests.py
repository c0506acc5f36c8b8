"""Asked to save, to stop or to go away at any moment: what follows is as if nothing had been."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_mer.testing import run_world

pytestmark = pytest.mark.dist

PROGRAM = Path(__file__).with_name("asked.py")
STEPS = 15


def short(config):
    """Three tasks of five steps, evaluated and saved at different ones."""
    for entry in config["stream"]:
        entry["steps"] = STEPS // 3
    config["model"]["num_layers"] = 2
    config["reptile"]["k"] = 3
    config["evaluate"] = {"max_batches": 1, "every_steps": 3}
    config["checkpoint"] = {"every_steps": 5, "keep_last": 2}
    config["launch"] = {"end_margin_seconds": 0.1}


class Asked:
    """Starts of a run that are asked for something."""

    def __init__(self, tiny):
        self.tiny = tiny

    def start(self, name, ask=None, ranks=2, options=(), change=short, timeout=120.0, grace=30.0):
        """Each rank's exit code and what it printed."""
        config = self.tiny.write(name, change)
        arguments = {
            "arguments": ["--config", str(config), *options],
            "folder": str(self.tiny.folder / name),
            "ask": ask,
        }
        return run_world(
            PROGRAM, "train", ranks, arguments, timeout, expect_failure=True, grace=grace
        )

    def codes(self, *arguments, **options):
        """Each rank's exit code."""
        said = self.start(*arguments, **options)
        return [code for code, _ in said], said[0][1]

    def status(self, name):
        return json.loads((self.tiny.folder / name / "status.json").read_text())

    def steps(self, name):
        return [line["step"] for line in self.tiny.lines(name)]

    def same(self, name, other):
        """Every line, and every bit of the last checkpoint."""
        for file in ("metrics.jsonl", "evaluations.jsonl"):
            assert self.tiny.results(name, file) == self.tiny.results(other, file)
        assert not list((self.tiny.folder / name).glob("*.lost.jsonl")), "a step was lost"
        assert self.weights(name) == self.weights(other)

    def weights(self, name):
        folder = self.tiny.folder / name / "checkpoints" / f"step_{STEPS:09d}"
        return {
            f"{path.name}/{key}": tensor.view(torch.uint8).numpy().tobytes()
            for path in sorted(folder.glob("*.safetensors"))
            for key, tensor in load_file(path).items()
        }


@pytest.fixture
def asked(tiny):
    return Asked(tiny)


CODES = {"SIGTERM": 4, "SIGUSR1": 4, "job_end": 4, "STOP": 3}


def end(asked, how, rank, last, step, name="asked"):
    """Start a run that is at step ``last``, and ask it so that it ends after ``step``."""
    # It is asked while a batch is trained; the ranks agree on it with the next one.
    codes, said = asked.codes(name, {"how": how, "rank": rank, "batch": step - last - 2})
    assert codes == [CODES[how]] * 2, said
    status = asked.status(name)
    assert (status["status"], status["step"]) == ("stopped" if how == "STOP" else "requeue", step)
    cause = {"STOP": "the file STOP", "job_end": "SLURM_JOB_END_TIME"}.get(how, f"signal {how}")
    assert cause in status["reason"]
    assert f"\n{status['status']}: {status['reason']}" in f"\n{said}"
    assert "error (" not in said, "an end as it was asked for"
    assert asked.steps(name) == list(range(1, step + 1))
    assert not (asked.tiny.folder / name / "STOP").exists()


def leave_alone(asked):
    codes, said = asked.codes("alone")
    assert codes == [0, 0], said


def test_asked_at_the_worst_moments(asked):
    leave_alone(asked)
    # Each at one rank only; an evaluation is due, a task ends, nothing is due, the run ends.
    end(asked, "SIGTERM", 1, 0, 3)
    end(asked, "job_end", 1, 3, 5)
    end(asked, "STOP", 0, 5, 8)
    codes, said = asked.codes("asked", {"how": "SAVE", "rank": 0, "batch": 3})
    assert codes == [0, 0], said
    log = (asked.tiny.folder / "asked" / "train.log").read_text()
    assert log.count("the file SAVE: a checkpoint of step 13 is written") == 1, log
    assert "step_000000013 is written" in log
    assert not (asked.tiny.folder / "asked" / "SAVE").exists()
    asked.same("asked", "alone")


@pytest.mark.slow
def test_asked_at_the_last_step(asked):
    leave_alone(asked)
    end(asked, "SIGUSR1", 0, 0, STEPS)
    codes, said = asked.codes("asked")
    assert codes == [0, 0], said
    asked.same("asked", "alone")


@pytest.mark.slow
@pytest.mark.parametrize("key", range(3))
def test_asked_at_random_moments(asked, key):
    leave_alone(asked)
    draw = random.Random(key)
    last = 0
    while last < STEPS - 3:
        how = draw.choice(sorted(CODES))
        step = last + draw.randint(2, 4)
        end(asked, how, 0 if how == "STOP" else draw.choice([0, 1]), last, step)
        last = step
    codes, said = asked.codes("asked", {"how": "SIGUSR2", "rank": 1, "batch": 0})
    assert codes == [0, 0], said
    asked.same("asked", "alone")


@pytest.mark.slow
def test_asked_while_it_loads_and_evaluates(asked):
    leave_alone(asked)
    # Nothing is trained yet, and nothing is lost.
    codes, said = asked.codes("asked", {"how": "SIGTERM", "rank": 1, "load": True})
    assert codes == [4, 4], said
    assert "no step was trained" in asked.status("asked")["reason"]
    assert not (asked.tiny.folder / "asked" / "metrics.jsonl").exists()
    codes, said = asked.codes("asked", {"how": "SIGTERM", "rank": 1, "evaluate": 0})
    assert codes == [4, 4], said
    assert asked.steps("asked") == [1]
    codes, said = asked.codes("asked", {"how": "STOP", "rank": 0, "load": True})
    assert codes == [3, 3], said
    assert not (asked.tiny.folder / "asked" / "STOP").exists()
    codes, said = asked.codes("asked")
    assert codes == [0, 0], said
    asked.same("asked", "alone")

"""What a real run keeps, over kills and a step back: these checkpoints and no others."""

import json

import pytest

from megatron_mer.checkpoint import damaged
from tests.training.test_kills import STEPS, Runs, short

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def cycle(config):
    """Tasks end at 4, 8 and 12; a checkpoint at every step."""
    short(config)
    config["checkpoint"] = {"every_steps": 1, "keep_last": 2, "keep_every": 3}


class Kept(Runs):
    """A run on one rank, and what is in its folder of checkpoints."""

    @property
    def root(self):
        return self.tiny.folder / "run/checkpoints"

    def until(self, kill=None):
        """Start, and look: steps that are there, whole to the byte, and what `latest` names."""
        self.start("run", kill, change=cycle, ranks=1)
        assert [one for path in self.root.glob("step_*") if (one := damaged(path))] == []
        found = sorted(path.name for path in self.root.iterdir() if path.name != "latest")
        latest = (self.root / "latest").read_text()
        assert latest.startswith("step_")
        return [int(name[5:]) for name in found], int(latest[5:])

    def kept(self, step):
        """What must be there once a step's checkpoint is written: keep_last, keep_every, ends."""
        return [one for one in range(1, step + 1) if one > step - 2 or not one % 3 or not one % 4]


def at(call, count, after=True):
    return {"ranks": [0], "rank": 0, "call": call, "count": count, "after": after}


def test_a_full_cycle(tiny):
    runs = Kept(tiny, ())
    runs.start("alone", change=cycle, ranks=1)
    # Whatever is in the way of a kill, the step after `prune` has all that must be there.
    assert runs.until(at("prune", 3)) == (runs.kept(3), 3)
    # Step 4 has its name and `latest`, but nothing was removed yet; the next start removes it.
    assert runs.until(at("name", 1)) == (sorted({*runs.kept(3), 4}), 4)
    assert runs.until(at("prune", 1)) == (runs.kept(5), 5)
    # A second start at once, killed while it reads.
    assert runs.until(at("load", 7)) == (runs.kept(5), 5)
    assert runs.until(at("prune", 4)) == (runs.kept(9), 9)
    assert runs.kept(9) == [3, 4, 6, 8, 9]

    # Back to step 6, by hand: what is after it is of another future, as soon as there is another.
    (runs.root / "latest").write_text("step_000000006\n")
    assert runs.until(at("load", 7)) == (runs.kept(9), 6)
    assert runs.until(at("prune", 1)) == ([3, 4, 6, 7], 7)
    lost = tiny.lines("run", "metrics.lost.jsonl")
    assert {7, 8, 9} <= {line["step"] for line in lost}
    log = (tiny.folder / "run/train.log").read_text()
    for step in (8, 9):
        assert f"step_{step:09d}: the run went back to before step {step}" in log

    assert runs.until() == (runs.kept(STEPS), STEPS)
    assert runs.kept(STEPS) == [3, 4, 6, 8, 9, 11, 12]
    runs.same("run", "alone")
    status = json.loads((tiny.folder / "run/status.json").read_text())
    assert (status["status"], status["step"]) == ("done", STEPS)

"""kill -9 at any moment, checkpoint writes included: what follows is as if nothing had been.

A moment is the n-th call of an operation on one rank (`kills.places`), or a time. Both are drawn by
a key, which is the name of the case, so a round that failed is repeated by running its case again.
"""

import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_mer.checkpoint import damaged, find_latest
from megatron_mer.checkpoint.layout import step_directories
from megatron_mer.testing import run_world

pytestmark = pytest.mark.dist

PROGRAM = Path(__file__).with_name("kills.py")
RANKS = 2
STEPS = 12
CASES = {
    "bf16_pp2": ("--precision=bf16", "--parallel.pp_size=2"),
    "bf16_tp2": ("--precision=bf16", "--parallel.tp_size=2"),
    "bf16_dp2": ("--precision=bf16", "--reptile.momentum=0.5"),
    "fp32_pp2": ("--precision=fp32", "--parallel.pp_size=2", "--reptile.momentum=0.5"),
    "fp32_dp2": ("--precision=fp32",),
}
ROUNDS = 10  # of each case
# The largest count of each call to draw: about as many as there are in six steps.
ON_ALL = {"chunk": 300, "fsync": 9, "mkdir": 3, "step": 5, "reptile": 5, "copy": 3, "evaluate": 2,
          "verify": 2, "load": 60}  # fmt: skip
ON_RANK_0 = {**ON_ALL, "fsync": 30, "rename": 6, "unlink": 12, "rmdir": 4, "mkdir": 6, "name": 3,
             "prune": 3, "status": 3, "line": 5}  # fmt: skip
LONGEST = 3.0  # seconds


def short(config):
    """Three tasks of four steps, a checkpoint at every second, at others than Reptile's updates."""
    for entry in config["stream"]:
        entry["steps"] = STEPS // 3
    config["model"]["num_layers"] = 2
    config["reptile"]["k"] = 3
    config["evaluate"]["max_batches"] = 1
    config["checkpoint"] = {"every_steps": 2, "keep_last": 2}


def moments(key):
    """Kills without end, drawn by a key."""
    draw = random.Random(key)
    while True:
        ranks = draw.choice([[0], [1], [0, 1], [0, 1]])
        if draw.random() < 0.3:
            yield {"ranks": ranks, "seconds": round(draw.uniform(0.0, LONGEST), 3)}
            continue
        rank = draw.choice(ranks)
        calls = ON_RANK_0 if rank == 0 else ON_ALL
        call = draw.choice(sorted(calls))
        count, after = draw.randint(1, calls[call]), draw.random() < 0.5
        yield {"ranks": ranks, "rank": rank, "call": call, "count": count, "after": after}


class Runs:
    """Starts of one configuration in worlds that may be killed."""

    def __init__(self, tiny, options):
        self.tiny = tiny
        self.options = options
        self.starts = 0

    def start(self, name, kill=None, change=short, ranks=RANKS, grace=3.0):
        """Start or resume the run ``name``; each rank's exit code."""
        self.starts += 1
        pids = self.tiny.folder / f"pids{self.starts}"
        pids.mkdir()
        config = self.tiny.write(name, change)
        arguments = {
            "arguments": ["--config", str(config), *self.options],
            "folder": str(pids),
            "kill": kill,
        }
        said = run_world(PROGRAM, "train", ranks, arguments, expect_failure=True, grace=grace)
        codes = [code for code, _ in said]
        assert kill or codes == [0] * ranks, f"exit codes {codes}; rank 0 said:\n{said[0][1]}"
        return codes

    def wait_for_a_standing_rank(self, rank):
        """Its process id, once it stands still in the latest start."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            path = self.tiny.folder / f"pids{self.starts}" / f"{rank}.pid"
            if path.exists() and path.read_text():
                stat = Path(f"/proc/{path.read_text()}/stat").read_text()
                if stat.rpartition(")")[2].split()[0] == "T":
                    return int(path.read_text())
            time.sleep(0.05)
        raise AssertionError("it does not stand still")

    def newest(self, name):
        """The step that a start would go on from, after a look at what a kill left; 0: none."""
        root = self.tiny.folder / name / "checkpoints"
        assert [one for path in step_directories(root) if (one := damaged(path))] == []
        info = find_latest(root)
        return info.step if info else 0

    def same(self, name, other):
        """Two finished runs agree in all that is not the machine's."""
        for file in ("metrics.jsonl", "evaluations.jsonl"):
            assert self.tiny.results(name, file) == self.tiny.results(other, file)
        mine, theirs = (self.content(one) for one in (name, other))
        assert mine.keys() == theirs.keys()
        for file, content in mine.items():
            assert content == theirs[file], f"{file} differs"

    def content(self, name):
        """The ledger, and every bit of the kept checkpoints; the wall time is no part of it."""
        run = self.tiny.folder / name
        assert json.loads((run / "status.json").read_text())["status"] == "done"
        found = {"ledger.json": (run / "ledger.json").read_bytes()}
        for path in sorted((run / "checkpoints").glob("step_*/*")):
            where = f"{path.parent.name}/{path.stem}"
            if path.name == "run_state.json":
                found[where] = {**json.loads(path.read_text()), "seconds": None}
            elif path.suffix == ".safetensors":
                # In which order they lie in the file depends on addresses in memory.
                for key, tensor in load_file(path).items():
                    found[f"{where}/{key}"] = tensor.view(torch.uint8).numpy().tobytes()
            elif path.name != "manifest.json":
                for one in json.loads(path.read_text())["fragments"]:
                    found[f"{where}/{one['kind']}/{one['name']} in the index"] = one
        return found


@pytest.fixture
def runs(tiny):
    return lambda *options: Runs(tiny, options)


def survive(runs, kills, rounds, alone="alone"):
    """Kill and start again until so many kills have hit; each run is then as if left alone.

    A run that reaches its end before that is compared, and another begins.
    """
    history, newest, hits, number = [], 0, 0, 0
    while hits < rounds or history:
        name = f"killed{number}"
        try:
            kill = next(kills) if hits < rounds else None
            history.append(kill)
            done = not any(runs.start(name, kill))
            now = runs.newest(name)
            assert now >= newest, f"the run went back from step {newest} to {now}"
            if done:
                runs.same(name, alone)
        except AssertionError as error:
            said = "\n  ".join(json.dumps(one) for one in history)
            raise AssertionError(f"{error}\n{name}, after the kills:\n  {said}") from error
        hits, newest = hits + (not done), now
        if done:
            history, newest, number = [], 0, number + 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_kills_at_random_moments(runs, case):
    here = runs(*CASES[case])
    here.start("alone")
    survive(here, moments(case), ROUNDS)


def test_kills_at_the_worst_moments(runs):
    both = {"ranks": [0, 1], "rank": 0, "after": True}
    kills = [
        # Step 4 has its name, `latest` names step 2: what is surely whole is taken.
        {**both, "call": "rename", "count": 3},
        # Step 4 is written again, and the old one is out of the way.
        {**both, "call": "rename", "count": 1},
        # Rank 1 alone, in the middle of its file of step 4.
        {"ranks": [1], "rank": 1, "call": "chunk", "count": 50, "after": True},
    ]
    here = runs(*CASES["bf16_dp2"])
    here.start("alone")
    survive(here, iter(kills), len(kills))
    log = (here.tiny.folder / "killed0/train.log").read_text()
    assert log.count("resuming after batch 2 (step 2)") == 3
    assert "not a whole checkpoint" not in log


@pytest.mark.slow
def test_a_rank_that_outlives_its_run_harms_the_next_start_in_nothing(runs):
    here = runs(*CASES["fp32_dp2"])
    here.start("alone")
    # Rank 0 is gone and its lock with it; rank 1 stands in the middle of its file of step 4.
    kill = {"ranks": [0], "rank": 1, "call": "chunk", "count": 250, "after": True, "stands": True}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(here.start, "killed", kill, grace=120.0)
        pid = here.wait_for_a_standing_rank(1)
        assert list((here.tiny.folder / "killed/checkpoints").glob("step_*.tmp"))
        here.start("killed")
        here.same("killed", "alone")
        os.kill(pid, signal.SIGCONT)
        codes = first.result(60)
    assert codes == [-signal.SIGKILL, 1], "it went on until it found the others gone"
    here.newest("killed")
    here.same("killed", "alone")

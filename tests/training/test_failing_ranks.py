"""A rank that fails, is killed or stands still: the cause first, and the end of all, soon."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.training.test_requests import Asked, short

pytestmark = pytest.mark.dist

STALL = 3


def watched(config):
    """A watchdog that is soon impatient."""
    short(config)
    # Evaluation before the first step and the first step may be slow on a busy machine.
    config["launch"] = {"watchdog_seconds": STALL, "setup_timeout_seconds": 60}


LIMIT = 30
"""Seconds from a fault to the end of all ranks, on a busy machine too."""


def seconds_since(asked, name):
    """From the fault until now."""
    return time.time() - (asked.tiny.folder / f"{name}.asked").stat().st_mtime


@pytest.fixture
def asked(tiny):
    return Asked(tiny)


def test_the_failing_rank_speaks_first_and_the_others_end(asked):
    (code_0, said_0), (code_1, said_1) = asked.start(
        "failing", {"how": "error", "rank": 1, "batch": 3}
    )
    assert (code_0, code_1) == (1, 1)
    cause = "ValueError: this rank has a reason of its own"
    assert cause in said_1
    assert "Traceback" not in said_0
    assert f"another rank is gone: rank 1: {cause}" in said_0
    status = asked.status("failing")
    assert status["status"] == "failed"
    assert status["reason"] == f"rank 1: {cause}"
    assert seconds_since(asked, "failing") < LIMIT


def test_a_killed_rank_is_missed_within_seconds(asked):
    said = asked.start("killed", {"how": "SIGKILL", "rank": 1, "batch": 3})
    assert [code for code, _ in said] == [1, -signal.SIGKILL]
    assert "Traceback" not in said[0][1]
    assert "another rank is gone: it said nothing, so it was killed" in said[0][1]
    assert asked.status("killed")["status"] == "failed"
    assert seconds_since(asked, "killed") < LIMIT


def _end_later(asked, name, rank, seconds):
    """A stopped process cannot end itself: what a launcher would do after a while."""

    def end():
        path = asked.tiny.folder / f"{name}.{rank}.pid"
        stat = Path(f"/proc/{path.read_text()}/stat") if path.exists() else None
        while not (stat and stat.exists() and " T " in stat.read_text()):
            time.sleep(0.2)
            stat = Path(f"/proc/{path.read_text()}/stat") if path.exists() else None
        time.sleep(seconds)
        os.kill(int(path.read_text()), signal.SIGKILL)

    threading.Thread(target=end, daemon=True).start()


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_is_stopped(asked, rank):
    _end_later(asked, "stopped", rank, STALL + 20)
    said = asked.start("stopped", {"how": "stand", "rank": rank, "batch": 3}, change=watched)
    other = 1 - rank
    assert said[other][0] == 1
    assert f"[rank {other}] nothing moved for 3 s (launch.watchdog_seconds)" in said[other][1]
    assert "in train_step" in said[other][1], "its stacks"
    status = asked.status("stopped")
    assert status["status"] == "failed"
    assert status["reason"].startswith(f"rank {other}: nothing moved for 3 s")


def test_a_rank_that_sleeps_says_so_itself(asked):
    said = asked.start("asleep", {"how": "sleep", "rank": 1, "batch": 3}, change=watched)
    assert [code for code, _ in said] == [1, 1]
    for rank in (0, 1):
        assert f"[rank {rank}] " in said[rank][1]
        assert "in _step" in said[rank][1], f"rank {rank}'s stacks"
    assert "in _ask" in said[1][1], "where it sleeps"
    assert "in _ask" not in said[0][1]
    assert asked.status("asleep")["status"] == "failed"
    assert seconds_since(asked, "asleep") < LIMIT

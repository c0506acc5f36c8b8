"""A watch that ends what stands still, and nothing else."""

import subprocess
import sys
import threading
import time

import pytest

from megatron_mer.launch import watchdog as module
from megatron_mer.launch.watchdog import Watchdog


@pytest.fixture
def watch(monkeypatch):
    """A watchdog with a limit; `told` and `left` hold what it did."""
    monkeypatch.setattr(module, "SECONDS_TO_TELL", 0.1)
    monkeypatch.setattr(module, "SECONDS_AFTER_TERM", 0.3)
    made = []

    def make(limit, first_limit=0.0, tell=None):
        told, left, term = [], threading.Event(), []
        watchdog = Watchdog(
            3,
            limit,
            first_limit,
            tell or told.append,
            lambda: bool(term) and term.pop(),
            lambda code: left.set(),
        )
        watchdog.told, watchdog.left = told, left
        watchdog.hurry = lambda: term.append(True)
        watchdog._tick = 0.05
        watchdog.start()
        made.append(watchdog)
        return watchdog

    yield make
    for watchdog in made:
        watchdog.close()


def test_it_says_where_a_rank_stands_still(watch, capfd):
    watchdog = watch(0.2)
    assert watchdog.left.wait(10)
    said = capfd.readouterr().err
    why = "nothing moved for 0.2 s (launch.watchdog_seconds)"
    assert f"[rank 3] {why}; this is where rank 3 stands" in said
    assert "test_it_says_where_a_rank_stands_still" in said, "the stack of the main thread"
    assert watchdog.told == [why]


def test_progress_keeps_it_quiet(watch):
    watchdog = watch(0.5)
    for _ in range(40):
        watchdog.progress()
        assert not watchdog.left.wait(0.03)
    watchdog.close()
    assert not watchdog.left.wait(1.0)


def test_the_first_step_has_more_time(watch):
    watchdog = watch(0.2, first_limit=60.0)
    assert not watchdog.left.wait(0.8)
    watchdog.step_ends()
    assert watchdog.left.wait(10)


def test_without_a_limit_it_waits(watch):
    watchdog = watch(None)
    watchdog.step_ends()
    assert not watchdog.left.wait(1.5)


def test_it_leaves_even_if_what_it_tells_hangs(watch):
    forever = threading.Event()
    watchdog = watch(0.2, tell=lambda text: forever.wait())
    assert watchdog.left.wait(10)
    forever.set()


def test_after_sigterm_a_step_ends_or_the_process_does(watch, capfd):
    watchdog = watch(60.0)
    # Before the first step, or between two, it only asks for a checkpoint.
    watchdog.hurry()
    assert not watchdog.left.wait(1.5)
    watchdog.step_begins(None)
    watchdog.hurry()
    assert not watchdog.left.wait(1.5)
    watchdog.step_begins(0.01)
    watchdog.hurry()
    assert not watchdog.left.wait(0.2)
    watchdog.step_ends()
    assert not watchdog.left.wait(1.5)
    watchdog.step_begins(0.01)
    watchdog.hurry()
    assert watchdog.left.wait(10)
    assert "SIGTERM came and the step does not end: another rank is gone" in capfd.readouterr().err


def test_a_slow_step_has_its_time_after_sigterm(watch):
    watchdog = watch(60.0)
    begin = time.monotonic()
    watchdog.step_begins(1.0)
    watchdog.hurry()
    assert watchdog.left.wait(10)
    assert time.monotonic() - begin >= 2.0


STUCK = """
import ctypes, os, signal
from megatron_mer.launch import watchdog as module
from megatron_mer.launch.requests import Requests
module.SECONDS_AFTER_TERM = module.SECONDS_TO_TELL = 0.2
requests = Requests()
requests.listen()
watchdog = module.Watchdog(0, None, 0.0, lambda text: None, requests.term_came)
watchdog.start()
watchdog.step_begins(0.1)
library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
library.pthread_mutex_init(mutex, None)
library.pthread_mutex_lock(mutex)
os.kill(os.getpid(), signal.SIGTERM)
library.pthread_mutex_lock(mutex)  # As in a collective, no signal ends this wait.
"""


def test_sigterm_ends_a_wait_outside_of_the_interpreter(project_root):
    done = subprocess.run(
        [sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60, cwd=project_root
    )
    assert done.returncode == 1
    assert "SIGTERM came and the step does not end" in done.stderr

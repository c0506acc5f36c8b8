"""Who has a run's directory: seen, refused, taken over from the dead, and noticed by the robbed."""

import fcntl
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_mer.errors import ConfigError, TrainingError
from megatron_mer.training import lock as module
from megatron_mer.training.lock import NAME, RunLock

BEAT = 0.05


@pytest.fixture(params=["flock", "no flock"])
def locks(request, monkeypatch):
    """With the system's locks, and on a file system that has none."""
    if request.param == "no flock":

        def refuse(file, how):
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(fcntl, "flock", refuse)
    return request.param


def elsewhere(monkeypatch):
    """What follows runs on another host."""
    monkeypatch.setattr(platform, "node", lambda: "other")


def record(root):
    return json.loads((root / NAME).read_bytes())


def taken(root):
    lock = RunLock(root, BEAT)
    lock.take()
    return lock


def test_a_live_run_is_refused_with_its_name(tmp_path, locks):
    first = taken(tmp_path)
    with pytest.raises(ConfigError) as caught:
        taken(tmp_path)
    assert f"host {platform.node()}, process {os.getpid()}" in str(caught.value)
    first.check()
    first.release()
    taken(tmp_path).release()
    assert (tmp_path / NAME).read_bytes() == b""


def test_a_live_run_on_another_host_is_seen_by_its_heartbeat(tmp_path, monkeypatch):
    first = taken(tmp_path)
    here = platform.node()
    elsewhere(monkeypatch)
    # Another node's locks are not seen here.
    monkeypatch.setattr(fcntl, "flock", lambda file, how: None)
    with pytest.raises(ConfigError, match=f"host {here}, process {os.getpid()}"):
        taken(tmp_path)
    first.check()
    first.release()


def test_a_dead_run_on_another_host_is_taken_over(tmp_path, locks, monkeypatch):
    dead = {"host": "gone", "pid": 1, "id": "x", "beats": 3, "beat_seconds": BEAT}
    (tmp_path / NAME).write_text(json.dumps(dead))
    begin = time.monotonic()
    mine = taken(tmp_path)
    assert time.monotonic() - begin >= module.DEAD_AFTER * BEAT
    assert record(tmp_path)["pid"] == os.getpid()
    mine.release()


def test_a_run_that_lets_go_meanwhile_is_not_waited_for(tmp_path, monkeypatch):
    dead = {"host": "gone", "pid": 1, "id": "x", "beats": 3, "beat_seconds": 10.0}
    (tmp_path / NAME).write_text(json.dumps(dead))
    monkeypatch.setattr(time, "sleep", lambda seconds: os.truncate(tmp_path / NAME, 0))
    taken(tmp_path).release()


def killed(root):
    taken(root)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_on_this_host_is_taken_over_at_once(tmp_path, locks):
    process = multiprocessing.get_context("fork").Process(target=killed, args=(tmp_path,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert record(tmp_path)["pid"] == process.pid
    taken(tmp_path).release()


def test_the_robbed_run_notices(tmp_path):
    first = taken(tmp_path)
    other = {"host": "other", "pid": 7, "id": "y", "beats": 0, "beat_seconds": BEAT}
    (tmp_path / NAME).write_text(json.dumps(other).ljust(module._SIZE))
    end = time.monotonic() + 20
    while not first._taken_by and time.monotonic() < end:
        time.sleep(BEAT)
    with pytest.raises(TrainingError, match="taken over by host other, process 7"):
        first.check()
    first.release()
    assert record(tmp_path) == other, "what the other run wrote stays"


def test_many_starts_at_once_let_one_in(tmp_path):
    code = (
        "import sys; from pathlib import Path; from megatron_mer.training.lock import RunLock\n"
        "from megatron_mer.errors import ConfigError\n"
        "lock = RunLock(Path(sys.argv[1]))\n"
        "try: lock.take()\n"
        "except ConfigError: sys.exit(2)\n"
        "print('in', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipe = subprocess.PIPE
    many = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(6)]
    guard = threading.Timer(60, lambda: [one.kill() for one in many])
    guard.start()
    said = [one.stdout.readline() for one in many]
    assert sorted(said) == ["", "", "", "", "", "in\n"]
    for one in many:
        one.communicate()
    guard.cancel()
    assert sorted(one.returncode for one in many) == [0, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("content", [b"host a, process 3\n", b"{", b"[]", b"\xff" * 600])
def test_a_record_of_no_run_is_no_hindrance(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    taken(tmp_path).release()

"""Following a run from outside: a real one, and what may happen to its directory."""

import json
import os
import platform
import shutil
import subprocess
import sys

import pytest

from megatron_mer.config import load_config, to_yaml
from megatron_mer.training.follow import RunFollower
from megatron_mer.training.preflight import prepare


class Clock:
    """Both clocks of a follower."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def started(tiny):
    """The directory of a run that has begun, without a step, and the time of its files."""
    config = load_config(tiny.write("run"))
    folder = tiny.folder / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "plan.json").write_text(json.dumps(prepare(config, 1).plan.history()))
    write_status(folder, status="running", step=0, reason="")
    return folder


def write_status(folder, time=1000.0, **values) -> None:
    (folder / "status.json").write_text(json.dumps(values))
    os.utime(folder / "status.json", (time, time))


def add_steps(folder, batches, time=1000.0, **changes) -> None:
    path = folder / "metrics.jsonl"
    with open(path, "a") as file:
        for batch in batches:
            line = {
                "step": batch + 1,
                "batch": batch,
                "task": "en",
                "loss": 8.0,
                "lr": 1e-3,
                "step_seconds": 2.0,
                "tokens_per_second": 128.0,
                "updates_since_reptile": 1,
            }
            file.write(json.dumps({**line, **changes}) + "\n")
    os.utime(path, (time, time))


def add_evaluation(folder, batches, moment, entry, task, seconds=None, **losses) -> None:
    line = {
        "step": batches,
        "batches": batches,
        "moment": moment,
        "entry": entry,
        "task": task,
        "losses": losses,
    } | ({} if seconds is None else {"seconds": seconds})
    with open(folder / "evaluations.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def follow(folder, clock: Clock) -> RunFollower:
    return RunFollower(folder, clock=clock, ticks=clock)


@pytest.mark.dist
def test_a_real_run_is_understood_to_the_end(tiny):
    tiny.train(tiny.write("run", lambda config: config["evaluate"].update(every_steps=3)))
    folder = tiny.folder / "run"
    seen = RunFollower(folder).look()
    summary = json.loads((folder / "summary.json").read_text())
    assert (seen.status, seen.name, seen.alarms, seen.notes) == ("done", "tiny", (), ())
    assert (seen.step, seen.batches, seen.total_batches, seen.seconds_left) == (20, 20, 20, None)
    assert [(one.task, one.state) for one in seen.tasks] == [
        (t, "past") for t in ("en", "fr", "de")
    ]
    forgetting = {one.name: one.forgetting for one in seen.held_out}
    assert forgetting == pytest.approx(summary["forgetting"]["sets"])
    assert seen.evaluated.mean_forgetting == pytest.approx(summary["forgetting"]["mean"])
    assert [row.label for row in seen.matrix] == [r["label"] for r in summary["matrix"]["rows"]]
    shown = [[row.losses[name] for name in summary["matrix"]["sets"]] for row in seen.matrix]
    assert shown == summary["matrix"]["losses"]
    assert seen.checkpoint.step == 20
    assert (seen.reptile.k, seen.reptile.last_step) == (4, 20)
    assert seen.reptile.delta_norm > 0
    assert seen.losses.loss == tiny.lines("run")[-1]["loss"]
    assert len(seen.curve) == 20


def test_from_no_directory_to_a_run(started, tmp_path):
    folder, clock = tmp_path / "later", Clock(1000.0)
    follower = follow(folder, clock)
    assert (follower.look().status, follower.look().name) == ("absent", "later")
    folder.mkdir()
    assert follower.look().status == "starting"
    for path in started.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    seen = follower.look()
    assert (seen.status, seen.name, seen.total_batches, seen.batches) == ("running", "tiny", 20, 0)
    assert [one.state for one in seen.tasks] == ["current", "future", "future"]
    # --fresh: the directory is renamed, and a new one appears.
    add_steps(folder, range(9))
    assert follower.look().batches == 9
    folder.rename(tmp_path / "aside")
    assert (follower.look().status, follower.look().batches) == ("absent", 0)
    folder.mkdir()
    shutil.copy(tmp_path / "aside" / "status.json", folder)
    add_steps(folder, range(2))
    seen = follower.look()
    assert (seen.status, seen.batches, seen.total_batches) == ("running", 2, None)


def test_a_torn_status_or_plan_leaves_what_is_known(started):
    follower = follow(started, Clock(1000.0))
    follower.look()
    (started / "status.json").write_text('{"status": "fai')
    (started / "plan.json").write_text('[{"first_ba')
    (started / "config.yaml").write_text("name: [")
    seen = follower.look()
    assert seen.status == "running"
    assert [note[:9] for note in seen.notes] == ["config.ya", "plan.json"]
    assert seen.total_batches is None


def test_a_run_that_stands_still_is_said_loudly(started):
    clock = Clock(1010.0)
    follower = follow(started, clock)
    add_steps(started, range(8), time=1005.0)
    seen = follower.look()
    assert (seen.quiet_seconds, seen.alarms) == (5.0, ())
    assert [one.state for one in seen.tasks] == ["past", "current", "future"]
    clock.now += 700
    assert follower.look().alarms == ("no step for 11 min",)
    (started / "checkpoints" / "step_000000008.tmp").mkdir()
    assert follower.look().alarms == ("no step for 11 min; a checkpoint is being written",)
    # One that is seen to grow is alive, whatever the file server's clock says.
    add_steps(started, range(8, 9), time=10.0)
    clock.now += 2
    seen = follower.look()
    assert (seen.quiet_seconds, seen.alarms) == (2.0, ())
    write_status(started, status="stopped", step=8, reason="interrupted")
    clock.now += 7000
    seen = follower.look()
    assert (seen.status, seen.reason, seen.alarms) == ("stopped", "interrupted", ())
    assert seen.seconds_left is None


def test_slow_steps_and_long_evaluations_are_no_alarm(started):
    clock = Clock(1000.0)
    follower = follow(started, clock)
    add_steps(started, range(8), step_seconds=60.0)
    follower.look()
    clock.now += 590
    assert follower.look().alarms == ()
    clock.now += 20
    assert follower.look().alarms == ("no step for 10 min",)
    add_evaluation(started, 7, "interval", 0, "en", seconds=600.0, en=8.0)
    assert follower.look().alarms == ()


def test_a_start_is_given_time(started):
    clock = Clock(1590.0)
    follower = follow(started, clock)
    assert follower.look().alarms == ()
    clock.now = 1661.0
    assert follower.look().alarms == ("no step yet, 11 min after the start",)
    # Resumed a day after the last step.
    add_steps(started, range(8), time=1700.0)
    clock.now = 100_000.0
    write_status(started, time=99_900.0, status="running", step=8, reason="")
    assert follow(started, clock).look().alarms == ()
    clock.now += 600
    assert follow(started, clock).look().alarms == ("no step for 27 h 28 min",)


def test_a_killed_process_is_missed_on_its_own_machine(started):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    host = platform.node()
    status = {"status": "running", "step": 0, "reason": "", "pid": child.pid}
    follower = follow(started, Clock(1000.0))
    write_status(started, **status, host=host)
    assert follower.look().alarms[0].startswith(f"process {child.pid} is gone")
    write_status(started, **status, host=host + "-another")
    assert follower.look().alarms == ()
    write_status(started, **status | {"pid": os.getpid()}, host=host)
    assert follower.look().alarms == ()


def test_batches_without_an_update_are_an_alarm_while_they_last(started):
    follower = follow(started, Clock(1000.0))
    add_steps(started, range(3))
    add_steps(started, range(3, 5), step=None, loss=None)
    seen = follower.look()
    said = "the last 2 batches in a row gave no update: loss or gradient not finite"
    assert (seen.alarms, seen.step, seen.batches) == ((said,), 3, 5)
    add_steps(started, range(5, 6))
    assert follower.look().alarms == ()


def test_forgetting_before_the_end_is_against_the_ends_of_entries(started):
    follower = follow(started, Clock(1000.0))
    add_steps(started, range(10))
    add_evaluation(started, 0, "start", None, None, en=8.0, fr=8.0, de=8.0)
    add_evaluation(started, 4, "interval", 0, "en", en=4.0, fr=7.9, de=8.0)  # for curves only
    add_evaluation(started, 7, "entry_end", 0, "en", en=5.0, fr=7.5, de=8.0)
    add_evaluation(started, 10, "interval", 1, "fr", en=5.5, fr=6.0, de=None)
    seen = follower.look()
    scored = {one.name: (one.state, one.first, one.best, one.now) for one in seen.held_out}
    assert scored == {
        "en": ("past", 8.0, 5.0, 5.5),
        "fr": ("current", 8.0, None, 6.0),
        "de": ("future", 8.0, None, None),
    }
    assert [one.forgetting for one in seen.held_out] == [0.5, None, None]
    assert (seen.evaluated.mean_forgetting, seen.evaluated.step) == (0.5, 10)
    assert [row.label for row in seen.matrix] == ["start", "0 en"]
    assert seen.held_out[0].trend == (8.0, 4.0, 5.0, 5.5)


def test_evaluations_whose_beginning_is_lost_are_shown(started):
    follower = follow(started, Clock(1000.0))
    add_evaluation(started, 7, "entry_end", 0, "en", en=5.0, fr=7.5, de=8.0)
    add_evaluation(started, 14, "entry_end", 1, "fr", en=5.25, fr=6.0, de=8.0)
    seen = follower.look()
    assert seen.notes == ()
    assert [one.first for one in seen.held_out] == [None] * 3
    assert [one.forgetting for one in seen.held_out] == [0.25, None, None]
    assert [row.label for row in seen.matrix] == ["0 en", "1 fr"]
    (started / "evaluations.jsonl").unlink()
    add_evaluation(started, 7, "entry_end", 0, "en", other=5.0)
    seen = follower.look()
    assert seen.held_out == ()
    assert "does not fit config.yaml" in seen.notes[0]


def test_the_time_left_counts_the_evaluations(started):
    follower = follow(started, Clock(1000.0))
    add_steps(started, range(10))
    assert follower.look().seconds_left == 20.0
    add_evaluation(started, 7, "entry_end", 0, "en", seconds=5.0, en=5.0)
    assert follower.look().seconds_left == 20.0 + 2 * 5.0  # at the ends of fr and de
    text = (started / "config.yaml").read_text()
    (started / "config.yaml").write_text(text.replace("evaluate:", "evaluate:\n  every_steps: 4"))
    # After 12 and 16 as well, and after 20, which is an end.
    assert follower.look().seconds_left == 20.0 + 4 * 5.0


def test_only_whole_checkpoints_count(started):
    follower = follow(started, Clock(1100.0))
    assert follower.look().checkpoint is None
    for name in ("step_000000005", "step_000000010", "step_000000015.tmp", "latest"):
        path = started / "checkpoints" / name
        path.mkdir()
        (path / "manifest.json").touch()
        os.utime(path / "manifest.json", (1000.0, 1000.0))
    found = follower.look().checkpoint
    assert (found.step, found.age_seconds) == (10, 100.0)

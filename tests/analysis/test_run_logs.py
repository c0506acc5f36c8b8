"""Steps, evaluations and warnings as they come in."""

import json
from itertools import pairwise

import pytest

from megatron_mer.analysis.run_logs import CURVE_POINTS, EvaluationLog, StepLog, WarningLog
from megatron_mer.analysis.snapshot import Curve, duration


def step(batch: int, **changes) -> dict:
    line = {
        "step": batch + 1,
        "batch": batch,
        "task": "en",
        "lr": 1e-3,
        "loss": 8.0,
        "loss_fresh": 8.0,
        "loss_replay": None,
        "grad_norm": 1.0,
        "step_seconds": 0.5,
        "tokens_per_second": 1000.0,
    }
    return {**line, **changes}


def write(path, lines, mode="a") -> None:
    with open(path, mode) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lines.jsonl"


def test_steps_with_and_without_the_newer_keys(path):
    log = StepLog(path)
    assert not log.read()
    assert (log.losses(), log.speed(), log.reptile(5), log.curve()) == (None, None, None, ())
    write(path, [step(0), step(1, loss=6.0, step_seconds=1.5, tokens_per_second=400.0)])
    assert log.read()
    losses, speed = log.losses(), log.speed()
    assert (losses.loss, losses.mean, losses.mean_of, losses.replay) == (6.0, 7.0, 2, None)
    assert (speed.step_seconds, speed.tokens_per_second) == (1.0, 550.0)  # all tokens, all seconds
    assert (speed.mfu, speed.data_wait, speed.memory_gib) == (None, None, None)
    assert log.curve() == ((0.5, 8.0), (1.5, 6.0))
    new = {"mfu": 0.4, "data_wait_seconds": 0.1, "memory_gib": 61.5, "loss_by_dataset": {"a": 1}}
    write(path, [step(batch, **new) for batch in range(2, 102)])
    log.read()
    speed = log.speed()
    assert (speed.mfu, speed.memory_gib) == (pytest.approx(0.4), 61.5)
    assert speed.data_wait == pytest.approx(0.2)
    assert "loss_by_dataset" not in log.last


def test_batches_without_an_update(path):
    log = StepLog(path)
    bad = {"step": None, "loss": None, "grad_norm": None}
    write(path, [step(0), step(1, **bad), step(2, **bad)])
    log.read()
    assert (log.step, log.batches, log.without_update) == (1, 3, 2)
    assert (log.losses().loss, log.losses().mean, log.losses().mean_of) == (None, 8.0, 1)
    write(path, [step(3) | {"step": 2}])
    log.read()
    assert (log.step, log.batches, log.without_update) == (2, 4, 0)


def test_reptile_s_last_update_is_remembered(path):
    log = StepLog(path)
    update = {"reptile_delta_norm": 2.5, "reptile_delta_cosine": None}
    write(path, [step(0, updates_since_reptile=0, **update), step(1, updates_since_reptile=1)])
    log.read()
    state = log.reptile(30)
    assert (state.updates_since, state.k, state.last_step) == (1, 30, 1)
    assert (state.delta_norm, state.delta_cosine) == (2.5, None)


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"batch": "x"}', '{"batch": -1}', "\0\0", "[" * 99999]
)
def test_a_line_that_is_no_step_is_counted_and_passed_over(path, text):
    log = StepLog(path)
    path.write_text(json.dumps(step(0)) + f"\n{text}\n" + json.dumps(step(1)) + "\n")
    log.read()
    assert (log.batches, log.unreadable) == (2, 1)


def test_a_resumed_run_s_lines_replace_the_old_ones(path):
    log = StepLog(path)
    write(path, [step(batch, loss=9.0) for batch in range(50)])
    log.read()
    new = path.with_name("new")
    write(new, [step(batch, loss=5.0) for batch in range(20)])
    new.replace(path)
    log.read()
    assert (log.batches, log.step, log.losses().mean) == (20, 20, 5.0)
    assert len(log.curve()) == 20


def test_a_long_file_is_sampled_before_its_end(path):
    write(path, [step(batch, loss=float(batch)) for batch in range(20_000)])
    log = StepLog(path, keep=100_000)
    log.read()
    assert log.batches == 20_000
    points = log.curve()
    assert len(points) <= CURVE_POINTS
    # The whole run is there, and its line is straight: loss = batch.
    assert points[0][0] < 100
    assert max(after[0] - before[0] for before, after in pairwise(points)) < 250
    assert all(abs(loss - batch) < 128 for batch, loss in points)
    write(path, [step(20_000)])
    log.read()
    assert log.batches == 20_001


def evaluation(batches: int, moment: str, task, **losses) -> dict:
    entry = None if task is None else 0
    return {
        "step": batches,
        "batches": batches,
        "moment": moment,
        "entry": entry,
        "task": task,
        "losses": losses,
    }


def test_evaluations_are_kept_where_they_matter(path):
    log = EvaluationLog(path)
    lines = [evaluation(0, "start", None, en=8.0)]
    lines += [evaluation(n, "interval", "en", en=8.0 - n / 1000) for n in range(1, 2000)]
    lines += [evaluation(2000, "entry_end", "en", en=None)]
    write(path, lines)
    with open(path, "a") as file:
        file.write('{"step": 7, "torn\n{"losses": 3}\n')
    assert log.read()
    assert log.start["losses"] == {"en": 8.0}
    assert [line["batches"] for line in log.ends] == [2000]
    assert log.last is log.ends[0]
    assert log.last["losses"] == {"en": None}
    assert log.unreadable == 2
    trend = log.trend("en")
    assert 8 <= len(trend) <= 16
    assert list(trend) == sorted(trend, reverse=True)
    assert log.trend("fr") == ()
    path.unlink()
    log.read()
    assert (log.start, log.ends, log.last) == (None, [], None)


def test_the_last_warnings_of_the_log(path):
    log = WarningLog(path)
    path.write_text(
        "2026-11-23 19:09:25 INFO a WARNING in the text\n"
        "2026-11-23 19:09:26 WARNING first\n"
        "  a line of a table\n\n"
        "2026-11-23 19:09:27 ERROR second\n"
        "2026-11-23 19:09:28 WARNING not whole"
    )
    log.read()
    assert [line[20:] for line in log.lines] == ["WARNING first", "ERROR second"]
    with open(path, "a") as file:
        file.writelines(f"\n2026-11-23 19:09:28 WARNING {at}" for at in range(9))
        file.write("\n")
    log.read()
    assert [line[-1] for line in log.lines] == list("45678")


def test_a_curve_keeps_its_size_and_its_means():
    curve = Curve(8)
    for batch in range(1000):
        curve.add(batch, float(batch))
    points = curve.points()
    assert len(points) == 8
    assert points[0] == (64.0, 63.5)
    curve.add(0, 63.5 * 129 - 63.5 * 128)
    assert curve.points()[0] == (64.0, 63.5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0 s"),
        (119, "119 s"),
        (720, "12 min"),
        (3 * 3600 + 300, "3 h 5 min"),
        (190000, "2 d 4 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text

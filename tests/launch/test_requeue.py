"""When a job of Slurm trains, runs again, ends or gives up."""

import threading
import time

import pytest

from megatron_mer.launch.requeue import (
    MAX_WAITS,
    Record,
    decide_end,
    decide_not_started,
    decide_refused,
    decide_start,
    decide_taken_over,
    keep,
    later,
    live_twin,
    read_record,
    write_object,
)


def status(state, step=0, time="t1", reason=""):
    return {
        "status": state, "step": step, "reason": reason, "host": "n1", "pid": 7, "time": time,
    }  # fmt: skip


def began(before=None, **changed):
    """The record of a job that found a status and began to train."""
    decision = decide_start(before or {}, Record(submission="s", **changed), "s")
    assert decision.action == "start"
    return decision.record


@pytest.mark.parametrize("state", ["done", "stopped"])
def test_what_is_over_does_not_run_again(state):
    decision = decide_end(status(state, 20, reason="asked"), began(), 0, 3)
    assert (decision.action, decision.reason) == ("end", f"{state} at step 20 (asked)")
    assert decision.record.step == 20
    after = decide_start(status(state, 20), decision.record, "s")
    assert after.action == "end"
    assert state in after.reason


def test_a_checkpoint_for_a_requeue_always_runs_again():
    record = began(restarts=3, waits=MAX_WAITS)
    decision = decide_end(status("requeue", 4), record, 4, max_restarts=0)
    assert decision.action == "requeue"
    assert (decision.record.restarts, decision.record.waits) == (0, 0)


def test_a_job_that_never_comes_to_its_first_step_ends_some_day():
    record = began()
    for number in range(1, MAX_WAITS + 1):
        decision = decide_end(status("requeue", 0), record, 4, max_restarts=0)
        assert (decision.action, decision.record.waits) == ("requeue", number)
        record = decision.record
    last = decide_end(status("requeue", 0), record, 4, max_restarts=0)
    assert last.action == "fail"
    assert "is the time limit too short?" in last.reason


@pytest.mark.parametrize("state", ["running", "failed"])
def test_crashes_without_a_step_are_counted(state):
    record = began()
    for number in (1, 2, 3):
        decision = decide_end(status(state, 5), record, 1, 3)
        assert decision.action == "requeue", decision.reason
        assert decision.record.restarts == number
        record = decide_start(status(state, 5), decision.record, "s").record
    last = decide_end(status(state, 5, time="t2"), record, 1, 3)
    assert last.action == "fail"
    assert "3 restarts in a row gained no step, and 3 are allowed" in last.reason
    assert decide_start(status(state, 5), last.record, "s").action == "end"


def test_a_step_gained_begins_the_count_anew():
    record = began(status("failed", 5), step=5, restarts=3)
    decision = decide_end(status("failed", 10, time="t2"), record, 1, 3)
    assert decision.action == "requeue"
    assert "5 steps gained; restart 1 of 3 without a step" in decision.reason


def test_no_restart_is_allowed_where_the_limit_is_zero():
    assert decide_end(status("failed", 0), began(), 1, 0).action == "fail"


@pytest.mark.parametrize("old", ["requeue", "done", "stopped", "running"])
def test_an_old_status_says_nothing_of_a_job_that_crashed_early(old):
    before = status(old, 5)
    first = decide_start(before, Record(), "s")
    assert first.action == "start", "another submission goes on with what was over"
    decision = decide_end(before, first.record, 1, 1)
    assert (decision.action, decision.record.restarts) == ("requeue", 1)
    assert "not begun at step 5" in decision.reason
    again = decide_end(before, decide_start(before, decision.record, "other").record, 1, 0)
    assert again.action == "fail"


def test_a_run_that_was_done_and_found_nothing_to_do_ends():
    before = status("done", 20)
    assert decide_end(before, decide_start(before, Record(), "s").record, 0, 3).action == "end"


def test_what_is_refused_does_not_run_again():
    decision = decide_refused(began())
    assert (decision.action, decision.reason) == ("fail", "the run is refused, see above")
    assert decide_start({}, decision.record, "s").action == "end"


def test_an_exit_code_alone_is_no_refusal():
    """Ranks that did not find each other end with 2, too, and may do so at the next start."""
    assert decide_end({}, began(), 2, 3).action == "requeue"


def test_a_live_twin_is_waited_for_but_not_for_ever():
    record = began()
    decision = decide_end(status("running", 0), record, 2, 0, twin="a run on n3")
    assert decision.action == "requeue"
    assert "a run on n3 still trains in this directory; 1 of 30 restarts" in decision.reason
    worn = decide_end(status("running"), began(waits=MAX_WAITS), 2, 0, twin="a run on n3")
    assert worn.action == "fail"
    # What the twin gains is not this job's.
    lively = decide_end(status("running", 5), began(waits=2), 2, 0, twin="a run on n3")
    assert (lively.action, lively.record.waits) == ("requeue", 3)


@pytest.mark.parametrize(
    ("one", "other", "is_later"),
    [
        ("20260131T000000Z", "20260130T235959Z", True),
        ("20260131T000000Z_10", "20260131T000000Z_2", True),
        ("20260131T000000Z_2", "20260131T000000Z", True),
        ("20260131T000000Z", "20260131T000000Z", False),
        ("20260130T000000Z", "20260131T000000Z", False),
        ("10", "9", True),
        ("9", "10", False),
        ("20260131T000000Z", "9", False),
        ("mine", "9", False),
    ],
)
def test_which_submission_is_later(one, other, is_later):
    assert later(one, other) is is_later


def test_an_older_submission_leaves_the_run_to_a_newer_one():
    newer = Record(submission="12", restarts=2)
    decision = decide_start(status("running", 5), newer, "11")
    assert (decision.action, decision.record) == ("end", newer)
    assert "submission 12 came later and has taken over this run" in decision.reason
    assert decide_start(status("running", 5), newer, "13").action == "start"
    assert decide_taken_over(newer, "12") is None
    assert decide_taken_over(Record(), "12") is None
    taken = decide_taken_over(newer, "11")
    assert (taken.action, taken.record) == ("end", newer)


def test_a_warning_before_any_rank_runs_again_but_not_for_ever():
    decision = decide_not_started(began(restarts=3))
    assert (decision.action, decision.record.waits) == ("requeue", 1)
    assert decide_not_started(began(waits=MAX_WAITS)).action == "fail"


def test_bad_nodes_are_named():
    decision = decide_end({}, began(), 1, 3, bad_nodes={"n3": "clock", "n1": "disk"})
    assert "left out from now on: n1, n3" in decision.reason


def test_a_record_survives_and_a_damaged_one_is_as_none(tmp_path):
    decision = decide_end(status("failed", 5), began(), 1, 3)
    keep(decision, tmp_path)
    assert read_record(tmp_path) == decision.record
    (tmp_path / "restarts.json").write_text('{"restarts": "many", "submission": "s"')
    assert read_record(tmp_path) == Record()
    (tmp_path / "restarts.json").write_text('{"restarts": "many", "submission": "s"}')
    assert read_record(tmp_path) == Record(submission="s")


def lock_of(tmp_path, beats):
    record = {"id": "a", "host": "n3", "beats": beats, "beat_seconds": 0.1}
    write_object(tmp_path / ".lock", record)


def test_a_twin_lives_if_its_heartbeat_moves(tmp_path):
    assert live_twin(tmp_path) == ""
    (tmp_path / ".lock").write_text("")
    assert live_twin(tmp_path) == ""
    lock_of(tmp_path, 1)
    assert live_twin(tmp_path) == ""
    thread = threading.Thread(target=lambda: (time.sleep(0.05), lock_of(tmp_path, 2)))
    thread.start()
    assert live_twin(tmp_path) == "a run on n3"
    thread.join()

"""What a rank is asked for, and how early the end of a job is met."""

import os
import signal
import time

import pytest

from megatron_mer.errors import LaunchError
from megatron_mer.launch.requests import JOB_END, Pace, Request, Requests, job_end


@pytest.fixture
def requests(tmp_path):
    before = {number: signal.getsignal(number) for number in (10, 12, 15)}
    yield Requests(folder=tmp_path)
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)


def send(number):
    os.kill(os.getpid(), number)


def test_the_greatest_request_counts(requests, tmp_path):
    requests.listen()
    assert requests.now(0.0) is Request.NONE
    expected = Request.NONE
    for ask, request in (
        (lambda: send(signal.SIGUSR2), Request.SIGUSR2),
        (lambda: (tmp_path / "SAVE").touch(), Request.SAVE_FILE),
        (lambda: send(signal.SIGUSR1), Request.SIGUSR1),
        (lambda: send(signal.SIGTERM), Request.SIGTERM),
        (lambda: setattr(requests, "job_end", time.time() + 5), Request.JOB_END),
        (lambda: (tmp_path / "STOP").touch(), Request.STOP_FILE),
    ):
        ask()
        assert request > expected
        expected = request
        assert requests.now(10.0) is expected
        assert requests.now(10.0) is expected, "asking does not answer it"
    requests.stopped()
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_answers_what_asks_for_no_more(requests, tmp_path):
    requests.listen()
    send(signal.SIGUSR2)
    (tmp_path / "SAVE").touch()
    requests.saving()
    # One that is being written is not asked for again, and the file stays until it is whole.
    assert requests.now(0.0) is Request.NONE
    assert (tmp_path / "SAVE").exists()
    requests.saved()
    assert not (tmp_path / "SAVE").exists()
    (tmp_path / "SAVE").touch()
    assert requests.now(0.0) is Request.SAVE_FILE
    send(signal.SIGUSR1)
    requests.saving()
    assert requests.now(0.0) is Request.SIGUSR1


def test_sigterm_is_known_to_other_threads(requests):
    assert not requests.term_came()
    requests.listen()
    send(signal.SIGUSR1)
    assert not requests.term_came()
    send(signal.SIGTERM)
    assert requests.term_came()
    assert not requests.term_came(), "it came once"


def test_only_one_rank_looks_for_files(tmp_path):
    (tmp_path / "STOP").touch()
    assert Requests().now(0.0) is Request.NONE


@pytest.mark.parametrize(
    ("request_", "effect"),
    [("SIGUSR2", "save"), ("SAVE_FILE", "save"), ("SIGUSR1", "requeue"), ("SIGTERM", "requeue"),
     ("JOB_END", "requeue"), ("STOP_FILE", "stop"), ("NONE", "nothing")],
)  # fmt: skip
def test_effects(request_, effect):
    assert Request[request_].effect == effect


def test_the_time_that_is_needed():
    pace = Pace(30.0, rank_bytes=10**9, world_size=4)
    # 10 s at 100 MB/s; twice, for one may be on its way.
    assert pace.seconds_needed == 2 * 10 + 30
    assert Pace(30.0, rank_bytes=10**9, world_size=64).seconds_needed == 2 * 64 + 30
    pace.step(4.0)
    pace.step(3.0)
    pace.evaluation(7.0)
    pace.evaluation(5.0)
    assert pace.seconds_needed == 2 * 4 + 7 + 2 * 10 + 30
    pace.checkpoint(2.0)
    pace.checkpoint(1.0)
    assert pace.seconds_needed == 2 * 4 + 7 + 2 * 2 + 30
    for _ in range(100):
        pace.step(1.0)
    assert pace.longest_step == 1.0


def test_the_end_of_the_job():
    assert job_end({}) is job_end({JOB_END: ""}) is None
    assert job_end({JOB_END: "4102444800"}) == 4102444800.0
    assert job_end({JOB_END: "1000000000"}) is None, "left over from another job"
    with pytest.raises(LaunchError, match="SLURM_JOB_END_TIME: given 'soon'"):
        job_end({JOB_END: "soon"})
    now = time.time()
    assert Requests(now + 10).now(8.0) is Request.NONE
    assert Requests(now + 10).now(11.0) is Request.JOB_END

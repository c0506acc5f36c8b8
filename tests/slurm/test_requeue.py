"""Jobs that Slurm or a user ends: what goes on is the run that was left alone, to the bit."""

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(360)]
STEPS = 30


def unsaved(config):
    """Thirty steps, with no checkpoint but those asked for and the one at the end."""
    config["stream"] = [dict(config["stream"][0], steps=STEPS)]
    config["checkpoint"] = {}
    config["launch"] = {"end_margin_seconds": 5}


@pytest.mark.parametrize(
    "launcher",
    ["srun", *(pytest.param(one, marks=pytest.mark.slow) for one in ("torchrun", "deepspeed"))],
)
def test_preemption(slurm_run, alone, launcher):
    """A higher partition takes the nodes: the job is warned, saves, and goes on afterwards."""
    config = slurm_run.tiny.write("run", unsaved)
    (job,) = slurm_run.submit(config, "--launcher", launcher, disk_seconds=0.5)
    slurm_run.until_step("run", 4)
    slurm_run.cluster.run("srun", "-p", "high", "-N3", "--exclusive", "sleep", "1")
    known = slurm_run.cluster.wait_job(job, 200)
    assert known["JobState"] == "COMPLETED"
    assert int(known["Restarts"]) >= 1
    assert "the ranks are asked for a checkpoint" in slurm_run.log("run")
    assert "requeue.py: requeue: requeue at step" in slurm_run.log("run")
    assert slurm_run.lost("run") == [], "the checkpoint came after the last step"
    assert slurm_run.tiny.results("run") == alone(unsaved)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_time_limit(slurm_run, alone):
    """More steps than a job has time for, on a cluster that does not tell when jobs end."""
    config = slurm_run.tiny.write("run", unsaved)
    (job,) = slurm_run.submit(config, "--time", "2", disk_seconds=5.0)
    known = slurm_run.cluster.wait_job(job, 800)
    assert known["JobState"] == "COMPLETED"
    assert int(known["Restarts"]) >= 1
    assert slurm_run.lost("run") == []
    assert slurm_run.tiny.results("run") == alone(unsaved)


@pytest.mark.slow
def test_what_a_user_cancels_stays_cancelled(slurm_run):
    (job,) = slurm_run.submit(slurm_run.tiny.write("run", unsaved), disk_seconds=0.5)
    slurm_run.until_step("run", 4)
    slurm_run.cluster.run("scancel", job)
    known = slurm_run.cluster.wait_job(job, 60)
    assert (known["JobState"], known["Restarts"]) == ("CANCELLED", "0")
    slurm_run.cluster.wait_idle()
    assert "after scancel nobody does" in slurm_run.log("run")
    assert slurm_run.cluster.job(job)["JobState"] == "CANCELLED"


@pytest.mark.slow
def test_a_chain_goes_on_after_a_crash_and_ends_at_once_when_the_run_is_done(slurm_run, alone):
    config = slurm_run.tiny.write("run", unsaved)
    jobs = slurm_run.submit(
        config, "--chain", "3", "--checkpoint.every_steps", "3", disk_seconds=0.5
    )
    slurm_run.until_saved("run", 3)
    slurm_run.kill_rank("run", 1)
    known = [slurm_run.cluster.wait_job(job, 200) for job in jobs]
    assert [one["JobState"] for one in known] == ["COMPLETED"] * 3
    assert [one["Restarts"] for one in known] == ["0"] * 3
    log = slurm_run.log("run")
    assert log.count("start 0 on") == 2, "two jobs trained"
    assert "this submission is over: done at step 30" in log
    assert slurm_run.tiny.results("run") == alone(unsaved)

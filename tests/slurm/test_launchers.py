"""A rank a node: every launcher trains what one machine trains."""

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]


def short(config):
    """Two tasks of three steps."""
    config["stream"] = [dict(entry, steps=3) for entry in config["stream"][:2]]


def of_three(config):
    """The same for three ranks."""
    short(config)
    config["batch"]["global_batch_size"] = 9


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "deepspeed"])
def test_a_job_trains_what_one_machine_trains(slurm_run, alone, launcher):
    (job,) = slurm_run.submit(slurm_run.tiny.write("run", short), "--launcher", launcher)
    known = slurm_run.cluster.wait_job(job, 150)
    assert known["JobState"] == "COMPLETED"
    assert slurm_run.status("run")["status"] == "done"
    assert slurm_run.tiny.results("run") == alone(short)
    assert "requeue.py: end: done at step 6" in slurm_run.log("run")


@pytest.mark.slow
def test_three_nodes(slurm_run, alone):
    (job,) = slurm_run.submit(slurm_run.tiny.write("run", of_three), nodes=3)
    assert slurm_run.cluster.wait_job(job, 150)["JobState"] == "COMPLETED"
    assert slurm_run.tiny.results("run") == alone(of_three, 3)

"""A node whose network is cut runs on by itself: nothing it does may reach the run's files."""

import pytest

NETWORK = "veth"
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(420)]


def impatient(config):
    """Thirty steps, a checkpoint every third, and no long wait for ranks that are silent."""
    config["stream"] = [dict(config["stream"][0], steps=30)]
    config["checkpoint"] = {"every_steps": 3}
    config["launch"] = {"step_timeout_seconds": 30, "watchdog_seconds": 40}


@pytest.mark.parametrize("node", ["n2", "n1"], ids=["worker", "batch host"])
def test_a_link_is_cut(slurm_run, alone, node):
    """The rest of the job begins again elsewhere, after the half that is cut off has given up."""
    cluster = slurm_run.cluster
    (job,) = slurm_run.submit(slurm_run.tiny.write("run", impatient), disk_seconds=0.5)
    slurm_run.until_saved("run", 3)
    cluster.link(node, up=False)
    try:
        known = cluster.wait_job(job, 360)
    finally:
        cluster.link(node, up=True)
    assert known["JobState"] == "COMPLETED"
    assert int(known["Restarts"]) >= 1
    assert slurm_run.tiny.results("run") == alone(impatient)
    cluster.wait_idle(60)

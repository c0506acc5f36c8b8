"""Nodes and ranks that die: the run ends as the run that was left alone, to the bit."""

import json

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(360)]


def saved_often(config):
    """Thirty steps, a checkpoint every third."""
    config["stream"] = [dict(config["stream"][0], steps=30)]
    config["checkpoint"] = {"every_steps": 3}


def test_a_rank_is_killed(slurm_run, alone):
    (job,) = slurm_run.submit(slurm_run.tiny.write("run", saved_often), disk_seconds=0.5)
    slurm_run.until_saved("run", 3)
    slurm_run.kill_rank("run", 1)
    known = slurm_run.cluster.wait_job(job, 250)
    assert known["JobState"] == "COMPLETED"
    assert int(known["Restarts"]) >= 1
    assert "steps gained; restart 1 of 3 without a step" in slurm_run.log("run")
    assert slurm_run.tiny.results("run") == alone(saved_often)


@pytest.mark.parametrize("node", ["n2", "n1"], ids=["worker", "batch host"])
def test_a_node_loses_power(slurm_run, alone, node):
    """The job begins again on the nodes that are left."""
    cluster = slurm_run.cluster
    (job,) = slurm_run.submit(slurm_run.tiny.write("run", saved_often), disk_seconds=0.5)
    slurm_run.until_saved("run", 3)
    cluster.cut_power(node)
    try:
        known = cluster.wait_job(job, 300)
    finally:
        cluster.start_node(node)
    assert known["JobState"] == "COMPLETED"
    assert int(known["Restarts"]) >= 1
    assert slurm_run.tiny.results("run") == alone(saved_often)
    cluster.wait_idle(60)


def test_a_run_that_always_fails_is_given_up(slurm_run):
    config = slurm_run.tiny.write("run", saved_often)
    (job,) = slurm_run.submit(config, "--launch.max_restarts_without_step", "1", disk_breaks=True)
    known = slurm_run.cluster.wait_job(job, 250)
    assert (known["JobState"], known["Restarts"]) == ("FAILED", "1")
    log = slurm_run.log("run")
    assert "1 restarts in a row gained no step, and 1 are allowed" in log
    assert "the disk is broken" in log
    assert json.loads((slurm_run.tiny.folder / "run" / "restarts.json").read_text())["ended"]


def test_what_is_refused_does_not_begin_again(slurm_run):
    """A dataset that went away between submission and start."""
    config = slurm_run.tiny.write("run", saved_often)
    blocker = slurm_run.cluster.run(
        "sbatch", "--parsable", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 100"
    ).strip()
    own = slurm_run.tiny.folder / "en"
    for end in ("bin", "idx"):
        source = (slurm_run.tiny.corpus / "en").with_suffix(f".{end}")
        own.with_suffix(f".{end}").write_bytes(source.read_bytes())
    (job,) = slurm_run.submit(config, "--stream.0.train.0.prefix", str(own))
    own.with_suffix(".bin").unlink()
    slurm_run.cluster.run("scancel", blocker)
    known = slurm_run.cluster.wait_job(job, 120)
    assert (known["JobState"], known["Restarts"]) == ("FAILED", "0")
    log = slurm_run.log("run")
    assert log.count("error (ConfigError)") == 1
    assert "requeue.py: fail: the run is refused, see above" in log


@pytest.mark.parametrize("what", ["cannot write", "lacks the file system"])
def test_a_node_that_is_not_fit_is_left_out(slurm_run, alone, what):
    config = slurm_run.tiny.write("run", saved_often)
    output_dir = slurm_run.tiny.folder / "run"
    output_dir.mkdir()
    cluster = slurm_run.cluster
    place = str(output_dir if what == "cannot write" else slurm_run.tiny.folder)
    if what == "cannot write":
        cluster.inside("n2", "mount", "--bind", place, place)
        cluster.inside("n2", "mount", "-o", "remount,bind,ro", place)
    else:
        cluster.inside("n2", "mount", "-t", "tmpfs", "none", place)
    try:
        (job,) = slurm_run.submit(config)
        known = cluster.wait_job(job, 250)
    finally:
        cluster.inside("n2", "umount", place)
    assert known["JobState"] == "COMPLETED"
    assert int(known["Restarts"]) >= 1
    assert known["NodeList"] == "n[1,3]"
    log = slurm_run.log("run")
    assert "no rank is started: n2 cannot read" in log
    assert "left out from now on: n2" in log
    assert slurm_run.tiny.results("run") == alone(saved_often)

"""What Slurm itself says of jobs, as tools/submit_slurm.py asks it."""

import os
import subprocess
from pathlib import Path

import pytest

from megatron_mer.errors import LaunchError
from megatron_mer.launch.submit import known_jobs, pending_reason, submit

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(60)]


@pytest.fixture
def script(cluster, tmp_path, monkeypatch):
    """An sbatch file of three whole nodes, on the virtual cluster."""
    for name, text in cluster.env.items():
        monkeypatch.setenv(name, text)
    path = tmp_path / "slurm" / "first" / "job.sbatch"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n#SBATCH -N3 --exclusive --output=/dev/null\nsleep 30\n")
    return path


def test_jobs_are_known_until_they_are_over(cluster, script):
    folder = script.parents[1]
    assert known_jobs(folder) == []
    ids = submit(script, 2)
    assert known_jobs(folder) == ids
    cluster.until(lambda: cluster.job(ids[0])["JobState"] == "RUNNING", 20, "the first job")
    assert pending_reason(ids[0]) == ""
    assert pending_reason(ids[1]) == "Dependency"
    cluster.run("scancel", *ids)
    for job in ids:
        cluster.wait_job(job, 20)
    cluster.wait_idle()
    assert known_jobs(folder) == []


def test_a_refused_partition_is_named(script, monkeypatch):
    monkeypatch.setitem(os.environ, "SBATCH_PARTITION", "gold")
    with pytest.raises(LaunchError, match=r"invalid partition"):
        submit(script, 1)


def test_options_of_the_shell_that_submits_do_not_stop_srun(cluster, script, monkeypatch):
    """sbatch by hand: what is exported there contradicts the job's own options."""
    log = script.with_name("job.log")
    until_done = Path(__file__).parents[2] / "examples" / "slurm" / "until_done.sh"
    script.write_text(
        f"#!/bin/bash\n#SBATCH -N1 --mem=100 --output={log}\n"
        "srun true || echo 'srun alone fails'\n"
        f"source {until_done}\nsrun env | grep ONLY_HERE && echo srun works\n"
    )
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "50")
    monkeypatch.setenv("ONLY_HERE", "1")
    done = subprocess.run(["sbatch", "--parsable", script], capture_output=True, text=True)
    job = done.stdout.strip()
    cluster.wait_job(job, 30)
    said = log.read_text()
    assert "srun alone fails" in said, "the test has lost its point"
    assert "srun works" in said, said

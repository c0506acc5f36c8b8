"""The sbatch files of examples/slurm train, once the lines that a site must change are changed."""

import re
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]
FOLDER = Path(__file__).parents[2] / "examples" / "slurm"
HERE = {
    "--partition": "main", "--nodes": "2", "--ntasks-per-node": "1", "--cpus-per-task": "1",
    "--time": "10",
}  # fmt: skip
NOT_HERE = ("--account", "--gpus-per-node", "--mem", "module load", "source .venv", "NCCL_SOCKET")


def short(config):
    """Two tasks of three steps."""
    config["stream"] = [dict(entry, steps=3) for entry in config["stream"][:2]]


def changed_for_this_site(text, ranks_per_node):
    """Change the lines with SITE in them, and no other."""
    lines = []
    for line in text.splitlines():
        if "# SITE:" in line:
            if any(word in line for word in NOT_HERE):
                continue
            option = re.match(r"#SBATCH (--[a-z-]+)=", line)
            if option:
                values = {**HERE, "--ntasks-per-node": str(ranks_per_node)}
                line = f"#SBATCH {option[1]}={values[option[1]]}"
            else:
                line = re.sub(r"^ranks_per_node=8", f"ranks_per_node={ranks_per_node}", line)
        lines.append(line)
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "name",
    [
        "pretrain",
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in ("one_node", "torchrun", "deepspeed")
        ),
    ],
)
def test_an_example_trains(slurm_run, alone, name):
    tiny, cluster = slurm_run.tiny, slurm_run.cluster
    text = (FOLDER / f"{name}.sbatch").read_text()
    script = tiny.folder / f"{name}.sbatch"
    script.write_text(changed_for_this_site(text, 2 if name == "one_node" else 1))
    log = tiny.folder / "run" / "slurm" / "by_hand" / "job.log"
    log.parent.mkdir(parents=True)
    path = f"PATH={Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin"
    cpus = f"--export=ALL,DS_ACCELERATOR=cpu,OMP_NUM_THREADS=1,{path}"
    arguments = (str(tiny.write("run", short)), str(tiny.folder / "run"))
    command = ("sbatch", "--parsable", f"--output={log}", cpus)
    job = cluster.run(*command, script, *arguments).strip()
    assert cluster.wait_job(job, 200)["JobState"] == "COMPLETED"
    assert tiny.results("run") == alone(short)
    assert "requeue.py: end: done at step 6" in log.read_text()

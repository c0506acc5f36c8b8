"""examples/slurm/until_done.sh where Slurm's commands fail, or warn at a bad moment.

Commands that fail by order stand for Slurm's; what decides is the real tools/requeue.py. What goes
well is tested on a real Slurm in tests/slurm.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOB = """\
CODE={code}
OUTPUT_DIR={folder}/run
ARGUMENTS=()
RANKS=2
PYTHON=({python})
set -euo pipefail
source {root}/examples/slurm/until_done.sh
train_until_done bash {folder}/train
"""
# The program of the frozen code: a dry run that takes a moment, and is not refused.
PROGRAM = "import time; open('loading', 'w').close(); time.sleep({seconds})\n"


class Job:
    """A job script in a folder of its own, and the commands that it finds."""

    def __init__(self, folder):
        self.folder = folder
        self.code = folder / "code"
        self.code.mkdir()
        (self.code / "tools").mkdir()
        tool = f"import runpy; runpy.run_path('{ROOT}/tools/requeue.py', run_name='__main__')\n"
        (self.code / "tools" / "requeue.py").write_text(tool)
        self.loading(0)
        (folder / "bin").mkdir()
        known = 'case "$1" in show) echo " Restarts=0 ExcNodeList=(null) ";; *) exit 0;; esac'
        commands = {"scontrol": known, "squeue": "echo 7.0", "scancel": "", "srun": ""}
        for name, does in commands.items():
            self.command(name, does)
        self.command("sleep", 'exec /bin/sleep "$(awk "BEGIN { print $1 / 50 }")"')
        self.train("exit 1")

    def loading(self, seconds):
        (self.code / "pretrain_llama_mer.py").write_text(PROGRAM.format(seconds=seconds))

    def command(self, name, does):
        path = self.folder / "bin" / name
        noted = f'echo "{name} $*" >>{self.folder}/called'
        path.write_text(f"#!/bin/bash\n{noted if name != 'sleep' else ''}\n{does}\n")
        path.chmod(0o755)

    def train(self, text):
        (self.folder / "train").write_text(text + "\n")

    def begin(self, **env):
        script = self.folder / "job.sh"
        names = {"code": self.code, "folder": self.folder, "root": ROOT, "python": sys.executable}
        script.write_text(JOB.format(**names))
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "1"}
        self.process = subprocess.Popen(
            ["bash", script],
            cwd=self.folder,
            env={**os.environ, **slurm, "PATH": f"{self.folder}/bin:{os.environ['PATH']}", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def warn_at(self, file, number=signal.SIGUSR1):
        end = time.monotonic() + 30
        while not (self.folder / file).exists():
            assert time.monotonic() < end, f"no {file}"
            time.sleep(0.02)
        self.process.send_signal(number)

    def end(self):
        """Exit code, what was printed, and which commands were called."""
        said = self.process.communicate(timeout=60)[0]
        path = self.folder / "called"
        return self.process.returncode, said, path.read_text() if path.exists() else ""


@pytest.fixture
def job(tmp_path):
    job = Job(tmp_path)
    yield job
    job.process.kill()


TRAIN_UNTIL_ASKED = "touch training; until [ -e asked ]; do /bin/sleep 0.05; done; exit 4"


def test_a_warning_that_cannot_be_handed_on_is_handed_on_later(job):
    job.train(TRAIN_UNTIL_ASKED)
    job.command("scancel", "[ -e tried ] && touch asked; touch tried; [ -e asked ]")
    job.begin()
    job.warn_at("training")
    code, said, called = job.end()
    assert code == 0, said
    assert "could not be handed on" in said
    assert "the ranks are asked for a checkpoint" in said
    assert "scontrol requeue 7" in called


def test_a_warning_waits_for_the_step(job):
    job.train(TRAIN_UNTIL_ASKED)
    job.command("squeue", "[ -e looked ] && echo 7.0 || { touch looked; echo 7.batch; }")
    job.command("scancel", "[ -e looked ] && touch asked")
    job.begin()
    job.warn_at("training")
    code, said, called = job.end()
    assert code == 0, said
    assert called.count("squeue") >= 2
    assert said.count("the ranks are asked for a checkpoint") == 1


def test_a_warning_before_the_ranks_starts_none(job):
    job.loading(1)
    job.train("touch training")
    job.begin()
    job.warn_at("loading")
    code, said, called = job.end()
    assert code == 0, said
    assert "no rank is started" in said
    assert "asked for a checkpoint" not in said
    assert not (job.folder / "training").exists()
    assert "requeue: warned before any rank was started; 1 of 30" in said
    assert "scontrol requeue 7" in called


def test_a_requeue_is_tried_ten_times(job):
    job.command("scontrol", 'case "$1" in show) echo " Restarts=0 ";; *) exit 1;; esac')
    job.begin()
    code, said, called = job.end()
    assert code == 1
    assert "Slurm refuses to requeue: submit again, or use --chain" in said
    assert called.count("scontrol requeue") == 10


def test_a_node_that_does_not_see_the_code_is_left_out(job):
    job.command(
        "scontrol",
        'case "$*" in *hostnames*) echo n1; echo n2;; *show*) echo " Restarts=0 ExcNodeList=n9 ";; '
        "*) exit 0;; esac",
    )
    job.command("srun", "echo n1; exit 1")
    job.train("touch training")
    job.begin(SLURM_JOB_NUM_NODES="2")
    code, said, called = job.end()
    assert code == 0, said
    assert not (job.folder / "training").exists()
    assert "no rank is started: n2 cannot read" in said
    assert "left out from now on: n2" in said
    assert "scontrol update JobId=7 ExcNodeList=n9,n2" in called
    assert list(json.loads((job.folder / "run" / "bad_nodes.json").read_text())) == ["n2"]


def test_a_check_of_nodes_that_was_ended_names_none(job):
    job.command("scontrol", 'case "$*" in *hostnames*) echo n1; echo n2;; esac')
    job.command("srun", "touch checking; /bin/sleep 1; echo n1; exit 1")
    job.train("touch training")
    job.begin(SLURM_JOB_NUM_NODES="2")
    job.warn_at("checking", signal.SIGTERM)
    code, said, _ = job.end()
    assert code == 143, said
    assert not (job.folder / "training").exists()
    assert not (job.folder / "run" / "bad_nodes.json").exists()


def test_nodes_that_cannot_be_asked_are_taken_as_they_are(job):
    job.command("srun", "exit 1")
    job.train("touch training")
    job.begin(SLURM_JOB_NUM_NODES="2")
    _, said, _ = job.end()
    assert "nodes could not be checked" in said
    assert (job.folder / "training").exists()


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"SLURM_MEM_PER_NODE": "1"}, {"SLURM_MEM_PER_NODE=1"}),
        ({"SLURM_MEM_PER_NODE": "1", "SLURM_MEM_PER_CPU": "2"}, set()),
        ({"SLURM_CPU_BIND": "x", "SLURM_CPU_BIND_TYPE": "y"}, set()),
    ],
)
def test_options_of_the_shell_that_submitted_do_not_reach_srun(job, given, left):
    job.train("env >seen")
    job.begin(SLURM_EXPORT_ENV="NONE", **given)
    job.end()
    seen = (job.folder / "seen").read_text().splitlines()
    assert "SLURM_EXPORT_ENV=ALL" in seen
    assert {line for line in seen if line.startswith(("SLURM_MEM", "SLURM_CPU_BIND"))} == left

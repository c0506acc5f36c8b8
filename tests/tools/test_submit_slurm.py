"""tools/submit_slurm.py: the sbatch file, what it refuses, and the run that it freezes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mer.config import load_config

TOOL = Path(__file__).parents[2] / "tools" / "submit_slurm.py"
GOLDEN = Path(__file__).parent / "golden"
CPUS = ("--cpus-per-task", "1")
NEEDED = ("--nodes", "2", "--gpus-per-node", "4", "--time", "24:00:00")
WARNING = (
    "warning: --cpus-per-task is not given; without it many clusters give each rank one core: "
    "cores of a node / GPUs of a node\n"
)
CASES = {
    "srun": (
        "--partition", "gpu", "--account", "team", "--qos", "long", "--cpus-per-task", "8",
        "--mem", "0", "--exclude", "n[3-4]", "--accept", "mix,replay",
        "--sbatch", "gres=gpu:4", "--sbatch=--mail-user=me@here",
    ),
    "torchrun": ("--launcher", "torchrun", "--cpus-per-task", "8", "--chain", "3"),
    "deepspeed": ("--launcher", "deepspeed", "--launch.max_restarts_without_step", "1"),
    "cpu": ("--gpus-per-node", "0", "--tasks-per-node", "2", "--time", "1"),
}  # fmt: skip


def call(folder, *arguments, path=""):
    """Start the tool in a folder; returns exit code, output and errors."""
    done = subprocess.run(
        [sys.executable, TOOL, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PATH": f"{path}{os.environ['PATH']}"},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_prints_the_sbatch_file_and_leaves_nothing(tiny, name):
    config = tiny.write("run")
    code, said, errors = call(
        tiny.folder, "--config", str(config), *NEEDED, *CASES[name], "--dry-run"
    )
    assert code == 0
    assert errors == (WARNING if name == "deepspeed" else "")
    said = said.replace(str(tiny.folder), "/home/me/work")
    said = said.replace(str(Path(sys.executable).parent), "/home/me/.venv/bin")
    golden = GOLDEN / f"submit_{name}.sbatch"
    if "GOLDEN" in os.environ:  # GOLDEN=write makes the files anew; look at what git then shows
        golden.write_text(said)
    assert said == golden.read_text()
    assert not (tiny.folder / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--parallel.pp_size", "3"), "parallel: tp_size 1 x pp_size 3 = 3 ranks a replica"),
        (("--batch.global_batch_size", "12"), "batch.global_batch_size"),
        (("--optimizer.lrr", "1"), "optimizer.lrr"),
        (("--time", "soon"), "--time: given 'soon'; allowed: minutes"),
        (("--time", "0"), "--time: given '0'"),
        (("--nodes", "0"), "--nodes: given 0; allowed: at least 1"),
        (("--chain", "0"), "--chain: given 0"),
        (("--gpus-per-node", "0"), "--tasks-per-node: missing; allowed: at least 1"),
        (("--tasks-per-node", "2"), "--tasks-per-node: given 2, but --gpus-per-node 4"),
        (("--cpus-per-task", "0"), "--cpus-per-task: given 0"),
        (("--sbatch", "time=1"), "--sbatch: given 'time=1', which this tool writes"),
        (("--sbatch", "--"), "--sbatch: "),
        (("--sbatch", "=x"), "--sbatch: given '=x'; allowed: NAME or NAME=VALUE"),
        (("--partitoin", "gpu"), "--partitoin: no such option; did you mean --partition?"),
        (("--fresh",), "--fresh: given, but each restart of the job would begin anew"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_written(tiny, options, said):
    code, _, errors = call(
        tiny.folder, "--config", str(tiny.write("run")), *NEEDED, *options, path="/nowhere:"
    )
    assert code == 2
    assert said in errors
    assert not (tiny.folder / "run").exists()


def fake_sbatch(folder, lines, squeue=""):
    """Commands that stand for a controller that takes or refuses jobs; sbatch notes what it got."""
    (folder / "bin").mkdir(exist_ok=True)
    noted = f'echo "$@" >>{folder}/asked; env >{folder}/env\n{lines}'
    for name, does in (("sbatch", noted), ("squeue", squeue)):
        path = folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{does}\n")
        path.chmod(0o755)
    return f"{folder}/bin:"


def test_a_submitted_run_is_frozen(tiny):
    path = fake_sbatch(tiny.folder, f"wc -l <{tiny.folder}/asked")
    config = tiny.write("run")
    options = (*NEEDED, *CPUS, "--chain", "3", "--optimizer.lr", "0.5")
    code, said, errors = call(tiny.folder, "--config", str(config), *options, path=path)
    assert (code, errors) == (0, "")
    (folder,) = (tiny.folder / "run" / "slurm").iterdir()
    asked = (tiny.folder / "asked").read_text().splitlines()
    assert [line.split()[1:-1] for line in asked] == [
        [], ["--dependency=afterany:1"], ["--dependency=afterany:2"],
    ]  # fmt: skip
    assert (folder / "jobs.txt").read_text() == "1\n2\n3\n"
    assert load_config(folder / "config.yaml").optimizer.lr == 0.5
    assert "torch==" in (folder / "packages.txt").read_text()
    assert json.loads((folder / "environment.json").read_text())["python"] == sys.executable
    assert "3 jobs in a chain, 1 to 3: 8 ranks on 2 nodes" in said
    assert f"python tools/watch.py {tiny.folder}/run" in said


def test_the_frozen_code_runs_without_the_checkout(tiny):
    path = fake_sbatch(tiny.folder, "echo 1")
    config = tiny.write("run")
    assert call(tiny.folder, "--config", str(config), *NEEDED, path=path)[0] == 0
    (folder,) = (tiny.folder / "run" / "slurm").iterdir()
    where = "import megatron_mer; print(megatron_mer.__file__)"
    program = f"import runpy; runpy.run_path('{folder}/code/tools/requeue.py'); {where}"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd="/", capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == f"{folder}/code/megatron_mer/__init__.py", done.stderr


def test_what_slurm_refuses_is_passed_on(tiny):
    path = fake_sbatch(tiny.folder, "echo 'invalid partition specified: gpu' >&2; exit 1")
    code, _, errors = call(tiny.folder, "--config", str(tiny.write("run")), *NEEDED, path=path)
    assert code == 2
    assert "invalid partition specified: gpu" in errors
    assert not (tiny.folder / "run").exists(), "a submission that is refused leaves nothing behind"


def test_a_run_that_a_job_still_has_is_not_submitted_again(tiny):
    known = 'case "$*" in *%r*) echo Resources;; *) echo 7;; esac'
    path = fake_sbatch(tiny.folder, "echo 7", known)
    arguments = ("--config", str(tiny.write("run")), *NEEDED, *CPUS, "--nodes", "1", "--time", "60")
    code, said, errors = call(tiny.folder, *arguments, path=path)
    assert (code, errors) == (0, "")
    assert "submitted job 7: 4 ranks on 1 node, 60 minutes\n" in said
    assert said.endswith("it waits: Resources (squeue's reason)\n")
    code, _, errors = call(tiny.folder, *arguments, path=path)
    assert code == 2
    assert "which jobs of Slurm have that are not over: 7" in errors
    assert "scancel 7" in errors
    assert len(list((tiny.folder / "run" / "slurm").iterdir())) == 1
    # Once it is over squeue knows it no more.
    assert call(tiny.folder, *arguments, path=fake_sbatch(tiny.folder, "echo 8"))[0] == 0


def test_options_of_the_shell_that_submits_are_not_handed_on(tiny, monkeypatch):
    for name in ("SBATCH_EXPORT", "SLURM_EXPORT_ENV", "SLURM_CPU_BIND_TYPE", "SLURM_MEM_PER_CPU"):
        monkeypatch.setenv(name, "NONE")
    monkeypatch.setenv("SBATCH_ACCOUNT", "team")
    path = fake_sbatch(tiny.folder, "echo 1")
    assert call(tiny.folder, "--config", str(tiny.write("run")), *NEEDED, path=path)[0] == 0
    env = (tiny.folder / "env").read_text()
    assert "=NONE" not in env
    assert "SBATCH_ACCOUNT=team" in env

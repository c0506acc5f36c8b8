"""A copy of the project, in which an example can leave what it makes."""

import os
import shutil
import subprocess
import sys

import pytest

PARTS = ("data_preprocessing", "examples", "megatron_mer", "tools", "pretrain_llama_mer.py")


@pytest.fixture
def start(project_root, tmp_path):
    """Run a program of the copy, which is `tmp_path`; return what it printed."""
    for part in PARTS:
        copy = shutil.copytree if (project_root / part).is_dir() else shutil.copy
        copy(project_root / part, tmp_path / part)

    def run(program):
        done = subprocess.run(
            [sys.executable, str(tmp_path / program)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=1200,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run

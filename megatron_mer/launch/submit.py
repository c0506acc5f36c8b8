"""Talks with Slurm about jobs: hands them in, asks what has become of them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Final

from megatron_mer.errors import LaunchError, Problem

JOBS_FILE: Final = "jobs.txt"
"""Beside the sbatch file: ids, one a line. Jobs look here for those that follow."""
_SECONDS: Final = 120
# Of the job or the shell that submits; sbatch, or srun in the job, would take them for options.
_NOT_HANDED_ON: Final = re.compile(
    r"SBATCH_EXPORT|SLURM_EXPORT_ENV|SLURM_CPU_BIND.*|SLURM_MEM_PER_.*"
)


def submit(script: Path, jobs: int) -> list[str]:
    """Submit jobs, each to begin when the one before has ended; returns their ids.

    Raises:
        LaunchError: sbatch is not there, or refuses.
    """
    ids: list[str] = []
    for _ in range(jobs):
        after = [f"--dependency=afterany:{ids[-1]}"] if ids else []
        command = ["sbatch", "--parsable", *after, str(script)]
        try:
            done = _run(command)
        except FileNotFoundError as error:
            given = (
                "there is no such command; submit from a machine of the cluster, or see --dry-run"
            )
            raise LaunchError([Problem("sbatch", given)]) from error
        if done.returncode != 0:
            submitted = f" (submitted before it: {', '.join(ids)})" if ids else ""
            given = f"refused `{shlex.join(command)}`: {done.stderr.strip()}{submitted}"
            raise LaunchError([Problem("sbatch", given, remedy="change what it names")])
        ids.append(done.stdout.strip().partition(";")[0])
        (script.parent / JOBS_FILE).write_text("\n".join(ids) + "\n", encoding="utf-8")
    return ids


def known_jobs(folder: Path) -> list[str]:
    """Jobs of a run's newest submission that wait or run; none where Slurm does not answer.

    Args:
        folder: holds a folder a submission.
    """
    files = sorted(folder.glob(f"*/{JOBS_FILE}"), key=lambda path: path.stat().st_mtime)
    ids = files[-1].read_text(encoding="utf-8").split() if files else []
    known = (_squeue(one, "%A").strip() for one in ids)
    return [one for one in known if one]


def pending_reason(job: str) -> str:
    """Why a job waits, as squeue says it; empty where it does not, or nothing is known."""
    reason = _squeue(job, "%r").strip()
    return "" if reason == "None" else reason


def _squeue(job: str, what: str) -> str:
    try:
        return _run(["squeue", "--noheader", "--jobs", job, "--format", what]).stdout
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    kept = {name: text for name, text in os.environ.items() if not _NOT_HANDED_ON.fullmatch(name)}
    return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, env=kept)

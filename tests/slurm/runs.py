"""Tiny runs as jobs of a virtual cluster, submitted as a user does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.slurm.cluster import SlurmCluster
from tests.tiny_run import TinyRun

TOOL = Path(__file__).parents[2] / "tools" / "submit_slurm.py"

# Python imports it first in every process of a job.
DISK = """\
import os, pathlib, time
plain = pathlib.Path.open
def slow(self, *mode, **options):
    if self.name == "metrics.jsonl" and mode[:1] == ("a",):
        time.sleep(float(os.environ["DISK_SECONDS"]))
        if "DISK_BREAKS" in os.environ:
            raise RuntimeError("the disk is broken")
    return plain(self, *mode, **options)
pathlib.Path.open = slow
"""


class SlurmRun:
    """Submits tiny runs by tools/submit_slurm.py.

    Args:
        cluster: where to.
        tiny: writes the configurations and reads what runs leave.
    """

    def __init__(self, cluster: SlurmCluster, tiny: TinyRun) -> None:
        self.cluster = cluster
        self.tiny = tiny
        self._disk = tiny.folder / "disk"
        self._disk.mkdir()
        (self._disk / "sitecustomize.py").write_text(DISK)

    def submit(
        self,
        config: Path,
        *options: str,
        nodes: int = 2,
        disk_seconds: float = 0.0,
        disk_breaks: bool = False,
    ) -> list[str]:
        """Submit a run with one rank a node; returns the ids of its jobs.

        Args:
            options: further ones of the tool.
            disk_seconds: how long a line of metrics.jsonl takes, so that a run lasts long enough
                for something to happen to it.
            disk_breaks: each start fails when it writes its first line.
        """
        env = {**self.cluster.env, "PYTHONPATH": str(self._disk), "DISK_SECONDS": str(disk_seconds)}
        if disk_breaks:
            env["DISK_BREAKS"] = "1"
        resources = ("--nodes", str(nodes), "--gpus-per-node", "0", "--tasks-per-node", "1")
        time = () if "--time" in options else ("--time", "10")
        done = subprocess.run(
            [sys.executable, TOOL, "--config", config, *resources, *time, *options],
            env=env,
            cwd=self.tiny.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return (self.folder(config.stem) / "jobs.txt").read_text().split()

    def folder(self, name: str) -> Path:
        """The newest submission of a run."""
        return max((self.tiny.folder / name / "slurm").iterdir())

    def log(self, name: str) -> str:
        """What the jobs of a run's newest submission printed."""
        path = self.folder(name) / "job.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def status(self, name: str) -> dict[str, Any]:
        """A run's status.json; empty while there is none."""
        path = self.tiny.folder / name / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def lost(self, name: str) -> list[str]:
        """Lines of steps that a run did twice."""
        path = self.tiny.folder / name / "metrics.lost.jsonl"
        return path.read_text().splitlines() if path.exists() else []

    def until_step(self, name: str, step: int, seconds: float = 120) -> None:
        """Wait until a run has done so many steps."""
        metrics = self.tiny.folder / name / "metrics.jsonl"

        def reached() -> bool:
            return metrics.exists() and metrics.read_text().count("\n") >= step

        self.cluster.until(reached, seconds, f"step {step} of {name}")

    def until_saved(self, name: str, step: int, seconds: float = 150) -> None:
        """Wait until a run has a checkpoint of at least this step."""
        what = f"a checkpoint of step {step} of {name}"
        self.cluster.until(lambda: self.status(name).get("step", 0) >= step, seconds, what)

    def kill_rank(self, name: str, rank: int) -> None:
        """SIGKILL to one rank's process, on whichever node it is."""
        config = str(self.folder(name) / "config.yaml").encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes()
                environ = (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ours = Path(command.split(b"\0")[0].decode()).name == "python" and config in command
            if ours and f"SLURM_PROCID={rank}".encode() in environ:
                os.kill(int(process.name), signal.SIGKILL)
                return
        raise AssertionError(f"{name} has no rank {rank}")

    def logs(self) -> str:
        """The ends of the logs of all jobs."""
        parts = []
        for path in sorted(self.tiny.folder.glob("*/slurm/*/job.log")):
            tail = path.read_text(errors="replace").splitlines()[-120:]
            parts += [f"--- {path}", *tail]
        return "\n".join(parts)

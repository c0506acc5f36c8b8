"""The ranks of a run under test: real processes of this node, which are killed in the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import megatron_mer
from megatron_mer.checkpoint.layout import rank_name
from megatron_mer.errors import ConfigError, MegatronMerError, TrainingError
from megatron_mer.launch.environment import free_port

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 5.0  # from the first rank's failure until the others are killed
_SAID_LINES = 15  # of a rank, in an error
_SAID_RANKS = 4
_OTHER_LAUNCHERS = (
    *("SLURM_", "OMPI_", "PMIX_", "PMI_", "MV2_", "TORCHELASTIC_"),
    *("CROSS_RANK", "CROSS_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
)  # beginnings of variables


class Ranks:
    """The ranks of one start. A context: at its end none of them runs any more.

    Args:
        arguments: command line of `check_resume.rank`, without its folder.
        world_size: number of ranks.
        folder: for their output and what they write down; made.
    """

    def __init__(self, arguments: Sequence[str], world_size: int, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._command = [
            *(sys.executable, "-m", "megatron_mer.training.check_resume.rank"),
            *("--records", str(folder), "--parent", str(os.getpid())),
            *arguments,
        ]
        self._world_size = world_size

    def __enter__(self) -> Ranks:
        """Start them."""
        port = free_port()
        try:
            for rank in range(self._world_size):
                with (self._folder / f"{rank_name(rank)}.log").open("wb") as log:
                    self._processes.append(
                        subprocess.Popen(
                            self._command,
                            env=_environment(rank, self._world_size, port),
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            # A group of its own, so that all that a rank started dies with it.
                            start_new_session=True,
                        )
                    )
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Kill what still runs."""
        self.kill()

    def kill(self) -> None:
        """End every rank with SIGKILL."""
        for process in self._processes:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()

    @property
    def held(self) -> bool:
        """Whether every rank waits to be killed."""
        return len(list(self._folder.glob("rank_*.held"))) == self._world_size

    def wait(self, timeout: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the end of all ranks, or for something before it.

        Args:
            timeout: seconds.
            until: asked again and again.

        Returns:
            Whether `until` came true; False: all ranks ended well before.

        Raises:
            ConfigError: the ranks refused the configuration.
            TrainingError: a rank failed, or the time ran out; with what the ranks last said.
        """
        end = time.monotonic() + timeout
        while True:
            codes = [process.poll() for process in self._processes]
            failed = [rank for rank, code in enumerate(codes) if code]
            if failed:
                raise self._failure(failed)
            if until():
                return True
            if None not in codes:
                return False
            if time.monotonic() > end:
                running = [rank for rank, code in enumerate(codes) if code is None]
                text = f"ranks {_listed(running)} still ran after {timeout:g} s (--timeout)"
                raise TrainingError(f"{text}; they last said:\n{self._said(running)}")
            time.sleep(_POLL_SECONDS)

    def _failure(self, failed: Sequence[int]) -> MegatronMerError:
        end = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < end and any(one.poll() is None for one in self._processes):
            time.sleep(_POLL_SECONDS)
        self.kill()
        codes = {rank: self._processes[rank].returncode for rank in failed}
        kind = ConfigError if ConfigError.exit_code in codes.values() else TrainingError
        listed = ", ".join(f"rank {rank} with exit code {code}" for rank, code in codes.items())
        return kind(f"the training program failed: {listed}; it last said:\n{self._said(failed)}")

    def _said(self, ranks: Sequence[int]) -> str:
        parts = []
        for rank in ranks[:_SAID_RANKS]:
            log = self._folder / f"{rank_name(rank)}.log"
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            last = "\n".join(f"    {line}" for line in lines[-_SAID_LINES:]) or "    (nothing)"
            parts.append(f"  rank {rank} ({log}):\n{last}")
        return "\n".join(parts)


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would give a rank on one node, without another launcher's variables."""
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(_OTHER_LAUNCHERS)
    }
    # The package may be used from a folder where it is not installed.
    root = str(Path(megatron_mer.__file__).resolve().parents[1])
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environ.get("PYTHONPATH")]))
    environ["PYTHONSAFEPATH"] = "1"  # Nor does a package in the working directory come first.
    if world_size > 1:
        environ.setdefault("OMP_NUM_THREADS", "1")
    return {
        **environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }

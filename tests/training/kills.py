"""Ranks that end in the middle of something; loaded by path in each rank."""

import os
import signal
import subprocess
from pathlib import Path

import torch


def train(arguments, folder, kill=None):
    """Run the training program as its script does, up to a kill.

    Args:
        arguments: its command line.
        folder: where the ranks of this world leave their process ids.
        kill: None: there is none. Else {"ranks": who ends, and either "seconds": so long after the
            run's directory is taken, wherever the process is then, or "rank", "call", "count",
            "after": this rank is before, or after, its count-th call of one of `places`}. With
            "stands": true this rank itself then stands still until it is told to go on; a "command"
            is run in a shell first.
    """
    from megatron_mer.training import main

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    (Path(folder) / f"{rank}.pid").write_text(str(os.getpid()))
    if kill and "seconds" in kill and rank in kill["ranks"]:
        _end_later(kill["seconds"])
    if kill and kill.get("rank") == rank:
        _end_at(kill, Path(folder))
    code = main.main(arguments)
    if code:
        raise SystemExit(code)


def _end_later(seconds):
    from megatron_mer.training import start

    look = start._agreed_checkpoint

    def timed(*arguments):
        # Without a handler the kernel ends the process at whatever instruction, as SIGKILL does.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        return look(*arguments)

    start._agreed_checkpoint = timed


def places():
    """What a rank can be killed at: where each call is looked up."""
    from megatron_mer.checkpoint import find, load, snapshot, writer
    from megatron_mer.continual.reptile import Reptile
    from megatron_mer.engine.training_engine import TrainingEngine
    from megatron_mer.training import loop, outputs

    return {
        "mkdir": (os, "mkdir"),
        "fsync": (os, "fsync"),
        "rename": (os, "rename"),
        "unlink": (os, "unlink"),
        "rmdir": (os, "rmdir"),
        "status": (outputs.RunDirectory, "write_status"),
        "line": (outputs.RunDirectory, "append_metrics"),
        "evaluate": (loop.Evaluator, "evaluate"),
        "step": (TrainingEngine, "train_step"),
        "reptile": (Reptile, "after_update"),
        "copy": (snapshot.Snapshot, "take"),
        "name": (writer, "commit"),
        "prune": (writer, "prune"),
        "verify": (find, "sha256_of"),
        "load": (load.CheckpointReader, "_read"),
    }


def _end_at(kill, folder):
    left = [kill["count"]]

    def hit():
        left[0] -= 1
        return left[0] == 0

    def end():
        if "command" in kill:
            subprocess.run(kill["command"], shell=True, check=True)
        for other in kill["ranks"]:
            pid = folder / f"{other}.pid"
            if other != kill["rank"] and pid.exists():
                os.kill(int(pid.read_text()), signal.SIGKILL)
        if kill["rank"] in kill["ranks"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if kill.get("stands"):
            os.kill(os.getpid(), signal.SIGSTOP)

    if kill["call"] == "chunk":
        _end_in_a_chunk(hit, end)
        return
    owner, name = places()[kill["call"]]
    real = getattr(owner, name)

    def counted(*arguments, **options):
        now = hit()
        if now and not kill["after"]:
            end()
        result = real(*arguments, **options)
        if now and kill["after"]:
            end()
        return result

    setattr(owner, name, counted)


def _end_in_a_chunk(hit, end):
    """Half of a chunk is in the file, and on its way to the disk."""
    from megatron_mer.checkpoint import files

    class File:
        def __init__(self, *arguments):
            self._file = open(*arguments)  # noqa: SIM115 (closed by __exit__)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self._file.close()

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, chunk):
            if hit():
                self._file.write(chunk[: len(chunk) // 2])
                self._file.flush()
                end()
            return self._file.write(chunk)

    def opened(path, mode, **options):
        return File(path, mode) if mode == "wb" else open(path, mode, **options)

    files.open = opened  # In that module the name hides the builtin.

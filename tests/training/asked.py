"""Ranks of a run that are asked for something in the middle of it; loaded by path in each rank."""

import os
import signal
import time
from pathlib import Path

import torch


def train(arguments, folder, ask=None):
    """Run the training program as its script does, up to a request.

    Args:
        arguments: its command line.
        folder: the run's output directory; each rank leaves its process id beside it,
            and the time of the request.
        ask: None: there is none. Else {"rank": who is asked, "batch": in which, "how": a signal's
            name, SAVE or STOP (the file), job_end (SLURM_JOB_END_TIME comes near), error (the rank
            fails), stand (it stands still) or sleep (its main thread does)}; with "evaluate" in
            place of "batch": in which evaluation; "load": while it loads.
    """
    from megatron_mer.training import main

    torch.set_num_threads(1)
    Path(f"{folder}.{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    if ask and int(os.environ["RANK"]) == ask["rank"]:
        _ask_at(ask, Path(folder))
    code = main.main(arguments)
    if code:
        raise SystemExit(code)


def _ask(how, folder, guard):
    Path(f"{folder}.asked").touch()
    if how in ("SAVE", "STOP"):
        (folder / how).touch()
    elif how == "job_end":
        guard.requests.job_end = time.time() + 0.5 * guard.pace.seconds_needed
    elif how == "error":
        raise ValueError("this rank has a reason of its own")
    elif how == "stand":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "sleep":
        time.sleep(3600)
    else:
        # Twice: the second one must not hurt.
        for _ in range(2):
            os.kill(os.getpid(), getattr(signal, how))


def _ask_at(ask, folder):
    from megatron_mer.engine.training_engine import TrainingEngine
    from megatron_mer.training import start
    from megatron_mer.training.evaluation import Evaluator
    from megatron_mer.training.loop import Trainer

    guards = []
    make = start.Guard

    def kept(*arguments):
        guards.append(make(*arguments))
        return guards[0]

    start.Guard = kept
    owner, name, left = {
        "batch": (TrainingEngine, "train_step", ask.get("batch")),
        "evaluate": (Evaluator, "evaluate", ask.get("evaluate")),
        "load": (Trainer, "__init__", 0),
    }[next(key for key in ("batch", "evaluate", "load") if key in ask)]
    real, calls = getattr(owner, name), []

    def asked(self, *arguments, **options):
        calls.append(None)
        if len(calls) == left + 1:
            _ask(ask["how"], folder, guards[0])
        return real(self, *arguments, **options)

    setattr(owner, name, asked)

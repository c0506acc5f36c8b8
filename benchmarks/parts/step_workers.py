"""Programs of `step_programs.py` that take turns, each in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.parts.measure import ROOT, Sample
from benchmarks.parts.step_case import Case
from megatron_mer.testing.ranks import free_port

PROGRAM = Path(__file__).with_name("step_programs.py")


class WorkerFailed(RuntimeError):
    """A program ended; holds the last lines that it printed."""


class Worker:
    """One program on one rank or several, which waits until it is asked for a step.

    Args:
        case: what it trains.
        ranks: processes.
        log: file for what it prints.
    """

    def __init__(self, case: Case, ranks: int, log: Path) -> None:
        self.case = case
        self._log = log
        port = free_port()
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        environ["OMP_NUM_THREADS"] = str(max(1, case.threads // ranks))
        command = [sys.executable, str(PROGRAM), json.dumps(asdict(case))]
        self._processes = []
        with log.open("ab") as output:
            for rank in range(ranks):
                if ranks > 1:
                    environ |= {
                        "RANK": str(rank),
                        "LOCAL_RANK": str(rank),
                        "WORLD_SIZE": str(ranks),
                        "LOCAL_WORLD_SIZE": str(ranks),
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port),
                    }
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": output}
                self._processes.append(subprocess.Popen(command, env=environ, text=True, **pipes))  # type: ignore[call-overload]
        self.parameters = sum(int(one["parameters"]) for one in self._answers())

    def ask(self, command: str) -> list[dict[str, Any]]:
        """Each rank's answer to a command.

        Raises:
            WorkerFailed: a rank has ended.
        """
        for process in self._processes:
            try:
                process.stdin.write(command + "\n")
                process.stdin.flush()
            except BrokenPipeError as error:
                raise WorkerFailed(self._last_words()) from error
        return self._answers()

    def _answers(self) -> list[dict[str, Any]]:
        lines = [process.stdout.readline() for process in self._processes]
        if not all(lines):
            self.close()
            raise WorkerFailed(self._last_words())
        return [json.loads(line) for line in lines]

    def _last_words(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-12:])

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __enter__(self) -> Worker:
        """Return the worker."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes."""
        self.close()


@dataclass
class Turns:
    """What each program's steps took, in turns."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of processor time, all ranks: what other processes disturb least."""
    peak_gib: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    """Seconds of the first step, which compiles."""
    loss: dict[str, float] = field(default_factory=dict)
    """Of the last step."""

    def sample(self, name: str) -> Sample:
        """Seconds a step."""
        return Sample(tuple(self.seconds[name]))

    def ratio(self, name: str, other: str) -> Sample:
        """Speed of one by another's, turn by turn: above 1 it is faster."""
        pairs = zip(self.seconds[name], self.seconds[other], strict=True)
        return Sample(tuple(theirs / own for own, theirs in pairs))


def take_turns(
    cases: Mapping[str, tuple[Case, int]], repetitions: int, log: Path, warm_up: int = 2
) -> Turns:
    """Let programs take turns (a, b, a, b, ...) so that what disturbs one disturbs all.

    Args:
        cases: name -> (what it trains, ranks).
        repetitions: steps of each that count.
        log: file for what they print.
        warm_up: steps before those.
    """
    found = Turns()
    with ExitStack() as stack:
        workers = {}
        for name, (case, ranks) in cases.items():
            workers[name] = stack.enter_context(Worker(case, ranks, log))
            found.seconds[name], found.cpu[name] = [], []
            found.parameters[name] = workers[name].parameters
        for turn in range(warm_up + repetitions):
            for name, worker in workers.items():
                said = worker.ask("step")
                seconds = max(one["seconds"] for one in said)
                if turn == 0:
                    found.first[name] = seconds
                if turn >= warm_up:
                    found.seconds[name].append(seconds)
                    found.cpu[name].append(sum(one["cpu"] for one in said))
                found.peak_gib[name] = sum(one["peak_gib"] for one in said)
                found.loss[name] = said[0]["loss"]
    return found


def ask_once(case: Case, ranks: int, command: str, log: Path) -> Sequence[Mapping[str, Any]]:
    """A command's answers from a program that took two steps before."""
    with Worker(case, ranks, log) as worker:
        for _ in range(2):
            worker.ask("step")
        return worker.ask(command)

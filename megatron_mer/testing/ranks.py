"""Run a function on several ranks of one machine, for tests.

Importing torch and DeepSpeed costs seconds a process, so ranks are forked from one warm server (the
standard library's ``forkserver``) that imported them once. Never for CUDA, which does not survive a
fork.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WARM_MODULES = ("megatron_mer.testing.warm",)


class WorldError(AssertionError):
    """A rank failed or hung; the message holds what every failed rank printed."""


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_main(
    source: str,
    function: str,
    arguments: Mapping[str, Any],
    environ: Mapping[str, str],
    folder: str,
) -> None:
    rank = environ["RANK"]
    log = open(f"{folder}/rank_{rank}.log", "w", buffering=1)  # noqa: SIM115 (lives as long as the rank)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.register(signal.SIGQUIT, file=log, all_threads=True)
    os.environ.update(environ)
    try:
        spec = importlib.util.spec_from_file_location(Path(source).stem, source)
        if spec is None or spec.loader is None:
            raise ImportError(f"{source}: not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        result = getattr(module, function)(**arguments)
        Path(f"{folder}/rank_{rank}.json").write_text(json.dumps(result))
    except SystemExit as stop:
        # Ending by an exit code is a result too: programs under test do.
        log.flush()
        os._exit(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    except BaseException:  # noqa: BLE001 (whatever it is, the parent shows it)
        traceback.print_exc(file=log)
        log.flush()
        os._exit(1)
    log.flush()
    os._exit(0)


def _rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "CROSS_RANK": "0",
        "CROSS_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }


def _report(folder: Path, ranks: Sequence[int], reason: str) -> str:
    parts = [reason]
    for rank in ranks:
        path = folder / f"rank_{rank}.log"
        text = path.read_text(errors="replace") if path.exists() else "(no output)"
        parts.append(f"--- rank {rank} ---\n{text[-6000:]}")
    return "\n".join(parts)


def run_world(
    source: str | Path,
    function: str,
    world_size: int,
    arguments: Mapping[str, Any] | None = None,
    timeout: float = 120.0,
    environ: Mapping[str, str] | None = None,
    expect_failure: bool = False,
    grace: float = 3.0,
) -> list[Any]:
    """Call ``function(**arguments)`` of the file ``source`` on ``world_size`` ranks.

    The file is loaded by path in each rank, so it need not be importable. Results travel as JSON.

    Args:
        source: path of a Python file.
        function: name of a function in it.
        world_size: number of ranks, each a process of its own with the variables of a launcher.
        arguments: keyword arguments, picklable.
        timeout: seconds after which every rank prints its stacks and is killed.
        environ: variables added to every rank's.
        expect_failure: return (exit code, output) of each rank instead of raising when ranks fail
            (a rank that is left waiting for a failed one is killed and counts as -9).
        grace: seconds that the others have to end once one has failed.

    Returns:
        Each rank's result, by rank; or (exit code, output) with ``expect_failure``.

    Raises:
        WorldError: a rank failed or the time ran out.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(WARM_MODULES))
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="world_") as name:
        folder = Path(name)
        call = (str(source), function, dict(arguments or {}))
        environs = [
            {**_rank_environment(rank, world_size, port), **(environ or {})}
            for rank in range(world_size)
        ]
        processes = [
            context.Process(target=_rank_main, args=(*call, environ, name)) for environ in environs
        ]
        for process in processes:
            process.start()
        codes = _wait(processes, folder, timeout, grace)
        if expect_failure:
            logs = [folder / f"rank_{rank}.log" for rank in range(world_size)]
            return [(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]
        failed = [rank for rank, code in enumerate(codes) if code != 0]
        if failed:
            first = [rank for rank in failed if codes[rank] != -signal.SIGKILL] or failed
            raise WorldError(_report(folder, first, f"ranks {failed} failed, exit codes {codes}"))
        return [
            json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(world_size)
        ]


def _wait(processes: Sequence[Any], folder: Path, timeout: float, grace: float) -> list[int]:
    """Wait for all; a failed rank ends the others after a moment, as a launcher would."""
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        if any(process.exitcode not in (None, 0) for process in processes):
            deadline = min(deadline, time.monotonic() + grace)
        if time.monotonic() > deadline:
            alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
            hung = all(process.exitcode in (None, 0) for process in processes)
            if hung:
                for rank in alive:
                    os.kill(processes[rank].pid, signal.SIGQUIT)
                time.sleep(1.0)
            for rank in alive:
                processes[rank].kill()
                processes[rank].join()
            if hung:
                raise WorldError(
                    _report(folder, alive, f"ranks {alive} still ran after {timeout} s")
                )
            break
        time.sleep(0.02)
    return [int(process.exitcode) for process in processes]

"""The ranks meet before any collective: contradictions are named, and who does not come."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from megatron_mer.errors import LaunchError, Problem

_POLL_SECONDS = 0.05
_SECONDS_TO_READ = 5.0
"""How long rank 0, which keeps the store, waits until all have read that the start is refused."""
_LISTED = 8


def meet(limit: timedelta, problem: str | None = None) -> Store:
    """Join the other ranks at MASTER_ADDR:MASTER_PORT. Returns when all are there and agree.

    Args:
        limit: how long to wait for them.
        problem: what keeps this rank from running, for all to hear.

    Returns:
        What the ranks share by name from now on.

    Raises:
        LaunchError: on every rank that is there; some did not come, contradict the others or have a
            problem, or this rank does not reach the address.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _open_store(rank, limit)
    number = store.add("came", 1)
    record = {
        "rank": rank,
        "world_size": world_size,
        "host": platform.node(),
        "pid": os.getpid(),
        "problem": problem,
    }
    store.set(f"guest/{number}", json.dumps(record))
    try:
        if rank == 0:
            verdict = _judge(store, world_size, limit)
            store.set("verdict", verdict)
        else:
            store.wait(["verdict"], limit + timedelta(seconds=_SECONDS_TO_READ))
            verdict = store.get("verdict").decode()
    except (dist.DistError, RuntimeError) as error:
        raise _unreachable(f"rank 0 did not answer any more: {_first_line(error)}") from error
    if verdict:
        # Whoever keeps the store may be gone already.
        with contextlib.suppress(dist.DistError, RuntimeError):
            store.add("left", 1)
            if rank == 0:
                _wait_for_readers(store)
        raise LaunchError(verdict)
    return store


def _open_store(rank: int, limit: timedelta) -> Store:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        given = f"given {address!r}, which names no host here ({platform.node()}): {error}"
        remedy = "set it to a name or address of rank 0's host that every node knows"
        raise LaunchError([Problem("MASTER_ADDR", given, remedy=remedy)]) from error
    # torchrun's own process keeps the store, through all restarts.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            address,
            port,
            is_master=rank == 0 and not agent,
            timeout=limit,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (dist.DistError, RuntimeError) as error:
        if "EADDRINUSE" in str(error):
            given = f"given {port}, which another program on {platform.node()} has"
            remedy = "set another, for all ranks alike, or end that program"
            raise LaunchError([Problem("MASTER_PORT", given, remedy=remedy)]) from error
        raise _unreachable(_first_line(error)) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"megatron_mer/{attempt}", store)


def _unreachable(reason: str) -> LaunchError:
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return LaunchError(
        f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} could not join the "
        f"run at MASTER_ADDR:MASTER_PORT = {address}: {reason}. Every rank must reach that "
        "address, and no other run may use the port"
    )


def _judge(store: Store, world_size: int, limit: timedelta) -> str:
    """Rank 0 waits for all and looks at each; what is wrong, or nothing."""
    guests: list[Mapping[str, Any]] = []
    end = time.monotonic() + limit.total_seconds()
    while True:
        for number in range(len(guests) + 1, store.add("came", 0) + 1):
            guests.append(json.loads(store.get(f"guest/{number}")))
        if wrong := _contradictions(guests, world_size):
            return "\n".join(wrong)
        if len(guests) == world_size:
            return ""
        if time.monotonic() > end:
            return _missing(guests, world_size, limit)
        time.sleep(_POLL_SECONDS)


def _contradictions(guests: list[Mapping[str, Any]], world_size: int) -> list[str]:
    wrong, seen = [], dict[int, str]()
    for guest in guests:
        rank, who = int(guest["rank"]), f"host {guest['host']}, process {guest['pid']}"
        if guest["world_size"] != world_size:
            given = f"rank {rank} ({who}) has {guest['world_size']}, rank 0 has {world_size}"
            remedy = "start all ranks of a run by one launcher"
            wrong.append(str(Problem("WORLD_SIZE", given, "the same on all ranks", remedy)))
        elif rank in seen:
            given = f"{rank} was given twice: to {seen[rank]} and to {who}"
            wrong.append(str(Problem("RANK", given, "each number once")))
        if guest["problem"]:
            wrong.append(f"rank {rank} ({who}): {guest['problem']}")
        seen[rank] = who
    return wrong


def _missing(guests: list[Mapping[str, Any]], world_size: int, limit: timedelta) -> str:
    missing = sorted(set(range(world_size)) - {int(guest["rank"]) for guest in guests})
    listed = ", ".join(map(str, missing[:_LISTED])) + (", ..." if len(missing) > _LISTED else "")
    hosts = ", ".join(sorted({str(guest["host"]) for guest in guests})[:_LISTED])
    return (
        f"{len(missing)} of {world_size} ranks did not come within {limit.total_seconds():g} s "
        f"(launch.setup_timeout_seconds): {listed}; those that came are on {hosts}. Look at "
        "what the others printed, and whether their nodes reach MASTER_ADDR:MASTER_PORT"
    )


def _wait_for_readers(store: Store) -> None:
    end = time.monotonic() + _SECONDS_TO_READ
    while time.monotonic() < end and store.add("left", 0) < store.add("came", 0):
        time.sleep(_POLL_SECONDS)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]

"""Which rank this process is: one answer under deepspeed, torchrun, srun, mpirun and plain python.

Each launcher tells it by variables of its own. They are read here, checked against each other, and
written back under the names that PyTorch and DeepSpeed read.
"""

from __future__ import annotations

import re
import socket
import subprocess
import zlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Final

from megatron_mer.errors import LaunchError, Problem

_LOOPBACK: Final = "127.0.0.1"
# Below 32768, where Linux begins to hand out ports to outgoing connections.
_FIRST_PORT: Final = 10000
_PORTS: Final = 20000
# Slurm numbers its special steps (batch script, extern, interactive shell) down from 2**32 - 1.
_FIRST_SPECIAL_STEP: Final = 0xFFFFFFF0


@dataclass(frozen=True, kw_only=True)
class RankEnvironment:
    """One process among those of a run."""

    rank: int
    """0 <= rank < world_size."""
    world_size: int
    """Number of processes."""
    local_rank: int
    """Number of this process on its node."""
    local_size: int
    """Number of processes on this node."""
    node_rank: int
    """Number of this node."""
    num_nodes: int
    """Number of nodes."""
    master_addr: str
    """Host of rank 0."""
    master_port: int
    """Port at which rank 0 is met."""
    launcher: str
    """torchrun, deepspeed, environment (set by hand), slurm, mpirun or python (one process)."""

    def export(self, environ: MutableMapping[str, str]) -> None:
        """Writes the variables that PyTorch and DeepSpeed read."""
        environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.local_rank),
            LOCAL_SIZE=str(self.local_size),
            CROSS_RANK=str(self.node_rank),
            CROSS_SIZE=str(self.num_nodes),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port),
        )


def scontrol_hostnames(nodelist: str) -> list[str]:
    """Expands a Slurm node list by `scontrol show hostnames`.

    Where that command is not installed, as in many containers, only the first host is given.
    """
    command = ["scontrol", "show", "hostnames", nodelist]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except FileNotFoundError:
        return [first_host(nodelist)]
    except subprocess.SubprocessError as error:
        given = f"`{' '.join(command)}` failed: {error}"
        remedy = "set MASTER_ADDR to the host of rank 0"
        raise LaunchError([Problem("SLURM_STEP_NODELIST", given, remedy=remedy)]) from error
    return result.stdout.split()


def first_host(nodelist: str) -> str:
    """Gives the first host of a Slurm node list, e.g. gpu003 of "gpu[003-007,9],login"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group() if first else nodelist)


def free_port() -> int:
    """Asks the system for a free TCP port."""
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return int(probe.getsockname()[1])


def rank_environment(
    environ: Mapping[str, str],
    hostnames: Callable[[str], Sequence[str]] = scontrol_hostnames,
    port: Callable[[], int] = free_port,
) -> RankEnvironment:
    """Finds out which process of a run this is.

    In this order: RANK, as torchrun and deepspeed set it; OMPI_COMM_WORLD_*, before Slurm because
    mpirun inside a job starts its daemons, not the ranks, as Slurm tasks; SLURM_* inside a step
    that srun started; else one plain process, also in an sbatch script, whose SLURM_* variables
    describe the steps to come.

    Args:
        environ: the environment, which is only read.
        hostnames: expands a Slurm node list.
        port: gives a free port, for a process on its own.

    Raises:
        LaunchError: with every variable that is missing or contradicts another.
    """
    reader = _Reader(environ)
    if "RANK" in environ:
        found = _from_rank(reader, port)
    elif "OMPI_COMM_WORLD_RANK" in environ:
        found = _from_mpirun(reader, hostnames, port)
    elif _in_slurm_step(environ):
        found = _from_slurm(reader, hostnames)
    else:
        found = _plain(reader, port)
    reader.check(found)
    return found


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    return step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP and "SLURM_PROCID" in environ


class _Reader:
    """Reads whole numbers of an environment and collects what is wrong."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.problems: list[Problem] = []
        self.names: dict[str, str] = {}

    def number(self, field: str, names: Sequence[str], default: int | None = None) -> int:
        """Reads the first variable that is set; without one it takes the default or complains."""
        self.names[field] = names[0]
        for name in names:
            text = self.environ.get(name, "")
            if not text:
                continue
            self.names[field] = name
            if text.isdecimal():
                return int(text)
            self.problems.append(Problem(name, f"given {text!r}", "a whole number >= 0"))
            return 0
        if default is None:
            remedy = "set it, or start the program by deepspeed, torchrun or srun"
            self.problems.append(Problem(names[0], "missing", "a whole number >= 0", remedy))
            return 0
        return default

    def equal(self, name: str, value: int, other: str) -> None:
        """Complains about a variable, if it is set, that tells another number."""
        text = self.environ.get(name, "")
        if text and text != str(value):
            given = f"given {text}, but {other} says {value}"
            remedy = "unset the one that is left over from something else"
            self.problems.append(Problem(name, given, "the same number of processes", remedy))

    def check(self, found: RankEnvironment) -> None:
        """Checks the numbers against each other.

        Raises:
            LaunchError: with all problems there are.
        """
        if not self.problems:
            self._below("rank", found.rank, "world_size", found.world_size)
            self._below("local_rank", found.local_rank, "local_size", found.local_size)
            self._below("node_rank", found.node_rank, "num_nodes", found.num_nodes)
            if found.local_size > found.world_size:
                given = f"{found.local_size} processes on this node, but {found.world_size} in all"
                self.problems.append(Problem(self.names["local_size"], given))
            if not 1 <= found.master_port <= 65535:
                given = f"given {found.master_port}"
                self.problems.append(Problem("MASTER_PORT", given, "1 to 65535"))
        if self.problems:
            raise LaunchError(self.problems)

    def _below(self, field: str, value: int, bound: str, size: int) -> None:
        if value >= size:
            name = self.names.get(field, field)
            given = f"given {value}, but {self.names.get(bound, bound)} is {size}"
            self.problems.append(Problem(name, given, f"0 to {size - 1}" if size else ""))


def _from_rank(reader: _Reader, port: Callable[[], int]) -> RankEnvironment:
    environ = reader.environ
    rank = reader.number("rank", ["RANK"])
    world_size = reader.number("world_size", ["WORLD_SIZE"])
    alone = world_size == 1
    local_rank = reader.number("local_rank", ["LOCAL_RANK"], 0 if alone else None)
    # A caller that tells no nodes has one.
    local_size = reader.number("local_size", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"], world_size)
    launcher = "environment"
    if "TORCHELASTIC_RUN_ID" in environ:
        launcher = "torchrun"
    elif "CROSS_SIZE" in environ:
        launcher = "deepspeed"
    elif _in_slurm_step(environ):
        # Somebody exported Slurm's numbers by hand. (torchrun and deepspeed start several ranks
        # in one Slurm task, so there the numbers differ rightly.)
        reader.equal("SLURM_STEP_NUM_TASKS", world_size, "WORLD_SIZE")
        if "SLURM_STEP_NUM_TASKS" not in environ:
            reader.equal("SLURM_NTASKS", world_size, "WORLD_SIZE")
        reader.equal("SLURM_PROCID", rank, "RANK")
    nodes = -(-world_size // max(local_size, 1))
    return RankEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_size=local_size,
        node_rank=reader.number(
            "node_rank", ["CROSS_RANK", "GROUP_RANK"], rank // max(local_size, 1)
        ),
        num_nodes=reader.number("num_nodes", ["CROSS_SIZE", "GROUP_WORLD_SIZE"], nodes),
        master_addr=_master_addr(reader, alone),
        master_port=reader.number("master_port", ["MASTER_PORT"], port() if alone else None),
        launcher=launcher,
    )


def _master_addr(reader: _Reader, one_node: bool) -> str:
    address = reader.environ.get("MASTER_ADDR", "")
    if not address and not one_node:
        remedy = "set it for all processes alike"
        reader.problems.append(Problem("MASTER_ADDR", "missing", "the host of rank 0", remedy))
    return address or _LOOPBACK


def _from_mpirun(
    reader: _Reader, hostnames: Callable[[str], Sequence[str]], port: Callable[[], int]
) -> RankEnvironment:
    environ = reader.environ
    rank = reader.number("rank", ["OMPI_COMM_WORLD_RANK"])
    world_size = reader.number("world_size", ["OMPI_COMM_WORLD_SIZE"])
    local_size = reader.number("local_size", ["OMPI_COMM_WORLD_LOCAL_SIZE"])
    reader.equal("WORLD_SIZE", world_size, "OMPI_COMM_WORLD_SIZE")
    # All ranks have to meet at one port without talking: they share the name of their MPI job.
    job = environ.get("PMIX_NAMESPACE", environ.get("OMPI_MCA_ess_base_jobid", ""))
    meeting = _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS
    address = environ.get("MASTER_ADDR", "")
    if not address and local_size < world_size and environ.get("SLURM_JOB_NODELIST"):
        # Inside a Slurm job it fills the job's nodes in their order, so rank 0 is on the first.
        address = _first_of(reader, ["SLURM_JOB_NODELIST"], hostnames)
    return RankEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=reader.number("local_rank", ["OMPI_COMM_WORLD_LOCAL_RANK"]),
        local_size=local_size,
        # mpirun does not tell nodes; this holds where it fills one node after the other.
        node_rank=rank // max(local_size, 1),
        num_nodes=-(-world_size // max(local_size, 1)),
        master_addr=address or _master_addr(reader, local_size == world_size),
        master_port=reader.number(
            "master_port", ["MASTER_PORT"], port() if world_size == 1 else meeting
        ),
        launcher="mpirun",
    )


def _from_slurm(reader: _Reader, hostnames: Callable[[str], Sequence[str]]) -> RankEnvironment:
    environ = reader.environ
    world_size = reader.number("world_size", ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"])
    reader.equal("WORLD_SIZE", world_size, reader.names["world_size"])
    node_rank = reader.number("node_rank", ["SLURM_NODEID"])
    local_rank = reader.number("local_rank", ["SLURM_LOCALID"])
    local_sizes = _tasks_per_node(
        environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", ""))
    )
    known = node_rank < len(local_sizes)
    address = environ.get("MASTER_ADDR", "") or _first_of_step(reader, hostnames)
    job = environ.get("SLURM_JOB_ID", environ.get("SLURM_JOBID", ""))
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    # Neighbouring jobs, and steps of one job that run side by side on a node, shall not meet.
    meeting = int(job or 0) * 31 + int(step or 0) if f"{job}{step}".isdecimal() else 0
    return RankEnvironment(
        rank=reader.number("rank", ["SLURM_PROCID"]),
        world_size=world_size,
        local_rank=local_rank,
        local_size=local_sizes[node_rank] if known else local_rank + 1,
        node_rank=node_rank,
        num_nodes=reader.number(
            "num_nodes", ["SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"]
        ),
        master_addr=address,
        master_port=reader.number("master_port", ["MASTER_PORT"], _FIRST_PORT + meeting % _PORTS),
        launcher="slurm",
    )


def _first_of_step(reader: _Reader, hostnames: Callable[[str], Sequence[str]]) -> str:
    """Gives the first host of the step, on which rank 0 runs; a step may use part of its job."""
    return _first_of(
        reader, ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"], hostnames
    )


def _first_of(
    reader: _Reader, names: Sequence[str], hostnames: Callable[[str], Sequence[str]]
) -> str:
    """Gives the first host of the first node list that is set."""
    for name in names:
        nodelist = reader.environ.get(name, "")
        if nodelist:
            hosts = hostnames(nodelist)
            if not hosts:
                reader.problems.append(Problem(name, f"given {nodelist!r}, which names no host"))
            return hosts[0] if hosts else ""
    remedy = "set MASTER_ADDR to the host of rank 0"
    reader.problems.append(Problem(names[0], "missing", "a node list", remedy))
    return ""


def _tasks_per_node(text: str) -> list[int]:
    """Reads Slurm's short form: "2(x3),1" is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(part[0])] * int(part[1] or 1)
    return counts


def _plain(reader: _Reader, port: Callable[[], int]) -> RankEnvironment:
    reader.names["world_size"] = "WORLD_SIZE"
    # The last two are of MPI launchers that are not read here; without this, each of their
    # processes would believe to be the only one.
    for name in ("WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        reader.equal(name, 1, "the absence of RANK")
    return RankEnvironment(
        rank=0,
        world_size=1,
        local_rank=0,
        local_size=1,
        node_rank=0,
        num_nodes=1,
        master_addr=_LOOPBACK,
        master_port=reader.number("master_port", ["MASTER_PORT"], port()),
        launcher="python",
    )

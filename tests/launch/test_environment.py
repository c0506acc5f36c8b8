"""The variables of every launcher, and contradictions among them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

import pytest

from megatron_mer.errors import LaunchError
from megatron_mer.launch.environment import (
    RankEnvironment,
    first_host,
    free_port,
    rank_environment,
    scontrol_hostnames,
)

DEEPSPEED = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "4",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "3",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_JOB_NODELIST": "n[1-4]",
    "SLURM_STEP_NODELIST": "n[2-4]",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-n1-77",
}


def expand(nodelist: str) -> list[str]:
    return {"n[1-4]": ["n1", "n2", "n3", "n4"], "n[2-4]": ["n2", "n3", "n4"]}[nodelist]


def no_hosts(nodelist: str) -> Sequence[str]:
    raise AssertionError(f"asked for the hosts of {nodelist}")


def read(environ: Mapping[str, str]) -> RankEnvironment:
    return rank_environment(environ, expand, lambda: 4321)


def refused(environ: Mapping[str, str]) -> dict[str, str]:
    with pytest.raises(LaunchError) as caught:
        read(environ)
    assert caught.value.exit_code == 2
    return {problem.path: str(problem) for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("environ", "launcher"), [(DEEPSPEED, "deepspeed"), (TORCHRUN, "torchrun")]
)
def test_launchers_that_set_rank(environ: dict[str, str], launcher: str) -> None:
    before = dict(environ)
    assert rank_environment(environ, no_hosts) == RankEnvironment(
        rank=5,
        world_size=8,
        local_rank=1,
        local_size=4,
        node_rank=1,
        num_nodes=2,
        master_addr="n1",
        master_port=29500,
        launcher=launcher,
    )
    assert environ == before


@pytest.mark.parametrize("environ", [DEEPSPEED, TORCHRUN])
def test_rank_wins_inside_a_slurm_step_with_other_numbers(environ: dict[str, str]) -> None:
    # One torchrun or deepspeed launcher a node, started by srun, each starting several ranks.
    assert read({**SLURM, **environ}) == read(environ)


def test_slurm_step() -> None:
    found = read(SLURM)
    assert found == RankEnvironment(
        rank=3,
        world_size=5,
        local_rank=1,
        local_size=2,
        node_rank=1,
        num_nodes=3,
        # The step's first host, not the job's.
        master_addr="n2",
        master_port=10000 + (1234 * 31) % 20000,
        launcher="slurm",
    )
    assert read({**SLURM, "SLURM_PROCID": "4"}).master_port == found.master_port
    assert read({**SLURM, "SLURM_STEP_ID": "1"}).master_port != found.master_port
    assert read({**SLURM, "SLURM_JOB_ID": "1235"}).master_port != found.master_port


def test_every_task_of_a_slurm_step_finds_the_same_meeting_point() -> None:
    places = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    found = [
        read(
            {
                **SLURM,
                "SLURM_PROCID": str(rank),
                "SLURM_NODEID": str(node),
                "SLURM_LOCALID": str(local),
            }
        )
        for rank, (node, local) in enumerate(places)
    ]
    assert [one.rank for one in found] == [0, 1, 2, 3, 4]
    assert [one.local_size for one in found] == [2, 2, 2, 2, 1]
    assert {(one.master_addr, one.master_port, one.world_size) for one in found} == {
        ("n2", found[0].master_port, 5)
    }


def test_slurm_of_older_versions_tells_less() -> None:
    names = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID")
    environ = {name: SLURM[name] for name in (*names, "SLURM_NNODES", "SLURM_JOB_NODELIST")}
    found = read({**environ, "SLURM_STEPID": "2"})
    assert (found.rank, found.world_size, found.master_addr) == (3, 5, "n1")


def test_slurm_takes_a_meeting_point_that_was_set() -> None:
    found = rank_environment({**SLURM, "MASTER_ADDR": "ib0", "MASTER_PORT": "77"}, no_hosts)
    assert (found.master_addr, found.master_port) == ("ib0", 77)


@pytest.mark.parametrize("step", [None, "4294967291", "4294967290", "batch"])
def test_python_in_a_batch_script_is_one_process(step: str | None) -> None:
    environ = {key: value for key, value in SLURM.items() if "STEP" not in key}
    environ["SLURM_PROCID"] = "0"
    if step is not None:
        environ["SLURM_STEP_ID"] = step
    found = rank_environment(environ, no_hosts, lambda: 4321)
    assert (found.world_size, found.launcher, found.master_port) == (1, "python", 4321)


def test_mpirun() -> None:
    found = read(MPIRUN)
    assert (found.rank, found.world_size, found.local_rank, found.local_size) == (2, 4, 2, 4)
    assert (found.master_addr, found.launcher) == ("127.0.0.1", "mpirun")
    other = read({**MPIRUN, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"})
    assert other.master_port == found.master_port
    assert 10000 <= found.master_port < 30000
    # Its daemons are Slurm tasks when it runs inside a job; their numbers mean nothing here.
    assert read({**SLURM, **MPIRUN}) == found


def test_mpirun_on_several_nodes_needs_an_address() -> None:
    environ = {
        **MPIRUN,
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    }
    assert list(refused(environ)) == ["MASTER_ADDR"]
    found = read({**environ, "MASTER_ADDR": "n1"})
    assert (found.node_rank, found.num_nodes, found.master_addr) == (1, 2, "n1")


def test_plain_python() -> None:
    found = read({"PATH": "/bin"})
    assert (found.rank, found.world_size, found.local_rank) == (0, 1, 0)
    assert (found.master_addr, found.master_port) == ("127.0.0.1", 4321)
    assert read({"WORLD_SIZE": "1"}) == found
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))


def test_what_is_exported_is_read_back() -> None:
    for environ in (DEEPSPEED, TORCHRUN, SLURM, MPIRUN, {}):
        found = read(environ)
        exported: dict[str, str] = {"PATH": "/bin"}
        found.export(exported)
        assert exported.pop("PATH") == "/bin"
        assert set(exported) == set(DEEPSPEED)
        again = read(exported)
        assert again.launcher == "deepspeed"
        assert {**vars(again), "launcher": ""} == {**vars(found), "launcher": ""}


@pytest.mark.parametrize(
    ("environ", "names", "holds"),
    [
        ({"RANK": "0"}, ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"], "missing"),
        ({**DEEPSPEED, "RANK": "8"}, ["RANK"], "given 8, but WORLD_SIZE is 8"),
        ({**DEEPSPEED, "RANK": "-1"}, ["RANK"], "given '-1'"),
        ({**DEEPSPEED, "WORLD_SIZE": "x"}, ["WORLD_SIZE"], "given 'x'"),
        ({**DEEPSPEED, "LOCAL_RANK": "4"}, ["LOCAL_RANK"], "given 4, but LOCAL_SIZE is 4"),
        ({**DEEPSPEED, "LOCAL_SIZE": "9"}, ["LOCAL_SIZE"], "9 processes on this node, but 8"),
        ({**DEEPSPEED, "CROSS_RANK": "2"}, ["CROSS_RANK"], "given 2, but CROSS_SIZE is 2"),
        ({**DEEPSPEED, "MASTER_PORT": "70000"}, ["MASTER_PORT"], "1 to 65535"),
        ({**DEEPSPEED, "WORLD_SIZE": "0"}, ["RANK"], "WORLD_SIZE is 0"),
        ({"WORLD_SIZE": "4"}, ["WORLD_SIZE"], "given 4, but the absence of RANK says 1"),
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, ["PMI_SIZE"], "given 4"),
        ({**SLURM, "WORLD_SIZE": "8"}, ["WORLD_SIZE"], "SLURM_STEP_NUM_TASKS says 5"),
        ({**SLURM, "SLURM_PROCID": "5"}, ["SLURM_PROCID"], "SLURM_STEP_NUM_TASKS is 5"),
        ({**SLURM, "SLURM_NODEID": "3"}, ["SLURM_NODEID"], "SLURM_STEP_NUM_NODES is 3"),
        ({**MPIRUN, "WORLD_SIZE": "8"}, ["WORLD_SIZE"], "OMPI_COMM_WORLD_SIZE says 4"),
    ],
)
def test_contradictions(environ: dict[str, str], names: list[str], holds: str) -> None:
    found = refused(environ)
    assert [name for name in names if name not in found] == []
    assert any(holds in line for line in found.values()), found


def test_slurm_numbers_exported_by_hand_have_to_agree() -> None:
    by_hand = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "n2",
        "MASTER_PORT": "5000",
    }
    assert list(refused({**SLURM, **by_hand})) == ["SLURM_STEP_NUM_TASKS"]
    found = read({**SLURM, **by_hand, "WORLD_SIZE": "5"})
    assert (found.rank, found.world_size, found.launcher) == (3, 5, "environment")


def test_all_contradictions_together() -> None:
    found = refused({"RANK": "a", "WORLD_SIZE": "b", "LOCAL_RANK": "c", "MASTER_PORT": "d"})
    assert set(found) == {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"}


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[003-007,9],login", "gpu003"),
        ("r[1-2]n[05,07]x,r9", "r1n05x"),
        ("a-b.c[10]", "a-b.c10"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host
    if shutil.which("scontrol") is None:
        assert scontrol_hostnames(nodelist) == [host]


def test_scontrol_is_asked_where_it_is_installed(tmp_path, monkeypatch) -> None:
    script = tmp_path / "scontrol"
    script.write_text('#!/bin/sh\necho "$1-$2-$3"; echo second\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert scontrol_hostnames("n[1-2]") == ["show-hostnames-n[1-2]", "second"]
    script.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(LaunchError, match="set MASTER_ADDR"):
        scontrol_hostnames("n[1-2]")


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, megatron_mer.launch.environment, megatron_mer.config; "
    code += "print([name for name in ('torch', 'deepspeed', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What a batch job of two nodes with four tasks gives each step, its own numbers included.
IN_A_JOB = {
    "SLURM_JOB_ID": "71",
    "SLURM_JOBID": "71",
    "SLURM_JOB_NODELIST": "n[1-4]",
    "SLURM_NODELIST": "n[1-4]",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_NNODES": "4",
    "SLURM_TASKS_PER_NODE": "1(x4)",
    "SLURM_JOB_END_TIME": "1767225600",
    "SLURM_SUBMIT_HOST": "login",
    "SLURM_CLUSTER_NAME": "c",
}
IN_A_STEP = {
    **IN_A_JOB,
    "SLURM_STEP_ID": "2",
    "SLURM_STEPID": "2",
    "SLURM_PROCID": "5",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "6",
    "SLURM_NPROCS": "6",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NODELIST": "n[2-4]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_GTIDS": "4,5",
    "SLURM_SRUN_COMM_HOST": "10.0.0.1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}


@pytest.mark.parametrize(
    "mpi",
    [
        # srun --mpi=pmix, for a program that is linked to Open MPI; --mpi=pmi2 and --mpi=none.
        {"PMIX_RANK": "5", "PMIX_NAMESPACE": "slurm.pmix.71.2", "PMIX_SERVER_URI2": "pmix.1;tcp4"},
        {"PMI_RANK": "5", "PMI_SIZE": "6", "PMI_FD": "3", "PMI_JOBID": "71.2"},
        # deepspeed --launcher slurm: srun --export=ALL,PYTHON..., no RANK and no MASTER_ADDR.
        {"PYTHONUNBUFFERED": "1", "PYTHONPATH": "/home/u/run"},
    ],
    ids=["pmix", "pmi2", "deepspeed"],
)
def test_tasks_of_a_step_are_its_ranks(mpi: dict[str, str]) -> None:
    found = read({**IN_A_STEP, **mpi})
    assert (found.launcher, found.rank, found.world_size) == ("slurm", 5, 6)
    assert (found.local_rank, found.local_size, found.node_rank, found.num_nodes) == (1, 2, 2, 3)
    assert (found.master_addr, found.master_port) == ("n2", 10000 + (71 * 31 + 2) % 20000)


def test_torchrun_in_a_task_of_a_step() -> None:
    # srun --ntasks-per-node=1 torchrun --nnodes 3 --nproc-per-node 2 --rdzv-backend c10d ...
    elastic = {
        "RANK": "3",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "1",
        "GROUP_WORLD_SIZE": "3",
        "ROLE_RANK": "3",
        "ROLE_WORLD_SIZE": "6",
        "ROLE_NAME": "default",
        "MASTER_ADDR": "n2.cluster",
        "MASTER_PORT": "41001",
        "TORCHELASTIC_RUN_ID": "71",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    step = {**IN_A_STEP, "SLURM_NTASKS": "3", "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "1"}
    found = read({**step, **elastic})
    assert (found.launcher, found.rank, found.world_size) == ("torchrun", 3, 6)
    assert (found.master_addr, found.master_port, found.node_rank) == ("n2.cluster", 41001, 1)


def test_mpirun_in_a_job_meets_on_its_first_node() -> None:
    mpirun = {
        "OMPI_COMM_WORLD_RANK": "5",
        "OMPI_COMM_WORLD_SIZE": "8",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "OMPI_COMM_WORLD_NODE_RANK": "1",
        "PMIX_NAMESPACE": "prterun-n1-77@1",
        "PMIX_RANK": "5",
    }
    # Its daemons are the tasks of a step of their own.
    found = read({**IN_A_STEP, **mpirun})
    assert (found.launcher, found.rank, found.world_size) == ("mpirun", 5, 8)
    assert (found.master_addr, found.node_rank, found.num_nodes) == ("n1", 2, 4)
    assert read({**IN_A_STEP, **mpirun, "MASTER_ADDR": "ib1"}).master_addr == "ib1"

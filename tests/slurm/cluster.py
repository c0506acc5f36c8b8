"""A real Slurm cluster of virtual nodes on this machine: root, and slurmctld, slurmd and munge.

A node is one slurmd in pid, mount and uts namespaces of its own (and net, for `network="veth"`):
its hostname is n1, n2, ..., and a power cut takes all of its processes along, as it does in life.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

CONFIGURATION = (Path(__file__).parent / "slurm.conf.in").read_text()
KILL_ON_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG
GONE = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")


def _die_with_parent() -> None:
    """Nothing outlives a test runner that is killed."""
    ctypes.CDLL(None).prctl(KILL_ON_PARENTS_DEATH, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class SlurmCluster:
    """Starts on entering and is gone on leaving; to be made in the main thread.

    Args:
        folder: where its configuration, logs and state go.
        nodes: number of nodes, n1 to nN.
        cpus: of each node, for Slurm; they share this machine's.
        network: loopback: node i is 127.77.K.i; veth: each has its own network, which can be cut.
        node_timeout: seconds without an answer after which a node is down.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 2,
        cpus: int = 4,
        network: Literal["loopback", "veth"] = "loopback",
        node_timeout: int = 15,
    ) -> None:
        self.folder = folder.resolve()
        self.network = network
        octet = os.getpid() % 250  # one subnet and one name prefix for each process that tests
        self._tag = f"sl{octet}"
        net = "10" if network == "veth" else "127"
        self.address = {f"n{i}": f"{net}.77.{octet}.{i}" for i in range(1, nodes + 1)}
        self._controller = f"10.77.{octet}.254" if network == "veth" else "127.0.0.1"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        # pytest's folders are closed to others, and munged refuses a socket in such a one.
        self._munge = Path(tempfile.mkdtemp(prefix="munge-"))
        self._munge.chmod(0o755)
        self._write_files(cpus, node_timeout)
        self.env = {**os.environ, "SLURM_CONF": str(self.folder / "etc" / "slurm.conf")}

    def _write_files(self, cpus: int, node_timeout: int) -> None:
        for name in ("etc", "log", "state", "spool", "pids"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for name in self.address:
            (self.folder / "tmp" / name).mkdir(parents=True, exist_ok=True)
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={name} NodeAddr={address} Port={free_port()} "
            f"CPUs={cpus} RealMemory=4000"
            for name, address in self.address.items()
        )
        text = CONFIGURATION.format(
            host=host,
            controller=self._controller,
            port=free_port(),
            folder=self.folder,
            munge=self._munge,
            node_timeout=node_timeout,
            nodes=nodes,
        )
        hosts = {"localhost": "127.0.0.1", **self.address, host: self._controller}
        files = {
            "slurm.conf": text,
            "cgroup.conf": "CgroupPlugin=cgroup/v1\n",  # not looked for, as there may be none
            "hosts": "".join(f"{address} {name}\n" for name, address in hosts.items()),
        }
        for name, content in files.items():
            (self.folder / "etc" / name).write_text(content)

    # Starting and stopping ----------------------------------------------------------------------

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start(self) -> None:
        key = self._munge / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        if self.network == "veth":
            self._make_network()
        socket_path = self._munge / "socket"
        self._spawn(
            "munged",
            "/usr/sbin/munged",
            "-F",
            f"--socket={socket_path}",
            f"--key-file={key}",
            f"--pid-file={self.folder}/pids/munged.pid",
            f"--log-file={self.folder}/log/munged.log",
            f"--seed-file={self._munge}/seed",
        )
        self.until(socket_path.exists, 10, "munged's socket")
        self._spawn("slurmctld", "/usr/sbin/slurmctld", "-D", "-c")
        for name in self.address:
            self.start_node(name)
        self.wait_idle()

    def _spawn(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.stderr").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def _make_network(self) -> None:
        bridge = f"{self._tag}br"
        self.run("ip", "link", "add", bridge, "type", "bridge")
        self.run("ip", "addr", "add", f"{self._controller}/24", "dev", bridge)
        self.run("ip", "link", "set", bridge, "up")
        for name, address in self.address.items():
            space = f"{self._tag}-{name}"
            self.run("ip", "netns", "add", space)
            peer = ("peer", "name", "eth0", "netns", space)
            self.run("ip", "link", "add", space, "type", "veth", *peer)
            self.run("ip", "link", "set", space, "master", bridge, "up")
            self.run("ip", "-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            self.run("ip", "-n", space, "link", "set", "eth0", "up")
            self.run("ip", "-n", space, "link", "set", "lo", "up")

    def _stop(self) -> None:
        if "slurmctld" in self._processes:
            self.run("scancel", "--state=RUNNING,PENDING,SUSPENDED", check=False)
        for name in [name for name in self._processes if name in self.address]:
            pid = self._node_pid(name)
            if pid is not None:
                os.kill(pid, signal.SIGTERM)
        for name in [name for name in self._processes if name in self.address]:
            self._end(name)
        for name in ("slurmctld", "munged"):
            if name in self._processes:
                self._processes[name].terminate()
                self._end(name)
        shutil.rmtree(self._munge, ignore_errors=True)
        if self.network == "veth":
            for name in self.address:
                self.run("ip", "netns", "del", f"{self._tag}-{name}", check=False)
            self.run("ip", "link", "del", f"{self._tag}br", check=False)

    def _end(self, name: str) -> None:
        process = self._processes.pop(name)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    # Commands -----------------------------------------------------------------------------------

    def run(self, *command: str | Path, check: bool = True, timeout: float = 60) -> str:
        """Run a command against this cluster; returns what it printed."""
        done = subprocess.run(
            [str(part) for part in command],
            env=self.env,
            text=True,
            capture_output=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def until(self, happened: Callable[[], object], seconds: float, what: str) -> None:
        """Wait until something is true."""
        end = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < end, f"not within {seconds} s: {what}"
            for name, process in self._processes.items():
                assert process.poll() is None, f"{name} ended: {process.returncode}"
            time.sleep(0.1)

    def job(self, job: str) -> dict[str, str]:
        """What the controller knows of a job: JobState, Restarts, NodeList, ..."""
        said = self.run("scontrol", "show", "job", "-o", job, check=False)
        return dict(part.split("=", 1) for part in said.split() if "=" in part)

    def wait_job(self, job: str, seconds: float) -> dict[str, str]:
        """Wait until a job has ended for good, requeues included; returns what is known of it."""
        self.until(lambda: self.job(job).get("JobState") in GONE, seconds, f"the end of job {job}")
        return self.job(job)

    # Nodes --------------------------------------------------------------------------------------

    def states(self) -> dict[str, str]:
        said = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False)
        return dict(map(str.split, said.splitlines()))

    def wait_idle(self, seconds: float = 20) -> None:
        """Wait until no node has anything to do."""
        idle = dict.fromkeys(self.address, "idle")
        self.until(lambda: self.states() == idle, seconds, "all nodes idle")

    def start_node(self, name: str) -> None:
        inside = (
            f"hostname {name}; mount -t tmpfs cg /sys/fs/cgroup; "
            f"mount --bind {self.folder}/etc/hosts /etc/hosts; exec /usr/sbin/slurmd -D -N {name}"
        )
        veth = ("nsenter", f"--net=/run/netns/{self._tag}-{name}")
        spaces = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
        before = veth if self.network == "veth" else ()
        self._spawn(name, *before, *spaces, "/bin/sh", "-c", inside)

    def _node_pid(self, name: str) -> int | None:
        """The node's slurmd, pid 1 of its namespace, as seen from outside."""
        parent = self._processes[name].pid
        try:
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        except OSError:
            return None
        return int(children[0]) if children else None

    def inside(self, name: str, *command: str) -> None:
        """Run a command in a node's own view of the file system."""
        self.run("nsenter", f"--mount=/proc/{self._node_pid(name)}/ns/mnt", *command)

    def cut_power(self, name: str) -> None:
        """Kill all of a node's processes at once; Slurm finds out by itself."""
        pid = self._node_pid(name)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        self._processes.pop(name).wait()

    def link(self, name: str, up: bool) -> None:
        """Cut or mend a node's network; veth only."""
        self.run("ip", "link", "set", f"{self._tag}-{name}", "up" if up else "down")

    def logs(self) -> str:
        """The ends of the logs of controller and nodes."""
        parts = []
        for path in sorted((self.folder / "log").glob("slurm*.log")):
            tail = path.read_text(errors="replace").splitlines()[-60:]
            parts += [f"--- {path.name}", *tail]
        return "\n".join(parts)

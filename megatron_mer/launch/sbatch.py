"""The text of an sbatch file from what a job needs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from megatron_mer.errors import LaunchError, Problem

Launcher = Literal["srun", "torchrun", "deepspeed"]
LAUNCHERS: Final[tuple[Launcher, ...]] = ("srun", "torchrun", "deepspeed")
WARN_SECONDS: Final = 120
"""How long before its end a job is warned, besides what the program itself keeps free."""
_TIME: Final = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job of Slurm that trains one run."""

    name: str
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    """0: the ranks compute on CPUs."""
    time: str
    """As Slurm writes it: minutes, H:M:S, D-H, D-H:M:S."""
    launcher: Launcher = "srun"
    partition: str = ""
    account: str = ""
    qos: str = ""
    cpus_per_task: int | None = None
    """Of one rank."""
    mem: str = ""
    exclude: str = ""
    """Nodes to leave out, as Slurm writes them."""
    options: Sequence[str] = ()
    """Further ones of sbatch, such as `gres=gpu:8`."""
    max_restarts: int = 3
    """Restarts in a row that may gain no step."""
    chained: bool = False
    """Another job follows, so that this one need not requeue itself."""
    accept: Sequence[str] = ()
    """Kinds of changes that a resumed run may take up."""
    work_dir: Path
    """Where relative paths of the configuration start."""
    output_dir: Path
    folder: Path
    """Of this submission: it holds code, configuration and log."""
    programs: Path
    """Folder of the Python that runs it."""


def seconds_of(time: str) -> int:
    """Reads a time limit of Slurm.

    Raises:
        LaunchError: it is none, or 0.
    """
    match = _TIME.fullmatch(time)
    days, *rest = (int(part) if part else None for part in match.groups()) if match else (None,)
    given = [part for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = [*given, 0, 0][:3]
    elif len(given) == 3:
        hours, minutes, seconds = given
    else:  # minutes, or minutes:seconds
        hours, (minutes, seconds) = 0, [*given, 0, 0][:2]
    total = (((days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        allowed = "minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S, above 0"
        raise LaunchError([Problem("--time", f"given {time!r}", allowed)])
    return total


def sbatch_text(job: Job) -> str:
    """Writes the sbatch file of a job."""
    options = "\n".join(f"#SBATCH --{option}" for option in _options(job))
    return f"""\
#!/usr/bin/env bash
# Written by tools/submit_slurm.py; docs/clusters.md says what each part does.
{options}

{_settings(job)}

set -euo pipefail
source "$CODE/examples/slurm/until_done.sh"
train_until_done {_command(job)}
"""


def _options(job: Job) -> Iterator[str]:
    one_task = job.launcher == "torchrun"
    cpus = job.cpus_per_task
    yield f"job-name={shlex.quote(job.name)}"
    for name in ("partition", "account", "qos"):
        if value := getattr(job, name):
            yield f"{name}={value}"
    yield f"nodes={job.nodes}"
    yield f"ntasks-per-node={1 if one_task else job.ranks_per_node}"
    if job.gpus_per_node:
        yield f"gpus-per-node={job.gpus_per_node}"
    if cpus:
        yield f"cpus-per-task={cpus * job.ranks_per_node if one_task else cpus}"
    if job.mem:
        yield f"mem={job.mem}"
    if job.exclude:
        yield f"exclude={job.exclude}"
    yield from job.options
    yield f"time={job.time}"
    yield f"signal=B:USR1@{min(WARN_SECONDS, seconds_of(job.time) // 10)}"
    yield "requeue"
    yield "open-mode=append"
    log = str(job.folder / "job.log").replace("%", "%%")  # Slurm fills in what follows a %
    yield f"output={shlex.quote(log)}"
    yield f"chdir={shlex.quote(str(job.work_dir))}"


def own_options() -> set[str]:
    """Names of all options that `sbatch_text` may write by itself."""
    job = Job(
        name="x", nodes=1, ranks_per_node=1, gpus_per_node=1, time="1", partition="x", account="x",
        qos="x", cpus_per_task=1, mem="0", exclude="x", work_dir=Path(), output_dir=Path(),
        folder=Path(), programs=Path(),
    )  # fmt: skip
    return {option.partition("=")[0] for option in _options(job)}


def _settings(job: Job) -> str:
    values = {
        "CODE": job.folder / "code",
        "OUTPUT_DIR": job.output_dir,
        "RANKS": job.nodes * job.ranks_per_node,
        "SUBMISSION": job.folder.name,
        "MAX_RESTARTS": job.max_restarts,
    }
    if job.chained:
        values["CHAIN"] = job.folder / "jobs.txt"
    arguments = ["--config", str(job.folder / "config.yaml")]
    arguments += [word for kind in job.accept for word in ("--accept", kind)]
    lines = [f"{name}={shlex.quote(str(value))}" for name, value in values.items()]
    lines.append(f"ARGUMENTS=({shlex.join(arguments)})")
    lines.append(f"export PATH={shlex.quote(str(job.programs))}:$PATH")
    if job.cpus_per_task:
        lines.append("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK")
    if not job.gpus_per_node:
        lines.append(f"export DS_ACCELERATOR=cpu OMP_NUM_THREADS={job.cpus_per_task or 1}")
    return "\n".join(lines)


def _command(job: Job) -> str:
    program = '"$CODE/pretrain_llama_mer.py" "${ARGUMENTS[@]}"'
    scripts = '"$CODE/examples/slurm'
    if job.launcher == "torchrun":
        start = f'srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash {scripts}/torchrun_node.sh"'
        return f"{start} \\\n    --nproc-per-node {job.ranks_per_node} {program}"
    if job.launcher == "deepspeed":
        start = f'bash {scripts}/deepspeed.sh" {job.ranks_per_node}'
        return f"{start} \\\n    {program}"
    return f'srun --kill-on-bad-exit=1 \\\n    "${{PYTHON[@]}}" {program}'

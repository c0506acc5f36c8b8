"""Write the sbatch file of a run, check the run as the training program would, and submit it.

Examples:
    python tools/submit_slurm.py --config my.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00
    python tools/submit_slurm.py --config my.yaml --nodes 1 --gpus-per-node 8 --time 60 --dry-run
    python tools/submit_slurm.py --config my.yaml --nodes 4 --gpus-per-node 8 --time 1-0 --chain 10
    python tools/submit_slurm.py --config my.yaml --nodes 2 --gpus-per-node 0 --tasks-per-node 4 \
        --time 60

Other options patch the configuration, as for pretrain_llama_mer.py: --optimizer.lr 2e-4. Everything
that is wrong is said before anything is written or submitted. OUTPUT_DIR/slurm/TIME/ then holds a
copy of the code, the resolved configuration, the installed packages, the sbatch file and the job's
log, so that a requeued job runs what was submitted. Log in to the cluster and start it in the
environment that the job shall have: modules loaded, .venv active. See docs/clusters.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

# The code that checks here is the code that is frozen.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mer.command import run_tool
from megatron_mer.config import RunConfig, load_config, to_yaml
from megatron_mer.config.parse import suggest
from megatron_mer.continual.history import KINDS
from megatron_mer.errors import LaunchError, Problem
from megatron_mer.launch.freeze import (
    describe_environment,
    freeze_code,
    installed_packages,
    new_folder,
)
from megatron_mer.launch.requeue import live_twin
from megatron_mer.launch.sbatch import LAUNCHERS, Job, own_options, sbatch_text, seconds_of
from megatron_mer.launch.submit import known_jobs, pending_reason, submit
from megatron_mer.training.preflight import prepare

ROOT = Path(__file__).resolve().parents[1]
DRY_FOLDER = "TIME"  # stands for the submission's folder where none is made


def parser_of_tool() -> argparse.ArgumentParser:
    """The tool's own options."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="the run's YAML")
    add("--nodes", type=int, required=True, metavar="N", help="nodes of a job")
    add("--gpus-per-node", type=int, required=True, metavar="G", help="one rank each; 0: CPUs")
    add("--tasks-per-node", type=int, metavar="T", help="ranks a node, with --gpus-per-node 0")
    add("--time", required=True, metavar="LIMIT", help="of a job: minutes, H:M:S, D-H:M:S")
    add("--launcher", choices=LAUNCHERS, default="srun", help="default: %(default)s")
    add("--partition", default="", metavar="NAME", help="Slurm's; default: the cluster's")
    add("--account", default="", metavar="NAME", help="Slurm's; default: yours")
    add("--qos", default="", metavar="NAME", help="Slurm's; default: none")
    add("--cpus-per-task", type=int, metavar="C", help="CPU cores of a rank")
    add("--mem", default="", metavar="SIZE", help="of a node, such as 500G; 0: all of it")
    add("--exclude", default="", metavar="NODES", help="nodes to leave out, such as n[3-4]")
    add("--chain", type=int, default=1, metavar="M", help="submit M jobs, one after the other")
    add(
        "--accept",
        action="append",
        default=[],
        metavar="KIND[,KIND]",
        help=f"changes that a resumed run may take up: {', '.join(KINDS)}",
    )
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="another option of sbatch, such as gres=gpu:8 or mail-user=me@here; repeatable",
    )
    add("--dry-run", action="store_true", help="print the sbatch file; write and submit nothing")
    return parser


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into the tool's own options and configuration overrides."""
    return parser_of_tool().parse_known_args(arguments)


def option_problems(options: argparse.Namespace, overrides: list[str]) -> Iterator[Problem]:
    """What is wrong with the options themselves."""
    for name in ("nodes", "chain"):
        if getattr(options, name) < 1:
            yield Problem(f"--{name}", f"given {getattr(options, name)}", "at least 1")
    if options.gpus_per_node < 0:
        yield Problem("--gpus-per-node", f"given {options.gpus_per_node}", "0 or more")
    tasks = options.tasks_per_node
    if options.gpus_per_node == 0 and (tasks is None or tasks < 1):
        given = "missing" if tasks is None else f"given {tasks}"
        yield Problem("--tasks-per-node", given, "at least 1 where --gpus-per-node is 0")
    if options.gpus_per_node > 0 and tasks not in (None, options.gpus_per_node):
        given = f"given {tasks}, but --gpus-per-node {options.gpus_per_node} makes a rank a GPU"
        yield Problem("--tasks-per-node", given, remedy="leave it out")
    if options.cpus_per_task is not None and options.cpus_per_task < 1:
        yield Problem("--cpus-per-task", f"given {options.cpus_per_task}", "at least 1")
    taken = own_options()
    for option in options.sbatch:
        name = option.lstrip("-").partition("=")[0]
        if not name or " " in option.strip():
            yield Problem("--sbatch", f"given {option!r}", "NAME or NAME=VALUE")
        elif name in taken:
            remedy = "use this tool's own options"
            yield Problem("--sbatch", f"given {option!r}, which this tool writes", remedy=remedy)
    yield from misspelled(overrides)
    if "--fresh" in overrides:
        given = "given, but each restart of the job would begin anew"
        yield Problem("--fresh", given, remedy="move the old output_dir away, or choose another")


def misspelled(overrides: list[str]) -> Iterator[Problem]:
    """Options that are no keys of the configuration, but nearly one of this tool's."""
    keys = {field.name for field in fields(RunConfig)}
    own = [name for action in parser_of_tool()._actions for name in action.option_strings]
    for word in overrides:
        name = word.partition("=")[0]
        if name.startswith("--") and "." not in name and name[2:] not in keys:
            near = suggest(name, [*own, *(f"--{key}" for key in keys)])
            if near:
                yield Problem(name, "no such option", remedy=near)


def checked(options: argparse.Namespace, overrides: list[str]) -> RunConfig:
    """The run's configuration, with everything checked that the training program checks.

    Raises:
        MegatronMerError: with what is wrong.
    """
    problems = list(option_problems(options, overrides))
    if problems:
        raise LaunchError(problems)
    seconds_of(options.time)
    config = load_config(options.config, overrides)
    prepare(config, options.nodes * ranks_per_node(options))
    return config


def ranks_per_node(options: argparse.Namespace) -> int:
    """One a GPU, or as many as were asked for."""
    return int(options.gpus_per_node or options.tasks_per_node)


def job_of(options: argparse.Namespace, config: RunConfig, folder: Path) -> Job:
    """The job, whose submission lies in a folder."""
    return Job(
        name=config.name,
        nodes=options.nodes,
        ranks_per_node=ranks_per_node(options),
        gpus_per_node=options.gpus_per_node,
        time=options.time,
        launcher=options.launcher,
        partition=options.partition,
        account=options.account,
        qos=options.qos,
        cpus_per_task=options.cpus_per_task,
        mem=options.mem,
        exclude=options.exclude,
        options=[option.strip().lstrip("-") for option in options.sbatch],
        max_restarts=config.launch.max_restarts_without_step,
        chained=options.chain > 1,
        accept=[kind for text in options.accept for kind in text.split(",")],
        work_dir=Path.cwd(),
        output_dir=Path(config.output_dir).absolute(),
        folder=folder,
        programs=Path(sys.executable).parent,
    )


def write(job: Job, config: RunConfig) -> Path:
    """Freeze code, configuration and environment beside the sbatch file; returns that one."""
    freeze_code(ROOT, job.folder / "code")
    script = job.folder / "job.sbatch"
    texts = {
        "config.yaml": to_yaml(config),
        "packages.txt": "\n".join(installed_packages()) + "\n",
        "environment.json": json.dumps(describe_environment(), indent=2) + "\n",
        script.name: sbatch_text(job),
    }
    for name, text in texts.items():
        (job.folder / name).write_text(text, encoding="utf-8")
    return script


def refuse_twins(output_dir: Path) -> None:
    """Two runs of one output_dir take each other's checkpoints and counts.

    Raises:
        LaunchError: another job has it, or a run in it is alive.
    """
    if jobs := known_jobs(output_dir / "slurm"):
        given = f"given {output_dir}, which jobs of Slurm have that are not over: {', '.join(jobs)}"
        remedy = f"wait for them, or `scancel {' '.join(jobs)}`"
        raise LaunchError([Problem("output_dir", given, remedy=remedy)])
    if twin := live_twin(output_dir):
        given = f"given {output_dir}, where {twin} is alive"
        raise LaunchError([Problem("output_dir", given, remedy="end it, or choose another")])


def submit_frozen(job: Job, config: RunConfig, jobs: int) -> list[str]:
    """Freeze the run and submit it; a submission that is refused leaves nothing behind."""
    try:
        return submit(write(job, config), jobs)
    except LaunchError:
        if not (job.folder / "jobs.txt").exists():
            shutil.rmtree(job.folder)
            for folder in (job.folder.parent, job.output_dir):
                if not any(folder.iterdir()):
                    folder.rmdir()
        raise


def counted(number: int, what: str) -> str:
    """`1 node`, `2 nodes`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def report(job: Job, ids: list[str]) -> str:
    """What was submitted, and how to watch and stop it."""
    ranks = counted(job.nodes * job.ranks_per_node, "rank")
    limit = f"{job.time} minutes" if job.time.isdigit() else job.time
    what = (
        f"job {ids[0]}" if len(ids) == 1 else f"{len(ids)} jobs in a chain, {ids[0]} to {ids[-1]}"
    )
    each = " each" if len(ids) > 1 else ""
    out, log = shlex.quote(str(job.output_dir)), shlex.quote(f"{job.folder}/job.log")
    return f"""\
submitted {what}: {ranks} on {counted(job.nodes, "node")}, {limit}{each}
code, configuration and environment are frozen in {job.folder}
  squeue --jobs {",".join(ids)}
  tail -F {log}
  python tools/watch.py {out}
  touch {out}/STOP          # checkpoint, then end for good; SAVE: checkpoint, then go on
  scancel {" ".join(ids)}"""


def work(options: argparse.Namespace, overrides: list[str]) -> None:
    """Check, write and submit."""
    config = checked(options, overrides)
    output_dir = Path(config.output_dir).absolute()
    by_hand = any(option.lstrip("-").startswith("cpus-per") for option in options.sbatch)
    if options.gpus_per_node and options.cpus_per_task is None and not by_hand:
        text = "without it many clusters give each rank one core: cores of a node / GPUs of a node"
        sys.stderr.write(f"warning: --cpus-per-task is not given; {text}\n")
    parent = output_dir / "slurm"
    if options.dry_run:
        print(sbatch_text(job_of(options, config, parent / DRY_FOLDER)), end="")
        return
    refuse_twins(output_dir)
    job = job_of(options, config, new_folder(parent))
    ids = submit_frozen(job, config, options.chain)
    print(report(job, ids))
    if reason := pending_reason(ids[0]):
        print(f"it waits: {reason} (squeue's reason)")


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    options, overrides = parse_arguments(arguments)
    return run_tool(lambda: work(options, overrides))


if __name__ == "__main__":
    sys.exit(main())

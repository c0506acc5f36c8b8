"""The quick start after installation: prepare the data, then train on two processes.

    make quickstart             # the same, with the installation before it
    make quickstart FRESH=1     # forget an earlier run: data and training begin anew

Started again it goes on where an earlier run stopped, or says that it is done.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from prepare import ROOT, StageError, prepare

CONFIG = Path("examples/quickstart/run.yaml")
OUTPUT = Path("runs/quickstart")
NUM_PROCESSES = 2
MAX_THREADS = 4  # a process; the model is too small to gain from more


def train(*, fresh: bool) -> int:
    """Start the training script under DeepSpeed's launcher and give its exit code."""
    command = ["deepspeed", "--quiet", "--num_accelerators", str(NUM_PROCESSES)]
    command += ["pretrain_llama_mer.py", "--config", str(CONFIG), *(["--fresh"] if fresh else [])]
    settings = _environment()
    if settings.get("DS_ACCELERATOR") == "cpu" and not _has_fast_bf16():
        print("   fp32 instead of bf16, which this CPU (no AVX-512) computes tens of times slower")
        command += ["--precision", "fp32"]
    shown = " ".join(f"{key}={value}" for key, value in settings.items())
    print(f"   {shown} {shlex.join(command)}", flush=True)
    # The launcher is found in PATH, and with it the Python that it starts.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return _call(command, {**os.environ, **settings, "PATH": path})


def _environment() -> dict[str, str]:
    """Variables for the training processes: threads, and the CPU where there are not two GPUs."""
    cores = len(os.sched_getaffinity(0))
    threads = max(1, min(MAX_THREADS, cores // NUM_PROCESSES))
    settings = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    if "DS_ACCELERATOR" not in os.environ and _count_gpus() < NUM_PROCESSES:
        settings["DS_ACCELERATOR"] = "cpu"
    return settings


def _count_gpus() -> int:
    """The GPUs that PyTorch can use; asks it only where a driver is."""
    answer = _ask_torch("torch.cuda.device_count()") if shutil.which("nvidia-smi") else None
    return int(answer or 0)


def _has_fast_bf16() -> bool:
    """Whether PyTorch has kernels for bfloat16 on this CPU: those that it has need AVX-512."""
    return _ask_torch("torch.backends.cpu.get_cpu_capability()") == "AVX512"


def _ask_torch(question: str) -> str | None:
    """The answer, from a process of its own."""
    command = [sys.executable, "-c", f"import torch; print({question})"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None


def _call(command: list[str], environment: dict[str, str]) -> int:
    """Run the command to its end; a Ctrl-C, which reaches it too, is for it to answer."""
    with subprocess.Popen(command, cwd=ROOT, env=environment) as run:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return run.wait()
        finally:
            signal.signal(signal.SIGINT, handler)


def _report(code: int) -> int:
    """Say how the run ended. Its own status file decides: launchers do not pass exit codes on."""
    try:
        status = json.loads((ROOT / OUTPUT / "status.json").read_text())
    except (OSError, ValueError):
        status = {}
    if status.get("status") == "done" and code == 0:
        files = ", ".join(str(OUTPUT / name) for name in ("summary.json", "report/losses.png"))
        print(f"   results: {files}; a page of all of it: python tools/report.py {OUTPUT}")
        return 0
    print(
        f"The run has not finished: exit code {code}, status.json: {status or 'missing'}.\n"
        "Start it again with `make quickstart`: it goes on from its last checkpoint.",
        file=sys.stderr,
    )
    return code or 1


def main() -> int:
    """Prepare, train, and give the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--fresh", action="store_true", help="begin anew: data and training")
    fresh = parser.parse_args().fresh
    start = time.monotonic()
    print("== Preparing the corpora: split, tokenizer, tokens", flush=True)
    try:
        prepare(fresh=fresh)
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("== Training five tasks with replay and Reptile", flush=True)
    code = _report(train(fresh=fresh))
    print(f"== {time.monotonic() - start:.0f} s in all after the installation", flush=True)
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

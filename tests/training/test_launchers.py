"""The same script under every launcher that can be installed without root."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "deepspeed": ("deepspeed", "--quiet", "--num_accelerators", "2", "--master_port"),
    "torchrun": ("torchrun", "--nproc-per-node", "2", "--master-port"),
    "python": ("python",),
}


def begin(project_root, name, port, *arguments):
    """Start the script under a launcher, in the background."""
    program, *options = LAUNCHERS[name]
    command = [str(BIN / program), *options, *([str(port)] if options else [])]
    return subprocess.Popen(
        [*command, str(project_root / "pretrain_llama_mer.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        },
    )


def launch(project_root, name, port, *arguments):
    """Start the script under a launcher; return the exit code and what was printed."""
    process = begin(project_root, name, port, *arguments)
    try:
        printed, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    return process.returncode, printed


def short(config):
    """Two tasks of three steps."""
    config["stream"] = [dict(entry, steps=3) for entry in config["stream"][:2]]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_trains_and_says_that_it_is_done(tiny, project_root, name):
    from megatron_mer.testing.ranks import free_port

    config = tiny.write("run", short)
    options = () if name == "python" else ("--parallel.pp_size=2",)
    code, printed = launch(project_root, name, free_port(), "--config", str(config), *options)
    assert code == 0, printed
    assert json.loads((tiny.folder / "run" / "status.json").read_text())["status"] == "done"
    assert [line["step"] for line in tiny.lines("run")] == [1, 2, 3, 4, 5, 6]
    assert "Held-out loss in nats a token" in printed
    assert (tiny.folder / "run" / "report" / "losses.png").exists()


def test_a_refusal_is_said_once_and_ends_all_ranks(tiny, project_root):
    from megatron_mer.testing.ranks import free_port

    config = tiny.write("run", short)
    code, printed = launch(
        project_root, "torchrun", free_port(), "--config", str(config), "--replay.alpha=1.0"
    )
    assert code != 0
    assert printed.count("error (ConfigError)") == 1, printed
    assert "replay.alpha: given 1.0" in printed


@pytest.mark.parametrize(
    "name",
    ["torchrun", *(pytest.param(one, marks=pytest.mark.slow) for one in ("deepspeed", "python"))],
)
def test_sigterm_to_the_launcher_ends_with_a_checkpoint(tiny, project_root, name):
    from megatron_mer.testing.ranks import free_port

    def long(config):
        config["stream"] = [dict(config["stream"][0], steps=400, max_epochs=99)]
        config["checkpoint"] = {}

    config = tiny.write("run", long)
    run = tiny.folder / "run"
    process = begin(project_root, name, free_port(), "--config", str(config))
    try:
        end = time.monotonic() + 90
        while time.monotonic() < end and not (run / "metrics.jsonl").exists():
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "requeue", printed
    assert status["reason"].startswith("signal SIGTERM asked the run to end")
    assert 0 < status["step"] < 400
    assert [line["step"] for line in tiny.lines("run")] == list(range(1, status["step"] + 1))
    assert (run / "checkpoints" / f"step_{status['step']:09d}").is_dir()
    # torchrun and deepspeed have codes of their own.
    assert name != "python" or process.returncode == 4

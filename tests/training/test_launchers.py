"""The same script under every launcher that can be installed without root."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "deepspeed": ("deepspeed", "--quiet", "--num_accelerators", "2", "--master_port"),
    "torchrun": ("torchrun", "--nproc-per-node", "2", "--master-port"),
    "python": ("python",),
}


def launch(project_root, name, port, *arguments):
    """Start the script under a launcher; return the exit code and what was printed."""
    program, *options = LAUNCHERS[name]
    command = [str(BIN / program), *options, *([str(port)] if options else [])]
    done = subprocess.run(
        [*command, str(project_root / "pretrain_llama_mer.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env={
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        },
    )
    return done.returncode, done.stdout + done.stderr


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

"""tools/requeue.py: what the scripts of a job read of it."""

import json
import subprocess
import sys
from pathlib import Path

from megatron_mer.launch.requeue import write_object

TOOL = Path(__file__).parents[2] / "tools" / "requeue.py"


def ask(*arguments):
    done = subprocess.run(
        [sys.executable, TOOL, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def status(state, step):
    return {"status": state, "step": step}


def test_the_program_answers_by_its_exit_code_and_one_line(tmp_path):
    code, said = ask("begin", str(tmp_path / "run"), "--submission", "s")
    assert (code, said) == (0, "requeue.py: start: from the beginning\n")
    write_object(tmp_path / "run" / "status.json", status("done", 3))
    code, said = ask("end", str(tmp_path / "run"), "--exit-code", "0")
    assert (code, said) == (3, "requeue.py: end: done at step 3\n")
    write_object(tmp_path / "run" / "bad_nodes.json", {"n3": "x", "n1": "y"})
    assert ask("bad-nodes", str(tmp_path / "run")) == (0, "n1,n3\n")
    code, _ = ask("begin", str(tmp_path / "run"), "--submission", "t")
    assert code == 0
    assert not (tmp_path / "run" / "bad_nodes.json").exists()
    kept = json.loads((tmp_path / "run" / "restarts.json").read_text())
    assert kept["submission"] == "t"

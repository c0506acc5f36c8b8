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
    code, said = ask("end", str(tmp_path / "run"), "--submission", "s", "--exit-code", "0")
    assert (code, said) == (3, "requeue.py: end: done at step 3\n")
    write_object(tmp_path / "run" / "bad_nodes.json", {"n3": "x"})
    assert ask("leave-out", str(tmp_path / "run"), "--nodes", "n1", "--why", "y") == (0, "")
    assert ask("bad-nodes", str(tmp_path / "run")) == (0, "n1,n3\n")
    code, _ = ask("begin", str(tmp_path / "run"), "--submission", "t")
    assert code == 0
    assert not (tmp_path / "run" / "bad_nodes.json").exists()
    kept = json.loads((tmp_path / "run" / "restarts.json").read_text())
    assert kept["submission"] == "t"


def test_a_record_that_cannot_be_written_does_not_keep_a_job_from_running_again(tmp_path):
    run = tmp_path / "run"
    assert ask("begin", str(run), "--submission", "s")[0] == 0
    # As on a full disk: a folder stands where the new record is written first.
    (run / ".restarts.json.tmp").mkdir()
    command = [sys.executable, TOOL, "end", run, "--submission", "s", "--exit-code", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "requeue.py: requeue: not begun at step 0" in done.stdout
    assert f"requeue.py: {run}/restarts.json: Is a directory" in done.stderr
    last = subprocess.run([*command, "--max-restarts", "0"], capture_output=True, text=True)
    assert last.returncode == 1
    assert "requeue.py: fail: " in last.stdout
    assert f"error: {run}/restarts.json: Is a directory" in last.stderr
    begin = [sys.executable, TOOL, "begin", run, "--submission", "s"]
    again = subprocess.run(begin, capture_output=True, text=True, timeout=60)
    assert again.returncode == 1, "a disk that stays full ends the job"


def test_the_run_says_how_often_it_may_fail(tmp_path):
    """As in the files of examples/slurm, which do not know the configuration."""
    for number, limit in enumerate((1, 3)):
        run = tmp_path / str(number)
        ask("begin", str(run), "--submission", "s")
        if limit == 1:
            (run / "config.yaml").write_text("launch: {max_restarts_without_step: 1}\n")
        codes = []
        while not codes or codes[-1] == 0:
            write_object(run / "status.json", {**status("failed", 0), "pid": len(codes)})
            codes.append(ask("end", str(run), "--submission", "s", "--exit-code", "1")[0])
        assert codes == [0] * limit + [1]

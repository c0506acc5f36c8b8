"""tools/watch.py: one picture, a snapshot as JSON, and a terminal that lives."""

import fcntl
import importlib.util
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import ModuleType

import pytest

from megatron_mer.config import load_config, to_yaml
from megatron_mer.training.preflight import prepare

TOOL = Path(__file__).parents[2] / "tools" / "watch.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("watch_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tiny):
    """A run's directory as it stands after eight of twenty batches."""
    config = load_config(tiny.write("run"))
    folder = tiny.folder / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "plan.json").write_text(json.dumps(prepare(config, 1).plan.history()))
    (folder / "status.json").write_text('{"status": "running", "step": 5, "reason": ""}')
    add_steps(folder, range(8))
    return folder


def add_steps(folder, batches) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        for batch in batches:
            line = {
                "step": batch + 1,
                "batch": batch,
                "task": "fr",
                "loss": 5.0,
                "step_seconds": 0.5,
            }
            file.write(json.dumps(line) + "\n")


def test_one_picture_where_there_is_no_terminal(tool, folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for options in ([], ["--once"]):
        assert tool.main([str(folder), *options]) == 0
        said = capsys.readouterr()
        assert said.err == ""
        assert "\x1b" not in said.out
        lines = said.out.splitlines()
        assert lines[0].startswith("tiny  running  task fr (2 of 3)")
        assert "batch 8 of 20  40.0%  about 0:06 left" in lines
        assert max(map(len, lines)) <= 80


def test_json_is_the_snapshot(tool, folder, capsys):
    assert tool.main([str(folder), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert (seen["status"], seen["batches"], seen["total_batches"]) == ("running", 8, 20)
    assert [task["state"] for task in seen["tasks"]] == ["past", "current", "future"]
    assert tool.main([str(folder), str(folder), "--json"]) == 0
    assert [one["batches"] for one in json.loads(capsys.readouterr().out)] == [8, 8]


def test_several_runs_take_a_line_each(tool, folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert tool.main([str(folder), str(folder), "--once"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "40%" in lines[1]


def test_what_is_no_run_is_named(tool, folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    runs = [str(tmp_path / "nowhere"), str(folder), str(tmp_path / "empty")]
    for option in ("--once", "--json"):
        assert tool.main([*runs, option]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert "nowhere, which does not exist; allowed: the directory (output_dir)" in said.err
        assert "empty, which holds no run" in said.err
        assert str(folder) + "," not in said.err


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "x"])
def test_an_interval_that_is_none(tool, value, capsys):
    with pytest.raises(SystemExit) as error:
        tool.main(["run", f"--interval={value}"])
    assert error.value.code == 2
    assert "--interval" in capsys.readouterr().err


def test_a_closed_pipe_and_an_ascii_output_end_well(folder):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    command = [sys.executable, str(TOOL), str(folder), "--once"]
    text = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=True)
    assert text.stderr == b""
    assert b"tiny  running" in text.stdout
    assert text.stdout.isascii()
    closed = subprocess.run(
        f"{sys.executable} {TOOL} {folder} --json | head -c 1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (closed.returncode, closed.stderr) == (0, b"")


# A terminal ---------------------------------------------------------------------------------------


class Terminal:
    """The tool on a terminal of 80 x 24; what it wrote so far."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.master, slave = pty.openpty()
        self.resize(80, 24)
        self.process = subprocess.Popen(
            [sys.executable, str(TOOL), *arguments, "--interval", "0.1"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**clean_environment(), "TERM": "xterm-256color", **environment},
            start_new_session=True,
            # What a background job of a shell starts ignores Ctrl-C; a terminal's program does not.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(slave)
        self.data = b""

    @property
    def text(self) -> str:
        return self.data.decode(errors="replace")

    def forget(self) -> None:
        self.data = b""

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def read(self) -> bool:
        """Take what was written; whether more may come."""
        if select.select([self.master], [], [], 0.2)[0]:
            try:
                self.data += os.read(self.master, 65536)
            except OSError:  # The other end is closed.
                return False
        return True

    def wait_for(self, word: str) -> None:
        end = time.monotonic() + 60
        while word not in self.text:
            assert time.monotonic() < end, f"{word!r} did not come: {self.text[-3000:]}"
            assert self.read(), f"ended without {word!r}: {self.text[-3000:]}"

    def end(self) -> int:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        end = time.monotonic() + 60
        while self.read():
            assert time.monotonic() < end, f"Ctrl-C did not end it: {self.text[-3000:]}"
        os.close(self.master)
        return self.process.wait(timeout=30)


@pytest.fixture
def open_terminal():
    """Starts the tool on a terminal; one that a failed test leaves behind is ended."""
    opened: list[Terminal] = []

    def start(*arguments: str, **environment: str) -> Terminal:
        opened.append(Terminal(*arguments, **environment))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.process.kill()
        terminal.process.wait(timeout=30)


def clean_environment() -> dict[str, str]:
    left_out = ("COLUMNS", "LINES", "NO_COLOR", "TERM", "FORCE_COLOR", "LC_ALL")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**kept, "LANG": "C.UTF-8", "PYTHONUTF8": "1"}


def test_a_terminal_follows_the_run_until_ctrl_c(folder, open_terminal):
    terminal = open_terminal(str(folder))
    terminal.wait_for("batch 8 of 20")
    terminal.wait_for("Ctrl-C ends")
    assert "\x1b[32m" in terminal.text or "\x1b[1;32m" in terminal.text
    add_steps(folder, range(8, 11))
    terminal.wait_for("batch 11 of 20")
    aside = folder.with_name("aside")
    folder.rename(aside)
    terminal.wait_for("waiting for")
    aside.rename(folder)
    terminal.forget()
    terminal.wait_for("batch 11 of 20")
    terminal.forget()
    terminal.resize(60, 20)
    terminal.wait_for("\x1b[32m" + "━" * 21 + "╋")  # at 80 columns it is 28 of them
    assert terminal.end() == 130
    assert "Traceback" not in terminal.text
    # The terminal is given back, with the last picture on it.
    after = terminal.text.rpartition("\x1b[?1049l")[2]
    assert "\x1b[?25h" in terminal.text
    assert "batch 11 of 20" in after


def test_a_terminal_waits_for_a_run_and_knows_no_color(tmp_path, open_terminal):
    terminal = open_terminal(str(tmp_path / "later"), NO_COLOR="1")
    terminal.wait_for("waiting for")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", terminal.text)
    assert terminal.end() == 130
    assert "Traceback" not in terminal.text


def test_a_dumb_terminal_gets_one_picture(folder, open_terminal):
    terminal = open_terminal(str(folder), TERM="dumb")
    terminal.wait_for("batch 8 of 20")
    assert terminal.process.wait(timeout=30) == 0
    assert "\x1b" not in terminal.text
    os.close(terminal.master)

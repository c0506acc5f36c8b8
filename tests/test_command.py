"""The frame of the tools: errors become a line and an exit code, whatever the output is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAD = "import sys; from megatron_mer.command import run_tool; from megatron_mer.errors import *\n"


def tool(body: str, stdout: int | None = subprocess.PIPE) -> subprocess.Popen[str]:
    """A process whose tool has the body."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    code = f"{HEAD}def work():\n{lines}sys.exit(run_tool(work))\n"
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("body", "code", "error"),
    [
        ("print('ä')", 0, ""),
        ("return 7", 7, ""),
        ("raise DataError('x.bin: torn')", 2, "error: x.bin: torn\n"),
        ("raise RunStopped('bound')", 3, "error: bound\n"),
        ("open('/nowhere/x', 'w')", 1, "error: /nowhere/x: No such file or directory\n"),
        ("raise KeyboardInterrupt", 130, ""),
    ],
)
def test_code_and_line(body: str, code: int, error: str) -> None:
    process = tool(body)
    assert process.communicate(timeout=60)[1] == error
    assert process.returncode == code


@pytest.mark.parametrize("lines", [1, 100_000])
def test_full_disk_behind_the_output(lines: int) -> None:
    with open("/dev/full", "w") as full:
        process = tool(f"for _ in range({lines}): print('x')", full.fileno())
    error = process.communicate(timeout=60)[1]
    assert error == "error: the output cannot be written: No space left on device\n"
    assert process.returncode == 1


def test_reader_that_has_seen_enough() -> None:
    process = tool("print('x', flush=True)\nfor _ in range(9**6): print('y')")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "x\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 0


def test_mistake_of_the_program_keeps_its_traceback() -> None:
    process = tool("return [][1]")
    assert "IndexError" in process.communicate(timeout=60)[1]

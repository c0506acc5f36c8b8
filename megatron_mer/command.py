"""The frame of a command line tool: from the errors of its work to lines and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from megatron_mer.errors import MegatronMerError

INTERRUPTED = 130
"""The shell's exit code of a program that Ctrl-C ended."""
CANNOT_WRITE = 1


def run_tool(work: Callable[[], int | None], errors: str = "backslashreplace") -> int:
    """Do a tool's work.

    What the user can mend becomes one `error:` line on standard error: a `MegatronMerError`, and
    an `OSError` such as a full disk behind standard output. A reader that has seen enough (`head`,
    `less`) is no error.

    Args:
        work: the tool without its command line; None stands for success.
        errors: how standard output and error write what the terminal's encoding lacks, as in
            `io.TextIOWrapper`.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors=errors)  # type: ignore[union-attr]
    try:
        code = work() or 0
        sys.stdout.flush()
        return code
    except MegatronMerError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except BrokenPipeError:
        _drop_output()
        return 0
    except OSError as error:
        _drop_output()
        place = error.filename or "the output cannot be written"
        sys.stderr.write(f"error: {place}: {error.strerror or error}\n")
        return CANNOT_WRITE
    except KeyboardInterrupt:
        return INTERRUPTED


def _drop_output() -> None:
    """Let what standard output still buffers go nowhere, or Python fails again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

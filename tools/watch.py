"""Watch runs while they train, from their output directories alone: no GPU, no torch.

Examples:
    python tools/watch.py runs/mine
    python tools/watch.py runs/a runs/b --interval 10
    python tools/watch.py runs/mine --once
    python tools/watch.py runs/mine --json

One run fills the terminal, several take a line each. Nothing is written, so anybody who may read
the directory can watch, from any machine that sees it. Ctrl-C ends. Where the output is no
terminal one picture is printed, as with --once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

# A machine that only looks at runs needs no installed package and no torch.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.live import Live
from rich.text import Text

from megatron_mer.analysis.runs_view import runs_view
from megatron_mer.analysis.snapshot import Snapshot
from megatron_mer.analysis.watch_view import full_view
from megatron_mer.command import run_tool
from megatron_mer.errors import ConfigError, Problem
from megatron_mer.training.follow import RunFollower

PLAIN_WIDTH = 100  # columns where there is no terminal and COLUMNS is not set
NARROWEST = 20
RESIZE_SECONDS = 0.25  # between two looks at the terminal's size


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="the directory of a run (its output_dir)")
    add("--once", action="store_true", help="print one picture and end")
    add("--json", action="store_true", help="print what is known now as JSON and end")
    add(
        "--interval",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="between two looks at the files (default: %(default)g)",
    )
    options = parser.parse_args(arguments)
    if not 0.1 <= options.interval <= 86400:
        parser.error(f"--interval: given {options.interval:g}; allowed: 0.1 to 86400 seconds")
    return options


def check_there(snapshots: Sequence[Snapshot]) -> None:
    """Refuse what is no run, where nobody waits for it to become one.

    Raises:
        ConfigError: with every such directory.
    """
    problems = []
    for one in snapshots:
        if one.status == "absent":
            what = "is no directory" if Path(one.directory).exists() else "does not exist"
            given = f"given {one.directory}, which {what}"
        elif one.status == "starting" and not one.tasks and not one.batches:
            given = f"given {one.directory}, which holds no run (no status.json)"
        else:
            continue
        problems.append(Problem("RUN", given, "the directory (output_dir) of a run that began"))
    if problems:
        raise ConfigError(problems)


def draw(snapshots: Sequence[Snapshot], console: Console, height: int | None) -> Text:
    """One run in full, several a line each."""
    width, ascii_only = max(NARROWEST, console.width), console.options.ascii_only
    if len(snapshots) == 1:
        return full_view(snapshots[0], width, height, ascii_only=ascii_only)
    return runs_view(snapshots, width, height, ascii_only=ascii_only)


def show_once(followers: Sequence[RunFollower], console: Console, as_json: bool) -> None:
    """Print what is known now."""
    snapshots = [follower.look() for follower in followers]
    check_there(snapshots)
    if as_json:
        values = [asdict(one) for one in snapshots]
        text = json.dumps(values[0] if len(values) == 1 else values, ensure_ascii=False, indent=2)
        print(text)
    else:
        console.print(draw(snapshots, console, None), crop=False, soft_wrap=True)


def show_live(followers: Sequence[RunFollower], console: Console, interval: float) -> None:
    """Draw until somebody interrupts; what was drawn last stays on the terminal."""
    snapshots = [follower.look() for follower in followers]
    try:
        with Live(console=console, auto_refresh=False, screen=True, transient=False) as live:
            while True:
                begin = time.monotonic()
                drawn = None
                while drawn is None or time.monotonic() - begin < interval:
                    if drawn != console.size:
                        drawn = console.size
                        live.update(framed(snapshots, console, interval), refresh=True)
                    time.sleep(min(RESIZE_SECONDS, interval))
                snapshots = [follower.look() for follower in followers]
    finally:
        with suppress(OSError):
            console.print(draw(snapshots, console, console.height - 2))


def framed(snapshots: Sequence[Snapshot], console: Console, interval: float) -> Text:
    """The picture, and in the terminal's last line how old it is."""
    height = max(2, console.height)
    picture = draw(snapshots, console, height - 1)
    lines = picture.plain.count("\n") + 1
    said = f"{time.strftime('%H:%M:%S')}, every {interval:g} s; Ctrl-C ends"
    picture.append("\n" * (height - lines))
    return picture.append(said[: console.width], style="dim")


def show(options: argparse.Namespace) -> None:
    """Show the runs once, or go on showing them where there is a terminal."""
    terminal = sys.stdout.isatty()
    width = None if terminal or "COLUMNS" in os.environ else PLAIN_WIDTH
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    followers = [RunFollower(run) for run in options.runs]
    if options.json or options.once or not terminal or console.is_dumb_terminal:
        show_once(followers, console, options.json)
    else:
        show_live(followers, console, options.interval)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    options = parse_arguments(arguments)
    # One character stands for one that is missing, or the columns would not line up.
    return run_tool(lambda: show(options), errors="replace")


if __name__ == "__main__":
    sys.exit(main())

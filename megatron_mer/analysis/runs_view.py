"""Several runs as lines for a terminal, one a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

from megatron_mer.analysis.snapshot import Snapshot, duration
from megatron_mer.analysis.terminal import clock, columns, fit, padded, plain, shortened
from megatron_mer.analysis.watch_view import ALARM, DASH, FAINT, STATUS_STYLES

_GAP = "  "
_BAR = 10  # columns
_TASK = 10  # columns of a task's name at most
_NAMES = (28, 14)  # columns of a run's name at most, and at least
_HEADS = (
    *("run", "status", "task", ""),
    *("done", "loss", "forgetting", "tokens/s", "left", "last step"),
)
_TEXTS = ("run", "status", "task", "")
# Columns that are left out where there is no room, first to last.
_DROPPABLE = ("", "tokens/s", "task", "last step", "loss", "left")


def runs_view(
    snapshots: Sequence[Snapshot],
    width: int,
    height: int | None = None,
    *,
    ascii_only: bool = False,
) -> Text:
    """A line a run, and one below it for what somebody should look at.

    Args:
        snapshots: the runs.
        width: columns, at least 20.
        height: lines at most; runs without an alarm are left out first. None: as many as needed.
        ascii_only: the terminal has no other characters.

    Returns:
        Lines, none wider than `width`.
    """
    shown = list(snapshots)
    if height is not None and _lines_of(shown) > height:
        calm = [one for one in shown if not one.alarms]
        while calm and _lines_of(shown) + 1 > height:
            gone = calm.pop()
            shown = [one for one in shown if one is not gone]
    lines = _lines(shown, _names(snapshots), width, ascii_only)
    if left := len(snapshots) - len(shown):
        lines.append(fit(Text(f"and {left} more", style=FAINT), width))
    return Text("\n", no_wrap=True).join(lines[:height])


def _name(name: str, width: int) -> str:
    """A name in at most so many columns; of a directory the end is what tells it from others."""
    if cell_len(name) <= width or "/" not in name:
        return shortened(name, width)
    while cell_len(name) >= width:
        name = name[1:]
    return "…" + name


def _lines_of(snapshots: Sequence[Snapshot]) -> int:
    return 1 + sum(2 if _said(one) else 1 for one in snapshots)


def _names(snapshots: Sequence[Snapshot]) -> dict[str, str]:
    """Directory -> the run's name, or the directory where two runs have one name."""
    counts = Counter(one.name for one in snapshots)
    return {
        one.directory: plain(one.name if counts[one.name] == 1 else one.directory)
        for one in snapshots
    }


def _lines(
    snapshots: Sequence[Snapshot], names: dict[str, str], width: int, ascii_only: bool
) -> list[Text]:
    heads = list(_HEADS)
    droppable = list(_DROPPABLE)
    longest = _NAMES[0]
    while True:
        rows = [_cells(one, _name(names[one.directory], longest), ascii_only) for one in snapshots]
        cells = [[row[head] for head in heads] for row in rows]
        lines = columns(heads, cells, names=sum(head in _TEXTS for head in heads))
        if cell_len(_GAP.join(lines[0])) <= width:
            break
        if longest > _NAMES[1]:
            longest -= 1
        elif droppable:
            heads.remove(droppable.pop(0))
            longest = _NAMES[0]
        else:
            break
    found = [fit(Text(_GAP.join(lines[0]), style=FAINT), width)]
    for one, line in zip(snapshots, lines[1:], strict=True):
        text = Text().append(line[0] + _GAP, style="bold")
        text.append(line[1], style=STATUS_STYLES.get(one.status))
        text.append(_GAP + _GAP.join(line[2:]))
        found.append(fit(text, width))
        if said := _said(one):
            found.append(fit(Text("  ").append(f" {plain(said)} ", style=ALARM), width))
    return found


def _said(snapshot: Snapshot) -> str:
    """What stands below a run's line, if anything does."""
    said = "; ".join(snapshot.alarms)
    return said or (snapshot.reason if snapshot.status in ("failed", "stopped") else "")


def _cells(snapshot: Snapshot, name: str, ascii_only: bool) -> dict[str, str]:
    """Head -> cell of one run."""
    share = snapshot.batches / snapshot.total_batches if snapshot.total_batches else None
    full, empty = "#-" if ascii_only else "━─"
    filled = 0 if share is None else int(share * _BAR)
    mean = snapshot.losses.mean if snapshot.losses else None
    forgetting = snapshot.evaluated.mean_forgetting if snapshot.evaluated else None
    speed = snapshot.speed.tokens_per_second if snapshot.speed else None
    left, quiet = snapshot.seconds_left, snapshot.quiet_seconds
    return {
        "run": name,
        "status": snapshot.status,
        "": padded(full * filled + empty * (_BAR - filled), _BAR),
        "done": DASH if share is None else f"{share:.0%}",
        "task": DASH if snapshot.task is None else shortened(plain(snapshot.task), _TASK),
        "loss": DASH if mean is None else f"{mean:.3f}",
        "forgetting": DASH if forgetting is None else f"{forgetting:+.3f}",
        "tokens/s": DASH if speed is None else f"{speed:,.0f}",
        "left": DASH if left is None else clock(left),
        "last step": DASH if quiet is None else f"{duration(quiet)} ago",
    }

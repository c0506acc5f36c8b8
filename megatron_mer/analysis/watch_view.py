"""A run at one moment as lines for a terminal; `tools/watch.py` draws them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

from megatron_mer.analysis.snapshot import HeldOut, Snapshot, duration
from megatron_mer.analysis.terminal import (
    chart,
    clock,
    columns,
    ends,
    fit,
    flow,
    padded,
    plain,
    shortened,
    spark,
)

DASH = "-"
STATUS_STYLES = {
    "running": "bold green",
    "done": "bold cyan",
    "failed": "bold white on red",
    "stopped": "bold yellow",
    "requeue": "bold yellow",
}
ALARM = "bold white on red"
FAINT = "dim"
_STATES = {"before": "before", "past": "past", "current": "now", "future": "later"}
_NAME = 16  # columns of a set's name at most
_CHART = (3, 12)  # lines of the chart at least and at most
_UNBOUNDED_CHART = 8
_TABLE = 8  # lines of the table that the chart gives way to
_WARNINGS = 2  # lines of warnings that have their place in any case
_MATRIX = 4  # lines from which on the matrix is worth its place
_DROPPABLE = ("start", "best", "task")  # columns left out where there is no room, first to last
_TREND_WIDTH, _TREND = 88, 16  # columns from which on there is a trend, and what it takes


def full_view(
    snapshot: Snapshot, width: int, height: int | None = None, *, ascii_only: bool = False
) -> Text:
    """All of one run.

    Args:
        snapshot: the run.
        width: columns, at least 20.
        height: lines at most; what matters least is left out. None: as many as there are.
        ascii_only: the terminal has no other characters: no charts.

    Returns:
        Lines, none wider than `width`.
    """
    head = _head(snapshot, width, ascii_only)
    table, warnings = _table(snapshot, width, ascii_only), _warnings(snapshot, width)
    if height is None:
        plot = _chart(snapshot, width, _UNBOUNDED_CHART, ascii_only)
        sections = [head, plot, table, _matrix(snapshot, width), warnings]
        return _stacked([section for section in sections if section], spaces=len(sections))
    room = height - len(head)
    # In the order of what matters: a word of warning, the sets, the curve, the matrix, the rest.
    said = warnings[-min(_WARNINGS, max(0, room)) :] if room > 0 else []
    room -= len(said)
    least = _CHART[0] + 1 if snapshot.curve and not ascii_only else 0
    table = _cut_table(snapshot, table, width, max(room - least, min(room, _TABLE)), ascii_only)
    room -= len(table)
    matrix = _matrix(snapshot, width, room - least)
    if len(matrix) < _MATRIX:
        matrix = []
    room -= len(matrix)
    plot = _chart(snapshot, width, min(room, _CHART[1] + 1) - 1, ascii_only)
    room -= len(plot)
    more = len(warnings) - len(said)
    said = warnings[max(0, more - max(0, room)) :] if more else said
    room -= len(said) - min(len(said), _WARNINGS)
    sections = [section for section in (head, plot, table, matrix, said) if section]
    return _stacked(sections, room, height)


def _stacked(sections: Sequence[Sequence[Text]], spaces: int, height: int | None = None) -> Text:
    lines: list[Text] = []
    for at, section in enumerate(sections):
        if at and spaces > 0:
            lines.append(Text())
            spaces -= 1
        lines += section
    return Text("\n", no_wrap=True).join(lines[:height])


# What always stands there ---------------------------------------------------------------------


def _head(snapshot: Snapshot, width: int, ascii_only: bool) -> list[Text]:
    lines = [_title(snapshot, width)]
    lines += [fit(Text(f" {plain(alarm)} ", style=ALARM), width) for alarm in snapshot.alarms]
    if snapshot.reason:
        style = "red" if snapshot.status == "failed" else "yellow"
        lines.append(fit(Text(plain(snapshot.reason), style=style), width))
    if snapshot.status == "absent":
        lines.append(fit(Text(f"waiting for {plain(snapshot.directory)}", style="yellow"), width))
    lines += _progress(snapshot, width, ascii_only)
    for fields in (_training(snapshot), _machine(snapshot), _state(snapshot)):
        lines += flow(fields, width)
    return lines + [fit(Text(plain(note), style="yellow"), width) for note in snapshot.notes]


def _title(snapshot: Snapshot, width: int) -> Text:
    left = Text().append(plain(snapshot.name), style="bold")
    left.append("  ").append(f"{snapshot.status}", style=STATUS_STYLES.get(snapshot.status, "bold"))
    current = next((span for span in snapshot.tasks if span.state == "current"), None)
    if current is not None:
        trained = [span for span in snapshot.tasks if span.state != "before"]
        place = trained.index(current) + 1
        left.append(f"  task {plain(current.task)} ({place} of {len(trained)})")
    return ends(left, Text(_since(snapshot), style=FAINT), width)


def _since(snapshot: Snapshot) -> str:
    if snapshot.quiet_seconds is None:
        return ""
    return f"last step {duration(snapshot.quiet_seconds)} ago"


def _progress(snapshot: Snapshot, width: int, ascii_only: bool) -> list[Text]:
    total, done = snapshot.total_batches, snapshot.batches
    if not total:
        return [fit(Text(f"batch {done:,}"), width)] if done else []
    words = [f"batch {done:,} of {total:,}", f"{done / total:.1%}"]
    if snapshot.seconds_left is not None:
        words.append(f"about {clock(snapshot.seconds_left)} left")
    return [*_bar(snapshot, total, width, ascii_only), fit(Text("  ".join(words)), width)]


def _bar(snapshot: Snapshot, total: int, width: int, ascii_only: bool) -> list[Text]:
    """The stream from left to right, its tasks divided, and their names below."""
    spans = [span for span in snapshot.tasks if span.state != "before"]
    starts = [round(span.first_batch / total * width) for span in spans]
    full, empty, full_divide, divide = "#-||" if ascii_only else "━─╋┼"
    reached = int(snapshot.batches / total * width)
    chars = [
        (full_divide if border else full) if column < reached else (divide if border else empty)
        for column in range(width)
        for border in [column > 0 and column in starts]
    ]
    bar = Text().append("".join(chars[:reached]), style="green")
    bar.append("".join(chars[reached:]), style=FAINT)
    names = Text()
    rooms = [end - start for start, end in zip(starts, [*starts[1:], width], strict=True)]
    if all(cell_len(plain(s.task)) < room for s, room in zip(spans, rooms, strict=True)):
        for span, room in zip(spans, rooms, strict=True):
            style = "bold green" if span.state == "current" else FAINT
            names.append(padded(plain(span.task), room), style=style)
        return [bar, names]
    current = next((at for at, span in enumerate(spans) if span.state == "current"), None)
    if current is None:
        return [bar]
    name = shortened(plain(spans[current].task), width - 2)
    start = min(starts[current], width - cell_len(name) - 2)
    return [bar, Text(f"{' ' * start}{'^' if ascii_only else '▲'} {name}", style="bold green")]


def _field(label: str, value: str, style: str = "") -> Text:
    return Text().append(f"{label} ", style=FAINT).append(value, style=style or None)


def _training(snapshot: Snapshot) -> list[Text]:
    fields = [] if snapshot.step is None else [_field("step", f"{snapshot.step:,}")]
    losses = snapshot.losses
    if losses is None:
        return fields
    none = losses.loss is None
    fields.append(_field("loss", _loss(losses.loss), "bold red" if none else "bold"))
    fields.append(_field("fresh", _loss(losses.fresh)))
    if losses.replay is not None:
        fields.append(_field("replay", _loss(losses.replay)))
    fields.append(_field(f"mean of {losses.mean_of}", _loss(losses.mean)))
    if snapshot.lr is not None:
        fields.append(_field("lr", f"{snapshot.lr:.2e}"))
    if losses.grad_norm is not None:
        fields.append(_field("grad norm", f"{losses.grad_norm:.3g}"))
    return fields


def _machine(snapshot: Snapshot) -> list[Text]:
    speed = snapshot.speed
    if speed is None:
        return []
    fields = [_field("s/step", f"{speed.step_seconds:.3g}")]
    if speed.tokens_per_second is not None:
        fields.insert(0, _field("tokens/s", f"{speed.tokens_per_second:,.0f}"))
    if speed.mfu is not None:
        fields.append(_field("MFU", f"{speed.mfu:.1%}"))
    if speed.data_wait is not None:
        style = "bold yellow" if speed.data_wait > 0.05 else ""
        fields.append(_field("data wait", f"{speed.data_wait:.1%}", style))
    if speed.memory_gib is not None:
        fields.append(_field("memory", f"{speed.memory_gib:.1f} GiB"))
    return fields


def _state(snapshot: Snapshot) -> list[Text]:
    fields = []
    reptile, checkpoint = snapshot.reptile, snapshot.checkpoint
    if reptile is not None:
        of = "" if reptile.k is None else f" of {reptile.k}"
        fields.append(_field("Reptile", f"{reptile.updates_since}{of} updates since the last"))
        if reptile.delta_norm is not None:
            fields.append(_field("delta norm", f"{reptile.delta_norm:.3g}"))
        if reptile.delta_cosine is not None:
            fields.append(_field("cosine", f"{reptile.delta_cosine:+.2f}"))
    if checkpoint is not None:
        age = f"step {checkpoint.step:,}, {duration(checkpoint.age_seconds)} ago"
        fields.append(_field("checkpoint", age))
    return fields


# What takes the place that is left ------------------------------------------------------------


def _warnings(snapshot: Snapshot, width: int) -> list[Text]:
    return [
        fit(Text(plain(line), style="red" if " ERROR " in line else "yellow"), width)
        for line in snapshot.warnings
    ]


def _chart(snapshot: Snapshot, width: int, height: int, ascii_only: bool) -> list[Text]:
    if ascii_only or height < 2 or len(snapshot.curve) < 2:
        return []
    title = f"training loss, batches 0 to {snapshot.batches:,}"
    lines = chart(snapshot.curve, width, height)
    return [fit(Text(title, style=FAINT), width), *(Text(line, style="cyan") for line in lines)]


def _cut_table(
    snapshot: Snapshot, table: list[Text], width: int, height: int, ascii_only: bool
) -> list[Text]:
    """The table with the sets that matter most, if not all of them fit."""
    if len(table) <= height:
        return table
    if height < 3:
        return []
    sets = snapshot.held_out
    ranked = sorted(sets, key=lambda one: (one.state != "current", -(one.forgetting or -1e9)))
    chosen = {one.name for one in ranked[: height - 2]}
    kept = [one for one in sets if one.name in chosen]
    left = len(sets) - len(kept)
    said = Text(f"and {left} more, with less forgetting or none", style=FAINT)
    return [*_table(snapshot, width, ascii_only, kept), fit(said, width)]


def _table(
    snapshot: Snapshot, width: int, ascii_only: bool, sets: Sequence[HeldOut] | None = None
) -> list[Text]:
    """The held-out sets. Forgetting > 0 is worse."""
    sets = snapshot.held_out if sets is None else sets
    if not sets:
        return []
    step = snapshot.evaluated.step if snapshot.evaluated else 0
    trend = width >= _TREND_WIDTH and not ascii_only
    heads = [f"held out, step {step:,}", "task", "start", "best", "now", "forgetting"]
    rows = [_set_cells(one) for one in sets]
    lines = columns(heads, rows, names=2)
    for column in _DROPPABLE:
        if cell_len("  ".join(lines[0])) <= width:
            break
        at = heads.index(column)
        heads, rows = _without(heads, at), [_without(row, at) for row in rows]
        heads[0] = "held out"
        lines = columns(heads, rows, names=1 + ("task" in heads))
    found = [
        fit(Text("  ".join(lines[0]) + ("  over the run" if trend else ""), style=FAINT), width)
    ]
    for one, cells in zip(sets, lines[1:], strict=True):
        style = {"current": "bold", "future": FAINT}.get(one.state or "", "")
        line = Text("  ".join(cells[:-1]) + "  ", style=style)
        line.append(cells[-1], style=_forgetting_style(one.forgetting, snapshot.max_forgetting))
        if trend:
            line.append("  " + spark(one.trend, _TREND), style="cyan")
        found.append(fit(line, width))
    return found


def _set_cells(one: HeldOut) -> list[str]:
    return [
        shortened(plain(one.name), _NAME),
        _STATES[one.state] if one.state else DASH,
        _loss(one.first),
        _loss(one.best),
        _loss(one.now),
        DASH if one.forgetting is None else f"{one.forgetting:+.3f}",
    ]


def _without(cells: Sequence[str], at: int) -> list[str]:
    return [*cells[:at], *cells[at + 1 :]]


def _forgetting_style(value: float | None, most: float | None) -> str:
    if value is None:
        return FAINT
    if most is not None and value > most:
        return ALARM
    return "yellow" if value > 0 else "green"


def _matrix(snapshot: Snapshot, width: int, height: int | None = None) -> list[Text]:
    """The losses at the ends of entries; of many rows the first and the last ones."""
    if len(snapshot.matrix) < 2 or not snapshot.held_out or (height is not None and height < 3):
        return []
    tasks = {one.name: one.task for one in snapshot.held_out}
    rows = list(snapshot.matrix)
    if height is not None and len(rows) + 1 > height:
        rows = [rows[0], *rows[len(rows) - (height - 2) :]]
    names, most = list(tasks), len(tasks)
    while True:
        # A mark or a blank at the end of each number, and so at the end of each name.
        head = ["after the end of", *(shortened(plain(name), _NAME) + " " for name in names)]
        cells = [
            [
                shortened(plain(row.label), _NAME),
                *(_marked(row.losses.get(name), tasks[name] == row.task) for name in names),
            ]
            for row in rows
        ]
        lines = ["  ".join(line).rstrip() for line in columns(head, cells, names=1)]
        if len(names) <= 1 or max(map(cell_len, lines)) <= width - (len(names) < most):
            break
        names = _fewer(names, snapshot)
    if len(names) < most:
        lines[0] += f" +{most - len(names)}"
    return [fit(Text(line, style="" if at else FAINT), width) for at, line in enumerate(lines)]


def _fewer(names: list[str], snapshot: Snapshot) -> list[str]:
    """Without a set whose task is to come, else without the first one."""
    future = [one.name for one in snapshot.held_out if one.state == "future" and one.name in names]
    left_out = future[-1] if future else names[0]
    return [name for name in names if name != left_out]


def _marked(loss: float | None, own: bool) -> str:
    return _loss(loss) + ("*" if own else " ")


def _loss(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}"

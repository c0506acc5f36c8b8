"""What is drawn of a run: everything at its width, what matters most at its height."""

from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from megatron_mer.analysis.runs_view import runs_view
from megatron_mer.analysis.snapshot import (
    CheckpointState,
    Evaluated,
    HeldOut,
    Losses,
    MatrixLine,
    ReptileState,
    Snapshot,
    Speed,
    TaskSpan,
)
from megatron_mer.analysis.watch_view import full_view

SETS = (
    HeldOut("en", "en", "past", 8.329, 5.074, 5.046, -0.028, (8.3, 5.1, 5.0)),
    HeldOut("العربية", "العربية", "past", 8.329, 4.953, 5.456, 0.503, (8.3, 5.0, 5.5)),
    HeldOut("日本語", "日本語", "current", 8.332, None, 5.122, None, (8.3, 5.1)),
    HeldOut("de", "de", "future", 8.339, None, None, None),
)
RUN = Snapshot(
    directory="runs/mine",
    name="mine",
    status="running",
    step=1219,
    batches=1220,
    total_batches=2000,
    quiet_seconds=4.0,
    seconds_left=3725.0,
    tasks=(
        TaskSpan(0, "old", 0, 0, "before"),
        TaskSpan(1, "en", 0, 500, "past"),
        TaskSpan(2, "العربية", 500, 1000, "past"),
        TaskSpan(3, "日本語", 1000, 1500, "current"),
        TaskSpan(4, "de", 1500, 2000, "future"),
    ),
    task="日本語",
    lr=1.94e-3,
    losses=Losses(5.075, 5.003, 5.289, 5.232, 100, 0.917),
    curve=tuple((float(batch), 8 - batch / 500) for batch in range(0, 1220, 4)),
    speed=Speed(0.198, 10323.0, 0.412, 0.005, 61.24),
    reptile=ReptileState(18, 30, 1200, 11.6, -0.25),
    held_out=SETS,
    matrix=tuple(
        MatrixLine(label, task, {one.name: one.now for one in SETS})
        for label, task in (("start", None), ("1 en", "en"), ("2 العربية", "العربية"))
    ),
    evaluated=Evaluated(1200, "interval", None, 0.2375),
    max_forgetting=0.5,
    checkpoint=CheckpointState(1000, 720.0),
    warnings=tuple(f"2026-11-23 19:10:0{at} WARNING number {at}" for at in range(5)),
)
EMPTY = Snapshot(directory="runs/mine", name="mine", status="starting")


def lines_of(text: Text) -> list[str]:
    return text.plain.split("\n")


def style_at(text: Text, word: str) -> str:
    """The last style that lies over a word."""
    start = text.plain.index(word)
    return str([span.style for span in text.spans if span.start <= start < span.end][-1])


def test_everything_is_said():
    shown = full_view(RUN, 120).plain
    for said in (
        "mine  running  task 日本語 (3 of 4)",
        "last step 4 s ago",
        "batch 1,220 of 2,000  61.0%  about 1:02:05 left",
        "step 1,219  loss 5.075  fresh 5.003  replay 5.289  mean of 100 5.232  lr 1.94e-03",
        "grad norm 0.917",
        "tokens/s 10,323  s/step 0.198  MFU 41.2%  data wait 0.5%  memory 61.2 GiB",
        "Reptile 18 of 30 updates since the last  delta norm 11.6  cosine -0.25",
        "checkpoint step 1,000, 12 min ago",
        "training loss, batches 0 to 1,220",
        "held out, step 1,200",
        "WARNING number 4",
    ):
        assert said in shown
    rows = [line.split() for line in lines_of(full_view(RUN, 80))]
    assert ["en", "past", "8.329", "5.074", "5.046", "-0.028"] in rows
    assert ["日本語", "now", "8.332", "-", "5.122", "-"] in rows
    assert ["de", "later", "8.339", "-", "-", "-"] in rows
    assert ["1", "en", "5.046*", "5.456", "5.122", "-"] in rows


def test_what_is_not_known_is_not_shown():
    assert lines_of(full_view(EMPTY, 80)) == ["mine  starting"]
    waiting = replace(EMPTY, status="absent")
    assert lines_of(full_view(waiting, 80)) == ["mine  absent", "waiting for runs/mine"]
    old = replace(RUN, speed=Speed(0.2, 100.0), reptile=None, checkpoint=None)
    shown = full_view(old, 80).plain
    assert not any(word in shown for word in ("MFU", "data wait", "memory", "Reptile", "None"))
    unplanned = replace(RUN, total_batches=None, tasks=(), seconds_left=None)
    assert "\nbatch 1,220\n" in full_view(unplanned, 80).plain


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 250])
@pytest.mark.parametrize("height", [1, 5, 10, 24, 40, 100, None])
def test_no_line_is_too_wide_and_none_too_many(width, height):
    for run in (RUN, EMPTY, replace(RUN, alarms=("no step for 12 min",), reason="x" * 300)):
        for ascii_only in (False, True):
            text = full_view(run, width, height, ascii_only=ascii_only)
            lines = lines_of(text)
            assert max(map(cell_len, lines)) <= width
            assert height is None or len(lines) <= height
            # The console agrees: nothing wraps.
            console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
            console.print(text)
            assert len(console.export_text().splitlines()) == len(lines)


def test_what_matters_most_stays_at_80_x_24_and_60_columns():
    for width in (80, 60):
        shown = full_view(RUN, width, 24).plain
        for said in ("forgetting", "+0.503", "-0.028", "WARNING number 4", "training loss"):
            assert said in shown
    low, high = full_view(RUN, 80, 18).plain, full_view(RUN, 80, 40).plain
    assert "+0.503" in low
    assert "WARNING number 4" in low
    assert "after the end of" not in low
    assert "after the end of" in high
    assert "WARNING number 0" in high


def test_of_many_sets_those_that_were_forgotten_most_stay():
    many = tuple(
        HeldOut(f"set{at}", f"task{at}", "past", 8.0, 5.0, 5.0 + at / 100, at / 100)
        for at in range(50)
    )
    many = (HeldOut("own", "now", "current", 8.0, None, 6.0, None), *many)
    shown = full_view(replace(RUN, held_out=many, matrix=()), 80, 24).plain
    assert "own " in shown
    assert "set49" in shown
    assert "set0 " not in shown
    kept = shown.count("past ")
    assert f"and {50 - kept} more, with less forgetting or none" in shown


def test_a_wide_matrix_says_how_many_sets_it_leaves_out():
    names = [f"set{at}" for at in range(30)]
    sets = tuple(HeldOut(n, n, "past", 8.0, 5.0, 5.0, 0.0) for n in names)
    rows = tuple(
        MatrixLine(f"{at} {n}", n, dict.fromkeys(names, 5.0)) for at, n in enumerate(names)
    )
    lines = lines_of(full_view(replace(RUN, held_out=sets, matrix=rows), 80))
    head = next(line for line in lines if line.startswith("after the end of"))
    shown = [word for word in head.split() if word.startswith("set")]
    assert head.endswith(f" +{30 - len(shown)}")
    assert shown[-1] == "set29"


def test_alarms_are_loud_also_without_colour():
    text = full_view(replace(RUN, alarms=("no step for 12 min",)), 80)
    assert lines_of(text)[1] == " no step for 12 min "
    assert style_at(text, "no step") == "bold white on red"
    assert style_at(full_view(RUN, 80), "+0.503") == "bold white on red"
    assert style_at(full_view(replace(RUN, max_forgetting=None), 80), "+0.503") == "yellow"
    assert style_at(full_view(RUN, 80), "-0.028") == "green"


def test_the_bar_is_divided_as_the_stream_is():
    bar, names = lines_of(full_view(RUN, 80))[1:3]
    assert bar.replace("╋", "━").replace("┼", "─") == "━" * 48 + "─" * 32
    assert [at for at, char in enumerate(bar) if char in "╋┼"] == [20, 40, 60]
    assert names.index("日本語") == 40
    many = tuple(
        TaskSpan(at, f"language{at}", at * 20, at * 20 + 20, "current" if at == 61 else "past")
        for at in range(100)
    )
    assert "▲ language61" in lines_of(full_view(replace(RUN, tasks=many), 80))[2]


def test_names_move_no_cursor():
    bad = "\x1b[2J\nname"
    sets = (replace(SETS[0], name=bad),)
    run = replace(RUN, name=bad, held_out=sets, warnings=(bad,), alarms=(bad,), reason=bad)
    for text in (full_view(run, 80), runs_view([run, run], 80)):
        assert "\x1b" not in text.plain
        assert "\nname" not in text.plain


def test_ascii_is_ascii():
    run = replace(RUN, tasks=RUN.tasks[:2], held_out=SETS[:1], matrix=(), task="en")
    assert full_view(run, 120, ascii_only=True).plain.isascii()
    assert runs_view([run, replace(run, directory="b")], 120, ascii_only=True).plain.isascii()


# Several runs -----------------------------------------------------------------------------------


def test_several_runs_take_a_line_each():
    other = replace(EMPTY, name="other", directory="runs/other")
    failed = replace(other, name="third", status="failed", reason="rank 1: broken", directory="c")
    late = replace(RUN, name="late", directory="d", alarms=("no step for 12 min",))
    lines = lines_of(runs_view([RUN, other, failed, late], 120))
    assert lines[0].split()[:3] == ["run", "status", "task"]
    cells = "mine running 日本語 ━━━━━━──── 61% 5.232 +0.237 10,323 1:02:05 4 s ago"
    assert lines[1].split() == cells.split()
    assert lines[2].split()[:2] == ["other", "starting"]
    assert lines[4].strip() == "rank 1: broken"
    assert lines[6].strip() == "no step for 12 min"
    assert len(lines) == 7


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_several_runs_fit(width):
    runs = [replace(RUN, directory=f"runs/experiments/of/today/number{at}") for at in range(30)]
    runs[29] = replace(runs[29], alarms=("no step for 12 min",))
    lines = lines_of(runs_view(runs, width, 24))
    assert len(lines) == 24
    assert max(map(cell_len, lines)) <= width
    assert lines[-1] == "and 9 more"
    assert lines[-2].strip().startswith("no step for")
    if width >= 60:
        # Runs of one name are told apart by the ends of their directories.
        assert lines[1].split()[0].endswith("number0")
        assert "+0.237" in lines[1]

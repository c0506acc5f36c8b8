import io
import logging
import re
import sys
from collections.abc import Iterator

import pytest

from megatron_mer.log import FILE_HANDLER, ROOT, get_logger, setup_logging
from megatron_mer.training.console import Progress, RemainingTime


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True

    def plain(self) -> str:
        """What was written, without colours and cursor movements; a redrawn line is a new line."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue()).replace("\r", "\n")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """A terminal 100 columns wide with the package's log on it."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "30")
    stream = Terminal()
    root = logging.getLogger(ROOT)
    before = (list(root.handlers), root.level, root.propagate)
    root.handlers = []
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        setup_logging(0)
    yield stream
    root.handlers, root.level, root.propagate = before[0], before[1], before[2]


def test_a_terminal_shows_everything(terminal: Terminal):
    progress = Progress(400, stream=terminal)
    progress.start(158)
    progress.update(159, "fr", 5.8991, 12_345.0)
    progress.update(160, "fr [new]", 5.8123, 12_345.0)
    progress.stop()
    last = terminal.plain().strip().splitlines()[-1]
    assert last.startswith("fr [new] ")
    for word in ("160/400", "loss 5.812", "12.3k tokens/s"):
        assert word in last
    assert re.search(r"\d:\d\d left", last)
    assert len(last) <= 100


def test_a_skipped_batch_has_no_loss(terminal: Terminal):
    progress = Progress(4, stream=terminal)
    progress.start(0)
    progress.update(1, "fr", float("nan"), 5.0)
    progress.stop()
    assert "skipped" in terminal.plain().splitlines()[-1]


def test_log_lines_go_above_the_bar(terminal: Terminal):
    logger = get_logger("console_test")
    progress = Progress(10, stream=terminal)
    progress.start(0)
    progress.update(1, "en", 7.0, 100.0)
    message = "[bold] " + "long " * 40 + "end"
    logger.info("%s", message)
    progress.update(10, "en", 6.0, 100.0)
    progress.stop()
    logger.info("after")
    lines = [line.rstrip() for line in terminal.plain().splitlines()]
    (at,) = [at for at, line in enumerate(lines) if message in line]
    assert "INFO" in lines[at]
    assert "1/10" not in lines[at]
    assert any("1/10" in line for line in lines[at + 1 :])
    assert any("10/10" in line for line in lines[at + 1 :])
    assert lines[-1].endswith("INFO after")


def test_the_log_gets_its_stream_back(terminal: Terminal, tmp_path):  # type: ignore[no-untyped-def]
    setup_logging(0, tmp_path / "run.log")
    streams = [handler.stream for handler in logging.getLogger(ROOT).handlers]  # type: ignore[attr-defined]
    progress = Progress(10, stream=terminal)
    progress.start(0)
    get_logger("console_test").warning("during")
    progress.stop()
    progress.stop()
    handlers = logging.getLogger(ROOT).handlers
    assert [handler.stream for handler in handlers] == streams  # type: ignore[attr-defined]
    assert (tmp_path / "run.log").read_text().rstrip().endswith("WARNING during")
    for handler in handlers:
        if handler.get_name() == FILE_HANDLER:
            handler.close()


@pytest.mark.parametrize("how", ["pipe", "closed", "disabled", "dumb"])
def test_elsewhere_nothing_is_drawn(how: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes other programs take a pipe for a terminal
    monkeypatch.setenv("TERM", "dumb" if how == "dumb" else "xterm")
    stream = io.StringIO() if how in ("pipe", "closed") else Terminal()
    written = stream.getvalue()
    if how == "closed":
        stream.close()
    progress = Progress(10, enabled=how != "disabled", stream=stream)
    progress.start(0)
    progress.update(1, "en", 7.0, 100.0)
    progress.stop()
    if how != "closed":
        assert stream.getvalue() == written == ""


def test_the_default_is_standard_error(terminal: Terminal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(10)
    progress.start(3)
    progress.stop()
    assert "3/10" in terminal.plain()


def test_stop_without_start(terminal: Terminal):
    Progress(10, stream=terminal).stop()
    assert terminal.getvalue() == ""


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_left_follows_the_last_steps():
    clock = Clock()
    remaining = RemainingTime(1000, clock)
    assert remaining.seconds() is None
    remaining.restart(100)
    assert remaining.seconds() is None
    for step in range(101, 201):
        clock.now += 2.0
        remaining.update(step)
    assert remaining.seconds() == pytest.approx(800 * 2.0)
    for step in range(201, 301):
        clock.now += 0.5
        remaining.update(step)
    assert remaining.seconds() == pytest.approx(700 * 0.5)
    remaining.restart(990)
    clock.now += 4.0
    remaining.update(991)
    assert remaining.seconds() == pytest.approx(9 * 4.0)

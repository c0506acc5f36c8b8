"""Errors keep their problems and codes; the logger speaks on rank 0."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_mer.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LaunchError,
    MegatronMerError,
    Problem,
    TrainingError,
)
from megatron_mer.log import CONSOLE_HANDLER, ROOT, get_logger, setup_logging

PROBLEMS = [
    Problem("a.b", "given 3", "1 or 2", "choose one", "run.yaml:4"),
    Problem("c", "missing"),
]


def test_a_problem_is_one_line() -> None:
    assert str(PROBLEMS[0]) == "a.b: given 3; allowed: 1 or 2; choose one (run.yaml:4)"
    assert str(PROBLEMS[1]) == "c: missing"
    assert "\n" not in str(Problem("a", "two\nlines"))


def test_an_error_prints_every_problem_on_a_line() -> None:
    error = ConfigError(PROBLEMS)
    assert str(error).splitlines() == [str(problem) for problem in PROBLEMS]
    assert error.problems == tuple(PROBLEMS)
    assert (str(ConfigError("plain")), ConfigError("plain").problems) == ("plain", ())


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (MegatronMerError, 1),
        (ConfigError, 2),
        (DataError, 2),
        (LaunchError, 2),
        (CheckpointError, 1),
        (TrainingError, 1),
    ],
)
def test_errors_keep_everything_on_the_way_between_processes(
    kind: type[MegatronMerError], code: int
) -> None:
    error = pickle.loads(pickle.dumps(kind(PROBLEMS)))
    assert type(error) is kind
    assert isinstance(error, MegatronMerError)
    assert (error.exit_code, error.problems) == (code, tuple(PROBLEMS))
    assert str(error) == str(kind(PROBLEMS))


@pytest.fixture
def clean_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger(ROOT)
    before = (list(root.handlers), root.level, root.propagate)
    yield root
    for handler in [one for one in root.handlers if one not in before[0]]:
        handler.close()
    root.handlers[:], root.level, root.propagate = before[0], before[1], before[2]
    root.setLevel(before[1])


def test_names_lie_below_the_root() -> None:
    assert get_logger("megatron_mer.data.loader").name == "megatron_mer.data.loader"
    assert get_logger("tool").name == "megatron_mer.tool"
    assert get_logger().name == ROOT
    assert get_logger("megatron_merchant").name == "megatron_mer.megatron_merchant"


def test_rank_0_prints_and_writes_its_file(
    clean_logger: logging.Logger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_file = tmp_path / "logs" / "run.log"
    setup_logging(0)
    setup_logging(0, log_file)
    get_logger("part").info("hello")
    get_logger("part").debug("whisper")
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert printed[0].endswith("INFO hello")
    assert log_file.read_text().splitlines() == printed
    names = [handler.get_name() for handler in clean_logger.handlers]
    assert names.count(CONSOLE_HANDLER) == 1


def test_other_ranks_speak_when_something_is_wrong(
    clean_logger: logging.Logger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(3, tmp_path / "run.log", level=logging.DEBUG)
    get_logger("part").info("hello")
    get_logger("part").warning("careful")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("WARNING [rank 3] careful")
    assert not (tmp_path / "run.log").exists()

"""Ranks as threads: the collectives of a save without processes."""

import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from tests.checkpoint.copying import Flaky

TIMEOUT = 20.0


class Ranks:
    """Runs a function on every rank, each in a thread, whose collective meets at a barrier."""

    def __init__(self, size: int):
        self.size = size
        self._barrier = threading.Barrier(size)
        self._reasons: list[str | None] = [None] * size

    def first_failure(self, rank: int, reason: str | None) -> str | None:
        self._reasons[rank] = reason
        self._barrier.wait(TIMEOUT)
        result = next((one for one in self._reasons if one), None)
        self._barrier.wait(TIMEOUT)
        return result

    def run(
        self, function: Callable[[int, Callable[[str | None], str | None]], object]
    ) -> list[object]:
        """The results by rank; an exception stands where a rank raised one."""

        def one(rank: int) -> object:
            try:
                return function(rank, lambda reason: self.first_failure(rank, reason))
            except BaseException as error:  # noqa: BLE001
                # Like a killed rank: the others' collective fails instead of waiting for ever.
                if not isinstance(error, Exception):
                    self._barrier.abort()
                return error

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size)))


@pytest.fixture
def ranks() -> type[Ranks]:
    return Ranks


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """All that is logged, also after a test of a program has set the logging up."""
    monkeypatch.setattr(logging.getLogger("megatron_mer"), "propagate", True)
    caplog.set_level("INFO", logger="megatron_mer")
    return caplog


@pytest.fixture
def flaky() -> Iterator[type[Flaky]]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.refuse = Flaky.tried = 0
    Flaky.gate = None
    Flaky.entered.clear()
    yield Flaky
    Flaky.store.clear()
    Flaky.pseudo_dirs[:] = [""]
    Flaky.gate = None


@pytest.fixture(params=["directory", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "there") if request.param == "directory" else f"memory://{uuid.uuid4()}"

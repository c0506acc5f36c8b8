"""Ranks as threads: the collectives of a save without processes."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

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

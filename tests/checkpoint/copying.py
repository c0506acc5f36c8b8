"""A file system that fails, and what the tests of copies have in common."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from fsspec.implementations.memory import MemoryFileSystem

from megatron_mer.checkpoint import Copier, open_place
from megatron_mer.checkpoint.place import Place
from tests.checkpoint.saved import names

TIMEOUT = 20.0
OWNER = {"id": "a", "name": "run", "output_dir": "/runs/a"}


class Flaky(MemoryFileSystem):
    """Refuses so many writes, and can hold one up."""

    protocol = "flaky"
    store: dict = {}  # noqa: RUF012 - as in its parent: one store a process
    pseudo_dirs = [""]  # noqa: RUF012
    cachable = False
    refuse = 0
    tried = 0
    gate: threading.Event | None = None
    entered = threading.Event()

    def _open(self, path, mode="rb", *options, **named):  # type: ignore[no-untyped-def]
        self._may_fail(mode)
        return super()._open(path, mode, *options, **named)

    def _may_fail(self, mode: str) -> None:
        if "w" not in mode:
            return
        if Flaky.gate is not None:
            Flaky.entered.set()
            assert Flaky.gate.wait(TIMEOUT)
        Flaky.tried += 1
        if Flaky.tried <= Flaky.refuse:
            raise ConnectionError("the service is away")


def a_copier(root: Path, url: str, **options) -> Copier:
    options = {"keep_last": 2, "first_pause": 0.01, "owner": OWNER, **options}
    return Copier(root, open_place(url), **options)


def copied(root: Path, url: str, **options) -> Copier:
    """Copy all that is there, and wait for it."""
    copier = a_copier(root, url, **options)
    copier.start()
    copier.finish(TIMEOUT)
    return copier


def holds(place: Place, source: Path) -> bool:
    """Whether the place has the very bytes of a checkpoint."""
    files = {name: (source / name).read_bytes() for name in names(source)}
    return place.problem(source.name) is None and all(
        place.read(f"{source.name}/{name}") == content for name, content in files.items()
    )


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)

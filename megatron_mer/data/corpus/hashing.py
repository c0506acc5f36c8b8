"""The checksum of a plain file that several workers share: read once more, beside them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

from megatron_mer.data.corpus.reading import LineRange, Unit
from megatron_mer.data.corpus.streams import Torn, open_input

PIECE = 1 << 20


class SharedFiles(threading.Thread):
    """Hashes, for each input that is split, the lines of its units.

    Args:
        units: of the job, in order.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        super().__init__(daemon=True)
        self._ranges: dict[int, tuple[Unit, Unit]] = {}
        for unit in units:
            if unit.stop is not None:
                first, _ = self._ranges.get(unit.source, (unit, unit))
                self._ranges[unit.source] = (first, unit)
        self._found: dict[int, str] = {}
        self._ended = False
        self._failure: Exception | None = None

    def run(self) -> None:
        """Hash all of them."""
        try:
            for source, (first, last) in self._ranges.items():
                self._found[source] = self._hash(first, last)
        except (OSError, Torn) as error:
            self._failure = error

    def end(self) -> None:
        """Leave the rest."""
        self._ended = True

    def result(self) -> dict[int, str]:
        """Wait, and return the SHA-256 of each input that is split.

        Raises:
            OSError, Torn: it could not be read.
        """
        self.join()
        if self._failure is not None:
            raise self._failure
        return self._found

    def _hash(self, first: Unit, last: Unit) -> str:
        digest = hashlib.sha256()
        with open_input(first.file.path) as opened:
            assert last.stop is not None  # so it was chosen
            lines = LineRange(opened, first.start, last.stop)
            while not self._ended and (data := lines.read(PIECE)):
                digest.update(data)
        return digest.hexdigest()

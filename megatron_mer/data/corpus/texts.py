"""The texts of inputs, one after the other, for programs that need no more than that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

from megatron_mer.data.corpus.faults import EMPTY
from megatron_mer.data.corpus.inputs import Format, expand_inputs
from megatron_mer.data.corpus.parsing import ReadSettings
from megatron_mer.data.corpus.reading import Unit, UnitReader
from megatron_mer.errors import DataError

PIECE_BYTES = 1 << 22


def read_texts(
    names: Sequence[str], settings: ReadSettings, format: Format | None = None
) -> Iterator[Iterator[str]]:
    """Yield each document as an iterator over its text: in one piece, or several if it is long.

    Memory holds a few pieces of the input. Empty documents are left out.

    Args:
        names: see `inputs.expand_inputs`.
        settings: how documents are found.
        format: of all inputs; None: by their names.

    Raises:
        DataError: an input or a document is unusable; names file and line.
    """
    for number, file in enumerate(expand_inputs(names, format)):
        for reading in UnitReader(Unit(number, file), settings, PIECE_BYTES):
            for fault in reading.batch.faults:
                if fault.kind != EMPTY:
                    raise DataError(f"{file.path}, line {fault.line}: {fault.reason}")
            for text in reading.batch.texts:
                yield iter((text,))
            if reading.long is not None:
                with closing(reading.long):
                    yield reading.long.chunks()

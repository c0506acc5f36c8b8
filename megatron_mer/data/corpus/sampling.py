"""A sample of the input, to compare tokenizers on: the first documents of some of its files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_mer.data.corpus.inputs import InputFile
from megatron_mer.data.corpus.parsing import ReadSettings
from megatron_mer.data.corpus.reading import Unit, UnitReader

FILES = 8
PIECE_BYTES = 1 << 17
DOCUMENT_CHARACTERS = 1 << 14
"""Of a document: the sample is to hold many."""
CHARACTERS = 1 << 17
"""Of the whole sample: the libraries tokenize it in a tenth of a second."""


class Sample(NamedTuple):
    """What the beginnings of files show."""

    texts: list[str]
    """To compare tokenizers on."""
    density: float
    """Documents a byte of file, about."""


def sample_inputs(inputs: Sequence[InputFile], settings: ReadSettings) -> Sample:
    """Look at the beginning of up to `FILES` files, evenly taken from all.

    What can be read only once (standard input, a pipe) gives nothing.
    """
    again = [file for file in inputs if not file.once]
    chosen = again[:: max(1, len(again) // FILES)][:FILES]
    texts: list[str] = []
    documents = size = 0
    for file in chosen:
        left = CHARACTERS // len(chosen)
        for reading in UnitReader(Unit(0, file), settings, PIECE_BYTES):
            documents += len(reading.batch.texts)
            size += reading.position
            for text in reading.batch.texts:
                texts.append(text[: min(left, DOCUMENT_CHARACTERS)])
                left -= len(texts[-1])
                if left <= 0:
                    break
            break
    return Sample(texts, documents / max(size, 1))

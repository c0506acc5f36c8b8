"""A sample of the input, to compare tokenizers on: the first documents of some of its files."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mer.data.corpus.inputs import InputFile
from megatron_mer.data.corpus.parsing import ReadSettings
from megatron_mer.data.corpus.reading import Unit, UnitReader

FILES = 8
PIECE_BYTES = 1 << 17
DOCUMENT_CHARACTERS = 1 << 14
"""Of a document: the sample is to hold many."""
CHARACTERS = 1 << 17
"""Of the whole sample: the libraries tokenize it in a tenth of a second."""


def sample_texts(inputs: Sequence[InputFile], settings: ReadSettings) -> list[str]:
    """Return texts from the beginning of up to `FILES` files, evenly taken from all.

    What can be read only once (standard input, a pipe) gives none.
    """
    again = [file for file in inputs if not file.once]
    chosen = again[:: max(1, len(again) // FILES)][:FILES]
    texts: list[str] = []
    for file in chosen:
        left = CHARACTERS // len(chosen)
        for reading in UnitReader(Unit(0, file), settings, PIECE_BYTES):
            for text in reading.batch.texts:
                texts.append(text[: min(left, DOCUMENT_CHARACTERS)])
                left -= len(texts[-1])
                if left <= 0:
                    break
            break
    return texts

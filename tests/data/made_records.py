"""Random records for tests, and where they lie."""

import numpy as np
from numpy.typing import NDArray

from megatron_mer.data.record_store import RecordFormat

KEY = 0xFEDC_BA98_7654_3210
SMALL = RecordFormat(seq_length=7, vocab_size=1000, with_ends=True, key=KEY)


class Rows:
    """Random records; the same seed gives the same ones."""

    def __init__(self, format: RecordFormat, count: int, seed: int = 0) -> None:
        generator, limits = np.random.default_rng(seed), np.iinfo(np.int64)
        self.identity = generator.integers(limits.min, limits.max, (count, 3), endpoint=True)
        self.tokens = generator.integers(0, format.vocab_size, (count, format.seq_length + 1))
        self.tokens[:, 0], self.tokens[:, -1] = 0, format.vocab_size - 1
        self.ends = generator.random((count, format.seq_length)) < 0.2 if format.with_ends else None


def at(*positions: int) -> NDArray[np.int64]:
    return np.array(positions, dtype=np.int64)

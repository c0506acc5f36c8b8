"""C++ core of plan and readers (csrc/). Wrong types raise TypeError, wrong values ValueError."""

import numpy as np
from numpy.typing import NDArray

class Permutation:
    """A keyed permutation of [0, size), 1 <= size <= 2^62, in O(1) memory."""

    def __init__(self, size: int) -> None: ...
    def forward(self, key: int, indices: NDArray[np.uint64]) -> NDArray[np.uint64]: ...
    def inverse(self, key: int, images: NDArray[np.uint64]) -> NDArray[np.uint64]: ...

class WeightTree:
    """Apportions samples 0, 1, 2, ... to weighted datasets in closed form."""

    @staticmethod
    def from_weights(weights: NDArray[np.float64]) -> WeightTree: ...
    @staticmethod
    def from_sizes(sizes: NDArray[np.int64]) -> WeightTree: ...
    def locate(self, n: int) -> tuple[int, int]:
        """The dataset of the n-th sample, and the sample's place among that dataset's."""

    def counts(self, n: int) -> NDArray[np.int64]:
        """How many of the first n samples each dataset gives."""

    def count(self, leaf: int, n: int) -> int:
        """counts(n)[leaf] in O(log datasets)."""

class SpanSpec:
    """An entry in a segment: `batches` or `fresh_rows` above 0, neither if `trained_before`."""

    def __init__(
        self,
        *,
        position: int,
        task: int,
        datasets: NDArray[np.int64],
        weights: NDArray[np.float64],
        batches: int,
        fresh_rows: int,
        trained_before: bool,
    ) -> None: ...

class Plan:
    """See megatron_mer.continual.plan, which holds the names and the limits."""

    def __init__(
        self,
        *,
        seed: int,
        dataset_keys: NDArray[np.uint64],
        dataset_sizes: NDArray[np.int64],
        buffer_capacities: NDArray[np.int64],
        buffer_by_task: bool,
    ) -> None:
        """No capacity: no buffer; one: of all tasks; one a task with `buffer_by_task`."""

    def append(
        self,
        *,
        first_batch: int,
        global_batch_size: int,
        alpha_numerator: int,
        alpha_denominator: int,
        include_current_task: bool,
        task_weights: NDArray[np.float64],
        from_buffer: bool,
        dropped: NDArray[np.int64],
        spans: list[SpanSpec],
    ) -> None:
        """Ends what was planned at `first_batch` and goes on with a new segment.

        dropped: tasks whose rows of earlier segments leave pool and buffer.
        """

    @property
    def num_slots(self) -> int:
        """Rows that the buffer holds at most; 0 without one."""

    @property
    def total_batches(self) -> int: ...
    def global_batch_size(self, batch: int) -> int:
        """Rows of a batch."""

    def spans(self) -> NDArray[np.int64]:
        """Position, task, segment, first batch, last batch and trained_before of each span."""

    def cursors_after(self, span: int) -> NDArray[np.int64]:
        """Samples that the run has taken of each of a span's datasets when it ends."""

    def cursors_at(self, batch: int) -> NDArray[np.int64]:
        """Samples of each dataset that the batches before one took."""

    def fresh_rows_before(self, batch: int) -> int:
        """Fresh rows of the batches before one; it may be `total_batches`."""

    def replay_rows(self, batch: int) -> int: ...
    def rows(
        self, batch: int, start: int = 0, stop: int | None = None
    ) -> tuple[
        NDArray[np.uint8],
        NDArray[np.int32],
        NDArray[np.int32],
        NDArray[np.int64],
        NDArray[np.int64],
        NDArray[np.int64],
    ]:
        """Kind, entry, dataset, sample, ordinal and slot of the rows at places [start, stop)."""

    def mark_skipped(self, batch: int) -> None: ...
    def skipped(self) -> NDArray[np.int64]: ...
    def ledger(
        self, batches: int
    ) -> tuple[
        list[NDArray[np.int64]],
        list[NDArray[np.int64]],
        list[NDArray[np.int64]],
        NDArray[np.int64],
        NDArray[np.int64],
        NDArray[np.int64],
    ]:
        """By span: fresh, replayed, skipped by dataset; batches, replay rows, pool batches."""

Writes = tuple[
    NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]
]
"""Position, source (-1: fresh), ordinal, dataset and sample, one element a record."""

class BufferLog:
    """Where a buffer's records lie: positions in a log, as a function of plan and batch."""

    def __init__(self, plan: Plan, segment_records: int) -> None: ...
    @property
    def batch(self) -> int:
        """Batches whose rows entered."""

    @property
    def tail(self) -> int:
        """Positions given out so far."""

    def live_segments(self) -> list[int]:
        """Segments with rows that the buffer holds, increasing."""

    def content(self) -> Writes:
        """Every row that the buffer holds; no sources."""

    def advance(self, batch: int) -> Writes:
        """Lets the rows of the batches before `batch` enter; what that writes."""

    def settle(self, batch: int) -> None:
        """Everybody can read what the batches before `batch` wrote."""

    def find(self, slots: NDArray[np.int64], ordinals: NDArray[np.int64]) -> NDArray[np.int64]:
        """Position of the row that each slot holds, -1 where it is not settled yet."""

    def sources(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where everybody can read the rows now that get these positions, -1: nowhere yet."""

class BufferEmpty(ValueError):
    """The buffer holds no row that may be replayed. args: batch, task."""

class ReadEnded(ValueError):
    """A file ends too early. args: row, byte, missing bytes."""

class ReadFailed(ValueError):
    """The system refused to read. args: row, byte, errno."""

class TokenOutside(ValueError):
    """An id is outside of the vocabulary. args: row, position, id."""

class DocumentFault(ValueError):
    """A document ends where it cannot. args: row, document, sequence, end; end -1: no sequence."""

def read_rows(
    descriptors: NDArray[np.int32],
    bytes: NDArray[np.int64],
    codes: NDArray[np.uint8],
    places: NDArray[np.int64],
    vocab_size: int,
    out: NDArray[np.int64],
) -> None:
    """Row i of dtype code codes[i], from bytes[i] of its file, to out[places[i]]."""

def document_ends(
    descriptors: NDArray[np.int32],
    tables: NDArray[np.int64],
    starts: NDArray[np.int64],
    length: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and places in [0, length) of the tokens, from starts[row] on, that end a document.

    tables, shape (n, 4): sequences, entries, bytes of a token and tokens, one index a row.
    """

RECORD_MAGIC: int
ERASED_MAGIC: int

class WriteFailed(ValueError):
    """The system refused to write. args: row, byte, errno."""

class RecordFault(ValueError):
    """A header's field is wrong. args: row, byte of the field, found, expected, 3 of identity."""

class Records:
    """Records of seq_length + 1 tokens and, if with_ends, as many end bits as inputs.

    Record i of a call lies at bytes[i] of its file and belongs to row places[i] of the arrays:
    identity (n, 3), tokens (n, seq_length + 1), ends (n, end_bytes), the lowest bit first.
    """

    def __init__(self, *, seq_length: int, vocab_size: int, with_ends: bool, key: int) -> None: ...
    @property
    def record_bytes(self) -> int: ...
    @property
    def end_bytes(self) -> int: ...
    def write(
        self,
        descriptors: NDArray[np.int32],
        bytes: NDArray[np.int64],
        places: NDArray[np.int64],
        identity: NDArray[np.int64],
        tokens: NDArray[np.int64],
        ends: NDArray[np.uint8],
        num_ends: NDArray[np.int64],
    ) -> None: ...
    def read(
        self,
        descriptors: NDArray[np.int32],
        bytes: NDArray[np.int64],
        places: NDArray[np.int64],
        identity: NDArray[np.int64],
        tokens: NDArray[np.int64],
        ends: NDArray[np.uint8],
    ) -> None:
        """Fill rows of `tokens` and `ends`."""

    def count_ends(
        self,
        descriptors: NDArray[np.int32],
        bytes: NDArray[np.int64],
        places: NDArray[np.int64],
        identity: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> None:
        """Fill rows of `counts` from the headers alone."""

    def fetch(
        self,
        descriptors: NDArray[np.int32],
        bytes: NDArray[np.int64],
        places: NDArray[np.int64],
        out: NDArray[np.uint8],
    ) -> None:
        """Fill rows of `out`, shape (n, record_bytes), with whole records of any identity."""

    def store(
        self,
        descriptors: NDArray[np.int32],
        bytes: NDArray[np.int64],
        places: NDArray[np.int64],
        content: NDArray[np.uint8],
    ) -> None:
        """Write rows of `content`, shape (n, record_bytes), as they are."""

    def erased(self) -> NDArray[np.uint8]:
        """Shape (1, record_bytes): a record that says that it was erased."""

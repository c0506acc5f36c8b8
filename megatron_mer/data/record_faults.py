"""What is said of a record that cannot be had: where it is, what stands there, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_mer._index import ERASED_MAGIC, RECORD_MAGIC
from megatron_mer.errors import DataError

RESTORE = "restore the file from a copy, or begin with an empty directory"
OTHER = "this directory belongs to another run: name another one, or empty it"


class RecordMissing(DataError):
    """A record's segment file is not there, or ends before the record does."""


class Place(NamedTuple):
    """Where a record is."""

    path: Path
    """The segment file."""
    byte: int
    """Where the record starts there."""
    position: int
    """Of the record in the log."""

    def __str__(self) -> str:
        """Return the start of a message."""
        return f"{self.path}, byte {self.byte}, record {self.position}"


def missing(place: Place) -> RecordMissing:
    """Build the error for a segment file that is not there."""
    return RecordMissing(
        f"{place}: the file is not there; expected it to hold this record: it was removed, or the "
        f"directory is the wrong one; {RESTORE}"
    )


def ended(place: Place, byte: int, lacking: int) -> RecordMissing:
    """Build the error for a file that ends before the record does, for lack of bytes."""
    return RecordMissing(
        f"{place}: the file ends too early; expected {lacking} more bytes from byte {byte} on: it "
        f"was truncated, or a crash came before they reached the disk; {RESTORE}"
    )


def wrong_field(
    place: Place, field: int, found: int, expected: int, held: Sequence[int], wanted: Sequence[int]
) -> DataError:
    """Build the error for a record whose header has another value than it must.

    Args:
        place: of the record.
        field: byte of the value in the header; see the table in `record_store`.
        found: what stands there, unsigned.
        expected: what must, unsigned.
        held: identity that stands in the header.
        wanted: identity that was asked for; empty if any.
    """
    if field == 0:
        text = _wrong_magic(found)
    elif field in _IDENTITY:
        text = f"holds {_identity(held)} instead of {_identity(wanted)}; {RESTORE}"
    else:
        text = _FIELDS[field].format(found=found, expected=expected)
    return DataError(f"{place}: {text}")


def outside(
    place: Place, identity: Sequence[int], position: int, token: int, vocab_size: int
) -> DataError:
    """Build the error for a token that is outside of the vocabulary."""
    return DataError(
        f"{place}: {_identity(identity)} has token id {token} at position {position}, the model's "
        f"vocabulary has ids 0 to {vocab_size - 1}; it was tokenized with another vocabulary, or "
        "model.vocab_size is too small"
    )


_FIELDS = {
    4: "version {found}; expected {expected}: another version of megatron_mer wrote it; " + OTHER,
    6: "tokens of {found} bytes; expected {expected}: its vocabulary is another one; " + OTHER,
    7: "end bits {found}; expected {expected}: written with another batch.eod_mask_loss; " + OTHER,
    8: "seq_length {found}; expected {expected}; " + OTHER,
    16: "key {found:#018x}; expected {expected:#018x}: of another run or tokenizer; " + OTHER,
    48: "a bit is wrong in its header: checksum {found:#018x}; expected {expected:#018x}, that of "
    "what stands there; " + RESTORE,
    56: "a bit is wrong: checksum {found:#018x}; expected {expected:#018x}, that of what stands "
    "there; " + RESTORE,
}
_IDENTITY = (24, 32, 40)


def _wrong_magic(found: int) -> str:
    if found == ERASED_MAGIC:
        return (
            "it was erased when its task was dropped from the buffer, and the checkpoint is from "
            "before that; go on from a checkpoint that was rewritten then"
        )
    if found == 0:
        return (
            "zeros; expected a record: it was never written, or a crash came before it reached the "
            f"disk; {RESTORE}"
        )
    magic, expected = (value.to_bytes(4, "little") for value in (found, RECORD_MAGIC))
    return (
        f"magic {magic!r}; expected {expected!r}, the start of a record: the file is damaged, or "
        f"its records have another size (seq_length, vocabulary); {RESTORE}"
    )


def _identity(values: Sequence[int]) -> str:
    ordinal, dataset, sample = values
    return f"sample {sample} of dataset key {dataset % 2**64:#018x} (live index {ordinal})"

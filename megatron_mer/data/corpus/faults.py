"""What can be wrong with a document, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OnError = Literal["stop", "skip"]

INVALID_UTF8, NOT_JSON, MISSING_KEY, NOT_TEXT = (
    "invalid UTF-8",
    "not JSON",
    "missing key",
    "not text",
)
TOO_LONG, DAMAGED, EMPTY = "too long", "damaged file", "empty"


@dataclass(frozen=True)
class Fault:
    """A document that is left out."""

    line: int
    """Its line, from 1; in Parquet files its row."""
    kind: str
    """One of the words above. An empty document is none of an error: it is always left out."""
    reason: str
    """What is wrong, in words."""


class FaultError(Exception):
    """The fault of a single document.

    Args:
        kind: one of the words above.
        reason: what is wrong, in words.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason

    def at(self, line: int) -> Fault:
        """Return the fault with its line."""
        return Fault(line, self.kind, self.reason)

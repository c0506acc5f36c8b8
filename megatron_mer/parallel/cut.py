"""Which part of a weight a tensor-parallel rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


def slice_bounds(size: int, parts: int, index: int) -> tuple[int, int]:
    """Where one of `parts` slices of `size` places begins and ends.

    All have ceil(size / parts) places but the last ones, which may have fewer or none.
    """
    share = -(-size // parts)
    return min(index * share, size), min((index + 1) * share, size)


@dataclass(frozen=True)
class Cut:
    """One rank's slice of a weight.

    The rank's tensor is as large as the largest slice. Where its own slice is shorter (a vocabulary
    that the ranks do not divide), the places at the end are padding: zeros that nothing reads, that
    have no gradient and that no checkpoint knows.
    """

    dim: int
    """The dim that is cut."""
    size: int
    """The whole weight's places along it."""
    parts: int
    """Number of slices."""
    index: int
    """This rank's slice, 0 <= index < parts."""
    replica: int = 0
    """Place among the ranks that hold the same slice; the first one's counts."""

    @property
    def begin(self) -> int:
        """First place of the whole weight in the slice."""
        return slice_bounds(self.size, self.parts, self.index)[0]

    @property
    def end(self) -> int:
        """The place behind the slice's last."""
        return slice_bounds(self.size, self.parts, self.index)[1]


def cut_of(parameter: nn.Parameter) -> Cut | None:
    """The slice that a parameter is; None: it is the whole weight."""
    cut: Cut | None = getattr(parameter, "cut", None)
    return cut

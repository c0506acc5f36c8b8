"""How far gradients point the same way: cosines, and what of them is noise.

Each source of rows (fresh rows, replayed rows, a task) gives the mean token-loss gradient of its
rows, in two halves. A gradient of few rows is mostly noise, which makes every cosine smaller than
the one between the true gradients. The halves say by how much: the cosine between two halves of one
source is what this many rows reach for gradients that are truly the same. Dividing by it,

    corrected(s, t) = <g_s, g_t> / sqrt(<a_s, b_s> <a_t, b_t>),    g = (a + b) / 2,

estimates the cosine of the true gradients (Spearman's correction for attenuation): <a, b> of
independent halves has the squared norm of the true gradient as its mean, without the noise that
<g, g> has. It may come out above 1, and does not exist where the halves do not agree.

A positive inner product of the gradients of two tasks means that a step for one helps the other;
to raise it is what Reptile is meant for (Riemer et al. 2019, arXiv 1810.11910; arXiv 2508.01908).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Alignment:
    """Between n sources; matrices are (n, n), symmetric, NaN where a number does not exist."""

    names: tuple[str, ...]
    norms: NDArray[np.float64]
    """(n,) L2 norm of each source's gradient."""
    dots: NDArray[np.float64]
    """Inner products of the gradients."""
    cosines: NDArray[np.float64]
    """Cosines of the gradients as they were measured; 1 on the diagonal."""
    halves: NDArray[np.float64]
    """(n,) cosine between the halves of each source."""
    corrected: NDArray[np.float64]
    """Cosines corrected for the noise of few rows; the diagonal is 1."""

    def between(self) -> float | None:
        """The mean cosine between two different sources; None for fewer than two."""
        upper = self.cosines[np.triu_indices(len(self.names), 1)]
        known = upper[np.isfinite(upper)]
        return float(known.mean()) if len(known) else None


def alignment(names: Sequence[str], gram: NDArray[np.float64]) -> Alignment:
    """Cosines from inner products.

    Args:
        names: of the n sources.
        gram: (2n, 2n) inner products of the halves a_0, b_0, a_1, b_1, ...

    Raises:
        ValueError: the matrix has another shape.
    """
    count = len(names)
    if gram.shape != (2 * count, 2 * count):
        raise ValueError(f"a matrix of shape {gram.shape} for {count} sources of two halves each")
    dots = gram.reshape(count, 2, count, 2).sum((1, 3)) / 4
    norms = np.sqrt(np.diag(dots))
    agreed = np.array([gram[2 * at, 2 * at + 1] for at in range(count)])
    within = np.array(
        [_ratio(agreed[at], gram[2 * at, 2 * at] * gram[2 * at + 1, 2 * at + 1])
         for at in range(count)]
    )  # fmt: skip
    cosines, corrected = np.full((count, count), np.nan), np.full((count, count), np.nan)
    for one in range(count):
        for other in range(count):
            if one == other:
                cosines[one, one] = corrected[one, one] = 1.0
                continue
            cosines[one, other] = _ratio(dots[one, other], dots[one, one] * dots[other, other])
            if agreed[one] > 0 and agreed[other] > 0:
                corrected[one, other] = _ratio(dots[one, other], agreed[one] * agreed[other])
    return Alignment(tuple(names), norms, dots, cosines, within, corrected)


def _ratio(dot: float, squares: float) -> float:
    """Dot / sqrt(squares); NaN where a gradient is zero or not finite."""
    if not (math.isfinite(dot) and math.isfinite(squares)) or squares <= 0:
        return math.nan
    return dot / math.sqrt(squares)

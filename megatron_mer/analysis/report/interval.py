"""Mean and confidence interval of a few numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

CONFIDENCE = 0.95


def mean_interval(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean of independent values and the 95% interval of it.

    The half width is t * s / sqrt(n), s the standard deviation with n - 1 (Student 1908); it
    supposes that the values are about normal.

    Args:
        values: At least one.

    Returns:
        {"n", "mean", "half_width"}; no half width (None) for one value.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return {"n": count, "mean": mean, "half_width": None}
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = t_quantile((1 + CONFIDENCE) / 2, count - 1) * math.sqrt(variance / count)
    return {"n": count, "mean": mean, "half_width": half}


def t_quantile(share: float, freedom: int) -> float:
    """The value that Student's t with so many degrees of freedom stays below.

    Args:
        share: Probability, 0.5 <= share < 1.
        freedom: Degrees of freedom, >= 1.
    """
    low, high = 0.0, 1.0
    while _t_below(high, freedom) < share:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        if _t_below(middle, freedom) < share:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _t_below(value: float, freedom: int) -> float:
    """P(T <= value), value >= 0: Abramowitz and Stegun 26.7.3 and 26.7.4, for whole degrees."""
    angle = math.atan(value / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    # The sum's terms are cos^i times a product of odd over even numbers, or the other way round.
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for i in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine**2 * (i - 1) / i
        total += term
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + inside / 2

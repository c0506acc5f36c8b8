import math

import pytest

from megatron_mer.analysis.report.interval import mean_interval, t_quantile

# Published table of Student's t, 97.5% (one side).
TABLE = {
    1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646, 8: 2.3060,
    9: 2.2622, 10: 2.2281, 15: 2.1314, 20: 2.0860, 30: 2.0423, 60: 2.0003, 120: 1.9799,
}  # fmt: skip


@pytest.mark.parametrize(("freedom", "value"), TABLE.items())
def test_t_against_the_table(freedom: int, value: float):
    assert t_quantile(0.975, freedom) == pytest.approx(value, abs=6e-5)


def test_half_is_the_middle():
    assert t_quantile(0.5, 3) == pytest.approx(0.0, abs=1e-12)


def test_an_interval_by_hand():
    # Mean 5.2, s = 0.2, t with 2 degrees 4.302653: 4.302653 * 0.2 / sqrt(3).
    found = mean_interval([5.0, 5.2, 5.4])
    assert found["n"] == 3
    assert found["mean"] == pytest.approx(5.2)
    assert found["half_width"] == pytest.approx(0.4968276, abs=1e-6)
    pair = mean_interval([1.0, 2.0])
    assert pair["half_width"] == pytest.approx(12.706205 * math.sqrt(0.5) / math.sqrt(2), abs=1e-5)


def test_one_value_has_no_interval():
    assert mean_interval([3.5]) == {"n": 1, "mean": 3.5, "half_width": None}

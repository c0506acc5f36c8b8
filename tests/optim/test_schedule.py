"""Learning rates at hand-calculated steps."""

from itertools import pairwise

import pytest

from megatron_mer.config import ScheduleConfig
from megatron_mer.errors import ConfigError
from megatron_mer.optim.schedule import check_schedule, lr_at

COSINE = ScheduleConfig(kind="cosine", warmup_steps=4, min_lr=0.2)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.25),
        (1, 0.5),
        (3, 1.0),
        (4, 1.0),
        (6, 0.2 + 0.4 * (1 + 2**-0.5)),
        (8, 0.6),
        (12, 0.2),
        (500, 0.2),
    ],
)
def test_cosine(step, expected):
    assert lr_at(COSINE, 1.0, 12, step) == pytest.approx(expected, rel=1e-12)


def test_cosine_falls_all_the_way():
    rates = [lr_at(COSINE, 1.0, 100, step) for step in range(101)]
    assert rates[:5] == sorted(rates[:5])
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))
    assert rates[-1] == 0.2


def test_without_warm_up_the_first_update_has_the_peak():
    assert lr_at(ScheduleConfig(), 3e-4, 10, 0) == 3e-4


def test_constant_stays():
    config = ScheduleConfig(kind="constant", warmup_steps=2)
    assert [lr_at(config, 0.8, 3, step) for step in (0, 1, 2, 9)] == [0.4, 0.8, 0.8, 0.8]


def test_contradictions_come_together():
    config = ScheduleConfig(warmup_steps=10, min_lr=2e-3)
    with pytest.raises(ConfigError) as error:
        check_schedule(config, 1e-3, 10)
    text = str(error.value)
    assert "schedule.warmup_steps: 10 with 10 steps" in text
    assert "schedule.min_lr: 0.002 with optimizer.lr 0.001" in text
    with pytest.raises(ConfigError, match="total_steps"):
        lr_at(ScheduleConfig(), 1e-3, 0, 0)


def test_negative_step_is_an_error():
    with pytest.raises(ValueError, match="-1"):
        lr_at(COSINE, 1.0, 12, -1)

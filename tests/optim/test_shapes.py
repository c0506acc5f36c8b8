"""Every kind of schedule at hand-calculated steps, and what must hold for any of them."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mer.config import ScheduleConfig
from megatron_mer.errors import ConfigError
from megatron_mer.optim.extension import horizon_on_resume, horizon_problems
from megatron_mer.optim.schedule import lr_at, lr_in_task
from megatron_mer.optim.shapes import Phases, decayed, phase_problems

WSD = ScheduleConfig(kind="wsd", warmup_steps=4, decay_steps=4, min_lr=0.2)
INFINITE = ScheduleConfig(
    kind="infinite",
    warmup_steps=2,
    cooldown_steps=4,
    decay_steps=4,
    constant_lr=0.4,
    min_lr=0.1,
)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("linear", [1.0, 0.8, 0.6, 0.4, 0.2]),
        ("sqrt", [1.0, 0.6, 0.2 + 0.8 * (1 - 0.5**0.5), 0.2 + 0.8 * (1 - 0.75**0.5), 0.2]),
        ("cosine", [1.0, 0.6 + 0.4 * 0.5**0.5, 0.6, 0.6 - 0.4 * 0.5**0.5, 0.2]),
        ("exponential", [1.0, 0.2**0.25, 0.2**0.5, 0.2**0.75, 0.2]),
    ],
)
def test_wsd(decay, expected):
    config = ScheduleConfig(**{**vars(WSD), "decay": decay})
    rates = [lr_at(config, 1.0, 20, step) for step in range(25)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:16] == [1.0] * 12
    assert rates[16:21] == pytest.approx(expected, rel=1e-12)
    assert rates[20:] == [0.2] * 5


def test_infinite():
    rates = [lr_at(INFINITE, 1.0, 16, step) for step in range(18)]
    middle = 0.3 * 0.5**0.5
    expected = [0.5, 1.0, 1.0, 0.7 + middle, 0.7, 0.7 - middle, *[0.4] * 6]
    expected += [0.4 * 0.25 ** (part / 4) for part in range(5)] + [0.1]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_defaults_are_the_published_shares():
    wsd = Phases.of(ScheduleConfig(kind="wsd"), 1.0, 200)
    assert (wsd.decay, wsd.end, wsd.shape) == (180, 200, "sqrt")
    # 3e-4 cools down to 1.65e-4 over 60 % of the steps; the last 25 % are the anneal.
    infinite = Phases.of(ScheduleConfig(kind="infinite", warmup_steps=2), 3e-4, 200)
    assert (infinite.warm, infinite.cool, infinite.decay, infinite.end) == (2, 122, 150, 200)
    assert infinite.constant == pytest.approx(1.65e-4)
    assert infinite.shape == "exponential"


def test_each_task_begins_where_the_one_before_ended():
    config = ScheduleConfig(per_task=True, warmup_steps=2, min_lr=0.2)
    first = [lr_in_task(config, 1.0, 6, step, is_first=True) for step in range(6)]
    later = [lr_in_task(config, 1.0, 6, step, is_first=False) for step in range(6)]
    assert first[:3] == [0.5, 1.0, 1.0]
    assert later[:3] == pytest.approx([0.6, 1.0, 1.0])
    assert first[2:] == later[2:]
    assert lr_in_task(config, 1.0, 6, 6, is_first=True) == 0.2


def test_a_later_task_loses_no_update_to_a_floor_of_zero():
    config = ScheduleConfig(per_task=True, warmup_steps=4)
    assert lr_in_task(config, 1.0, 9, 0, is_first=False) == 0.25


@st.composite
def schedules(draw):
    kind = draw(st.sampled_from(["cosine", "wsd", "infinite", "constant"]))
    total = draw(st.integers(8, 60))
    values = {"kind": kind, "warmup_steps": draw(st.integers(0, total // 4))}
    if kind != "constant":
        values["min_lr"] = draw(st.floats(0.001, 0.3))
    if kind in ("wsd", "infinite"):
        values["decay_steps"] = draw(st.integers(1, total // 4))
        values["decay"] = draw(st.sampled_from(["linear", "cosine", "sqrt", "exponential", None]))
    if kind == "infinite":
        values["cooldown_steps"] = draw(st.integers(1, total // 4))
        values["constant_lr"] = draw(st.floats(0.3, 1.0))
    return ScheduleConfig(**values), total


@given(schedules())
def test_rates_rise_in_the_warm_up_and_never_again(case):
    config, total = case
    assert phase_problems(config, 1.0, total) == []
    rates = [lr_at(config, 1.0, total, step) for step in range(total + 3)]
    warm = config.warmup_steps
    assert all(earlier < later for earlier, later in pairwise(rates[:warm]))
    assert all(earlier >= later - 1e-15 for earlier, later in pairwise(rates[warm:]))
    assert rates[warm] == 1.0
    assert all(0 < rate <= 1.0 for rate in rates)
    end = 1.0 if config.kind == "constant" else config.min_lr
    assert rates[total:] == [end] * 3


@given(
    st.sampled_from(["linear", "cosine", "sqrt", "exponential"]),
    st.floats(0.1, 10.0),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
)
def test_a_decay_goes_from_end_to_end(shape, high, share_of_high, share):
    low = high * share_of_high
    assert decayed(shape, high, low, 0.0) == pytest.approx(high)
    assert decayed(shape, high, low, 1.0) == low
    assert low * (1 - 1e-12) <= decayed(shape, high, low, share) <= high * (1 + 1e-12)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"kind": "wsd", "warmup_steps": 8, "decay_steps": 3}, "8 steps of warm-up, 3 of decay"),
        (
            {"kind": "infinite", "cooldown_steps": 8, "decay_steps": 3, "min_lr": 0.1},
            "0 steps of warm-up, 8 of cooldown, 3 of decay in a schedule of 10 steps",
        ),
        ({"kind": "infinite"}, "0, which an exponential decay never reaches"),
        ({"kind": "wsd", "decay": "exponential"}, "give a floor, such as 0.1"),
        ({"kind": "infinite", "constant_lr": 2.0, "min_lr": 0.1}, "2 with optimizer.lr 1"),
        (
            {"kind": "infinite", "constant_lr": 0.1, "min_lr": 0.2},
            "0.2 with schedule.constant_lr 0.1",
        ),
        ({"kind": "wsd", "warmup_steps": 10}, "10 with 10 steps in all"),
    ],
)
def test_phases_that_do_not_fit(values, text):
    with pytest.raises(ConfigError) as error:
        lr_at(ScheduleConfig(**values), 1.0, 10, 0)
    assert text in str(error.value)


def test_the_constant_phase_is_extended_as_long_as_the_decay_has_not_begun():
    for config in (WSD, INFINITE):
        assert horizon_problems(config, 1.0, fixed=16, step=12, stream_steps=30) == []
        assert horizon_on_resume(config, 16, 12, 30) == 30
        before = [lr_at(config, 1.0, 16, step) for step in range(13)]
        assert before == [lr_at(config, 1.0, 30, step) for step in range(13)]
        # From the decay on a longer stream needs a schedule for what follows, as a cosine does.
        assert horizon_on_resume(config, 16, 13, 30) == 16
        (problem,) = horizon_problems(config, 1.0, fixed=16, step=13, stream_steps=30)
        assert "fixed at first launch to end after 16 steps" in problem.given
        # Shorter, as far as the decay still fits.
        assert horizon_on_resume(config, 16, 6, 10) == 10
        assert horizon_on_resume(config, 16, 7, 10) == 16
        longer = ScheduleConfig(**{**vars(config), "total_steps": 20})
        assert horizon_problems(longer, 1.0, fixed=16, step=12, stream_steps=30) == []
        assert horizon_on_resume(longer, 16, 12, 30) == 20


def test_shares_of_the_steps_cannot_be_extended():
    for key in ("decay_steps", "cooldown_steps"):
        config = ScheduleConfig(**{**vars(INFINITE), key: None})
        assert horizon_on_resume(config, 160, 5, 300) == 160
        assert horizon_problems(config, 1.0, fixed=160, step=5, stream_steps=300)


def test_a_longer_stream_is_free_with_a_schedule_for_each_task():
    config = ScheduleConfig(per_task=True, warmup_steps=2, min_lr=0.1)
    assert horizon_problems(config, 1.0, fixed=16, step=16, stream_steps=99) == []


def test_the_last_rate_stays_for_ever():
    assert lr_at(INFINITE, 1.0, 16, 10**12) == 0.1
    assert math.isclose(lr_at(WSD, 1.0, 20, 10**12), 0.2)

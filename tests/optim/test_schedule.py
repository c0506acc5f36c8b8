"""Learning rates at hand-calculated steps."""

import re
import shlex
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mer.config import ScheduleConfig, ScheduleSegmentConfig, load_config
from megatron_mer.errors import ConfigError
from megatron_mer.optim.extension import horizon_problems
from megatron_mer.optim.schedule import check_schedule, end_of_schedule, horizon, lr_at

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


def cosine(steps, lr, warmup_steps=0, min_lr=0.0):
    return ScheduleSegmentConfig(
        kind="cosine", steps=steps, lr=lr, warmup_steps=warmup_steps, min_lr=min_lr
    )


def constant(lr, steps=None, warmup_steps=0):
    return ScheduleSegmentConfig(kind="constant", steps=steps, lr=lr, warmup_steps=warmup_steps)


# The first schedule ends at 12 at the rate 0.2; then a cosine to 20, a constant to 24, and another.
THREE = replace(
    COSINE,
    total_steps=12,
    then=(
        cosine(8, 0.6, warmup_steps=4, min_lr=0.1),
        constant(0.5, steps=4, warmup_steps=2),
        constant(0.4),
    ),
)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.25),
        (8, 0.6),
        (12, 0.3),
        (13, 0.4),
        (15, 0.6),
        (16, 0.6),
        (18, 0.35),
        (20, 0.3),
        (21, 0.5),
        (22, 0.5),
        (23, 0.5),
        (24, 0.4),
        (900, 0.4),
    ],
)
def test_segments(step, expected):
    # The schedule's own total_steps counts, whatever the stream has become.
    for stream_steps in (12, 30):
        assert lr_at(THREE, 1.0, stream_steps, step) == pytest.approx(expected, rel=1e-12)


def test_a_constant_that_falls_on_a_line_at_its_end():
    config = ScheduleConfig(kind="constant", total_steps=10, then=(constant(0.25, 5, 4),))
    rates = [lr_at(config, 1.0, 99, step) for step in (9, 10, 11, 12, 13, 14, 15, 400)]
    assert rates == [1.0, 0.8125, 0.625, 0.4375, 0.25, 0.25, 0.25, 0.25]


def test_the_last_cosine_stays_at_its_end():
    config = ScheduleConfig(total_steps=5, then=(cosine(4, 0.8, min_lr=0.3),))
    assert [lr_at(config, 1.0, 5, step) for step in (5, 9, 10, 1000)] == [0.8, 0.3, 0.3, 0.3]


def segment(draw, is_last):
    kind = draw(st.sampled_from(["cosine", "constant"]))
    steps = None if kind == "constant" and is_last else draw(st.integers(2, 12))
    lr = draw(st.floats(0.01, 1.0))
    warmup = draw(st.integers(0, (steps or 9) - 1))
    return ScheduleSegmentConfig(
        kind=kind,
        steps=steps,
        lr=lr,
        warmup_steps=warmup,
        min_lr=lr * draw(st.floats(0.0, 1.0)) if kind == "cosine" else 0.0,
    )


@st.composite
def schedules(draw):
    kind = draw(st.sampled_from(["cosine", "constant"]))
    count = draw(st.integers(1, 3))
    return ScheduleConfig(
        kind=kind,
        total_steps=draw(st.integers(6, 15)),
        warmup_steps=draw(st.integers(0, 5)),
        min_lr=draw(st.floats(0.0, 0.9)) if kind == "cosine" else 0.0,
        then=tuple(segment(draw, place == count - 1) for place in range(count)),
    )


@given(schedules())
def test_a_warm_up_goes_on_from_the_rate_before_in_equal_steps(config):
    begin, before = config.total_steps, config.min_lr if config.kind == "cosine" else 0.9
    for part in config.then:
        at_joint = lr_at(config, 0.9, 1, begin)
        slope = (part.lr - before) / max(1, part.warmup_steps)
        assert at_joint == pytest.approx(before + slope if slope else part.lr, rel=1e-12)
        warm = begin + part.warmup_steps
        assert lr_at(config, 0.9, 1, warm) == pytest.approx(part.lr, rel=1e-12)
        for step in range(begin, warm - 1):
            rise = lr_at(config, 0.9, 1, step + 1) - lr_at(config, 0.9, 1, step)
            assert rise == pytest.approx(slope, rel=1e-9, abs=1e-15)
        begin += part.steps or 0
        before = part.min_lr if part.kind == "cosine" else part.lr
    end = end_of_schedule(config, 1)
    assert end == (None if config.then[-1].steps is None else begin)
    assert {lr_at(config, 0.9, 1, begin + far) for far in (20, 10**9)} == {before}


@given(schedules(), st.integers(0, 100))
def test_segments_change_nothing_ahead_of_them(config, step):
    first = replace(config, then=())
    if step < config.total_steps:
        assert lr_at(config, 0.9, 1, step) == lr_at(first, 0.9, 1, step)


def test_horizon_and_end():
    assert (horizon(COSINE, 40), horizon(THREE, 40)) == (40, 12)
    assert end_of_schedule(COSINE, 40) == 40
    assert end_of_schedule(replace(COSINE, total_steps=30), 40) == 30
    assert end_of_schedule(ScheduleConfig(kind="constant"), 40) is None
    assert end_of_schedule(THREE, 40) is None
    assert end_of_schedule(replace(THREE, then=THREE.then[:2]), 40) == 24


def test_contradictions_of_segments_come_together():
    config = ScheduleConfig(
        kind="constant",
        warmup_steps=11,
        then=(cosine(4, 0.1, warmup_steps=4, min_lr=0.2), constant(0.3), constant(0.3, 2, 3)),
    )
    with pytest.raises(ConfigError) as error:
        check_schedule(config, 1.0, 10)
    assert [problem.path for problem in error.value.problems] == [
        "schedule.warmup_steps",
        "schedule.total_steps",
        "schedule.then.0.min_lr",
        "schedule.then.0.warmup_steps",
        "schedule.then.1.steps",
        "schedule.then.2.warmup_steps",
    ]
    # What nothing follows may be shorter than its warm-up.
    check_schedule(ScheduleConfig(kind="constant", warmup_steps=11), 1.0, 10)


RUN = """\
name: small
seed: 1
precision: bf16
model: {size: llama-1m, seq_length: 64}
tokenizer: sentencepiece:tok.model
batch: {global_batch_size: 8, micro_batch_size: 2}
optimizer: {lr: 3.7e-3}
stream: [{task: en, train: [data/en], steps: 300}, {task: fr, train: [data/fr], steps: 100}]
schedule: {warmup_steps: 20, min_lr: 5e-5}
output_dir: runs/small
"""


@pytest.fixture
def stretched(tmp_path):
    """A run of 300 steps that stands at 290 and now has 400: its file and the problem."""
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    config = load_config(path)
    (problem,) = horizon_problems(config.schedule, config.optimizer.lr, 300, 290, 400)
    return path, problem


def test_a_longer_stream_prints_the_rates_before_and_after(stretched):
    path, problem = stretched
    schedule = load_config(path).schedule
    assert problem.path == "stream"
    assert "now 400 batches" in problem.given
    assert "end after 300 steps" in problem.given
    for step, end in ((290, 300), (290, 400), (300, 300), (300, 400)):
        assert f"{lr_at(schedule, 3.7e-3, end, step):.4g} " in problem.given + " "
    assert "step 290" in problem.given


def test_the_printed_sections_end_the_problem(stretched):
    path, problem = stretched
    sections = re.findall(r"`(schedule: .*?)`", str(problem))
    assert len(sections) == 2
    schedules = []
    for section in sections:
        path.write_text(re.sub("(?m)^schedule: .*$", section, RUN))
        config = load_config(path)
        assert horizon_problems(config.schedule, config.optimizer.lr, 300, 290, 400) == []
        schedules.append(config.schedule)
    stays, again = schedules
    assert stays == ScheduleConfig(warmup_steps=20, min_lr=5e-5, total_steps=300)
    assert again == replace(stays, then=(cosine(100, 3.7e-3, warmup_steps=20, min_lr=5e-5),))
    assert end_of_schedule(again, 400) == 400


def test_the_printed_options_end_the_problem(stretched):
    path, problem = stretched
    options = re.findall(r"`(--.*?)`", str(problem))
    schedules = [load_config(path, shlex.split(one)).schedule for one in options]
    assert [len(schedule.then) for schedule in schedules] == [0, 1]
    for schedule in schedules:
        assert horizon_problems(schedule, 3.7e-3, 300, 290, 400) == []


@pytest.mark.parametrize("added", [1, 2, 20, 21])
@pytest.mark.parametrize("config", [ScheduleConfig(), ScheduleConfig(warmup_steps=20, min_lr=5e-5)])
def test_the_printed_section_fits_whatever_was_added(tmp_path, config, added):
    (problem,) = horizon_problems(config, 2e-5 + 3e-4, 300, 300, 300 + added)
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    option = shlex.split(re.findall(r"`(--.*?)`", str(problem))[1])
    (more,) = load_config(path, option).schedule.then
    assert (more.steps, more.lr, more.min_lr) == (added, 2e-5 + 3e-4, config.min_lr)
    assert more.warmup_steps == min(config.warmup_steps, 20 if added > 20 else added // 2)


def test_a_horizon_is_fixed():
    (problem,) = horizon_problems(replace(COSINE, total_steps=40), 1.0, 30, 5, 40)
    assert problem.path == "schedule.total_steps"
    assert "40, but the run began with a schedule of 30 steps" in problem.given
    assert horizon_problems(replace(COSINE, total_steps=30), 1.0, 30, 5, 40) == []
    assert horizon_problems(COSINE, 1.0, 30, 5, 30) == []
    assert horizon_problems(COSINE, 1.0, 30, 5, 20) == []
    assert horizon_problems(replace(THREE, warmup_steps=2), 1.0, 12, 14, 90) == []


def test_a_warm_up_that_the_fixed_horizon_has_no_room_for():
    (problem,) = horizon_problems(replace(COSINE, warmup_steps=30), 1.0, 30, 5, 40)
    assert (problem.path, problem.given) == ("schedule.warmup_steps", "30 with 30 steps in all")


def test_a_constant_may_be_left_at_any_step_to_come():
    config = ScheduleConfig(kind="constant")
    assert horizon_problems(config, 1.0, 30, 5, 40) == []
    follows = replace(config, total_steps=20, then=(constant(0.1),))
    assert horizon_problems(follows, 1.0, 30, 20, 40) == []
    (problem,) = horizon_problems(follows, 1.0, 30, 21, 40)
    assert problem.path == "schedule.total_steps"
    assert "21 steps were applied" in problem.given
    assert horizon_problems(follows, 1.0, 20, 21, 40) == []

"""The rate that a real run trains with, a schedule for each task."""

import pytest

from megatron_mer.config import ScheduleConfig, load_config
from megatron_mer.errors import ConfigError
from megatron_mer.optim.schedule import lr_in_task
from megatron_mer.training.preflight import prepare

pytestmark = pytest.mark.dist

SCHEDULE = {"kind": "wsd", "per_task": True, "warmup_steps": 2, "min_lr": 1e-4, "decay_steps": 3}


def rates(tiny, name):
    return [line["lr"] for line in tiny.lines(name)]


def expected(*lengths):
    config = ScheduleConfig(**SCHEDULE)
    return [
        lr_in_task(config, 1e-3, length, step, is_first=entry == 0)
        for entry, length in enumerate(lengths)
        for step in range(length)
    ]


@pytest.mark.slow
def test_each_task_warms_up_and_decays_and_an_appended_task_needs_no_other_schedule(tiny):
    def two(config):
        config["schedule"] = SCHEDULE
        config["stream"] = config["stream"][:2]

    def three(config):
        config["schedule"] = SCHEDULE

    tiny.train(tiny.write("run", two))
    assert rates(tiny, "run") == expected(7, 7)
    tiny.train(tiny.write("run", three))
    assert rates(tiny, "run") == expected(7, 7, 6)
    tiny.train(tiny.write("whole", three))
    assert tiny.results("run") == tiny.results("whole")


def test_a_batch_without_an_update_uses_its_step_up(tiny):
    config = tiny.write("run", lambda c: c.update(schedule=SCHEDULE))
    tiny.train(config, poison={"batch": 4, "rank": 0})
    assert [line["step"] for line in tiny.lines("run")][3:6] == [4, None, 5]
    assert rates(tiny, "run") == expected(7, 7, 6)


def test_phases_longer_than_an_entry_name_it(tiny):
    def short(config):
        config["schedule"] = {**SCHEDULE, "decay_steps": 5}

    config = load_config(tiny.write("run", short), [])
    with pytest.raises(ConfigError) as error:
        prepare(config, world_size=1)
    (problem,) = error.value.problems
    assert problem.path == "schedule"
    assert problem.given == (
        "2 steps of warm-up, 5 of decay in a schedule of 6 steps (entry 2, task de)"
    )

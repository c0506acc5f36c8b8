"""A shortened run is a run that can be made, and a resume in it has work to do."""

import itertools

import pytest

from megatron_mer.config import load_config
from megatron_mer.errors import ConfigError
from megatron_mer.training.check_resume.shorten import shorten
from megatron_mer.training.preflight import prepare


def then(config):
    config["schedule"] |= {
        "total_steps": 12,
        "then": [
            {"kind": "cosine", "steps": 8, "lr": 1e-3, "warmup_steps": 5, "min_lr": 1e-4},
            {"kind": "constant", "lr": 1e-4},
        ],
    }


def infinite_per_task(config):
    config["schedule"] = {"kind": "infinite", "per_task": True, "warmup_steps": 1, "min_lr": 1e-5}


def wsd(config):
    config["schedule"] = {"kind": "wsd", "warmup_steps": 9, "decay_steps": 9, "decay": "linear"}


def fresh_tokens(config):
    for entry in config["stream"]:
        entry["fresh_tokens"] = 32 * 8 * entry.pop("steps")


def many_tasks(config):
    config["stream"] = [
        {**entry, "steps": 2, "task": f"{entry['task']}_{number}"}
        for number in range(3)
        for entry in config["stream"]
    ]
    for entry in config["stream"]:
        entry["valid"] = {entry["task"][:2]: entry["valid"]}
    config["replay"] |= {
        "policy": "weights",
        "weights": {entry["task"]: number for number, entry in enumerate(config["stream"])},
    }


def no_weight_left(config):
    many_tasks(config)
    weights = config["replay"]["weights"]
    weights.update(dict.fromkeys(list(weights)[:-1], 0))


def one_task(config):
    config["stream"] = [{**config["stream"][0], "steps": 20}]
    config["replay"]["include_current_task"] = True


def trained_before(config):
    first = config["stream"][0]
    del first["steps"], first["max_epochs"]
    first["trained_before"] = True


def trackers(config):
    config["wandb"] = {"project": "p"}
    config["tensorboard"] = {}
    config["checkpoint"] = {"copy_to": "s3://bucket/run"}
    config["evaluate"] |= {"every_steps": 100, "bounds": {"max_forgetting": 0, "action": "stop"}}


def buffer(config):
    rows = {entry["task"]: 20 for entry in config["stream"]}
    config["replay"] |= {"source": "buffer", "capacity_samples": rows, "dir": "/live/buffer"}


def bare(config):
    for key in ("replay", "reptile", "evaluate"):
        del config[key]
    for entry in config["stream"]:
        del entry["valid"]


CASES = (
    then, infinite_per_task, wsd, fresh_tokens, many_tasks, no_weight_left, one_task,
    trained_before, trackers, buffer, bare,
)  # fmt: skip


@pytest.mark.parametrize("change", CASES)
@pytest.mark.parametrize(("steps", "more"), [(6, 6), (1, 1), (3, 9), (9, 3)])
def test_it_can_be_made_and_stops_where_it_should(tiny, change, steps, more):
    config = load_config(tiny.write("run", change))
    short = shorten(config, steps, more)
    if (change, min(steps, more)) == (infinite_per_task, 1):
        return  # Three phases do not fit into one step.
    plan = prepare(short.config, 1).plan
    assert plan.total_batches == short.total == steps + more
    assert plan.entries[0].task == config.stream[0].task
    assert steps <= short.killed_after < short.total
    every = short.config.checkpoint.every_steps
    saves = {entry.last_batch for entry in plan.entries} | set(range(0, short.total, every))
    assert steps in saves
    assert not saves & set(range(steps + 1, short.killed_after + 1))
    assert short.config.wandb is short.config.tensorboard is None
    assert short.config.checkpoint.copy_to is None
    assert short.config.replay is None or short.config.replay.dir is None
    if short.config.evaluate:
        assert short.config.evaluate.bounds is None


@pytest.mark.parametrize("change", [None, then, fresh_tokens, many_tasks, trained_before])
def test_replay_reptile_and_a_boundary_lie_inside(tiny, change):
    short = shorten(load_config(tiny.write("run", change)), 6, 6)
    plan = prepare(short.config, 1).plan
    ends = [entry.last_batch for entry in plan.entries]
    assert any(0 < end <= 6 for end in ends)
    assert any(plan.replay_rows(batch) for batch in range(6))
    assert all(plan.replay_rows(batch) for batch in range(7, 12))
    k = short.config.reptile.k
    assert 6 % k
    assert k < 6 < 2 * k <= 12
    if len(ends) - ends.count(0) > 2:
        assert any(short.killed_after < end < 12 for end in ends)


def test_what_was_changed_is_said(tiny):
    short = shorten(load_config(tiny.write("run", many_tasks)), 4, 3)
    assert "checkpoint.every_steps 5 -> 4" in short.changes
    assert "stream: without its last 5 entries (tasks fr_1, de_1, en_2, fr_2, de_2)" in (
        short.changes
    )
    assert "stream.3.steps 2 -> stream.3.steps 1 (task en_1)" in short.changes
    (alone,) = (line for line in shorten(load_config(tiny.write("run", one_task)), 6, 6).changes
                if "no boundary" in line)  # fmt: skip
    assert alone.startswith("stream: it has one entry")


@pytest.mark.parametrize(
    ("steps", "more", "said"),
    [
        (0, 6, "--steps: given 0; allowed: at least 1"),
        (6, 0, "--more: given 0; allowed: at least 1"),
        (15, 6, "--steps and --more: given 15 and 6, but the stream has 20 steps; allowed: 20"),
    ],
)
def test_numbers_that_are_none(tiny, steps, more, said):
    with pytest.raises(ConfigError, match=said):
        shorten(load_config(tiny.write("run")), steps, more)


def test_no_entry_is_longer_than_it_was(tiny):
    """Else its data might not last."""
    for lengths in itertools.product((1, 2, 9), repeat=3):

        def change(config, lengths=lengths):
            config["schedule"]["warmup_steps"] = 0
            for entry, steps in zip(config["stream"], lengths, strict=True):
                entry["steps"] = steps

        config = load_config(tiny.write("run", change))
        for steps in range(1, sum(lengths)):
            short = shorten(config, steps, sum(lengths) - steps)
            assert [entry.steps for entry in short.config.stream] == list(lengths)
        if sum(lengths) > 4:
            short = shorten(config, 2, 2)
            now = [entry.steps for entry in short.config.stream]
            assert sum(now) == 4
            assert all(one <= was for one, was in zip(now, lengths, strict=False))

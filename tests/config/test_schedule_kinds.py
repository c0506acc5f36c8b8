"""What a schedule's kind does not read is an error, found before anything starts."""

import pytest

from megatron_mer.config import load_config
from megatron_mer.errors import ConfigError


def load(*options):
    values = [f"--schedule.{option}" for option in options]
    return load_config("examples/quickstart/run.yaml", [*values])


def plain(kind, *options):
    """The quick start's schedule has warm-up and min_lr; a constant reads no min_lr."""
    cleared = ["min_lr=0"] if kind == "constant" else []
    return load(f"kind={kind}", *cleared, *options)


@pytest.mark.parametrize(
    ("kind", "option", "text"),
    [
        ("cosine", "decay_steps=5", "given 5, which kind cosine does not use"),
        ("cosine", "decay=linear", "given linear, which kind cosine does not use"),
        ("wsd", "cooldown_steps=5", "given 5, which kind wsd does not use"),
        ("wsd", "constant_lr=0.001", "given 0.001, which kind wsd does not use"),
        ("constant", "decay_steps=5", "given 5, which kind constant does not use"),
        ("constant", "per_task=true", "which ends where it would begin again"),
        ("wsd", "decay=cubic", "decay"),
    ],
)
def test_refused(kind, option, text):
    with pytest.raises(ConfigError, match=text):
        plain(kind, option)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "infinite"])
def test_per_task_reads_no_length(kind):
    assert plain(kind, "per_task=true").schedule.per_task
    with pytest.raises(ConfigError) as error:
        plain(kind, "per_task=true", "total_steps=100", "then=[{kind: cosine, steps: 5, lr: 1e-3}]")
    assert "total_steps: given 100 with per_task" in str(error.value)
    assert "schedule.then: given with per_task" in str(error.value)


def test_a_warm_up_longer_than_the_shortest_entry():
    with pytest.raises(ConfigError, match="150 steps of warm-up in a schedule of the shortest ent"):
        plain("cosine", "per_task=true", "warmup_steps=150")
    assert plain("cosine", "per_task=true", "warmup_steps=149").schedule.warmup_steps == 149

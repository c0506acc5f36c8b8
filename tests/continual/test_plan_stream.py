"""From the sections of a configuration to a plan."""

from dataclasses import replace
from decimal import Decimal

import pytest

from megatron_mer.config import DatasetConfig, ReplayConfig, TaskConfig
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.stream import plan_spec
from megatron_mer.errors import ConfigError

EN = TaskConfig(
    task="en",
    train=(
        DatasetConfig(prefix="data/en", weight=3.0),
        DatasetConfig(prefix="data/web", weight=1.0),
    ),
    steps=5,
)
FR = TaskConfig(task="fr", train=(DatasetConfig(prefix="data/fr"),), fresh_tokens=640, max_epochs=2)
SIZES = {"en": 90, "web": 40, "fr": 40, "unused": 7}


def build(*stream: TaskConfig, replay: ReplayConfig | None = None, sizes=SIZES) -> Plan:
    return Plan(plan_spec(stream, replay, 1, 8, 16, sizes))


def test_a_configuration_becomes_a_plan() -> None:
    base = TaskConfig(
        task="base", train=(DatasetConfig(prefix="old/en", name="old"),), trained_before=True
    )
    replay = ReplayConfig(alpha=Decimal("0.25"), include_current_task=True)
    plan = build(base, EN, FR, replay=replay, sizes={**SIZES, "old": 30})
    assert plan.datasets == ("old", "en", "web", "fr")
    assert [entry.task for entry in plan.entries] == ["base", "en", "fr"]
    assert [entry.last_batch for entry in plan.entries] == [0, 5, 12]
    assert plan.rows_trained_before == 30
    assert [plan.replay_rows(batch) for batch in range(12)] == [2] * 12
    assert plan.spec.replay is not None
    assert plan.spec.replay.include_current_task
    counts = [plan.ledger(12)["datasets"][name]["fresh"] for name in plan.datasets]
    assert counts == [0, 22, 8, 42]
    assert plan.spec.stream[2].max_epochs == 2


def test_moving_data_or_renaming_nothing_changes_no_row() -> None:
    moved = replace(EN, train=tuple(replace(one, prefix=f"/mnt/{one.name}") for one in EN.train))
    for batch in range(5):
        left, right = build(EN).rows(batch), build(moved).rows(batch)
        assert (left.sample == right.sample).all()
        assert (left.dataset == right.dataset).all()


def test_problems_come_together_with_their_paths() -> None:
    other = replace(FR, train=(DatasetConfig(prefix="b/fr"), DatasetConfig(prefix="data/zh")))
    with pytest.raises(ConfigError) as error:
        build(EN, FR, other)
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("stream.2.train.1: dataset 'zh', whose number of samples")
    assert "en, fr, unused, web" in lines[0]
    assert lines[1].startswith(
        "stream.2.train.0: prefix b/fr under the name 'fr', which data/fr has"
    )
    build(FR, replace(FR, train=(DatasetConfig(prefix="./data//fr"),)))  # the same prefix
    with pytest.raises(ConfigError, match=r"stream\.0\.train\.0: .*320 samples .*allowed: 90"):
        build(replace(EN, train=EN.train[:1], steps=40))

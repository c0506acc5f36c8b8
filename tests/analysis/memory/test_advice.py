"""What makes a run fit, and that the cheapest stands first."""

from pathlib import Path

import pytest

from megatron_mer.analysis.memory.advice import (
    fitting_changes,
    needed,
    single_changes,
    worst_stage,
)
from megatron_mer.analysis.memory.plan import plan_memory
from megatron_mer.config import load_config
from megatron_mer.parallel.topology import Layout

PAPER = Path(__file__).resolve().parents[3] / "examples/paper/1.1b_mer25.yaml"
GIB = 1 << 30


def paper(*options):
    return load_config(PAPER, options)


def peak(config, ranks):
    layout = Layout.of(config.parallel, ranks)
    return needed(worst_stage(plan_memory(config, layout, "cuda"), "cuda"), "cuda")


def test_each_change_by_itself_takes_less():
    config = paper()
    changes = single_changes(config, 8, "cuda")
    assert {change.settings[0][0] for change in changes} == {
        "batch.micro_batch_size",
        "parallel.activation_checkpointing",
        "parallel.tp_size",
        "parallel.pp_size",
        "ranks",
    }
    assert all(needed(change.worst, "cuda") < peak(config, 8) for change in changes)


def test_a_little_too_much_takes_a_smaller_micro_batch():
    config = paper()
    [first, *_] = fitting_changes(config, 8, "cuda", peak(config, 8) - 1)
    assert first.settings == (("batch.micro_batch_size", "4", "2"),)
    smaller = paper("--batch.micro_batch_size=2")
    assert needed(first.worst, "cuda") == peak(smaller, 8)


@pytest.mark.parametrize("limit", [8, 12, 16, 24])
def test_what_fits_is_in_order_and_none_is_more_of_another(limit):
    config = paper()
    changes = fitting_changes(config, 8, "cuda", limit * GIB)
    assert changes
    assert all(needed(change.worst, "cuda") <= limit * GIB for change in changes)
    order = [(change.ranks, change.slowdown) for change in changes]
    assert order == sorted(order)
    for index, change in enumerate(changes):
        for other in changes[:index]:
            pairs = zip(change.strength, other.strength, strict=True)
            assert any(mine < theirs for mine, theirs in pairs)


def test_more_ranks_are_the_last_resort():
    # One row at a time, recomputed, of a model that one rank has to hold whole.
    config = paper("--batch.micro_batch_size=1", "--parallel.activation_checkpointing=full")
    [first, *_] = fitting_changes(config, 1, "cuda", peak(config, 1) // 2)
    assert first.ranks > 1
    assert first.settings[-1][0] == "ranks"


def test_nothing_makes_it_fit_into_nothing():
    assert fitting_changes(paper(), 8, "cuda", 1000) == []

"""The faulty node is named, and the others are not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mer.config import PreflightConfig
from megatron_mer.launch.nodes import NodeFacts, judge, neighbours

LIMITS = PreflightConfig(min_free_gib=10, min_all_reduce_gib_per_second=4)


def facts(count, **changed):
    """Nodes n0, n1, ...; changed: {n1={"clock": 7}}."""
    names = [f"n{number}" for number in range(count)]
    usual = {"free_gib": 50.0, "clock": 1000.0}
    return [NodeFacts(node=name, **{**usual, **changed.get(name, {})}) for name in names]


def speeds(count, slow=()):
    """A pair is as slow as its slower node."""
    pairs = [pair for one in neighbours(count) for pair in one]
    return {pair: 1.0 if set(pair) & set(slow) else 9.0 for pair in pairs}


@given(st.integers(1, 60))
def test_pairs_make_a_ring_and_a_round_has_each_node_once(count):
    rounds = neighbours(count)
    for pairs in rounds:
        members = [node for pair in pairs for node in pair]
        assert count == 1 or len(set(members)) == len(members)
    edges = {frozenset(pair) for pairs in rounds for pair in pairs}
    assert edges == {frozenset((node, (node + 1) % count)) for node in range(count)}
    assert len(rounds) <= 3


@given(st.integers(3, 20), st.data())
def test_one_slow_node_is_told_from_its_neighbours(count, data):
    slow = data.draw(st.integers(0, count - 1))
    found = judge(facts(count), speeds(count, [slow]), LIMITS)
    assert set(found.bad) == {f"n{slow}"}
    assert "reaches 1 GiB/s" in found.bad[f"n{slow}"]


def test_of_two_nodes_both_are_named_and_none_is_left_out():
    found = judge(facts(2), speeds(2, [1]), LIMITS)
    assert found.bad == {}
    assert "nodes n0 and n1 reach 1 GiB/s" in str(found.problems[0])


def test_one_node_is_measured_in_itself():
    assert set(judge(facts(1), speeds(1, [0]), LIMITS).bad) == {"n0"}


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_nothing_is_wrong_with_good_nodes(count):
    assert judge(facts(count), speeds(count), LIMITS).problems == ()


@pytest.mark.parametrize("skew", [6.0, -6.0])
def test_a_wrong_clock(skew):
    found = judge(facts(3, n1={"clock": 1000 + skew}), {}, LIMITS)
    assert found.bad == {"n1": f"node n1's clock is {skew:+.1f} s from the middle one"}


def test_a_node_that_does_not_see_the_directory():
    found = judge(facts(3, n2={"trouble": "does not see /runs", "free_gib": 0.0}), {}, LIMITS)
    assert found.bad == {"n2": "node n2 does not see /runs"}


def test_a_full_disk_is_no_nodes_fault():
    found = judge(facts(3, n0={"free_gib": 9.0}), {}, LIMITS)
    assert found.bad == {}
    assert str(found.problems[0]) == (
        "launch.preflight.min_free_gib: 9.0 GiB are free at output_dir; allowed: at least 10; "
        "make space there"
    )

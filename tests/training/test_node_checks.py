"""Checks of nodes on real ranks, each of which says that it is a node of its own."""

import json
from pathlib import Path

import pytest

from megatron_mer.testing import run_world

pytestmark = pytest.mark.dist
PROGRAM = Path(__file__).parent / "programs.py"
LIMITS = {"min_free_gib": 0.0}


def check(folder, limits, world_size=3, **fault):
    """The error that every rank got; None where the nodes are fit."""
    arguments = {"folder": str(folder), "limits": {**LIMITS, **limits}, **fault}
    said = run_world(PROGRAM, "check_nodes", world_size, arguments, 60.0)
    assert len(set(said)) == 1, "every rank hears the same"
    assert list(folder.glob(".preflight*")) == []
    return said[0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_good_nodes_pass_and_leave_nothing(tmp_path, world_size):
    assert check(tmp_path, {"min_all_reduce_gib_per_second": 1e-9}, world_size) is None
    assert list(tmp_path.iterdir()) == []


def test_a_clock_that_is_wrong_is_named_and_kept(tmp_path):
    said = check(tmp_path, {}, skewed={"rank": 1, "seconds": 60})
    assert "node n1's clock is +60" in said
    bad = json.loads((tmp_path / "bad_nodes.json").read_text())
    assert list(bad) == ["n1"]


def test_too_slow_for_the_limit_names_every_node(tmp_path):
    said = check(tmp_path, {"min_all_reduce_gib_per_second": 1e9})
    assert [f"node n{place} reaches" in said for place in range(3)] == [True] * 3


def test_a_full_disk_is_said(tmp_path):
    assert "GiB are free at output_dir; allowed: at least 1e+09" in check(
        tmp_path, {"min_free_gib": 1e9}
    )
    assert json.loads((tmp_path / "bad_nodes.json").read_text()) == {}

"""Ranks that contradict each other are told apart before any collective, on all of them."""

import re
from pathlib import Path

import pytest

from megatron_mer.testing import run_world
from megatron_mer.testing.ranks import free_port

pytestmark = pytest.mark.dist

SCENARIOS = {
    "agree": {},
    "other world size": {"environ": {"1": {"WORLD_SIZE": "4"}}},
    "one rank twice": {"environ": {"1": {"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}}},
    "agree again": {"environ": {"1": {"TORCHELASTIC_USE_AGENT_STORE": ""}}},
    "a problem": {"problem": "LOCAL_RANK 4 with 4 visible devices"},
    "absent": {"absent": True, "limit": 1},
    "foreign program": {"foreign": True},
    "no such host": {"environ": {str(r): {"MASTER_ADDR": "not a host"} for r in (0, 1)}},
}


@pytest.fixture(scope="module")
def said():
    scenarios = [{**scenario, "port": free_port()} for scenario in SCENARIOS.values()]
    program = Path(__file__).with_name("meetings.py")
    ranks = run_world(program, "meet_as_told", 2, {"scenarios": scenarios}, timeout=90)
    return {name: [one[at] for one in ranks] for at, name in enumerate(SCENARIOS)}


def test_ranks_that_agree_meet(said):
    assert said["agree"] == said["agree again"] == ["", ""]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("other world size", r"WORLD_SIZE: rank 1 \(host .* has 4, rank 0 has 2"),
        ("one rank twice", "RANK: 0 was given twice"),
        ("a problem", r"rank 1 \(host .*\): LOCAL_RANK 4 with 4 visible devices"),
        ("no such host", "MASTER_ADDR: given 'not a host', which names no host here"),
    ],
)
def test_both_ranks_hear_what_is_wrong(said, name, text):
    for one in said[name]:
        assert re.search(text, one), said[name]


def test_rank_0_names_who_did_not_come(said):
    assert "1 of 2 ranks did not come within 1 s" in said["absent"][0]
    assert "launch.setup_timeout_seconds): 1;" in said["absent"][0]


def test_a_port_that_a_foreign_program_has(said):
    assert "MASTER_PORT: given" in said["foreign program"][0]
    assert "which another program on" in said["foreign program"][0]

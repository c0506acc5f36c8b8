"""The time limit of collectives, in every group that PyTorch or DeepSpeed made."""

from pathlib import Path

import pytest

from megatron_mer.testing import run_world

pytestmark = pytest.mark.dist

PROGRAMS = Path(__file__).with_name("programs.py")


def test_every_group_gets_the_limit_and_keeps_it(tiny):
    options = {"arguments": [str(tiny.write("run"))], "world_size": 2}
    said = run_world(PROGRAMS, "limited", 2, options, timeout=90)
    for one in said:
        assert one["applied"]
        assert len(one["before"]) > 1, "DeepSpeed has groups of its own"
        assert min(one["before"]) >= 600
        assert set(one["after"]) == {1.0}
    assert 0.5 < said[0]["seconds"] < 3.5
    assert said[0]["gone"] is True, said[0]["gone"]

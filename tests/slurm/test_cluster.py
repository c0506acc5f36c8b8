"""The virtual cluster does what the tests on it build on."""

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(60)]


def test_tasks_of_a_step_lie_on_their_nodes(cluster):
    said = cluster.run("srun", "-N2", "--ntasks-per-node=2", "hostname")
    assert sorted(said.split()) == ["n1", "n1", "n2", "n2"]


def test_a_node_without_power_comes_back(cluster):
    cluster.cut_power("n2")
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    assert cluster.states()["n2"].startswith("down")
    cluster.start_node("n2")
    cluster.wait_idle()

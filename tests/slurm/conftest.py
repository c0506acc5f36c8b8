"""A cluster for the tests of a module, and what is said where one of them fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import SlurmCluster
from tests.slurm.runs import SlurmRun
from tests.tiny_run import TinyRun


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test prints its jobs' logs and those of controller and nodes."""
    report = yield
    if report.when == "call" and report.failed:
        for name, title in (("cluster", "logs of Slurm"), ("slurm_run", "logs of the jobs")):
            if name in item.funcargs:
                report.sections.append((title, item.funcargs[name].logs()))
    return report


@pytest.fixture(scope="module")
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SlurmCluster]:
    """Three nodes, shared by the tests of a module; its NETWORK says of which network."""
    network = getattr(request.module, "NETWORK", "loopback")
    folder = tmp_path_factory.mktemp("slurm")
    with SlurmCluster(folder, nodes=3, network=network) as running:
        yield running


@pytest.fixture
def slurm_run(cluster: SlurmCluster, tiny: TinyRun) -> Iterator[SlurmRun]:
    """Submits runs of this test's folder; no job of it is left behind."""
    yield SlurmRun(cluster, tiny)
    cluster.run("scancel", "--state=RUNNING,PENDING,SUSPENDED", check=False)


Alone = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """Results of a run that is left alone, on this machine without Slurm, by what changes it."""
    found: dict[tuple[Any, int], list[dict[str, Any]]] = {}

    def results(change: Callable[[dict[str, Any]], None], ranks: int = 2) -> list[dict[str, Any]]:
        if (change, ranks) not in found:
            tiny = TinyRun(corpus, tmp_path_factory.mktemp("alone"))
            tiny.train(tiny.write("run", change), world_size=ranks)
            found[change, ranks] = tiny.results("run")
        return found[change, ranks]

    return results

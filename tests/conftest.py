"""Settings of the whole suite, and an account of what a run of it left out and why."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch or matplotlib is imported: many processes share few cores, and none has a screen.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# The same examples on every machine; a search for new ones is `--hypothesis-profile=search`.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile("fixed")

# Fixtures that several folders of tests share.
pytest_plugins = ["tests.tiny_run", "tests.small_disk", "tests.handbook"]

COST_MARKERS = ("slow", "slurm", "gpu")
_deselected: Counter[str] = Counter()


@cache
def _missing_for(marker: str) -> str | None:
    """What this machine lacks for tests with the marker; None if they can run."""
    if marker == "slurm" and shutil.which("slurmctld") is None:
        return "Slurm is not installed (no slurmctld in PATH)"
    if marker == "slurm":
        spaces = ["unshare", "--mount", "--uts", "--pid", "--fork", "true"]
        if subprocess.run(spaces, stderr=subprocess.DEVNULL).returncode != 0:
            return "Slurm's virtual nodes need root and namespaces (unshare is not permitted)"
    if marker == "gpu":
        if shutil.which("nvidia-smi") is None:
            return "no NVIDIA driver (no nvidia-smi in PATH)"
        import torch

        if not torch.cuda.is_available():
            return "PyTorch finds no CUDA device"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in COST_MARKERS:
        if item.get_closest_marker(marker) and (reason := _missing_for(marker)):
            pytest.skip(reason)


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        markers = [name for name in COST_MARKERS if item.get_closest_marker(name)]
        _deselected.update(["+".join(markers)] if markers else [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for markers, count in sorted(_deselected.items()):
        terminalreporter.write_line(f"left out: {count} marked {markers} (make test-long)")


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The folder that holds pyproject.toml."""
    return Path(__file__).resolve().parents[1]

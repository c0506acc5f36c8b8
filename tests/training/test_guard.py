"""The order in which a run that was asked to end says so."""

import json

import pytest
import torch.distributed as dist

from megatron_mer.config import LaunchConfig
from megatron_mer.errors import CheckpointError
from megatron_mer.launch.requests import Request
from megatron_mer.training.guard import Guard
from megatron_mer.training.outputs import RunDirectory


class FullDisk(RunDirectory):
    """One on which no status can be written."""

    def write_status(self, *arguments):
        raise CheckpointError("no space is left")


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def stopped_in(outputs):
    """The guard of a run that ends by the file STOP, and the error that ends it."""
    (outputs.root / "STOP").touch()
    guard = Guard(LaunchConfig(), outputs, rank=0)
    return guard, guard.stop(Request.STOP_FILE, 3, saved=True)


def test_the_stop_file_stays_until_the_status_says_stopped(alone, tmp_path):
    guard, error = stopped_in(FullDisk(tmp_path))
    with pytest.raises(CheckpointError):
        guard.end(error)
    assert (tmp_path / "STOP").exists(), "the next start would train on"
    guard, error = stopped_in(RunDirectory(tmp_path))
    guard.end(error)
    assert not (tmp_path / "STOP").exists()
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "stopped"

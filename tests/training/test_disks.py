"""A run whose disk fills up, or becomes read-only: a named cause, nothing lost, and it goes on."""

import json
import shutil
import subprocess

import pytest

from megatron_mer.checkpoint import damaged, find_latest
from megatron_mer.checkpoint.layout import step_directories
from megatron_mer.errors import ConfigError, TrainingError
from megatron_mer.testing import run_world
from megatron_mer.training.outputs import RunDirectory
from tests.training.test_kills import PROGRAM, short

pytestmark = pytest.mark.dist


class Runs:
    """Starts of a run on a small disk, and of one on an ordinary one."""

    def __init__(self, tiny, disk):
        self.tiny = tiny
        self.disk = disk
        self.run = disk.root / "run"

    def start(self, output_dir, ranks=1, **moment):
        """Each rank's exit code, and what rank 0 printed."""
        config = self.tiny.write("run", short)
        arguments = {
            "arguments": ["--config", str(config), "--output_dir", str(output_dir)],
            "folder": str(self.tiny.folder),
            "kill": {"ranks": [], "rank": 0, "after": True, **moment} if moment else None,
        }
        said = run_world(PROGRAM, "train", ranks, arguments, expect_failure=True)
        return [code for code, _ in said], said[0][1]

    def finish_as_if_nothing_had_been(self, ranks=1):
        alone = self.tiny.folder / "alone"
        for output_dir in (self.run, alone):
            codes, said = self.start(output_dir, ranks)
            assert codes == [0] * ranks, said
        # The tiny runs' reader looks below its own folder.
        shutil.copytree(self.run, self.tiny.folder / "moved")
        for file in ("metrics.jsonl", "evaluations.jsonl"):
            assert self.tiny.results("moved", file) == self.tiny.results("alone", file)

    def unharmed(self, before):
        """Every checkpoint of a copy is there as it was; nothing is half there."""
        root = self.run / "checkpoints"
        for path in (one for one in before.rglob("*") if one.is_file()):
            # The copy was made as rank 0 came to it; another rank may have begun to write by then.
            if ".tmp" in path.parent.suffix:
                continue
            assert (root / path.relative_to(before)).read_bytes() == path.read_bytes(), path
        assert [damaged(path) for path in step_directories(root)] == [None] * len(
            step_directories(root)
        )
        assert list(root.glob("*.tmp")) == []
        return find_latest(root).step


@pytest.fixture
def runs(tiny, small_disk):
    return Runs(tiny, small_disk)


def status_of(run):
    return json.loads((run / "status.json").read_text())


def test_every_file_of_a_run_says_what_is_wrong_with_its_disk(small_disk):
    outputs = RunDirectory(small_disk.root / "run")
    outputs.make()
    outputs.write_status("running", 3)
    outputs.append_metrics({"batch": 0})
    subprocess.run(small_disk.fill(), shell=True, check=True)
    for write in (
        lambda: outputs.write_status("failed", 3, "x" * 2000),
        lambda: [outputs.append_metrics({"batch": at, "task": "x" * 99}) for at in range(99)],
        lambda: outputs.cut_to(0),
    ):
        with pytest.raises(TrainingError, match=r"cannot be written \(\[Errno 28\] No space left"):
            write()
    assert outputs.read_status()["status"] == "running"
    small_disk.empty()
    assert sorted(path.name for path in outputs.root.glob(".status*")) == []
    # The lines that had room are whole, or cut.
    outputs.cut_to(5)
    assert [line["batch"] for line in outputs.metrics()] == [0, 0, 1, 2, 3, 4]
    subprocess.run(small_disk.protect(outputs.root), shell=True, check=True)
    with pytest.raises(ConfigError, match=r"cannot be written \(Read-only file system\)"):
        outputs.lock()


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_disk_that_fills_up_during_a_write(runs, tmp_path, ranks):
    before = tmp_path / "before"
    keep = f"cp -r {runs.run}/checkpoints {before}"
    # Room for some of step 6, and for what else a run writes in these steps.
    codes, said = runs.start(
        runs.run, ranks, call="copy", count=3, command=f"{keep}; {runs.disk.fill(300_000)}"
    )
    assert set(codes) <= {1, -9}, said
    assert codes[0] == 1
    assert "No space left on device" in said.partition("error (")[2]
    status = status_of(runs.run)
    assert status["status"] == "failed"
    assert "No space left on device" in status["reason"]
    assert status["step"] == runs.unharmed(before) == 4
    # Still full: it is said again, and nothing is harmed.
    subprocess.run(f"rm {runs.disk.root}/ballast; {runs.disk.fill(0)}", shell=True, check=True)
    codes, said = runs.start(runs.run, ranks)
    assert codes[0] in (1, 2)
    assert "No space left on device" in said.partition("error (")[2]
    assert runs.unharmed(before) == 4
    runs.disk.empty()
    runs.finish_as_if_nothing_had_been(ranks)


@pytest.mark.slow
@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_a_target_that_becomes_read_only(runs, tmp_path, below):
    before = tmp_path / "before"
    place = runs.run / below
    keep = f"cp -r {runs.run}/checkpoints {before}"
    codes, said = runs.start(
        runs.run, call="copy", count=3, command=f"{keep}; {runs.disk.protect(place)}"
    )
    assert codes == [1], said
    assert "Read-only file system" in said
    assert "Traceback" not in said
    assert runs.unharmed(before) == 4
    if below:  # Else the status cannot be written, which the log says.
        assert "Read-only file system" in status_of(runs.run)["reason"]
    else:
        assert "status.json cannot be written" in said
    # Still read-only: a start says so before it trains anything.
    lines = (runs.run / "metrics.jsonl").read_bytes()
    codes, said = runs.start(runs.run, ranks=2)
    assert codes[0] == (1 if below else 2), said
    assert "Read-only file system" in said
    assert "Traceback" not in said
    assert str(runs.run) in said
    assert below or (runs.run / "metrics.jsonl").read_bytes() == lines
    assert runs.unharmed(before) == 4
    subprocess.run(["umount", "--lazy", str(place)], check=True)
    runs.finish_as_if_nothing_had_been()

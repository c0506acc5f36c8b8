"""Runs that replay from a buffer: the same rows for every layout, and after any kill."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_mer.errors import ConfigError
from megatron_mer.training import drop_tasks
from megatron_mer.training.kept_buffer import BufferOfRun
from tests.tiny_run import TinyRun

pytestmark = pytest.mark.dist

BUFFER = ("--replay.source=buffer", "--replay.capacity_samples=40")


def records(run: Path) -> set[str]:
    return {path.name for path in (run / "buffer").glob("*.rec")}


def kill(tiny: TinyRun, config: Path, after: int, *options: str, world_size: int = 1) -> None:
    """Run until the line of a batch is written."""
    tiny.train(config, *options, world_size=world_size, kill_after=after, expect_failure=True)
    assert len(tiny.lines(config.stem)) == after + 1


def test_a_run_replays_from_its_buffer(tiny):
    tiny.train(tiny.write("run"), *BUFFER)
    lines = tiny.lines("run")
    assert sum(line["replay_rows"] for line in lines) > 20
    assert all("replay_wait_seconds" in line for line in lines)
    assert records(tiny.folder / "run")
    ledger = json.loads((tiny.folder / "run/ledger.json").read_text())
    assert sum(one["replayed"] for one in ledger["datasets"].values()) == sum(
        line["replay_rows"] for line in lines
    )


def test_every_layout_replays_the_same_rows(tiny):
    folders = {}
    for name, ranks, options in (
        ("one", 1, ()),
        ("dp2_pp2", 4, ("--parallel.pp_size=2",)),
        ("tp2", 2, ("--parallel.tp_size=2",)),
    ):
        folders[name] = tiny.folder / f"{name}_rows"
        folders[name].mkdir()
        tiny.train(tiny.write(name), *BUFFER, *options, world_size=ranks, record=str(folders[name]))
    wanted = rows_by_batch(folders["one"])
    assert len(wanted) == 20
    for name in ("dp2_pp2", "tp2"):
        assert rows_by_batch(folders[name]) == wanted
        for mine, theirs in zip(tiny.lines(name), tiny.lines("one"), strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def rows_by_batch(folder: Path) -> dict[int, list]:
    """All rows of each batch in the order of the data ranks; every other rank has the same."""
    found: dict[int, dict[int, list]] = {}
    for path in folder.glob("batch_*"):
        _, batch, _, data, *_ = path.name.split("_")
        rows = json.loads(path.read_text())
        assert found.setdefault(int(batch), {}).setdefault(int(data), rows) == rows
    return {
        batch: [row for data in sorted(ranks) for row in ranks[data]]
        for batch, ranks in found.items()
    }


@pytest.mark.parametrize(("ranks", "after"), [(2, 2), pytest.param(1, 4, marks=pytest.mark.slow)])
def test_killed_it_goes_on_to_the_bit_at_any_number_of_ranks(tiny, ranks, after):
    tiny.train(tiny.write("alone"), *BUFFER, world_size=ranks)
    config = tiny.write("killed")
    kill(tiny, config, 11, *BUFFER, world_size=ranks)
    tiny.train(config, *BUFFER, world_size=after)
    if after == ranks:
        assert tiny.results("killed") == tiny.results("alone")
    assert records(tiny.folder / "killed") == records(tiny.folder / "alone")
    for mine, theirs in zip(tiny.lines("killed"), tiny.lines("alone"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_a_checkpoint_older_than_the_newest_finds_its_records(tiny):
    options = (*BUFFER, "--checkpoint.every_steps=2", "--checkpoint.keep_last=8")
    tiny.train(tiny.write("alone"), *options)
    config = tiny.write("back")
    kill(tiny, config, 17, *options)
    run = tiny.folder / "back"
    for step in (12, 14, 16, 18):
        shutil.rmtree(run / f"checkpoints/step_{step:09d}")
    (run / "checkpoints/latest").unlink()
    tiny.train(config, *options)
    assert "resuming after batch 10" in (run / "train.log").read_text()
    assert tiny.results("back") == tiny.results("alone")


@pytest.mark.slow
def test_a_lost_buffer_is_built_again_from_the_datasets(tiny):
    tiny.train(tiny.write("alone"), *BUFFER)
    config = tiny.write("lost")
    kill(tiny, config, 11, *BUFFER)
    run = tiny.folder / "lost"
    shutil.rmtree(run / "buffer")
    kill(tiny, config, 15, *BUFFER)
    # What was built for step 10 need not have what step 7 needs.
    for path in (*(run / "checkpoints").glob("step_00000001*"), run / "checkpoints/latest"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    tiny.train(config, *BUFFER)
    log = (run / "train.log").read_text()
    assert log.count("built again from the datasets") == 2
    assert "resuming after batch 7" in log
    assert tiny.results("lost") == tiny.results("alone")


def moved_corpus(tiny) -> TinyRun:
    """Tiny runs over a corpus of their own, which may be taken apart."""
    shutil.copytree(tiny.corpus, tiny.folder / "corpus")
    return TinyRun(tiny.folder / "corpus", tiny.folder)


def remove_dataset(tiny: TinyRun, name: str) -> None:
    for path in tiny.corpus.glob(f"{name}.*"):
        path.unlink()


def test_past_corpora_may_go(tiny):
    tiny.train(tiny.write("alone"), *BUFFER)
    own = moved_corpus(tiny)
    config = own.write("gone")
    kill(own, config, 15, *BUFFER)
    for name in ("en", "fr"):
        remove_dataset(own, name)
    kill(own, config, 17, *BUFFER)
    own.train(config, *BUFFER)  # ... which a second resume still knows of.
    assert own.results("gone") == own.results("alone")
    ledger = json.loads((own.folder / "gone/ledger.json").read_text())
    assert ledger["datasets"]["en"]["replayed"] > 0


@pytest.mark.slow
def test_what_is_still_trained_on_may_not_go(tiny):
    own = moved_corpus(tiny)
    config = own.write("gone")
    kill(own, config, 11, *BUFFER)
    remove_dataset(own, "fr")
    said = own.train(config, *BUFFER, expect_failure=True, output=True)
    assert "which batches from 10 on read as 'fr'" in said
    remove_dataset(own, "en")
    # Without its buffer the run cannot do without them.
    shutil.rmtree(own.folder / "gone/buffer")
    (own.corpus / "fr.bin").write_bytes((tiny.corpus / "fr.bin").read_bytes())
    for suffix in ("bin", "idx", "json"):
        shutil.copy(tiny.corpus / f"fr.{suffix}", own.corpus)
    said = own.train(config, *BUFFER, expect_failure=True, output=True)
    assert "needs samples of dataset 'en' that it does not hold yet" in said


@pytest.mark.slow
def test_segments_go_when_no_checkpoint_needs_them(tiny):
    options = (
        "--replay.source=buffer",
        "--replay.capacity_samples=20",
        "--checkpoint.every_steps=1",
        "--checkpoint.keep_last=1",
    )
    tiny.train(tiny.write("run"), *options, world_size=2)
    run = tiny.folder / "run"
    needed = set()
    for path in (run / "checkpoints").glob("step_*"):
        saved = json.loads((path / "run_state.json").read_text())["buffer"]
        for first, end in saved["segments"]:
            needed |= {f"segment_{number:09d}.rec" for number in range(first, end)}
    last = saved["tail"] // saved["segment_records"]
    kept = {name for name in records(run) if int(name[8:-4]) < last}
    assert kept <= needed
    assert len(list((run / "checkpoints").glob("step_*"))) == 3


def test_a_folder_of_another_run_is_refused(tiny):
    place = f"--replay.dir={tiny.folder / 'shared'}"
    tiny.train(tiny.write("first"), *BUFFER, place, kill_after=8, expect_failure=True)
    said = tiny.train(tiny.write("second"), *BUFFER, place, expect_failure=True, output=True)
    assert f"which has the buffer of run 'tiny' of {tiny.folder / 'first'}" in said
    tiny.train(tiny.write("first"), *BUFFER, place)
    assert (tiny.folder / "first/status.json").read_text().count('"done"') == 1
    held = sorted(path.name for path in (tiny.folder / "shared").glob("*.rec"))
    tiny.train(tiny.write("first"), *BUFFER, place, "--fresh")
    (aside,) = tiny.folder.glob("shared.before_*")
    assert sorted(path.name for path in aside.glob("*.rec")) == held


@pytest.mark.slow
def test_a_damaged_record_ends_the_run_with_its_place(tiny):
    config = tiny.write("run")
    kill(tiny, config, 15, *BUFFER)
    for path in (tiny.folder / "run/buffer").glob("*.rec"):
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(content)
    said = tiny.train(config, *BUFFER, expect_failure=True, output=True)
    assert "reading batch" in said
    assert ".rec" in said
    status = json.loads((tiny.folder / "run/status.json").read_text())
    assert status["status"] == "failed"
    # It can be built again, since the datasets are there.
    shutil.rmtree(tiny.folder / "run/buffer")
    tiny.train(config, *BUFFER)
    tiny.train(tiny.write("alone"), *BUFFER)
    assert tiny.results("run") == tiny.results("alone")


def test_a_full_disk_ends_every_rank_with_the_cause_and_the_run_resumes(tiny):
    tiny.train(tiny.write("alone"), *BUFFER, world_size=2)
    config = tiny.write("full")
    codes = tiny.train(config, *BUFFER, world_size=2, expect_failure=True, buffer_full_at=9)
    assert codes == [1, 1]
    status = json.loads((tiny.folder / "full/status.json").read_text())
    assert status["status"] == "failed"
    assert "rank" not in status["reason"] or "No space left" in status["reason"]
    assert "No space left" in status["reason"]
    tiny.train(config, *BUFFER, world_size=2)
    assert tiny.results("full") == tiny.results("alone")


# Rows are displaced, moved and removed before a slow disk has them: with few rows many segments die
# in a batch, and a checkpoint after each batch removes what the one before needed.
@pytest.mark.slow
@pytest.mark.parametrize(("rank", "capacity", "every"), [(0, 128, 10), (0, 400, 1), (1, 400, 1)])
def test_a_disk_that_falls_behind_only_makes_the_run_wait(tiny, rank, capacity, every):
    def long(config):
        for task in config["stream"]:
            task.update(steps=30, max_epochs=100)
            del task["valid"]
        config["schedule"] = {"kind": "constant", "warmup_steps": 1}
        config["batch"].update(global_batch_size=16, micro_batch_size=8)
        config["checkpoint"].update(every_steps=every, keep_last=1)
        config["replay"].update(alpha=0.5, source="buffer", capacity_samples=capacity, prefetch=4)
        config["model"]["num_layers"] = 1
        del config["evaluate"]

    tiny.train(tiny.write("alone", long), world_size=2)
    slow = {"rank": rank, "seconds": 0.03}
    tiny.train(tiny.write("slow", long), world_size=2, slow_buffer=slow, timeout=240.0)
    assert tiny.results("slow") == tiny.results("alone")
    assert records(tiny.folder / "slow") == records(tiny.folder / "alone")


@pytest.mark.parametrize("policy", ["equal", pytest.param("uniform", marks=pytest.mark.slow)])
def test_capacity_by_task_and_what_was_trained_before(tiny, policy):
    capacity = "--replay.capacity_samples={base: 9, fr: 12, de: 5}"

    def before(config):
        config["stream"][0] = {
            "task": "base",
            "trained_before": True,
            "train": config["stream"][0]["train"],
        }

    options = ("--replay.source=buffer", capacity, f"--replay.policy={policy}")
    tiny.train(tiny.write("alone", before), *options)
    config = tiny.write("killed", before)
    kill(tiny, config, 11, *options)
    tiny.train(config, *options)
    assert tiny.results("killed") == tiny.results("alone")
    assert tiny.lines("alone")[0]["replay_rows"] > 0


def test_a_run_may_change_to_a_buffer(tiny):
    config = tiny.write("run")
    kill(tiny, config, 11)
    said = tiny.train(config, *BUFFER, expect_failure=True, output=True)
    assert "replay.source was stream, is buffer" in said
    tiny.train(config, *BUFFER, "--accept", "replay")
    assert len(tiny.lines("run")) == 20
    # Not in mid-run: it is known before the first batch, and said by a dry run too.
    small = ("--replay.source=buffer", "--replay.capacity_samples=1")
    for more in ((), ("--dry-run",)):
        options = (*small, *more, f"--output_dir={tiny.folder}/small")
        said = tiny.train(config, *options, expect_failure=True, output=True)
        assert "the replay buffer holds no sample that may be replayed" in said
        assert "Its capacity (replay.capacity_samples, 1) is too small" in said
    other = ("--replay.source=buffer", "--replay.capacity_samples=41")
    said = tiny.train(config, *other, "--accept", "replay", expect_failure=True, output=True)
    assert "replay.capacity_samples was 40, is 41" in said


@pytest.mark.slow
def test_a_buffer_that_a_kept_checkpoint_needs_is_not_removed(tiny):
    tiny.train(tiny.write("alone"), *BUFFER)
    config, run = tiny.write("run"), tiny.folder / "run"
    kill(tiny, config, 7, *BUFFER)
    kill(tiny, config, 11, "--accept", "replay")
    again = (*BUFFER, "--accept", "replay")
    said = tiny.train(config, *again, expect_failure=True, output=True)
    needs = f"replay.dir: given {run}/buffer, which has an earlier buffer of this run that "
    assert needs + "checkpoint step_000000007 needs" in said
    other = tiny.folder / "other"
    kill(tiny, config, 15, *again, f"--replay.dir={other}")
    for step in (10, 14, 15):
        shutil.rmtree(run / f"checkpoints/step_{step:09d}", ignore_errors=True)
    (run / "checkpoints/latest").unlink()
    said = tiny.train(config, *BUFFER, f"--replay.dir={other}", expect_failure=True, output=True)
    assert f"which has the buffer of run 'tiny' of {run}" in said
    tiny.train(config, *BUFFER)
    assert "resuming after batch 7" in (run / "train.log").read_text()
    assert "built again" not in (run / "train.log").read_text()
    assert tiny.results("run") == tiny.results("alone")


@pytest.mark.slow
def test_a_copied_run_leaves_the_original_its_buffer(tiny):
    config = tiny.write("run")
    place = f"--replay.dir={tiny.folder}/rows"
    kill(tiny, config, 11, *BUFFER, place)
    shutil.copytree(tiny.folder / "run", tiny.folder / "copy")
    copied = tiny.write("copy")
    said = tiny.train(copied, *BUFFER, place, expect_failure=True, output=True)
    assert f"which has the buffer of run 'tiny' of {tiny.folder}/run; allowed" in said
    with pytest.raises(ConfigError, match="drop the task from that run"):
        drop_tasks.drop_tasks(*BufferOfRun.of(str(tiny.folder / "copy")), ["en"], do=True)
    # With a folder of its own, or with its own folder, which a copy brings along.
    tiny.train(copied, *BUFFER, f"--replay.dir={tiny.folder}/other_rows")
    tiny.train(config, *BUFFER, place)
    assert tiny.results("copy") == tiny.results("run")
    kill(tiny, tiny.write("whole"), 11, *BUFFER)
    shutil.copytree(tiny.folder / "whole", tiny.folder / "twin")
    tiny.train(tiny.write("twin"), *BUFFER)
    assert tiny.results("twin") == tiny.results("run")

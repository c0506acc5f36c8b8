"""Runs that replay from a buffer: the same rows for every layout, and after any kill."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

BUFFER = ("--replay.source=buffer", "--replay.capacity_samples=40")


def records(run: Path) -> set[str]:
    return {path.name for path in (run / "buffer").glob("*.rec")}


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


@pytest.mark.parametrize(("ranks", "after"), [(2, 2), (1, 4)])
def test_killed_it_goes_on_to_the_bit_at_any_number_of_ranks(tiny, ranks, after):
    tiny.train(tiny.write("alone"), *BUFFER, world_size=ranks)
    config = tiny.write("killed")
    codes = tiny.train(config, *BUFFER, world_size=ranks, kill_after=11, expect_failure=True)
    assert set(codes) == {-9}
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
    tiny.train(config, *options, kill_after=17, expect_failure=True)
    run = tiny.folder / "back"
    for step in (12, 14, 16, 18):
        shutil.rmtree(run / f"checkpoints/step_{step:09d}")
    (run / "checkpoints/latest").unlink()
    tiny.train(config, *options)
    assert "resuming after batch 10" in (run / "train.log").read_text()
    assert tiny.results("back") == tiny.results("alone")


def test_a_lost_buffer_is_built_again_from_the_datasets(tiny):
    tiny.train(tiny.write("alone"), *BUFFER)
    config = tiny.write("lost")
    tiny.train(config, *BUFFER, kill_after=11, expect_failure=True)
    shutil.rmtree(tiny.folder / "lost/buffer")
    tiny.train(config, *BUFFER)
    assert "it is built again from the datasets" in (tiny.folder / "lost/train.log").read_text()
    assert tiny.results("lost") == tiny.results("alone")

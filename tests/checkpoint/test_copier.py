"""Copying in the background: tried again after failures, never in the way."""

import threading
import time
from pathlib import Path

import pytest

from megatron_mer.checkpoint import CheckpointWriter, open_place
from megatron_mer.checkpoint.layout import LATEST, step_directories, step_name
from tests.checkpoint.copying import TIMEOUT, Flaky, a_copier, copied, holds, until
from tests.checkpoint.saved import fragment, names, save


def test_nothing_is_copied_twice(tmp_path: Path, flaky: type[Flaky]):
    save(tmp_path, 10)
    copied(tmp_path, "flaky://run")
    first = flaky.tried
    copied(tmp_path, "flaky://run")
    assert flaky.tried == first
    # The same step again, after a skipped batch, is another checkpoint.
    save(tmp_path, 10, 2.0)
    copied(tmp_path, "flaky://run")
    assert flaky.tried > first
    assert holds(open_place("flaky://run"), tmp_path / step_name(10))


@pytest.mark.parametrize("refuse", [1, 3, 6])
def test_a_failure_is_a_warning_and_tried_again(
    tmp_path: Path, flaky: type[Flaky], heard: pytest.LogCaptureFixture, refuse: int
):
    flaky.refuse = refuse
    save(tmp_path, 10)
    copier = a_copier(tmp_path, "flaky://run")
    copier.start()
    until(lambda: copier.missing() == [])
    copier.close()
    assert holds(open_place("flaky://run"), tmp_path / step_name(10))
    said = [one.getMessage() for one in heard.records if one.levelname == "WARNING"]
    assert len(said) == refuse
    for text in said:
        assert "copying to flaky://run failed: ConnectionError: the service is away; " in text
        assert "trying again in" in text


def test_pauses_grow_and_the_end_of_the_run_does_not_wait_for_them(
    tmp_path: Path, flaky: type[Flaky], heard: pytest.LogCaptureFixture
):
    flaky.refuse = 1
    save(tmp_path, 10)
    copier = a_copier(tmp_path, "flaky://run", first_pause=1000.0)
    copier.start()
    until(lambda: "trying again in 600 s" in heard.text)
    copier.finish(TIMEOUT)
    assert copier.missing() == []


def test_what_was_not_copied_is_said_at_the_end(
    tmp_path: Path, flaky: type[Flaky], heard: pytest.LogCaptureFixture
):
    flaky.refuse = 1_000
    save(tmp_path, 10)
    copier = copied(tmp_path, "flaky://run", first_pause=0.001)
    copier.close()
    assert heard.text.count("not known to be copied to flaky://run: step_000000010") == 1
    assert "a start copies what is missing" in heard.text
    flaky.refuse = 0
    copied(tmp_path, "flaky://run")
    assert holds(open_place("flaky://run"), tmp_path / step_name(10))


def test_the_end_waits_only_so_long(
    tmp_path: Path, flaky: type[Flaky], heard: pytest.LogCaptureFixture, monkeypatch
):
    monkeypatch.setattr("megatron_mer.checkpoint.copier._SECONDS_TO_STOP", 0.05)
    flaky.gate = threading.Event()
    save(tmp_path, 10)
    copier = a_copier(tmp_path, "flaky://run")
    copier.start()
    begin = time.monotonic()
    copier.finish(0.2)
    assert time.monotonic() - begin < TIMEOUT / 4
    assert "waiting until step_000000010 is in flaky://run (at most 0 s)" in heard.text
    assert "not known to be copied to flaky://run: step_000000010" in heard.text
    flaky.gate.set()
    copier._thread.join(TIMEOUT)


def test_an_outage_leaves_no_backlog(
    tmp_path: Path, flaky: type[Flaky], heard: pytest.LogCaptureFixture
):
    flaky.refuse = 2
    copier = a_copier(tmp_path, "flaky://run", first_pause=0.5)
    save(tmp_path, 5, keep_last=1)
    copier.start()
    until(lambda: "trying again" in heard.text)
    for step in (10, 15, 20):
        save(tmp_path, step, keep_last=1, permanent=step == 10)
        copier.offer(step)
    until(lambda: copier.missing() == [])
    copier.finish(TIMEOUT)
    assert open_place("flaky://run").steps() == ["step_000000020", "step_000000010"]
    assert "step_000000015 was removed before it could be copied" in heard.text


def test_what_is_being_copied_is_not_removed(tmp_path: Path, flaky: type[Flaky]):
    copier = a_copier(tmp_path, "flaky://run")
    copied(tmp_path / "none", "flaky://run")  # claims the place
    save(tmp_path, 10)
    flaky.gate = threading.Event()
    copier.start()
    assert flaky.entered.wait(TIMEOUT)
    assert copier.in_hand() == step_name(10)
    writer = CheckpointWriter(
        tmp_path, rank=0, world_size=1, first_failure=lambda reason: reason, keep_last=1,
        committed=copier.offer, in_use=copier.in_hand,
    )  # fmt: skip
    for step in (20, 30):
        writer.save(step, [fragment(step)], {"value": float(step)})
        writer.wait()
    assert names(tmp_path) == ["latest", "step_000000010", "step_000000030"]
    flaky.gate.set()
    until(lambda: copier.missing() == [])
    assert holds(open_place("flaky://run"), tmp_path / step_name(30))
    writer.save(40, [fragment(40)], {"value": 40.0})
    writer.wait()
    copier.finish(TIMEOUT)
    assert "step_000000010" not in names(tmp_path)


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_what_changes_while_it_is_copied_is_noticed(
    tmp_path: Path, flaky: type[Flaky], heard: pytest.LogCaptureFixture, change: str
):
    copied(tmp_path / "none", "flaky://run")
    save(tmp_path, 10)
    flaky.gate = threading.Event()
    copier = a_copier(tmp_path, "flaky://run")
    copier.start()
    assert flaky.entered.wait(TIMEOUT)
    if change == "removed":
        save(tmp_path, 20, keep_last=1)
    else:
        save(tmp_path, 10, 2.0)
    flaky.gate.set()
    copier.finish(TIMEOUT)
    assert "step_000000010 was removed or replaced while it was copied" in heard.text
    assert "WARNING" not in {one.levelname for one in heard.records}
    place = open_place("flaky://run")
    (left,) = step_directories(tmp_path)
    assert place.steps() == [left.name]
    assert holds(place, left)


def test_a_checkpoint_that_is_damaged_here_is_not_copied(
    tmp_path: Path, url: str, heard: pytest.LogCaptureFixture
):
    here = tmp_path / "here"
    for step in (10, 20):
        save(here, step)
    path = here / step_name(20) / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    copied(here, url)
    place = open_place(url)
    assert "step_000000020 is not copied, it is damaged" in heard.text
    assert "expected 192 bytes of SHA-256" in heard.text or "SHA-256" in heard.text
    assert list(place.best()) == ["step_000000010"]
    assert place.read(LATEST) == b"step_000000010\n"


def test_a_place_of_another_run_is_left_alone(
    tmp_path: Path, url: str, heard: pytest.LogCaptureFixture
):
    save(tmp_path / "a", 10)
    save(tmp_path / "b", 20)
    copied(tmp_path / "a", url)
    copied(tmp_path / "b", url, owner={"id": "b", "name": "other", "output_dir": "/runs/b"})
    place = open_place(url)
    assert place.steps() == ["step_000000010"]
    assert f"{url} now has the copies of another run, run (output_dir /runs/a)" in heard.text
    assert "not known to be copied" in heard.text


def test_copies_that_are_ahead_of_the_run_are_left_alone(
    tmp_path: Path, url: str, heard: pytest.LogCaptureFixture
):
    """As after a start that could not look at the place and went on from an older checkpoint."""
    for step in (10, 20):
        save(tmp_path / "lost", step)
    copied(tmp_path / "lost", url)
    save(tmp_path / "here", 10)
    copied(tmp_path / "here", url)
    assert f"{url} holds step_000000020, which is ahead of this run" in heard.text
    assert list(open_place(url).best()) == ["step_000000020", "step_000000010"]


def test_checkpoints_that_nobody_copied_there_are_left_alone(
    tmp_path: Path, heard: pytest.LogCaptureFixture
):
    save(tmp_path / "a", 10)
    save(tmp_path / "there", 7)
    copied(tmp_path / "a", str(tmp_path / "there"))
    assert "holds checkpoints that no run has copied there" in heard.text
    assert names(tmp_path / "there") == ["latest", "step_000000007"]

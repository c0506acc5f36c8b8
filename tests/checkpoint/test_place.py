"""Copies in a second place are whole or not there, whatever ends the copying."""

import errno
import hashlib
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_mer.checkpoint import damaged, open_place
from megatron_mer.checkpoint import place as module
from megatron_mer.checkpoint.files import FileFacts
from megatron_mer.checkpoint.layout import LATEST, MANIFEST, step_directories, step_name
from tests.checkpoint.copying import OWNER, TIMEOUT, Flaky, a_copier, copied, holds, until
from tests.checkpoint.saved import names, save


def test_a_copy_is_the_checkpoint_byte_for_byte(tmp_path: Path, url: str):
    here, beside = tmp_path / "here", tmp_path / "metrics.jsonl"
    beside.write_bytes(b'{"step": 20}\n\xc3')  # torn within a letter
    for step in (10, 20):
        save(here, step)
    files = {"metrics.jsonl": beside, "from_hf/config.json": beside, "none": tmp_path / "none"}
    copier = copied(here, url, beside=files)
    place = open_place(url)
    assert place.steps() == ["step_000000020", "step_000000010"]
    assert all(holds(place, path) for path in step_directories(here))
    assert place.read(LATEST) == b"step_000000020\n"
    assert place.read("metrics.jsonl") == place.read("from_hf/config.json") == beside.read_bytes()
    assert place.owner() == OWNER
    assert list(place.best()) == place.steps()
    assert copier.missing() == []


def test_the_same_ones_stay_there_as_here(tmp_path: Path, url: str):
    here, place = tmp_path / "here", open_place(url)
    copier = a_copier(here, url, keep_every=60)
    copier.start()
    for step in range(10, 110, 10):
        save(here, step, keep_last=2, keep_every=60, permanent=step % 40 == 0)
        copier.offer(step)
        until(lambda: copier.missing() == [] and copier.in_hand() is None)
    copier.finish(TIMEOUT)
    kept = [f"step_{step:09d}" for step in (100, 90, 80, 60, 40)]
    assert place.steps() == kept == [path.name for path in step_directories(here)]
    # Back at step 70: what comes after it is of another future.
    copier = a_copier(here, url, keep_every=60)
    copier.start()
    until(lambda: copier.missing() == [])
    save(here, 70, keep_last=2)
    copier.offer(70)
    copier.finish(TIMEOUT)
    assert place.steps() == [f"step_{step:09d}" for step in (70, 60, 40)]
    assert place.read(LATEST) == b"step_000000070\n"


def test_a_torn_copy_is_not_taken_for_a_whole_one(tmp_path: Path, url: str):
    here, place = tmp_path / "here", open_place(url)
    for step in (10, 20):
        save(here, step)
    copied(here, url)
    place._put(f"{step_name(20)}/rank_00000.safetensors", b"half")
    assert "rank_00000.safetensors: expected" in str(place.problem(step_name(20)))
    assert list(place.best()) == [step_name(10)]
    copied(here, url)
    assert holds(place, here / step_name(20))


@pytest.mark.parametrize("at", range(1, 7))
def test_stopped_at_any_write_the_copies_are_whole(tmp_path: Path, flaky: type[Flaky], at: int):
    """The third checkpoint replaces the first; writing stops for good at its nth write."""
    place = open_place("flaky://run")
    for step in (10, 20):
        save(tmp_path, step, keep_last=1)
        copied(tmp_path, "flaky://run", keep_last=1)
    flaky.tried, real = 0, Flaky._may_fail

    def away(_: Flaky, mode: str) -> None:
        if "w" in mode:
            Flaky.tried += 1
            if Flaky.tried >= at:
                raise ConnectionError

    save(tmp_path, 30, keep_last=1)
    try:
        Flaky._may_fail = away  # type: ignore[method-assign]
        copied(tmp_path, "flaky://run", keep_last=1, first_pause=0.001)
    finally:
        Flaky._may_fail = real  # type: ignore[method-assign]
    best = next(place.best())
    # Three files, the manifest, `latest`.
    assert best == step_name(30 if at > 5 else 20)
    assert place.problem(best) is None
    copied(tmp_path, "flaky://run", keep_last=1)
    assert place.steps() == [step_name(30)]
    assert holds(place, tmp_path / step_name(30))


def test_a_full_disk_there_gives_its_space_back(
    tmp_path: Path, heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    save(tmp_path / "here", 10)
    there = tmp_path / "there"
    copied(tmp_path / "here", str(there))
    save(tmp_path / "here", 20)
    # A limit on the size of a file stands for the full disk: the write itself fails, at its byte.
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, limit[1]))
    try:
        copier = a_copier(tmp_path / "here", str(there), first_pause=1000.0)
        copier.start()
        until(lambda: "trying again" in heard.text)
        assert names(there) == ["latest", "run.json", "step_000000010"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert f"[Errno {errno.EFBIG}]" in heard.text
    copier.finish(TIMEOUT)
    assert damaged(there / step_name(20)) is None


def killed_in_the_last_file(here: Path, there: Path) -> int:
    """Copy in a process that is killed half way through the manifest; its exit code."""
    process = os.fork()
    if process == 0:
        write = module.write_bytes

        def killing(path: Path, chunks: Iterator[bytes]) -> FileFacts:
            def some() -> Iterator[bytes]:
                for chunk in chunks:
                    yield chunk[: len(chunk) // 2]
                    if path.name == MANIFEST:
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield chunk[len(chunk) // 2 :]

            return write(path, some())

        module.write_bytes = killing
        try:
            copied(here, str(there))
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_killed_while_copying_to_a_directory(tmp_path: Path):
    here, there = tmp_path / "here", tmp_path / "there"
    for step in (10, 20):
        save(here, step)
        if step == 10:
            copied(here, str(there))
    assert killed_in_the_last_file(here, there) == -signal.SIGKILL
    assert names(there) == ["latest", "run.json", "step_000000010", "step_000000020.tmp"]
    assert list(open_place(str(there)).best()) == [step_name(10)]
    copied(here, str(there))
    assert names(there) == ["latest", "run.json", "step_000000010", "step_000000020"]
    assert damaged(there / step_name(20)) is None


def test_what_is_brought_back_is_verified(tmp_path: Path, url: str):
    source = save(tmp_path / "here", 10)
    copied(tmp_path / "here", url)
    place, name = open_place(url), "rank_00000.safetensors"
    content = (source / name).read_bytes()
    right = hashlib.sha256(content).hexdigest()
    target = tmp_path / "back"
    assert place.fetch(source.name, name, len(content), right, target) is None
    assert target.read_bytes() == content
    wrong = place.fetch(source.name, name, len(content), "0" * 64, target)
    assert wrong is not None
    assert "of SHA-256 0000" in wrong
    assert "No such file" in str(place.fetch(source.name, "gone", 1, None, target)) or url[0] == "m"


def test_latest_says_what_to_go_on_from(tmp_path: Path, url: str):
    here, place = tmp_path / "here", open_place(url)
    for step in (10, 20, 30):
        save(here, step, keep_last=9)
    copied(here, url, keep_last=9)
    place.point(step_name(20))
    assert list(place.best()) == [step_name(step) for step in (20, 10, 30)]


def test_a_manifest_is_the_last_file_of_a_copy(
    tmp_path: Path, flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch
):
    written: list[str] = []
    opened = Flaky._open

    def noted(self: Flaky, path: str, mode: str = "rb", *options, **named):  # type: ignore[no-untyped-def]
        if "w" in mode:
            written.append(path)
        return opened(self, path, mode, *options, **named)

    monkeypatch.setattr(Flaky, "_open", noted)
    source = save(tmp_path, 10)
    copied(tmp_path, "flaky://run")
    inside = [path.rpartition("/")[2] for path in written if source.name in path]
    assert sorted(inside) == names(source)
    assert inside[-1] == MANIFEST
    assert written[-1].endswith(LATEST)

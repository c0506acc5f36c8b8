"""A job that is killed goes on with what is missing, to the bytes of a clean run."""

import gzip
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_mer.data.corpus import job as job_module
from megatron_mer.errors import DataError
from tests.data.corpus.conftest import Build, content, line
from tests.handbook import Handbook

TOOL = Path(__file__).parents[3] / "tools" / "preprocess_data.py"
TEXTS = [f"the fox number {i} sleeps near the stove" for i in range(400)]


def test_finished_shards_are_used_again(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(map(line, TEXTS)) + b"broken\n")
    with pytest.raises(DataError, match="line 401: not JSON"):
        build([path], tmp_path / "c")
    kept = sorted((tmp_path / "c.parts").glob("*.json"))
    assert len(kept) > 3
    times = {manifest: manifest.stat().st_mtime_ns for manifest in kept}
    seen = []

    def look(assembly: object) -> None:
        seen.extend([manifest.stat().st_mtime_ns == times[manifest] for manifest in kept])

    publish = job_module.Assembly.publish
    monkeypatch.setattr(
        job_module.Assembly, "publish", lambda self, given: (look(self), publish(self, given))[1]
    )
    build([path], tmp_path / "c", on_error="skip")  # what may be left out does not change the rest
    assert seen
    assert all(seen)
    monkeypatch.undo()
    build([path], tmp_path / "clean", on_error="skip")
    assert content(tmp_path / "c") == content(tmp_path / "clean")
    assert not (tmp_path / "c.parts").exists()


@pytest.mark.parametrize("changed", ["content", "eod", "key"])
def test_shards_of_another_job_are_not_used(build: Build, tmp_path: Path, changed: str) -> None:
    path, data = tmp_path / "x.jsonl", b"".join(line(text, body=text[::-1]) for text in TEXTS)
    path.write_bytes(data + b"broken\n")
    with pytest.raises(DataError):
        build([path], tmp_path / "c")
    given = {"eod": {"append_eod": False}, "key": {"text_keys": ("body",)}}.get(changed, {})
    path.write_bytes(data.replace(b"fox", b"dog") if changed == "content" else data)
    build([path], tmp_path / "c", **given)
    build([path], tmp_path / "clean", **given)
    assert content(tmp_path / "c") == content(tmp_path / "clean")


@pytest.mark.parametrize("packed", [False, True])
def test_torn_parts_are_made_again(build: Build, tmp_path: Path, packed: bool) -> None:
    path, data = tmp_path / "x", b"".join(map(line, TEXTS))
    path.write_bytes(gzip.compress(data + b"broken\n") if packed else data + b"broken\n")
    with pytest.raises(DataError):
        build([path], tmp_path / "c")
    tokens = sorted((tmp_path / "c.parts").glob("*.tokens"))
    tokens[1].write_bytes(tokens[1].read_bytes()[:-2])
    sorted((tmp_path / "c.parts").glob("*.json"))[2].write_text("{")
    build([path], tmp_path / "c", on_error="skip")
    build([path], tmp_path / "clean", on_error="skip")
    assert content(tmp_path / "c") == content(tmp_path / "clean")


@pytest.mark.parametrize("ending", ["tokens", "lengths"])
def test_a_finished_shard_that_changed_is_noticed(
    build: Build, tmp_path: Path, ending: str
) -> None:
    """A disk may lose what it took, and leave the size."""
    path, data = tmp_path / "x.jsonl", b"".join(map(line, TEXTS))
    path.write_bytes(data + b"broken\n")
    with pytest.raises(DataError):
        build([path], tmp_path / "c")
    shard = sorted((tmp_path / "c.parts").glob(f"*.{ending}"))[1]
    before = shard.read_bytes()
    shard.write_bytes(bytes(len(before)))
    with pytest.raises(DataError, match=rf"{shard.name}: not what was written there"):
        build([path], tmp_path / "c", on_error="skip")
    build([path], tmp_path / "c", on_error="skip")
    build([path], tmp_path / "clean", on_error="skip")
    assert content(tmp_path / "c") == content(tmp_path / "clean")


def command(*more: str) -> list[str]:
    return [sys.executable, str(TOOL), "--shard-size", "0.2", "--on-error", "skip", *more]


def kill_now_and_then(
    directory: Path, name: str, handbook: Handbook, kills: int, seed: int
) -> None:
    """Start a job again and again, kill it at random moments, and compare what comes out."""
    texts = [text for language in handbook.values() for text in language]
    for number in range(3):
        data = b"".join(line(text) for text in texts[number::3] * 3)
        (directory / f"{number}.jsonl").write_bytes(data + b"broken\n")
    subprocess.run(["gzip", "-k", "2.jsonl"], cwd=directory, check=True)
    given = ["--input", "0.jsonl", "1.jsonl", "2.jsonl.gz", "--tokenizer", name]
    start = time.monotonic()
    clean = command(*given, "--output-prefix", "clean", "--workers", "1")
    subprocess.run(clean, cwd=directory, check=True, capture_output=True)
    seconds = time.monotonic() - start
    wait, killed = random.Random(seed), 0
    while killed < kills:
        workers = str(wait.randrange(1, 4))
        run = command(*given, "--output-prefix", "c", "--workers", workers, "--overwrite")
        process = subprocess.Popen(
            run, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(wait.uniform(0.3, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
    run = command(*given, "--output-prefix", "c", "--workers", "2", "--overwrite")
    subprocess.run(run, cwd=directory, check=True, capture_output=True)
    assert content(directory / "c") == content(directory / "clean")
    kept = [Path(directory / f"{stem}.faults.jsonl").read_text() for stem in ("c", "clean")]
    assert kept[0] == kept[1]
    assert len(kept[0].splitlines()) == 3
    assert not (directory / "c.parts").exists()
    assert not list(directory.glob("*.partial"))


@pytest.mark.timeout(120)
def test_kill_twice(names: Mapping[str, str], handbook: Handbook, tmp_path: Path) -> None:
    kill_now_and_then(tmp_path, names["hf"], handbook, kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kill_twenty_times(names: Mapping[str, str], handbook: Handbook, tmp_path: Path) -> None:
    kill_now_and_then(tmp_path, names["unigram"], handbook, kills=20, seed=2)


def test_what_is_read_once_is_never_reused(build: Build, tmp_path: Path) -> None:
    """Two pipes of the same name say different things."""
    os.mkfifo(path := tmp_path / "pipe.jsonl")
    for last in (b"broken\n", line("fine")):
        data = b"".join(line(text + str(last)) for text in TEXTS) + last
        threading.Thread(target=path.write_bytes, args=(data,), daemon=True).start()
        if last.startswith(b"broken"):
            with pytest.raises(DataError):
                build([path], tmp_path / "c")
        else:
            build([path], tmp_path / "c")
    (tmp_path / "x.jsonl").write_bytes(data)
    build([tmp_path / "x.jsonl"], tmp_path / "clean")
    assert content(tmp_path / "c")[:2] == content(tmp_path / "clean")[:2]

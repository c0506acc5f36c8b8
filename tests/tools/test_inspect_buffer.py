"""What is said of a buffer is what lies there; a dropped task is gone, and the run goes on."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_mer.checkpoint import find_latest
from megatron_mer.checkpoint.find import damaged
from megatron_mer.checkpoint.layout import step_directories
from megatron_mer.continual.plan import Plan
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.tokenizers import load_tokenizer
from megatron_mer.errors import ConfigError, DataError
from megatron_mer.training import drop_tasks
from megatron_mer.training.dry_run import sample_texts
from megatron_mer.training.kept_buffer import BufferOfRun
from megatron_mer.training.lock import RunLock
from tests.stored_bytes import found_in, sample_bytes
from tests.tiny_run import SEQ_LENGTH, TinyRun
from tools import inspect_buffer

pytestmark = pytest.mark.dist


@pytest.fixture(autouse=True)
def own_log():
    """The program sets the log up for itself."""
    log = logging.getLogger("megatron_mer")
    before = log.handlers[:], log.propagate, log.level
    yield
    log.handlers[:], log.propagate, log.level = before


ROOT = Path(__file__).resolve().parents[2]
BUFFER = ("--replay.source=buffer", "--replay.capacity_samples=40", "--checkpoint.keep_last=1")
BY_TASK = (
    "--replay.source=buffer",
    "--replay.capacity_samples={en: 20, fr: 15, de: 10}",
    "--replay.policy=equal",
    "--checkpoint.keep_last=1",
)
STEPS = ["step_000000015", "step_000000014", "step_000000007"]
"""Checkpoints of a run killed after batch 17: the ends of en and fr, and one within de."""


def inspect(*arguments):
    """Run the program in this process, which has torch; its exit code, output and errors."""
    out, errors = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            code = inspect_buffer.main([str(one) for one in arguments])
        except SystemExit as stopped:
            code = stopped.code
    for stream in (out, errors):
        stream.seek(0)
    return code, out.read(), errors.read()


def killed_run(corpus, folder, options) -> TinyRun:
    tiny = TinyRun(corpus, folder)
    tiny.train(tiny.write("run"), *options, kill_after=17, expect_failure=True)
    assert [path.name for path in step_directories(folder / "run/checkpoints")] == STEPS
    return tiny


@pytest.fixture(scope="module")
def killed(corpus, tmp_path_factory) -> TinyRun:
    """A run with a buffer of all tasks, killed in its last task."""
    return killed_run(corpus, tmp_path_factory.mktemp("killed"), BUFFER)


@pytest.fixture
def run(killed, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(killed.folder / "run", tmp_path / "run"))


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def replayed(run: Path, first: int) -> Counter[str]:
    """Replay rows from a batch on, by task, as the run's plan has them."""
    plan = Plan.from_history(json.loads((run / "plan.json").read_text()))
    counts: Counter[str] = Counter()
    for batch in range(first, plan.total_batches):
        rows = plan.rows(batch)
        counts.update(plan.entries[one].task for one in rows.entry[rows.kind == 1])
    return counts


def test_what_it_holds(run, killed):
    code, said, errors = inspect(run, "--json")
    assert (code, errors) == (0, "")
    report = json.loads(said)
    assert (report["checkpoint"], report["batch"]) == (STEPS[0], 15)
    assert (report["rows"], report["capacity"], report["problems"]) == (40, 40, [])
    info = find_latest(run / "checkpoints")
    plan = Plan.from_history(info.run_state["history"])
    fresh = {"en": plan.fresh_rows_before(7)}
    fresh["fr"] = plan.fresh_rows_before(14) - fresh["en"]
    fresh["de"] = plan.fresh_rows_before(15) - plan.fresh_rows_before(14)
    assert {one["task"]: one["fresh_rows"] for one in report["tasks"]} == fresh
    total = report["fresh_rows"]
    assert total == sum(fresh.values())
    for one in report["tasks"]:
        assert one["expected_share"] == pytest.approx(fresh[one["task"]] / total)
        assert one["share"] == one["rows"] / 40
    assert [one["dataset"] for one in report["datasets"]] == ["en", "fr", "de"]
    assert sum(one["rows"] for one in report["entries"]) == sum(report["ages"]["rows"]) == 40
    assert report["ages"]["edges"][-1] == total
    disk = report["disk"]
    sizes = [path.stat().st_blocks * 512 for path in (run / "buffer").glob("*.rec")]
    parts = ("checkpoint", "other_checkpoints", "after", "stale")
    assert sum(sizes) == disk["bytes"] == sum(disk[f"{part}_bytes"] for part in parts)
    assert disk["stale_bytes"] == 0 < disk["after_bytes"]
    code, text, _ = inspect(run)
    assert code == 0
    assert "40 rows of a capacity of 40" in " ".join(text.split())
    assert text.rstrip().endswith("whole by records")
    older = json.loads(inspect(f"{run}@7", "--json", "--sizes")[1])
    assert (older["batch"], [one["rows"] for one in older["tasks"]]) == (7, [40, 0, 0])


def test_the_program_runs_alone(killed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    command = [sys.executable, ROOT / "tools/inspect_buffer.py", killed.folder / "run", "--sizes"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == inspect(killed.folder / "run", "--sizes")[1]


def test_damage_is_named_with_what_to_do(run, killed, corpus):
    about = json.loads((run / "buffer/buffer.json").read_text())
    checkpoint = BufferOfRun.of(str(run))[1]
    content = checkpoint.content()
    assert about["segment_records"] == 1
    path = run / f"buffer/segment_{content.position[3]:09d}.rec"
    good = path.read_bytes()
    path.write_bytes(good[:70] + bytes([good[70] ^ 1]) + good[71:])
    code, said, errors = inspect(run)
    assert code == 1
    assert f"not whole: {path}, byte 0, record {content.position[3]}: a bit is wrong" in errors
    assert f"remove {run}/buffer and start the run again" in errors
    assert "whole by" not in said
    assert inspect(run, "--sizes")[0] == 0
    path.write_bytes(good[:70])
    code, _, errors = inspect(run, "--sizes")
    assert (code, f"{path}: expected at least {len(good)} bytes, found 70" in errors) == (1, True)
    path.unlink()
    state = run / f"checkpoints/{STEPS[0]}/run_state.json"
    name = content.plan.datasets[content.dataset[0]]
    old, new = f'"{name}": "{corpus / name}"', f'"{name}": "{"x" * len(str(corpus / name))}"'
    state.write_text(state.read_text().replace(old, new))
    code, _, errors = inspect(run, "--sizes")
    assert (code, f"{path}: expected at least {len(good)} bytes, found no file" in errors) == (
        1,
        True,
    )
    assert f"bring back {name} (xxx" in errors


def test_samples_are_the_datasets_text(run, corpus, tmp_path):
    shown = json.loads(inspect(run, "--samples", 3, "--task", "fr", "--json")[1])["samples"]
    assert [one["task"] for one in shown] == ["fr"] * 3
    assert shown == json.loads(inspect(run, "--samples", 3, "--task", "fr", "--json")[1])["samples"]
    dataset = IndexedDataset(corpus / "fr")
    tokenizer = load_tokenizer(f"sentencepiece:{corpus / 'tok.model'}")
    for one in shown:
        assert one["text"] == sample_texts(dataset, one["sample"], SEQ_LENGTH, tokenizer)
    said = inspect(run, "--samples", 50, "--sizes")[1]
    assert said.count("fresh rows ago ---") == 40
    code, _, errors = inspect(run, "--samples", 1, "--task", "it")
    assert (code, "--task: given 'it'; allowed: en, fr, de" in errors) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["@8"], "given step 8 of"),
        (["", "--drop-task", "it"], "--drop-task: given 'it'; allowed: en, fr, de"),
        (["", "--drop-task", "de", "--yes"], "given 'de', which is in training at"),
        (["", "--yes"], "--yes needs --drop-task"),
        (["", "--task", "fr"], "need --samples"),
        (["/buffer"], "which holds no checkpoint"),
        (["x"], "which does not exist"),
    ],
)
def test_what_cannot_be_is_refused(killed, arguments, words):
    before = tree(killed.folder / "run/buffer")
    place, *options = arguments
    code, _, errors = inspect(f"{killed.folder / 'run'}{place}", *options)
    assert (code, words in errors, "Traceback" in errors) == (2, True, False)
    assert tree(killed.folder / "run/buffer") == before


def test_a_dropped_task_is_gone_from_every_file(run, corpus):
    needles = sample_bytes(corpus, "fr")
    others = sample_bytes(corpus, "en") + sample_bytes(corpus, "de")
    assert found_in(run, needles) > 10
    before, kept = tree(run), found_in(run, others)
    code, said, errors = inspect(run, "--drop-task", "fr")
    assert (code, errors) == (0, "")
    assert "this is what --yes would do" in said
    assert tree(run) == before
    held = json.loads(inspect(run, "--json")[1])["tasks"][1]["rows"]
    code, done, errors = inspect(run, "--drop-task", "fr", "--yes")
    assert (code, errors) == (0, "")
    assert done.splitlines()[1:] == said.splitlines()[1:]
    assert f"{STEPS[0]} rewritten: {held} rows dropped, {40 - held} left" in done
    assert f"{STEPS[1]} rewritten" in done
    assert f"{STEPS[2]} rewritten" not in done  # It has no row of fr yet, but is to train it.
    assert f"note: {STEPS[2]} still trains fr from batch 7 on" in done
    assert f"dataset 'fr': {corpus / 'fr'}" in done
    assert found_in(run, needles) == 0
    assert found_in(run, others) == kept
    for path in step_directories(run / "checkpoints"):
        assert damaged(path) is None
        assert inspect(f"{run}@{int(path.name[5:])}")[0] == 0
    assert (run / "checkpoints/latest").read_text() == STEPS[0] + "\n"
    assert (
        tree(run)["checkpoints/step_000000015/rank_00000.safetensors"]
        == (before["checkpoints/step_000000015/rank_00000.safetensors"])
    )
    after = tree(run)
    again = inspect(run, "--drop-task", "fr", "--yes")[1]
    assert "no kept checkpoint refers to it\n  0 records erased" in again
    assert tree(run) == after


def test_torn_records_go_too(run, corpus):
    """A kill leaves half a record, a power cut a record under a header of zeros."""
    needle = sample_bytes(corpus, "fr")[0]
    buffer = run / "buffer"
    (buffer / "segment_000000900.rec").write_bytes(b"RMER" + bytes(60) + needle[:40])
    (buffer / "segment_000000901.rec").write_bytes(bytes(64) + needle + bytes(62))
    (buffer / "segment_000000902.rec").write_bytes(b"ERAS" + bytes(60) + needle + bytes(62))
    (buffer / "segment_000000903.rec").write_bytes(bytes(192))
    said = inspect(run, "--drop-task", "fr", "--yes")[1]
    assert "3 torn or damaged records erased" in said
    assert "checkpoints need 0 of them" in said
    assert found_in(buffer, [needle[:40], *sample_bytes(corpus, "fr")]) == 0


def drop(run: Path, *tasks: str) -> drop_tasks.Drop:
    return drop_tasks.drop_tasks(*BufferOfRun.of(str(run)), tasks, do=True)


def dies(run: Path, moment: int) -> bool:
    """Whether a process that drops a task has changed the disk so often that it is killed."""
    child = os.fork()
    if child == 0:
        calls = iter(range(moment))

        def dying(real):
            def call(*arguments, **options):
                if next(calls, None) is None:
                    os._exit(9)
                return real(*arguments, **options)

            return call

        for name in ("rename", "link", "fsync", "mkdir", "unlink", "rmdir"):
            setattr(os, name, dying(getattr(os, name)))
        drop_tasks.RecordStore.erase = dying(drop_tasks.RecordStore.erase)
        try:
            drop(run, "fr")
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_is_done_by_the_same_call(killed, tmp_path, corpus, every):
    needles = sample_bytes(corpus, "fr")
    done = Path(shutil.copytree(killed.folder / "run", tmp_path / "done"))
    drop(done, "fr")
    moment, died = 0, True
    while died:
        run = Path(shutil.copytree(killed.folder / "run", tmp_path / f"run_{moment}"))
        died = dies(run, moment)
        found = find_latest(run / "checkpoints")
        assert (found.step, damaged(found.path)) == (15, None)
        drop(run, "fr")
        assert found_in(run, needles) == 0
        assert tree(run) == tree(done)
        shutil.rmtree(run)
        moment += every
    assert moment > 40


def test_a_live_run_is_left_alone(run):
    before = tree(run / "checkpoints")
    for folder in (run, run / "buffer"):
        lock = RunLock(folder)
        lock.take()
        with pytest.raises(ConfigError, match=r"only what no run uses.*where a run is alive"):
            drop(run, "fr")
        lock.release()
    assert tree(run / "checkpoints") == before


def test_another_buffers_description_changes_nothing(run):
    path = run / "buffer/buffer.json"
    path.write_text(path.read_text().replace('"seq_length": 32', '"seq_length": 64'))
    before = tree(run / "checkpoints")
    with pytest.raises(DataError, match=r"nothing was changed. Is its buffer.json"):
        drop(run, "fr")
    assert tree(run / "checkpoints") == before


def resumed(killed: TinyRun, folder: Path, *tasks: str) -> TinyRun:
    """A copy of the killed run without the tasks, ready to go on."""
    shutil.copytree(killed.folder / "run", folder / "run")
    drop(folder / "run", *tasks)
    tiny = TinyRun(killed.corpus, folder)
    tiny.write("run")
    return tiny


def test_the_run_goes_on_without_the_task(killed, tmp_path):
    """And killed once more, it goes on to the bit."""
    runs = []
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
        runs.append(resumed(killed, tmp_path / name, "fr"))
    straight, again = runs
    straight.train(straight.folder / "run.yaml", *BUFFER)
    counts = replayed(straight.folder / "run", 15)
    assert set(counts) == {"en"}
    assert sum(line["replay_rows"] for line in straight.lines("run")[15:]) == counts.total() > 8
    options = (*BUFFER, "--checkpoint.every_steps=1")
    again.train(again.folder / "run.yaml", *options, kill_after=17, expect_failure=True)
    again.train(again.folder / "run.yaml", *options)
    assert again.results("run") == straight.results("run")
    for one in runs:
        assert found_in(one.folder / "run/buffer", sample_bytes(killed.corpus, "fr")) == 0
        assert inspect(one.folder / "run")[0] == 0


def test_a_checkpoint_from_before_the_drop_drops_anew(killed, tmp_path):
    tiny, run = resumed(killed, tmp_path, "fr"), tmp_path / "run"
    for name in ("checkpoints", "buffer"):
        shutil.rmtree(run / name)
    shutil.copytree(killed.folder / "run/checkpoints", run / "checkpoints")
    tiny.train(tiny.folder / "run.yaml", *BUFFER)
    assert set(replayed(run, 15)) == {"en"}
    assert found_in(run / "buffer", sample_bytes(killed.corpus, "fr")) == 0
    said = "task fr was dropped from the replay buffer after step_000000015 was written"
    assert said in (run / "train.log").read_text()


def test_with_nothing_left_to_replay_all_rows_are_fresh(killed, tmp_path):
    tiny = resumed(killed, tmp_path, "en", "fr")
    tiny.train(tiny.folder / "run.yaml", *BUFFER)
    assert [line["replay_rows"] for line in tiny.lines("run")[15:]] == [0] * 5
    assert inspect(tmp_path / "run")[0] == 0
    report = json.loads(inspect(tmp_path / "run", "--json")[1])
    assert [bool(one["rows"]) for one in report["tasks"]] == [False, False, True]


@pytest.mark.slow
def test_with_a_capacity_for_each_task(corpus, tmp_path):
    (tmp_path / "whole").mkdir()
    killed = killed_run(corpus, tmp_path / "whole", BY_TASK)
    run = killed.folder / "run"
    report = json.loads(inspect(run, "--json")[1])
    assert [one["rows"] for one in report["tasks"][:2]] == [20, 15]
    drop(run, "en")
    killed.train(killed.folder / "run.yaml", *BY_TASK)
    assert set(replayed(run, 15)) == {"fr"}
    drop(run, "fr", "de")  # It is done: no task is in training.
    report = json.loads(inspect(run, "--json")[1])
    assert (report["rows"], report["problems"]) == (0, [])
    for task in ("en", "fr", "de"):
        assert found_in(run / "buffer", sample_bytes(corpus, task)) == 0

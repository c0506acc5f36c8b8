"""Bad input: named errors with the numbers, exit code 2, no traceback, all problems at once."""

import json
import os
import platform
import shutil
import subprocess
import sys

import numpy as np
import pytest

from megatron_mer.data.indexed_writer import IndexedDatasetWriter
from megatron_mer.data.sidecar import Provenance
from megatron_mer.training.outputs import RunDirectory


def refused(project_root, config, *options):
    """Run the script as a plain process; return what it printed after checking its exit."""
    done = subprocess.run(
        [
            sys.executable,
            str(project_root / "pretrain_llama_mer.py"),
            "--config",
            str(config),
            *options,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 2, printed
    assert "Traceback" not in printed
    return printed


CASES = {
    "missing prefix": (
        lambda c: c["stream"][1]["train"][0].update(prefix="nowhere/fr"),
        (),
        ["stream.1.train.0.prefix", "nowhere/fr"],
    ),
    "heads": (
        {},
        ("--parallel.tp_size=3",),
        ["model.num_heads: 4 does not divide into parallel.tp_size 3"],
    ),
    "batch": (
        {},
        ("--batch.micro_batch_size=3",),
        ["batch.global_batch_size: 8 rows do not divide into micro_batch_size 3"],
    ),
    "exhausted": (
        lambda c: c["stream"][0].update(steps=100000, max_epochs=1),
        (),
        ["dataset 'en' would have given 800000 samples"],
    ),
    "alpha": ({}, ("--replay.alpha=1.0",), ["replay.alpha", "1.0"]),
    "unknown key": (lambda c: c["reptile"].update(epsilom=0.1), (), ["reptile.epsilom", "epsilon"]),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_its_numbers(tiny, project_root, case):
    change, options, words = CASES[case]
    printed = refused(project_root, tiny.write("bad", change or None), *options)
    for word in words:
        assert word in printed, f"{word!r} is not in:\n{printed}"
    assert not (tiny.folder / "bad").exists(), "a refused run leaves nothing behind"


def foreign(corpus, folder, fingerprint, largest):
    writer = IndexedDatasetWriter(folder / "foreign", np.uint16)
    writer.add_document(np.append(np.arange(600) % 400, largest))
    writer.finalize(Provenance("sentencepiece", fingerprint, largest + 1, 2, True))
    return str(folder / "foreign")


def test_tokenizers_that_differ_and_foreign_ids_are_named(tiny, corpus, project_root):
    prefix = foreign(corpus, tiny.folder, "f" * 64, 700)
    config = tiny.write("bad", lambda c: c["stream"][0]["train"][0].update(prefix=prefix))
    printed = refused(project_root, config)
    assert "ffffffffffffffff" in printed
    assert "700" in printed
    assert "511" in printed


def test_all_problems_come_at_once(tiny, project_root):
    def change(config):
        config["reptile"]["epsilon"] = 1.5
        config["replay"]["alpha"] = 1.0
        config["batch"]["colour"] = "red"

    printed = refused(project_root, tiny.write("bad", change))
    for path in ("reptile.epsilon", "replay.alpha", "batch.colour"):
        assert path in printed

    def late(config):
        config["stream"][0]["train"][0]["prefix"] = "nowhere/en"
        config["stream"][2]["valid"] = "nowhere/de"
        config["tokenizer"] = "sentencepiece:nowhere.model"

    printed = refused(project_root, tiny.write("bad", late))
    for word in ("nowhere/en", "nowhere/de", "nowhere.model"):
        assert word in printed


@pytest.mark.dist
def test_id_outside_the_vocabulary_without_a_sidecar_ends_the_run_with_its_place(tiny):
    writer = IndexedDatasetWriter(tiny.folder / "foreign", np.uint16)
    writer.add_document(np.append(np.arange(4000) % 400, 700))
    writer.finalize()
    (tiny.folder / "foreign.json").unlink(missing_ok=True)
    prefix = str(tiny.folder / "foreign")
    config = tiny.write("bad", lambda c: c["stream"][0]["train"][0].update(prefix=prefix))
    codes = tiny.train(config, expect_failure=True)
    assert codes == [2]
    status = (tiny.folder / "bad" / "status.json").read_text()
    assert "failed" in status
    assert "700" in status
    assert "foreign" in status


REFUSED = {
    "--replay.alpha=0.5": "replay.alpha was 0.3, is 0.5",
    "--batch.global_batch_size=4": "global_batch_size was 8, is 4",
    "--seed=8": "seed was 7, is 8",
    "--batch.eod_mask_loss=false": "batch.eod_mask_loss: given False",
    "--reptile=": "reptile: given an empty value",
    "--seed=1e999999999": "seed: given",
    "--replay.alpha=1e-999999999": "replay.alpha: given",
    "--model.num_layers=2": "model.num_layers: given 2, but the run began with 4",
    "--model.rope_base=500": "model.rope_base: given 500",
    "--precision=bf16": "precision: given bf16, but the run began with fp32",
    "--reptile=null": "reptile: no reptile section, but the checkpoint was written with",
    "--reptile.momentum=0.5": "reptile: reptile momentum 0.5",
    "--reptile.k=1": "reptile.k: given 1, but the checkpoint stands",
    "--schedule.total_steps=30": "schedule.total_steps: 30, but the run began with",
}


def files_of(run):
    """Every file of a run with its content, checkpoints aside."""
    return {
        path.name: path.read_bytes()
        for path in run.iterdir()
        if path.is_file() and path.name not in ("train.log", ".lock")
    }


@pytest.mark.dist
def test_a_resume_that_would_change_what_was_trained_leaves_the_run_as_it_was(tiny):
    config = tiny.write("run")
    tiny.train(config, kill_after=10, expect_failure=True)
    before = files_of(tiny.folder / "run")
    assert len(tiny.lines("run")) == 11
    for option, words in REFUSED.items():
        printed = tiny.train(config, option, expect_failure=True, output=True)
        assert words in printed, f"{option}: {words!r} is not in:\n{printed}"
        assert "Traceback" not in printed
        assert files_of(tiny.folder / "run") == before, option
    options = ("--optimizer.lr=2e-3", "--reptile.epsilon=0.7", "--evaluate.max_samples=3")
    tiny.train(config, *options)
    log = (tiny.folder / "run" / "train.log").read_text()
    assert "optimizer.lr was 0.001, is 0.002 from here on" in log
    assert "reptile.epsilon was 0.5, is 0.7 from here on" in log
    assert "WARNING evaluate.max_samples changed: held-out losses from here on" in log


@pytest.mark.dist
def test_tasks_are_appended_with_an_explicit_schedule(tiny):
    def two(config):
        del config["stream"][2]

    tiny.train(tiny.write("run", two))
    config = tiny.write("run")
    printed = tiny.train(config, expect_failure=True, output=True)
    assert "the rate would go from 0.0001 to" in printed
    assert "as an option `--schedule.total_steps 14`" in printed
    tiny.train(config, "--schedule.total_steps=14")
    lines = tiny.lines("run")
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert {line["lr"] for line in lines[14:]} == {1.0e-4}
    summary = json.loads((tiny.folder / "run" / "summary.json").read_text())
    assert summary["matrix"]["losses"][0][2] is None
    assert summary["learned"]["sets"]["de"] > 0


@pytest.mark.dist
def test_a_run_that_died_before_its_results_writes_them_at_the_next_start(tiny):
    config = tiny.write("run")
    tiny.train(config, kill_after=19, expect_failure=True)
    run = tiny.folder / "run"
    assert not (run / "summary.json").exists()
    tiny.train(config)
    assert json.loads((run / "status.json").read_text())["status"] == "done"
    assert json.loads((run / "summary.json").read_text())["steps"] == 20
    assert (run / "report" / "losses.png").exists()


@pytest.mark.dist
def test_fresh_begins_anew_and_keeps_the_earlier_run(tiny):
    config = tiny.write("run")
    tiny.train(config, kill_after=10, expect_failure=True)
    earlier = tiny.lines("run")
    tiny.train(config, "--fresh")
    assert [line["step"] for line in tiny.lines("run")] == list(range(1, 21))
    (aside,) = tiny.folder.glob("run.before_*")
    assert len((aside / "metrics.jsonl").read_text().splitlines()) == len(earlier) == 11


@pytest.mark.dist
def test_a_full_disk_fails_the_run_with_its_cause(tiny):
    config = tiny.write("run")
    codes = tiny.train(config, world_size=2, disk_full_at=10, expect_failure=True)
    assert set(codes) == {1}
    status = json.loads((tiny.folder / "run" / "status.json").read_text())
    assert status["status"] == "failed"
    assert "No space left on device" in status["reason"]
    assert status["step"] == 7
    tiny.train(config, world_size=2)
    assert [line["step"] for line in tiny.lines("run")] == list(range(1, 21))


@pytest.mark.dist
def test_a_dataset_whose_content_changed_is_refused_on_resume(tiny, corpus):
    def copied(config):
        config["stream"][0]["train"] = [{"prefix": str(tiny.folder / "en")}]

    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{corpus / 'en'}{suffix}", tiny.folder / f"en{suffix}")
    config = tiny.write("run", copied)
    tiny.train(config, kill_after=10, expect_failure=True)
    sidecar = json.loads((tiny.folder / "en.json").read_text())
    sidecar["bin_sha256"] = "0" * 64
    (tiny.folder / "en.json").write_text(json.dumps(sidecar))
    printed = tiny.train(config, expect_failure=True, output=True)
    assert "dataset 'en' has the content 0000000000000000000000..., the run began with" in printed
    assert "its content changed" in printed


@pytest.mark.dist
def test_a_second_run_in_the_same_directory_is_refused(tiny, project_root):
    config = tiny.write("run")
    outputs = RunDirectory(tiny.folder / "run")
    outputs.make()
    outputs.lock()
    for options in ((), ("--fresh",)):
        printed = refused(project_root, config, *options)
        assert f"where a run is alive (host {platform.node()}, process {os.getpid()})" in printed
    assert not list(tiny.folder.glob("run.before_*"))


@pytest.mark.dist
def test_fresh_sets_no_foreign_directory_aside(tiny, project_root):
    (tiny.folder / "run").mkdir()
    (tiny.folder / "run" / "thesis.tex").write_text("years of work")
    printed = refused(project_root, tiny.write("run"), "--fresh")
    assert "holds files but no run" in printed
    assert [path.name for path in (tiny.folder / "run").iterdir()] == ["thesis.tex"]


@pytest.mark.dist
def test_a_batch_without_a_target_is_named(tiny):
    writer = IndexedDatasetWriter(tiny.folder / "ones", np.uint16)
    for _ in range(4000):
        writer.add_document(np.array([5]))
    writer.finalize()
    prefix = str(tiny.folder / "ones")
    config = tiny.write("bad", lambda c: c["stream"][0]["train"][0].update(prefix=prefix))
    printed = tiny.train(config, expect_failure=True, output=True)
    assert "no target of batch 0 counts: batch.eod_mask_loss" in printed

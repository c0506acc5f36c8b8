"""Bad input: named errors with the numbers, exit code 2, no traceback, all problems at once."""

import os
import subprocess
import sys

import numpy as np
import pytest

from megatron_mer.data.indexed_writer import IndexedDatasetWriter
from megatron_mer.data.sidecar import Provenance


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
    "heads": ({}, ("--parallel.tp_size=3",), ["num_heads", "4", "3"]),
    "batch": ({}, ("--batch.micro_batch_size=3",), ["batch.global_batch_size", "8", "3"]),
    "exhausted": (
        lambda c: c["stream"][0].update(steps=100000, max_epochs=1),
        (),
        ["en", "800000"],
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


def test_a_changed_plan_is_refused_on_resume(tiny, project_root):
    config = tiny.write("run")
    tiny.train(config, "--stream.2.steps=1")
    before = (tiny.folder / "run" / "metrics.jsonl").read_text()
    for option, word in (("--replay.alpha=0.5", "alpha"), ("--batch.global_batch_size=4", "batch")):
        printed = refused(project_root, config, option)
        assert word in printed
        assert "--fresh" in printed
    assert (tiny.folder / "run" / "metrics.jsonl").read_text() == before

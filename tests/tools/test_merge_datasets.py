"""The command line of tools/merge_datasets.py, run as users run it."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.indexed_writer import IndexedDatasetWriter
from megatron_mer.data.sidecar import Provenance, Source

TOOL = Path(__file__).parents[2] / "tools" / "merge_datasets.py"
PROVENANCE = Provenance("sentencepiece", "f" * 64, 300, 2, True)


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder with fr_0, fr_1 and fr_2, which have sidecars, and bare, which has none."""
    for number in range(3):
        source = Source(f"{number}.jsonl", 2, 0, 9, f"{number}" * 64)
        with IndexedDatasetWriter(tmp_path / f"fr_{number}", np.uint16) as writer:
            writer.add_documents(np.array([number, 7, 2, 2]), [3, 1])
            writer.finalize(replace(PROVENANCE, sources=(source,)))
    with IndexedDatasetWriter(tmp_path / "bare", np.uint16) as writer:
        writer.add_document([5])
        writer.finalize()
    return tmp_path


def test_merges_what_was_named_and_says_so(shards: Path) -> None:
    done = run(shards, "--input", "fr_*.idx", "--output-prefix", "out/fr", "--check", "full")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "out/fr: 6 documents in 6 sequences, 12 tokens of uint16, from 3 datasets"
    assert second.startswith("sidecar: sentencepiece tokenizer ffffffffffffffff..., 3 source files")
    assert done.stderr.splitlines() == ["checking 3 datasets", "merging 3 datasets into out/fr"]
    assert IndexedDataset(shards / "out" / "fr").document(4).tolist() == [2, 7, 2]
    (shards / "list").write_text("fr_2\nfr_1.bin\n")
    done = run(shards, "--input", "fr_0", "--input-list", "list", "--output-prefix", "out/b")
    assert done.returncode == 0, done.stderr
    dataset = IndexedDataset(shards / "out" / "b")
    assert [dataset.document(2 * at)[0] for at in range(3)] == [0, 2, 1]


def test_a_source_that_comes_twice_is_a_warning(shards: Path) -> None:
    run(shards, "--input", "fr_0", "fr_1", "--output-prefix", "a")
    done = run(shards, "--input", "a", "fr_1", "--output-prefix", "b")
    assert done.returncode == 0, done.stderr
    assert "warning: source file 1.jsonl stands in 2 of the datasets" in done.stdout


def test_errors_are_plain_and_exit_code_2(shards: Path) -> None:
    before = files(shards)
    done = run(shards, "--input", "fr_0", "bare", "--output-prefix", "out")
    assert done.returncode == 2
    assert done.stderr.startswith("error: bare.json: is missing, so this dataset's tokenizer is")
    done = run(shards, "--input", "fr_0", "--output-prefix", "fr_0", "--overwrite")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: fr_0: is also the output")
    done = run(shards, "--output-prefix", "out")
    assert done.returncode == 2
    assert "name the datasets to merge: --input PREFIX ... or --input-list FILE" in done.stderr
    assert files(shards) == before


def test_without_sidecar_it_says_that_none_was_written(shards: Path) -> None:
    done = run(shards, "--input", "fr_0", "bare", "--output-prefix", "o", "--without-sidecar")
    assert done.returncode == 0, done.stderr
    assert "no sidecar was written (--without-sidecar)" in done.stdout
    assert "missing" not in done.stderr
    assert not (shards / "o.json").exists()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_leaves_no_dataset_and_the_next_one_succeeds(
    tmp_path: Path, how: signal.Signals
) -> None:
    with IndexedDatasetWriter(tmp_path / "s", np.uint8) as writer:
        writer.add_documents(np.full(100, 7, dtype=np.uint8), [60, 40])
        writer.finalize()
    huge = [f"huge{number}" for number in range(20)]
    for name in huge:
        write_hole(tmp_path / name)
    (tmp_path / "out").mkdir()
    command = [sys.executable, str(TOOL), "--without-sidecar", "--output-prefix", "out/m"]
    process = subprocess.Popen(
        [*command, "--input", "s", *huge], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    partial = tmp_path / "out" / "m.bin.partial"
    deadline = time.monotonic() + 30
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == (-how if how == signal.SIGKILL else 128 + how)
    if how == signal.SIGKILL:
        assert files(tmp_path / "out") == ["m.bin.partial"]
    else:
        assert files(tmp_path / "out") == []
        assert said.endswith(f"stopped by signal {how.value}; nothing was left behind\n")
    done = run(tmp_path, *command[2:], "--input", "s")
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "out") == ["m.bin", "m.idx"]


def write_hole(prefix: Path) -> None:
    """Write one document of 2^31 - 1 zero bytes, which fill no disk and take a while to read."""
    with IndexedDatasetWriter(prefix, np.uint8) as writer:
        writer.add_document(np.zeros(1, dtype=np.uint8))
        writer.finalize()
    os.truncate(f"{prefix}.bin", 2**31 - 1)
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(34)
        file.write((2**31 - 1).to_bytes(4, "little"))

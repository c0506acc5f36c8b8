"""The command line of tools/preprocess_data.py, run as users run it."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer

from megatron_mer.data.indexed_dataset import IndexedDataset

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
TRAINING_TEXT = (
    "the fox and the dog run near the warm stove and the slow cat sleeps near the brown dog"
)


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = io.BytesIO()
    SentencePieceTrainer.Train(
        sentence_iterator=iter([TRAINING_TEXT] * 3),
        model_writer=model,
        vocab_size=280,
        byte_fallback=True,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tok.model"
    path.write_bytes(model.getvalue())
    return f"sentencepiece:{path}"


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


def test_writes_a_dataset_and_a_table(tmp_path: Path, name: str) -> None:
    documents = [{"body": "the fox"}, {"body": ""}, {"body": "brown"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, documents)))
    common = ["--input", "in.jsonl", "--tokenizer", name, "--text-key", "body"]
    done = run(tmp_path, *common, "--output-prefix", "out/c", "--workers", "2")
    assert (done.returncode, done.stderr) == (0, "")
    dataset = IndexedDataset(tmp_path / "out" / "c")
    assert dataset.num_documents == 2
    assert dataset.document(1)[-1] == 2
    table = done.stdout.splitlines()
    tokens = str(dataset.num_tokens)
    ratio = f"{12 / dataset.num_tokens:.2f}"
    assert table[0].startswith("1 unit of work, 1 worker; ids: sentencepiece 0.2.3; no gigatoken")
    assert table[2].split() == ["in.jsonl", "2", "1", "0", "12", tokens, ratio]
    assert table[3].split() == ["total", "2", "1", "0", "12", tokens, ratio]
    assert table[5] == "what was left out is named in out/c.faults.jsonl"
    assert table[6].startswith(f"out/c: {tokens} tokens of uint16, ")
    done = run(tmp_path, *common, "--output-prefix", "out/d", "--no-append-eod")
    assert done.returncode == 0
    assert IndexedDataset(tmp_path / "out" / "d").num_tokens == dataset.num_tokens - 2


def test_errors_are_one_line_and_exit_code_2(tmp_path: Path, name: str) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "fox"}\n{"text": \n')
    common = ["--input", "in.jsonl", "--output-prefix", "c", "--tokenizer"]
    done = run(tmp_path, *common, name)
    assert done.returncode == 2
    assert done.stderr.startswith("error: in.jsonl, line 2: not JSON")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    done = run(tmp_path, *common, "nonsense:x")
    assert done.returncode == 2
    assert done.stderr.startswith("error: tokenizer 'nonsense:x'; allowed: sentencepiece:PATH")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_leaves_no_dataset_and_no_processes(
    tmp_path: Path, name: str, how: signal.Signals
) -> None:
    for pipe in ("a.jsonl", "b.jsonl"):
        os.mkfifo(tmp_path / pipe)  # inputs that never end
    command = [sys.executable, str(TOOL), "--input", "a.jsonl", "b.jsonl", "--output-prefix", "c"]
    command += ["--tokenizer", name, "--workers", "2"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    for pipe in ("a.jsonl", "b.jsonl"):
        threading.Thread(target=feed, args=(tmp_path / pipe,), daemon=True).start()
    # Three: the tool and its workers, which are at work.
    while len(members(process.pid)) < 3 or len(list(tmp_path.glob("c.parts/*.tokens"))) < 2:
        time.sleep(0.02)
    process.send_signal(how)
    assert process.wait(20) == (-how if how == signal.SIGKILL else 128 + how)
    deadline = time.monotonic() + 20
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert members(process.pid) == []
    left = {path.name for path in tmp_path.iterdir()} - {"a.jsonl", "b.jsonl", "c.parts"}
    assert left == ({"c.bin.partial"} if how == signal.SIGKILL else set())


def feed(pipe: Path) -> None:
    """Write documents until nobody reads."""
    line = json.dumps({"text": "the quick brown fox\n" * 100}).encode() + b"\n"
    with suppress(BrokenPipeError), open(pipe, "wb") as file:
        while True:
            file.write(line * 20)


def members(session: int) -> list[int]:
    """Return the living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def test_a_small_job_imports_nothing_large(tmp_path: Path, name: str) -> None:
    """Start-up stays short: awkward alone, which gigatoken brings, takes half a second."""
    (tmp_path / "in.jsonl").write_text('{"text": "the fox"}\n')
    arguments = ["--input", "in.jsonl", "--output-prefix", "c", "--tokenizer", name]
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{str(TOOL)!r}, *{arguments!r}]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as done:\n    assert not done.code\n"
        "large = {'torch', 'deepspeed', 'transformers', 'awkward', 'pyarrow', 'fsspec', 'pandas'}\n"
        "print(sorted(large & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr

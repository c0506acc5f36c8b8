"""The command line of tools/inspect_dataset.py, run as users run it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sentencepiece import SentencePieceTrainer

from megatron_mer.data.indexed_writer import IndexedDatasetWriter
from megatron_mer.data.sidecar import Provenance, Source
from megatron_mer.data.tokenizers import load_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "inspect_dataset.py"
TEXTS = [
    "the fox runs",
    "الإدارة المتقدمة للنظام",
    "高度な管理、第12章",
    "red \x1b[31malert\x9b\ttab\nline",
    "ça va déjà " * 40,
]


def train(path: Path, text: str) -> None:
    """Make a byte-fallback model of at most 290 ids that returns every text unchanged."""
    model = io.BytesIO()
    SentencePieceTrainer.Train(
        sentence_iterator=iter([text] * 3),
        model_writer=model,
        vocab_size=290,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer tok.model and two datasets: text, with a sidecar, and bare, without one."""
    path = tmp_path_factory.mktemp("datasets")
    train(path / "tok.model", "the quick brown fox jumps over the lazy dog and the slow cat")
    tokenizer = load_tokenizer(f"sentencepiece:{path / 'tok.model'}")
    size = sum(len(text.encode()) for text in TEXTS)
    source = Source("text\x1b.jsonl", len(TEXTS), 0, size, "0" * 64)
    provenance = Provenance(
        "sentencepiece", tokenizer.fingerprint, tokenizer.vocab_size, 2, True, (source,)
    )
    with IndexedDatasetWriter(path / "text", np.uint16) as writer:
        for text in TEXTS:
            writer.add_document(np.append(tokenizer.encode(text), 2))
        writer.finalize(provenance)
    with IndexedDatasetWriter(path / "bare", np.uint16) as writer:
        writer.add_documents(np.array([5, 6, 7, 299]), [3, 0, 1, 0])
        writer.finalize()
    return path


def run(
    folder: Path, *arguments: str, code: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def report(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run(folder, *arguments, "--json").stdout)
    return found


def test_the_table_of_a_dataset(folder: Path) -> None:
    done = run(folder, "bare", "text.idx", "--seq-length", "2", PYTHONIOENCODING="utf-8")
    assert done.stderr == ""
    bare, text = done.stdout.split("text\n", 1)
    assert [line.split(None, 1)[1] for line in bare.splitlines()[1:8]] == [
        "bare.bin 8 bytes, bare.idx 122 bytes",
        "4 of uint16",
        "4 (2 empty) in 4 sequences",
        "min 0, median 0, mean 1.0, 95 % up to 3, max 3",
        "1 of --seq-length 2",
        "none: tokenizer, sources and checksums are unknown",
        "sizes, dtype and both ends of the index",
    ]
    assert [line.split() for line in bare.splitlines()[9:]] == [
        ["tokens", "documents"],
        ["empty", "2", "█" * 40],
        ["1", "1", "█" * 20],
        ["2", "-", "3", "1", "█" * 20],
        [],
    ]
    assert " ids, largest used " in text
    assert "documents end with id 2" in text
    assert "bytes a token" in text
    assert "text\\x1b.jsonl: 5 documents" in text


def test_json_says_the_same(folder: Path) -> None:
    bare, text = report(folder, "bare", "text")
    assert (bare["documents"], bare["empty_documents"], bare["samples"]) == (4, 2, 0)
    assert bare["sidecar"] is None
    assert bare["lengths"] == {"min": 0, "median": 0, "mean": 1.0, "p95": 3, "max": 3}
    assert bare["histogram"] == {"edges": [1, 2, 4], "documents": [1, 1]}
    assert text["sidecar"]["provenance"]["eod_id"] == 2
    sizes = sum(len(text.encode()) for text in TEXTS)
    assert text["sidecar"]["bytes_per_token"] == pytest.approx(sizes / text["tokens"])


def test_documents_come_back_as_text_in_any_script(folder: Path) -> None:
    common = ["text", "--tokenizer", "sentencepiece:tok.model", "--documents"]
    (text,) = report(folder, *common, "0:", "--max-tokens", "0")
    assert [shown["text"] for shown in text["shown"]] == TEXTS
    said = run(folder, *common, "1:4", PYTHONIOENCODING="utf-8").stdout
    for number in (1, 2):
        assert f"--- document {number}: " in said
        assert f"\n{TEXTS[number]}\n" in said
    # What would steer the terminal is shown, not obeyed.
    assert "red \\x1b[31malert\\x9b\ttab\nline\n" in said
    assert "\x1b" not in said
    # A terminal that lacks the letters gets them spelled instead of a traceback.
    assert "\\u7ba1" in run(folder, *common, "1:4", PYTHONIOENCODING="ascii").stdout


def test_long_documents_are_cut_between_characters_and_say_so(folder: Path) -> None:
    common = ["text", "--tokenizer", "sentencepiece:tok.model", "--documents", "2"]
    for cut in (4, 5, 6):  # characters of three bytes each, a token a byte
        (text,) = report(folder, *common, "--max-tokens", str(cut))
        (shown,) = text["shown"]
        assert TEXTS[2].startswith(shown["text"])
        assert shown["left_out"] == shown["tokens"] - cut
    said = run(folder, *common, "--max-tokens", "7", PYTHONIOENCODING="utf-8").stdout
    assert f"... {shown['tokens'] - 7} more tokens (--max-tokens)" in said


def test_samples_are_drawn_by_the_seed(folder: Path) -> None:
    drawn = [
        [shown["document"] for shown in report(folder, "text", "--samples", "3", *more)[0]["shown"]]
        for more in ([], [], ["--seed", "2"], ["--seed", "3"])
    ]
    assert drawn[0] == drawn[1] == sorted(set(drawn[0]))
    assert len(drawn[0]) == 3
    assert len(set(map(tuple, drawn))) > 1
    (bare,) = report(folder, "bare", "--samples", "9")
    assert [shown["ids"] for shown in bare["shown"]] == [[5, 6, 7], [], [299], []]


def test_the_picture(folder: Path, tmp_path: Path) -> None:
    run(folder, "bare", "text", "--histogram", str(tmp_path / "new" / "lengths.png"))
    with Image.open(tmp_path / "new" / "lengths.png") as image:
        assert (image.format, image.size[0]) == ("PNG", 1440)
    done = run(folder, "bare", "--histogram", "/proc/nowhere/lengths.png", code=2)
    assert done.stderr.startswith("error: /proc/nowhere/lengths.png: cannot be written: ")


def test_the_full_check_says_what_it_checked(folder: Path) -> None:
    text, bare = report(folder, "text", "bare", "--check", "full")
    last = text["sidecar"]["provenance"]["vocab_size"] - 1
    assert text["checked"][1:] == [
        "all 5 lengths and pointers of the index",
        "all 6 document indices",
        f"all {text['tokens']:,} ids, which are in 0 to {last}",
        "the SHA-256 of both files",
    ]
    assert bare["checked"][3:] == [
        "not the ids: no vocabulary is known (--vocab-size)",
        "no checksums: there is no sidecar",
    ]
    (bare,) = report(folder, "bare", "--vocab-size", "300")
    assert bare["checked"][1].startswith("not the ids: without a sidecar only --check full")
    assert report(folder, "bare", "--vocab-size", "300", "--check", "full")[0]["checked"][3] == (
        "all 4 ids, which are in 0 to 299"
    )


def test_damage_is_named_and_the_other_datasets_are_shown(folder: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"torn{suffix}").write_bytes((folder / f"text{suffix}").read_bytes())
    with open(tmp_path / "torn.bin", "r+b") as file:
        file.write(b"\xff\x00")
    torn = str(tmp_path / "torn")
    assert run(folder, torn).stdout.startswith(torn)  # opening cannot see it
    done = run(folder, torn, "text", "--check", "full", code=2)
    assert f"error: {torn}.bin: SHA-256 " in done.stderr
    assert done.stdout.startswith("text\n")
    os.truncate(f"{torn}.bin", 8)
    done = run(folder, torn, "text", "--json", code=2)
    assert "torn.idx, byte " in done.stderr
    assert "the .bin is truncated" in done.stderr
    assert ["error" in found for found in json.loads(done.stdout)] == [True, False]
    done = run(folder, "bare", "--check", "full", "--vocab-size", "299", code=2)
    assert "bare.bin" in done.stderr
    assert "299" in done.stderr


def test_what_does_not_fit_is_an_error(folder: Path, tmp_path: Path) -> None:
    train(tmp_path / "other.model", "some other text about a lazy dog and a few quick foxes")
    name = f"sentencepiece:{tmp_path / 'other.model'}"
    done = run(folder, "text", "--tokenizer", name, "--samples", "1", code=2)
    assert "error: text.json: was tokenized by a sentencepiece model with SHA-256 " in done.stderr
    assert "name the model it was tokenized with" in done.stderr
    done = run(folder, "bare", "--tokenizer", name, "--documents", "2", code=2)
    assert "error: bare: document 2: " in done.stderr
    done = run(folder, "text", "--vocab-size", "9", code=2)
    assert "--vocab-size 9 allows 0 to 8" in done.stderr
    done = run(folder, "text", "--documents", "3:9", code=2)
    assert "--documents 3:9 was asked for; it has 5 documents" in done.stderr
    assert "expected A:B" in run(folder, "text", "--documents", "2-3", code=2).stderr
    assert "no dataset matches" in run(folder, "nothing*", code=2).stderr


def test_a_reader_that_has_seen_enough_is_no_error(folder: Path) -> None:
    command = f"{sys.executable} {TOOL} text --documents 0: | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=folder, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"text\n", b"")


def test_it_starts_without_heavy_libraries(folder: Path) -> None:
    program = (
        f"import runpy, sys; tool = runpy.run_path({str(TOOL)!r}, run_name='tool'); "
        "code = tool['main'](['text', '--samples', '1']); "
        "heavy = {'torch', 'matplotlib', 'sentencepiece', 'pydantic', 'rich'} & set(sys.modules); "
        "sys.exit(code or ', '.join(heavy) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

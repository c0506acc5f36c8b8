"""tools/train_tokenizer.py: nothing is lost, and the same input gives the same model."""

import gzip
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from megatron_mer.data.tokenizers import load_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [
    "The quick brown fox.\nIt jumps over  the lazy dog.\n\n  Indented\tand tabbed \n",
    "第 12 章 高度な管理\nこの章では、前章までに説明した一部の側面を取り上げます。",
    "فصل 12. الإدارة المتقدمة\nيعيد هذا الفصل النظر في بعض القضايا",
    "Übergrößenträger trägt Größe; ça va déjà, œuvre et naïveté.",
    "long " * 3000,
    "長" * 9000,
]
UNSEEN = [
    "emoji 🦊🦊 and \r\n control \x01",
    " leading",
    "한국어 텍스트",
    "</s><unk> <0x41>",
    "\n \n",
]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "train_tokenizer_tool", ROOT / "tools" / "train_tokenizer.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    data = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    (tmp_path / "a.jsonl").write_bytes(b"".join(data[:3]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(data[3:])))
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")]


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "byte-bpe"])
def test_text_comes_back_and_training_is_deterministic(
    tool: ModuleType, inputs: list[str], tmp_path: Path, model_type: str
) -> None:
    common = ["--vocab-size", "350", "--model-type", model_type]
    for stem in ("one", "two"):
        output = str(tmp_path / f"{stem}.model")
        assert tool.main(["--input", *inputs, "--output", output, *common]) == 0
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "two.model").read_bytes()
    kind = "hf" if model_type == "byte-bpe" else "sentencepiece"
    tokenizer = load_tokenizer(f"{kind}:{tmp_path / 'one.model'}")
    assert tokenizer.vocab_size == 350
    for text in TEXTS + UNSEEN:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        # Nothing unknown, no control ids out of text.
        assert ids.size == 0 or ids.min() > (1 if kind == "hf" else 2)
    assert len(tokenizer.encode("\n")) == 1


def test_every_kind_of_input(tool: ModuleType, inputs: list[str], tmp_path: Path) -> None:
    """The same texts in other files give the same model."""
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number}.txt").write_bytes(text.encode())
    common = ["--vocab-size", "400", "--model-type", "byte-bpe"]
    outputs = [tmp_path / "a.json", tmp_path / "b.json"]
    for given, output in zip((inputs, [str(tmp_path / "texts")]), outputs, strict=True):
        assert tool.main(["--input", *given, "--output", str(output), *common]) == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_long_lines_are_cut_and_not_left_out(tool: ModuleType) -> None:
    for line in ("word " * 5000, "x" * 9000, "長" * 9000, " " * 5000, "a", "é" * 2048 + "b"):
        parts = list(tool.cut(line))
        assert "".join(parts) == line
        assert all(0 < len(part.encode()) <= tool.MAX_LINE_BYTES for part in parts)


def test_a_share_is_chosen_by_content(tool: ModuleType) -> None:
    texts = [f"document {i}" for i in range(2000)]
    half = {text for text in texts if tool.is_chosen(text, 0.5)}
    assert 900 < len(half) < 1100
    assert {text for text in texts if tool.is_chosen(text, 0.1)} < half
    assert all(tool.is_chosen(text, 1.0) for text in texts)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--vocab-size", "100000"], "no unigram model of 100000 ids from 6 documents"),
        (["--vocab-size", "350", "--share", "0"], "--share 0.0; allowed"),
        (["--vocab-size", "257", "--model-type", "byte-bpe"], "byte-bpe needs at least 258"),
        (["--vocab-size", "99999", "--model-type", "byte-bpe"], "ids and no more"),
        (["--vocab-size", "350", "--character-coverage", "2"], "--character-coverage 2.0"),
        (["--vocab-size", "350", "--text-key", "body"], "line 1: key 'body' is missing"),
    ],
)
def test_errors(
    tool: ModuleType,
    inputs: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    message: str,
) -> None:
    output = tmp_path / "x.model"
    assert tool.main(["--input", *inputs, "--output", str(output), *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not output.exists()


def test_an_existing_model_is_kept(
    tool: ModuleType, inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.model").write_text("mine")
    arguments = ["--input", *inputs, "--output", str(tmp_path / "x.model"), "--vocab-size", "350"]
    assert tool.main(arguments) == 2
    assert "already exists" in capsys.readouterr().err
    assert (tmp_path / "x.model").read_text() == "mine"
    assert tool.main([*arguments, "--overwrite"]) == 0
    assert "from 6 documents" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.partial"))

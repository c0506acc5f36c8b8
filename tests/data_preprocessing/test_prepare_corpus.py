"""Preparing a corpus: nothing moves, nothing repeats, nothing is half."""

import gzip
import json
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from data_preprocessing import corpus, prepare_corpus
from data_preprocessing.buckets import Buckets
from data_preprocessing.corpus import Settings
from data_preprocessing.keys import is_valid, order_key
from data_preprocessing.normalise import Normaliser
from megatron_mer.errors import DataError

TEXTS = [f"document number {i}" for i in range(300)]
PINNED_VALID = ["1507", "1878", "1965", "2439", "4295", "13931", "19601"]
PINNED_KEY = "12d6746a1657fce8f5485813d9352abc"


def write(path: Path, texts: list[str]) -> Path:
    content = "".join(json.dumps({"text": text, "meta": {"n": 1}}) + "\n" for text in texts)
    path.write_text(content)
    return path


def read(directory: Path, side: str) -> list[str]:
    lines = [
        json.loads(line)
        for path in sorted(directory.glob(f"{side}-*.jsonl.gz"))
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]
    assert all(line["meta"] == {"n": 1} for line in lines)
    return [line["text"] for line in lines]


def prepare(tmp_path: Path, texts: list[str], name: str = "out", **changes: Any) -> Path:
    settings = Settings(**({"valid_share": 0.1} | changes))
    corpus.prepare_corpus([write(tmp_path / f"{name}.jsonl", texts)], tmp_path / name, settings)
    return tmp_path / name


def test_every_document_lands_once_in_a_shuffled_order(tmp_path: Path) -> None:
    out = prepare(tmp_path, TEXTS + TEXTS[:40] + ["", " \n"])
    train, valid = read(out, "train"), read(out, "valid")
    assert sorted(train + valid) == sorted(TEXTS)
    assert 15 <= len(valid) <= 45
    assert train != sorted(train, key=TEXTS.index)
    counts = json.loads((out / "counts.json").read_text())
    assert (counts["documents_read"], counts["empty"], counts["duplicates"]) == (342, 2, 40)
    for side, texts in (("train", train), ("valid", valid)):
        assert counts[side]["documents"] == len(texts)
        assert counts[side]["text_bytes"] == sum(len(text.encode()) for text in texts)


def test_adding_data_moves_no_document(tmp_path: Path) -> None:
    small = prepare(tmp_path, TEXTS[:150], "small")
    large = prepare(tmp_path, TEXTS[::-1], "large")
    for side in ("train", "valid"):
        before, after = read(small, side), read(large, side)
        assert set(before) <= set(after)
        assert [text for text in after if text in set(before)] == before  # nor its order


def test_the_seed_changes_the_order_and_not_the_split(tmp_path: Path) -> None:
    one, two = prepare(tmp_path, TEXTS, "one"), prepare(tmp_path, TEXTS, "two", seed=-2)
    for side in ("train", "valid"):
        first, second = read(one, side), read(two, side)
        assert first != second
        assert sorted(first) == sorted(second)


def test_split_share_and_growth() -> None:
    texts = [str(i) for i in range(20_000)]
    small, large = ({t for t in texts if is_valid(t, share)} for share in (0.05, 0.06))
    assert 880 < len(small) < 1120  # 4 standard deviations
    assert small < large
    assert not any(is_valid(text, 0.0) for text in texts)
    # Pinned: a split that changed between versions would leak held-out text into training.
    assert [t for t in texts if is_valid(t, 0.0005)] == PINNED_VALID
    assert order_key("text", 1).hex() == PINNED_KEY


def test_any_number_of_buckets_gives_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = prepare(tmp_path, TEXTS, "one")
    monkeypatch.setattr(corpus, "BUCKET_BYTES", 500)
    many = prepare(tmp_path, TEXTS, "many")
    for path in one.glob("*.jsonl.gz"):
        assert path.read_bytes() == (many / path.name).read_bytes()
    assert len(list(many.iterdir())) == 3  # two shards and the counts: no buckets are left


def test_buckets_sort_and_keep_the_first_of_equal_keys_first(tmp_path: Path) -> None:
    keys = [order_key(str(i % 50), 1) for i in range(100)]
    with Buckets(tmp_path, 7) as buckets:
        for number, key in enumerate(keys):
            buckets.add(key, number % 2 == 0, str(number).encode())
        found = list(buckets.in_order())
    expected = sorted((key, number) for number, key in enumerate(keys))
    assert found == [(key, n % 2 == 0, str(n).encode()) for key, n in expected]


def test_shards_are_bounded_and_described(tmp_path: Path) -> None:
    out = prepare(tmp_path, TEXTS, shard_bytes=1000)
    counts = json.loads((out / "counts.json").read_text())
    shards = counts["train"]["shards"]
    assert [shard["file"] for shard in shards] == [f"train-{i:05d}.jsonl.gz" for i in range(5)]
    assert all(1000 <= shard["text_bytes"] < 1030 for shard in shards[:-1])
    assert sum(shard["documents"] for shard in shards) == counts["train"]["documents"]
    assert sorted(read(out, "train") + read(out, "valid")) == sorted(TEXTS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc\u2028d\u0085e", "a\nb\nc\nd\ne"),
        ("\ufeffa\x00\x1b[b\x7f\tc\n", "a[b\tc\n"),
        ("e\u0301", "é"),
        ("ﬁ ①", "ﬁ ①"),
        ("می\u200cخواهم \u200f(a)", "می\u200cخواهم \u200f(a)"),
    ],
)
def test_normalising(text: str, expected: str) -> None:
    assert Normaliser()(text) == expected
    assert Normaliser()(expected) == expected
    assert Normaliser(False, False, "none")(text) == text


def test_other_unicode_forms() -> None:
    assert Normaliser(unicode_form="NFKC")("ﬁ①") == "fi1"
    decomposed = unicodedata.normalize("NFD", "é")
    assert Normaliser(unicode_form="none")(decomposed) == decomposed


def test_texts_that_normalise_to_the_same_are_duplicates(tmp_path: Path) -> None:
    out = prepare(tmp_path, ["café", "cafe\u0301", *TEXTS])
    assert (read(out, "train") + read(out, "valid")).count("café") == 1


def test_half_a_surrogate_in_another_key_survives(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", TEXTS)
    path.write_text(path.read_text().replace('"n": 1', '"n": "\\ud800"'))
    corpus.prepare_corpus([path], tmp_path / "out", Settings())
    line = gzip.decompress((tmp_path / "out" / "train-00000.jsonl.gz").read_bytes()).split(b"\n")[0]
    assert json.loads(line)["meta"] == {"n": "\ud800"}


def test_a_failed_run_leaves_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", TEXTS)
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(DataError, match=r"in\.jsonl, line 301: not JSON"):
        corpus.prepare_corpus([path], tmp_path / "out", Settings())
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("texts", "changes", "message"),
    [
        (["a"], {"valid_share": 1e-9}, "the valid side got none of 1 documents"),
        ([""], {"valid_share": 0}, "the train side got none of 0 documents"),
        (TEXTS, {"valid_share": 1.0}, "valid share 1.0; allowed"),
        (TEXTS, {"shard_bytes": 0}, "shard size 0"),
        (TEXTS, {"seed": 2**63}, "seed 9223372036854775808"),
        (TEXTS, {"text_key": "body"}, "key 'body' is missing"),
    ],
)
def test_errors(tmp_path: Path, texts: list[str], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, texts, **changes)
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", TEXTS)
    command = [sys.executable, prepare_corpus.__file__, "--input", "in.jsonl", "--output", "out"]

    def run(*extra: str) -> subprocess.CompletedProcess[str]:
        arguments = [*command, *extra]
        return subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = run("--valid-share", "0.1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("read 300 documents; left out 0 empty ones and 0 duplicates\n")
    done = run()
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "already exists" in done.stderr
    assert run("--overwrite").returncode == 0
    (tmp_path / "out" / "counts.json").unlink()
    assert "holds no counts.json" in run("--overwrite").stderr

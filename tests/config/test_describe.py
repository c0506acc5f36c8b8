"""The help, the reference file and the schema say the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_mer.config import describe, load_config, to_yaml
from megatron_mer.config.describe import keys
from megatron_mer.config.yaml12 import read_yaml

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "examples/reference.yaml"


def written_keys(data: Any, path: str = "") -> set[str]:
    """Paths of all keys; every place in a list counts as N."""
    found: set[str] = set()
    if isinstance(data, dict):
        for key, value in data.items():
            found |= {path + key} | written_keys(value, f"{path}{key}.")
    elif isinstance(data, list):
        for item in data:
            found |= written_keys(item, f"{path}N.")
    return found


def test_the_reference_has_exactly_the_keys_of_the_schema() -> None:
    written = written_keys(read_yaml(REFERENCE.read_text(), "reference").data)
    # Names of held-out sets and of tasks are the user's.
    by_user = ("stream.N.valid.", "replay.weights.", "replay.capacity_samples.")
    written = {key for key in written if not key.startswith(by_user)}
    assert written == set(keys())


def test_the_reference_says_every_default_that_the_schema_has() -> None:
    lines = REFERENCE.read_text().splitlines()
    section, compared = "", 0
    for line in lines:
        if match := re.match(r"(\w+):", line):
            section = match[1]
        if match := re.match(r"  (\w+):.*#.*; default ([^:;]+)", line):
            told = match[2].split(": ")[0].strip()
            shown = re.search(rf"--{section}\.{match[1]}: .*\(default: (.*)\)", describe())
            assert shown is not None, line
            if told != "not" and told[0].isdigit():
                assert float(told) == float(shown[1]), line
            else:
                assert told == shown[1], line
            compared += 1
    assert compared > 20


def test_the_reference_loads_and_spells_out_what_a_size_means() -> None:
    config = load_config(REFERENCE)
    assert load_config(REFERENCE, ["--model.size", "null"]).model.hidden_size == 128
    by_size = load_config(REFERENCE, ["--model", "{size: llama-1m, seq_length: 256}"]).model
    assert "vocab_size: 4096" in to_yaml(config)
    for key in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_hidden_size"):
        assert getattr(by_size, key) == getattr(config.model, key)
    assert by_size.tie_embeddings == config.model.tie_embeddings


def test_every_key_is_described_with_its_meaning() -> None:
    lines = describe().splitlines()
    described = {}
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("--"):
            described[line[2:].partition(": ")[0]] = below.strip()
    assert list(described) == list(keys())
    assert all(len(meaning) > 5 and not meaning.startswith("--") for meaning in described.values())


def test_ranges_and_defaults_are_told() -> None:
    text = describe()
    assert "--reptile.epsilon: a number >= 0 and <= 1 (required)" in text
    assert "--parallel.tp_size: a whole number >= 1 (default: 1)" in text
    assert "--schedule.kind: cosine | wsd | infinite | constant (default: cosine)" in text
    assert "--schedule.then: a list (default: [])" in text
    assert "--schedule.then.N.lr: a number > 0 (required)" in text
    assert "--replay.weights: a section {name: a number >= 0} or null\n" in text
    assert (
        "--stream.N.valid: a prefix, or a section of prefixes by name {name: P} or null\n" in text
    )
    assert (
        "--optimizer.betas: a list of 2, each a number >= 0 and < 1 (default: [0.9, 0.95])" in text
    )

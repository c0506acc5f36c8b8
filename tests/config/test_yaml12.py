"""Values of YAML 1.2's core schema."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from megatron_mer.config.yaml12 import read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", Decimal("0.001")),
        ("1.", Decimal(1)),
        (".5", Decimal("0.5")),
        ("0.29", Decimal("0.29")),
        ("-7", -7),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("!!bool 'true'", True),
        ("!!str 1", "1"),
        ("~", None),
        ("null", None),
        ("'null'", "null"),
        ("[a, {b: 1}]", ["a", {"b": 1}]),
        ("{a: &x 1, b: *x}", {"a": 1, "b": 1}),
    ],
)
def test_values(text: str, value: Any) -> None:
    document = read_yaml(text, "f")
    assert document.data == value
    assert type(document.data) is type(value)
    assert document.problems == []


def test_repeated_keys_name_both_lines() -> None:
    document = read_yaml("a:\n  b: 1\n  c: 2\n  b: 3\n", "f.yaml")
    (problem,) = document.problems
    assert (problem.path, problem.where) == ("a.b", "f.yaml:4")
    assert "lines 2 and 4" in problem.given


def test_places_fall_back_to_the_section_around() -> None:
    document = read_yaml("x: 1\na:\n  b: [1,\n    2]\n", "f")
    assert document.find("a.b.1") == "f:4"
    assert document.find("a.b.7.z") == "f:3"
    assert document.find("a.q") == "f:2"
    assert document.find("q.r") == "f"


def test_deep_nesting_is_a_named_error() -> None:
    from megatron_mer.errors import ConfigError

    with pytest.raises(ConfigError, match="no valid YAML"):
        read_yaml("[" * 5000 + "]" * 5000, "f")


def test_what_is_written_reads_back_under_yaml_1_1_too() -> None:
    import yaml

    data = {"a": "no", "b": "1e-3", "c": [1, 2.5e-9, True, None], "d": "é: #"}
    assert yaml.safe_load(write_yaml(data)) == data

"""YAML 1.2 (core schema), strictly: what a file's author wrote is what arrives.

PyYAML reads YAML 1.1, where `1e-3` is text, `no` is false and a repeated key silently wins. Here
`1e-3` is a number, `no` is Norwegian and a repeated key is a problem. Numbers that are not whole
arrive as exact decimals.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

import yaml

from megatron_mer.errors import ConfigError, Problem

_TAG: Final = "tag:yaml.org,2002:"
_SCALARS: Final = (
    ("null", re.compile(r"(?:~|null|Null|NULL|)$")),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")),
    ("int", re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")),
    ("float", re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$")),
    ("float", re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$")),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with the types of YAML 1.2."""


_Loader.yaml_implicit_resolvers = {}
for _name, _pattern in _SCALARS:
    # The third argument would be a table of first characters; None tries the pattern on all.
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, None)


@dataclass
class Document:
    """A parsed file, or several merged into one."""

    data: Any
    where: dict[str, str] = field(default_factory=dict)
    """Path of a value ("stream.0.steps") -> where it was written ("run.yaml:12")."""
    problems: list[Problem] = field(default_factory=list)

    def find(self, path: str) -> str:
        """Says where a path, or else the nearest section around it, was written."""
        while path not in self.where:
            if not path:
                return ""
            path = path.rpartition(".")[0]
        return self.where[path]

    def forget(self, path: str) -> None:
        """Drops the places of a path and of all that lies below it."""
        below = [key for key in self.where if key == path or key.startswith(path + ".")]
        for key in below:
            del self.where[key]


def read_yaml(text: str, source: str) -> Document:
    """Parses one document.

    Args:
        text: the YAML.
        source: name of the file, for messages.

    Returns:
        Mappings, lists, texts, booleans, ints, Decimals and None; repeated keys and unusable
        values are among its problems.

    Raises:
        ConfigError: if the text is no YAML; names the line and the column.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        document = Document(None)
        if node is not None:
            document.data = _Builder(document, source).build(node, "", ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        detail = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError([Problem(source + place, f"is no valid YAML: {detail}")]) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError([Problem(source, f"is no valid YAML: {error}")]) from error
    document.where[""] = source
    return document


class _Builder:
    """Makes values of YAML nodes, keeping the line of each."""

    def __init__(self, document: Document, source: str) -> None:
        self.document = document
        self.source = source

    def build(self, node: yaml.Node, path: str, around: tuple[yaml.Node, ...]) -> Any:
        """Builds the value at `path`; `around` are the nodes it lies in."""
        self.document.where[path] = self._place(node)
        if any(node is outer for outer in around):
            self._problem(path, "an alias that contains itself", "values that end somewhere", node)
            return None
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path, (*around, node))
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            inside = (*around, node)
            return [
                self.build(item, _join(path, index), inside)
                for index, item in enumerate(node.value)
            ]
        return self._scalar(node, path)

    def _mapping(
        self, node: yaml.MappingNode, path: str, around: tuple[yaml.Node, ...]
    ) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
                shown = key if isinstance(key, str) else "a list or section"
                self._problem(
                    path or "top level", f"the key {shown}", "text; write it in quotes", key_node
                )
                continue
            line = key_node.start_mark.line + 1
            if key in values:
                given = f"given twice, in lines {lines[key]} and {line}"
                self._problem(_join(path, key), given, "each key once", key_node)
                continue
            lines[key] = line
            values[key] = self.build(value_node, _join(path, key), around)
            self.document.where[_join(path, key)] = self._place(key_node)
        return values

    def _scalar(self, node: yaml.Node, path: str) -> Any:
        text = node.value
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.ScalarNode) and kind in _MAKERS:
            try:
                return _MAKERS[kind](text)
            except (ValueError, LookupError, ArithmeticError):
                self._problem(path, f"given {text[:40]!r}, marked as {kind}", "", node)
                return text
        allowed = "plain YAML: text, numbers, true, false, null, lists and sections"
        self._problem(path, f"given a value marked {node.tag}", allowed, node)
        return None

    def _problem(self, path: str, given: str, allowed: str, node: yaml.Node) -> None:
        problem = Problem(path, given, allowed, where=self._place(node))
        self.document.problems.append(problem)

    def _place(self, node: yaml.Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}"


def _join(path: str, key: str | int) -> str:
    return f"{path}.{key}" if path else str(key)


def _make_null(text: str) -> None:
    if not _SCALARS[0][1].match(text):
        raise ValueError(text)


def _make_bool(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _make_int(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text, base)


def _make_float(text: str) -> Decimal:
    number = Decimal(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))
    # Exact arithmetic on an exponent of millions would not end; a float has none above 308.
    if number.is_finite() and abs(number.adjusted()) > _LARGEST_EXPONENT:
        return Decimal("nan")
    return number


_LARGEST_EXPONENT: Final = 400

_MAKERS: Final[Mapping[str, Any]] = {
    "null": _make_null,
    "bool": _make_bool,
    "int": _make_int,
    "float": _make_float,
    "str": str,
}


class _Dumper(yaml.SafeDumper):
    """Writes what both YAML 1.1 and 1.2 read back as the same value."""

    def ignore_aliases(self, data: Any) -> bool:
        """Writes equal values out each time."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = any(pattern.match(text) for _, pattern in _SCALARS)
    return dumper.represent_scalar(_TAG + "str", text, style="'" if plain else None)


def _represent_decimal(dumper: yaml.SafeDumper, value: Decimal) -> yaml.ScalarNode:
    return dumper.represent_scalar(_TAG + "float", f"{value:f}")


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(Decimal, _represent_decimal)


def write_yaml(data: Mapping[str, Any]) -> str:
    """Writes a mapping; `read_yaml` gives it back equal."""
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return str(text)

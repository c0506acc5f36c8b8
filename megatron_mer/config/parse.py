"""From a tree of plain values to the sections of the schema, with every problem on the way."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from decimal import Decimal
from functools import cache
from typing import Any, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from megatron_mer.config.describe import (
    allowed_text,
    is_list,
    section_of,
    type_hints,
    without_none,
)
from megatron_mer.config.model_schema import ModelConfig
from megatron_mer.config.schema import RunConfig
from megatron_mer.config.sizes import DIMENSIONS, SIZES, fill_size
from megatron_mer.errors import Problem


class NotParsedError(Exception):
    """A check asked for a value that is missing or was refused."""


class Partial:
    """Stands for a section some of whose values are missing or were refused.

    It has the others as attributes, so that checks between values still run on those.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise NotParsedError(name) from None


_REFUSED = Partial({})


def as_far_as_parsed(problems: Iterable[Problem]) -> Iterator[Problem]:
    """Gives what a check finds until it asks for a value that is missing or was refused."""
    try:
        yield from problems
    except NotParsedError:
        return


def parse_run(data: Any) -> tuple[RunConfig | Partial, list[Problem]]:
    """Parses a whole configuration.

    Args:
        data: the tree as `read_yaml` gives it.

    Returns:
        The configuration, or what could be parsed of it, and every problem of a single value. Only
        without problems is it complete: a list may hold a `Partial`.
    """
    parser = _Parser()
    run: RunConfig | Partial = parser.section(RunConfig, write_out(data), "")
    return run, parser.problems


def parse_model(data: Mapping[str, Any]) -> tuple[ModelConfig | Partial, list[Problem]]:
    """Parses a `model:` section alone, as `parse_run` does a whole configuration."""
    parser = _Parser()
    model: ModelConfig | Partial = parser.section(ModelConfig, data, "model")
    return model, parser.problems


def suggest(given: str, allowed: Iterable[str]) -> str:
    """Says which allowed word was probably meant; empty if none is near."""
    near = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else ""


def write_out(data: Any) -> Any:
    """Writes shorthands out: a bare prefix in `train` is a dataset, alone or in a list."""
    if not isinstance(data, Mapping) or not isinstance(data.get("stream"), list):
        return data
    return {**data, "stream": [_write_out_entry(entry) for entry in data["stream"]]}


def _write_out_entry(entry: Any) -> Any:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("train"), list | str):
        return entry
    train = [entry["train"]] if isinstance(entry["train"], str) else entry["train"]
    written = [{"prefix": item} if isinstance(item, str) else item for item in train]
    return {**entry, "train": written}


class _Parser:
    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def section(self, section: type, data: Any, path: str) -> Any:
        """Parses a section; a `Partial` if anything of it was refused."""
        if not isinstance(data, Mapping):
            keys = ", ".join(field.name for field in fields(section))
            allowed = f"a section with the keys {keys}"
            self._refuse(path or "top level", f"given {show(data)}", allowed)
            return _REFUSED
        unsized = False
        if section is ModelConfig:
            unsized = self._bad_size(data, path)
            data = data if unsized else fill_size(data)
        self._unknown(section, data, path)
        values: dict[str, Any] = {}
        complete = True
        for field in fields(section):
            here = f"{path}.{field.name}" if path else field.name
            hint = type_hints(section)[field.name]
            if field.name in data:
                value = self._value(hint, data[field.name], here, field.default == ())
                bad = value is _REFUSED
                complete = complete and not (bad or isinstance(value, Partial))
                if not bad:
                    values[field.name] = value
            elif field.default is not MISSING:
                values[field.name] = field.default
            elif field.default_factory is not MISSING:
                values[field.name] = field.default_factory()
            else:
                complete = False
                if not (unsized and field.name in DIMENSIONS):
                    self._missing(hint, here, section, field.name)
        return section(**values) if complete else Partial(values)

    def _value(self, hint: Any, data: Any, path: str, may_be_empty: bool) -> Any:
        inner, optional = without_none(hint)
        section = section_of(hint)
        if section is None:
            named = get_origin(inner) is dict and isinstance(data, Mapping)
            return self._named(inner, data, path) if named else self._leaf(hint, data, path)
        if data is None and optional:
            return None
        if not is_list(inner):
            return self.section(section, data, path)
        if not isinstance(data, list):
            return self._refuse(path, f"given {show(data)}", "a list of sections")
        if not data and not may_be_empty:
            return self._refuse(path, "given an empty list", "at least one item")
        return tuple(
            self.section(section, item, f"{path}.{index}") for index, item in enumerate(data)
        )

    def _named(self, hint: Any, data: Mapping[str, Any], path: str) -> Any:
        """Parses values by names of the user's choice, so that a refused one has its own path."""
        _, value = get_args(hint)
        values = {name: self._leaf(value, item, f"{path}.{name}") for name, item in data.items()}
        return _REFUSED if any(item is _REFUSED for item in values.values()) else values

    def _leaf(self, hint: Any, data: Any, path: str) -> Any:
        try:
            return _adapter(hint).validate_python(data)
        except ValidationError:
            remedy = ""
            if isinstance(data, str) and _is_number(data):
                remedy = "write the number without quotes and underscores"
            elif isinstance(data, int | float | Decimal) and "text" in allowed_text(hint):
                remedy = "write it in quotes"
            return self._refuse(path, f"given {show(data)}", allowed_text(hint), remedy)

    def _unknown(self, section: type, data: Mapping[str, Any], path: str) -> None:
        known = [field.name for field in fields(section)]
        for key in data:
            if key not in known:
                here = f"{path}.{key}" if path else key
                self._refuse(here, "no such key", ", ".join(known), suggest(key, known))

    def _missing(self, hint: Any, path: str, section: type, name: str) -> None:
        remedy = "add it"
        if section is ModelConfig and name in DIMENSIONS:
            remedy = "add it, or choose a model.size"
        self._refuse(path, "missing", allowed_text(hint), remedy)

    def _bad_size(self, model: Mapping[str, Any], path: str) -> bool:
        """Refuses an unknown size, once, instead of every dimension it leaves open."""
        size = model.get("size")
        if size is None or (isinstance(size, str) and size in SIZES):
            return False
        if isinstance(size, str) and size:
            near = suggest(size, SIZES)
            self._refuse(f"{path}.size", f"given {show(size)}", ", ".join(SIZES), near)
        return True

    def _refuse(self, path: str, given: str, allowed: str, remedy: str = "") -> Partial:
        self.problems.append(Problem(path, given, allowed, remedy))
        return _REFUSED


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def show(value: Any) -> str:
    """Shows a value of a configuration file as its author would write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        shown = "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    elif isinstance(value, list | tuple):
        shown = "[" + ", ".join(show(item) for item in value) + "]"
    else:
        shown = repr(value) if isinstance(value, str) else str(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."

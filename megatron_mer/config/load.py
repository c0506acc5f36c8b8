"""A run's configuration from a YAML file and the command line."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

from megatron_mer.config.checks import check_run
from megatron_mer.config.from_hf import KEY, fill_from_hf
from megatron_mer.config.model_schema import ModelConfig
from megatron_mer.config.parse import parse_run, show, write_out
from megatron_mer.config.schema import RunConfig
from megatron_mer.config.sizes import SIZES
from megatron_mer.config.yaml12 import Document, read_yaml, write_yaml
from megatron_mer.errors import ConfigError, Problem

_COMMAND_LINE: Final = "command line"


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Loads, patches and checks a configuration.

    A file may begin with `extends: OTHER.yaml`, a path relative to itself: sections are merged key
    by key, lists and plain values replace the other file's. All other relative paths in a
    configuration (datasets, tokenizer, output_dir) start at the working directory.

    Args:
        path: the YAML file.
        overrides: command line, `--section.key value` or `--section.key=value`, with values in
            YAML and list items by their place (`--stream.0.steps 50`); `--reptile null` takes an
            optional section away.

    Raises:
        ConfigError: with every problem that was found, each with the place it was written at.
    """
    document = _read_file(Path(path), ())
    _apply_overrides(document, overrides)
    filled, foreign = fill_from_hf(document.data)
    run, problems = parse_run(filled)
    if any(problem.path == KEY for problem in foreign):  # Then the dimensions are not there.
        problems = [one for one in problems if one.given != "missing"]
    problems = [*document.problems, *foreign, *problems, *check_run(run)]
    if problems:
        raise ConfigError(list(_with_places(problems, document)))
    return cast(RunConfig, run)


def resolve_vocab(config: RunConfig, tokenizer_vocab_size: int) -> RunConfig:
    """Gives the model the tokenizer's vocabulary size, unless it has a larger one of its own.

    Raises:
        ConfigError: if the model's vocabulary is smaller than the tokenizer's.
    """
    vocab_size = config.model.vocab_size
    if vocab_size is None:
        return replace(config, model=replace(config.model, vocab_size=tokenizer_vocab_size))
    if vocab_size < tokenizer_vocab_size:
        given = f"{vocab_size} is less than the tokenizer's {tokenizer_vocab_size}"
        remedy = "leave it out for the tokenizer's size"
        problem = Problem("model.vocab_size", given, f">= {tokenizer_vocab_size}", remedy)
        raise ConfigError([problem])
    return config


def to_yaml(config: RunConfig) -> str:
    """Writes a configuration with every value spelled out; loading it gives an equal one."""
    return write_yaml(cast(dict[str, Any], _plain(config)))


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        # Null is spelled out where leaving the key out would mean what the size says.
        by_size = SIZES.get(value.size or "", {}) if isinstance(value, ModelConfig) else {}
        pairs = ((field.name, getattr(value, field.name)) for field in fields(value))
        return {n: _plain(item) for n, item in pairs if item is not None or n in by_size}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _with_places(problems: Iterable[Problem], document: Document) -> Iterator[Problem]:
    for problem in dict.fromkeys(problems):
        yield problem if problem.where else replace(problem, where=document.find(problem.path))


def _read_file(path: Path, children: tuple[Path, ...]) -> Document:
    """Reads a file and what it extends; `children` are the files that extend it."""
    document = read_yaml(_read_text(path), str(path))
    if document.data is None:
        raise ConfigError([Problem(str(path), "is empty", "a configuration")])
    if not isinstance(document.data, dict):
        given = f"holds {show(document.data)}"
        raise ConfigError([Problem(str(path), given, "a configuration of the form key: value")])
    if "extends" not in document.data:
        return document
    extends = document.data.pop("extends")
    where = document.where.pop("extends")
    if not isinstance(extends, str) or not extends:
        given = f"given {show(extends)}"
        raise ConfigError([Problem("extends", given, "the path of one YAML file", where=where)])
    base = path.parent / extends
    chain = (*children, path)
    if any(base.resolve() == file.resolve() for file in chain):
        given = "goes in a circle: " + " -> ".join(str(file) for file in (*chain, base))
        raise ConfigError([Problem("extends", given, "a file that does not", where=where)])
    if not base.is_file():
        given = f"given {extends!r}, but there is no file {base}"
        allowed = "a path relative to the file that names it"
        raise ConfigError([Problem("extends", given, allowed, where=where)])
    return _merge_documents(_read_file(base, chain), document)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        problem = Problem(str(path), f"cannot be read: {reason}", "a YAML file")
        raise ConfigError([problem]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([Problem(str(path), f"is no UTF-8 text: {error}")]) from error


def _merge_documents(base: Document, child: Document) -> Document:
    base.data = _merge(base, base.data, child.data, "")
    base.where.update(child.where)
    base.problems += child.problems
    return base


def _merge(document: Document, base: Any, child: Any, path: str) -> Any:
    """Puts one value over another; forgets where replaced values were written."""
    if not isinstance(base, Mapping) or not isinstance(child, Mapping):
        document.forget(path)
        return child
    merged = dict(base)
    for key, value in child.items():
        here = f"{path}.{key}" if path else key
        merged[key] = _merge(document, base[key], value, here) if key in base else value
    return merged


def _apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    document.data = write_out(document.data)
    waiting = list(overrides)
    while waiting:
        option = waiting.pop(0)
        name, equals, text = option.partition("=")
        if not name.startswith("--") or len(name) == 2:
            allowed = "--section.key value or --section.key=value"
            problem = Problem(option, "no option", allowed, where=_COMMAND_LINE)
            document.problems.append(problem)
            continue
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                problem = Problem(name, "given no value", f"{name} VALUE", where=_COMMAND_LINE)
                document.problems.append(problem)
                continue
            text = waiting.pop(0)
        _apply_override(document, name, text)


def _apply_override(document: Document, option: str, text: str) -> None:
    path = option[2:]
    if not text.strip():
        allowed = f"{option} VALUE, or {option} null to leave it out"
        document.problems.append(
            Problem(path, "given an empty value", allowed, where=_COMMAND_LINE)
        )
        return
    try:
        value = read_yaml(text, option)
    except ConfigError as error:
        document.problems += error.problems
        return
    problem = _put(document.data, path.split("."), value.data, option)
    if problem is not None:
        document.problems.append(replace(problem, where=_COMMAND_LINE))
        return
    document.forget(path)
    document.where[path] = option
    document.problems += [replace(problem, path=path, where=option) for problem in value.problems]


def _put(data: Any, keys: Sequence[str], value: Any, option: str) -> Problem | None:
    """Sets the value at a path, making the sections on the way; returns what stands against it."""
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        around = ".".join(keys[:depth])
        place: str | int = key
        if isinstance(data, list):
            if not key.isdecimal() or int(key) >= len(data):
                allowed = f"{around}.0 to {around}.{len(data) - 1}" if data else "an item"
                return Problem(option, f"{around} has {len(data)} items", allowed)
            place = int(key)
        elif not isinstance(data, dict):
            given = f"{around} holds {show(data)}, which has no {key}"
            return Problem(option, given, "a key of a section")
        if last:
            data[place] = value
        elif isinstance(data, dict):
            # An optional section that is absent, or null, comes into being.
            data[place] = {} if data.get(key) is None else data[place]
        data = data[place]
    return None

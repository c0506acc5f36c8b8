"""The configuration in words: what a key may hold, and the text of `--help`."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from decimal import Decimal
from functools import cache
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen

from megatron_mer.config import field_types, model_schema, preflight_schema, schema

_NOUNS: Final = {
    int: "a whole number",
    float: "a number",
    Decimal: "a decimal fraction",
    str: "text",
    bool: "true or false",
    type(None): "null",
}


@cache
def type_hints(section: type) -> dict[str, Any]:
    """Gives the types of a section's keys, with their ranges."""
    return get_type_hints(section, include_extras=True)


def without_none(hint: Any) -> tuple[Any, bool]:
    """Splits `X | None` into X and True, any other type into itself and False."""
    if get_origin(hint) in (Union, types.UnionType):
        arms = [arm for arm in get_args(hint) if arm is not type(None)]
        if len(arms) < len(get_args(hint)):
            return (arms[0] if len(arms) == 1 else Union[tuple(arms)]), True  # noqa: UP007
    return hint, False


def section_of(hint: Any) -> type | None:
    """Gives the section that a key holds, or that its list's items hold; None for plain values."""
    inner, _ = without_none(hint)
    if get_origin(inner) is tuple and get_args(inner)[-1] is Ellipsis:
        inner = get_args(inner)[0]
    return inner if isinstance(inner, type) and is_dataclass(inner) else None


def is_list(hint: Any) -> bool:
    """Says whether a key holds a list of any length."""
    return get_origin(hint) is tuple and get_args(hint)[-1] is Ellipsis


def allowed_text(hint: Any) -> str:
    """Says what a key of this type may hold, for instance "a whole number >= 1"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        notes = [note.text for note in arguments[1:] if isinstance(note, field_types.Note)]
        if notes and arguments[0] is not Decimal:
            return notes[0]
        limits = " and ".join(_limits(arguments[1:]))
        return " ".join(part for part in (allowed_text(arguments[0]), limits, *notes) if part)
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(allowed_text(arm) for arm in arguments)
    if is_list(hint):
        return "a list"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {allowed_text(arguments[0])}"
    if origin is dict:
        return f"a section {{name: {allowed_text(arguments[1])}}}"
    return "a section" if is_dataclass(hint) else _NOUNS[hint]


def _limits(metadata: tuple[Any, ...]) -> Iterator[str]:
    for entry in metadata:
        if isinstance(entry, Ge):
            yield f">= {entry.ge}"
        elif isinstance(entry, Gt):
            yield f"> {entry.gt}"
        elif isinstance(entry, Lt):
            yield f"< {entry.lt}"
        elif isinstance(entry, Le) and entry.le != field_types.LARGEST:
            yield f"<= {entry.le}"
        elif isinstance(entry, MinLen):
            yield "of at least one character"


def describe() -> str:
    """Describes every key: its path, what it may hold, its default and its meaning.

    Paths are written as on the command line; N stands for a place in a list, counted from 0.
    """
    return "\n".join(_describe_section(schema.RunConfig, ""))


def keys(section: type = schema.RunConfig, path: str = "") -> Iterator[str]:
    """Gives the path of every key, sections before what they hold; N stands for a list's places."""
    for field in fields(section):
        yield path + field.name
        hint = type_hints(section)[field.name]
        inner = section_of(hint)
        if inner is not None:
            step = ".N." if is_list(hint) else "."
            yield from keys(inner, path + field.name + step)


def _describe_section(section: type, path: str) -> Iterator[str]:
    for field in fields(section):
        hint = type_hints(section)[field.name]
        inner = section_of(hint)
        texts = [_meanings().get((section.__name__, field.name), "")]
        if inner is not None:
            texts.insert(0, (inner.__doc__ or "").strip())
        yield f"--{path}{field.name}: {allowed_text(hint)}{_default(section, field)}"
        meaning = " ".join(" ".join(texts).split())
        yield from textwrap.wrap(
            meaning, 96, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
        )
        if inner is not None:
            step = ".N." if is_list(hint) else "."
            yield from _describe_section(inner, path + field.name + step)


def _default(section: type, field: Field[Any]) -> str:
    if section is model_schema.ModelConfig and field.name.startswith(("hidden", "num_", "ffn")):
        return " (default: by model.size)"
    if field.default is None or field.default == "":
        return ""
    if field.default is not MISSING:
        shown = str(field.default).lower() if isinstance(field.default, bool) else field.default
        return f" (default: {list(shown) if isinstance(shown, tuple) else shown})"
    return "" if field.default_factory is not MISSING else " (required)"


@cache
def _meanings() -> dict[tuple[str, str], str]:
    """Reads the texts below the fields, which Python itself does not keep."""
    found = {}
    modules = (model_schema, preflight_schema, schema)
    sources = (inspect.getsource(module) for module in modules)
    for node in itertools.chain.from_iterable(ast.parse(source).body for source in sources):
        if not isinstance(node, ast.ClassDef):
            continue
        for field, text in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                found[node.name, field.target.id] = str(text.value.value)
    return found

"""Naming many datasets at once: prefixes, patterns and lists of them."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from megatron_mer.errors import DataError

SUFFIXES = (".idx", ".bin")


def expand_prefixes(names: Sequence[str]) -> list[str]:
    """Return the prefixes that were named, in order.

    Args:
        names: each a prefix, the path of one of its two files, or a pattern with `*`, `?` or `[]`,
            which stands for the datasets whose `.idx` it matches, in alphabetical order.

    Raises:
        DataError: a pattern matches nothing.
    """
    return [prefix for name in names for prefix in _expand(name)]


def read_prefix_list(path: str | Path) -> list[str]:
    """Return the names in a text file: one a line; empty lines and lines with `#` do not count.

    Raises:
        DataError: the file cannot be read, or names nothing.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    names = [line.strip() for line in lines]
    names = [name for name in names if name and not name.startswith("#")]
    if not names:
        raise DataError(f"{path}: names no dataset; expected one prefix a line")
    return names


def _expand(name: str) -> list[str]:
    # A file of exactly that name comes first: prefixes may hold brackets or end with a suffix.
    if Path(f"{name}.idx").exists() or not (stem := _without_suffix(name)):
        return [name]
    if Path(f"{stem}.idx").exists() or not glob.has_magic(stem):
        return [stem]
    found = sorted(path.removesuffix(".idx") for path in glob.glob(f"{stem}.idx", recursive=True))
    if not found:
        raise DataError(f"{name}: no dataset matches this pattern ({stem}.idx)")
    return found


def _without_suffix(name: str) -> str:
    return next((name.removesuffix(end) for end in SUFFIXES if name.endswith(end)), name)

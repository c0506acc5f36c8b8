"""Documents out of Parquet files: a row each, a row group at a time."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator
from typing import Any

from megatron_mer.data.corpus.faults import DAMAGED, NOT_TEXT, Fault, FaultError
from megatron_mer.data.corpus.inputs import is_remote, remote
from megatron_mer.data.corpus.parsing import Batch, ReadSettings, decode, language_of
from megatron_mer.data.corpus.reading import Mark, Reading
from megatron_mer.errors import DataError

BATCH_BYTES, BATCH_ROWS = 1 << 22, 4096
"""Of text, and rows, that are decoded together."""
BUFFER = 1 << 20


def read_parquet(
    path: str, settings: ReadSettings, begin: Mark, digest: hashlib._Hash
) -> Iterator[Reading]:
    """Yield the rows of a Parquet file as documents.

    Args:
        path: local or remote.
        settings: the keys are names of columns.
        begin: its offset is the first row group.
        digest: gets the footer, which describes every column of every row group.

    Raises:
        DataError: pyarrow is missing, or a column.
    """
    arrow = _import_arrow(path)
    with contextlib.ExitStack() as stack:
        try:
            source = _open(path, stack)
            digest.update(_footer(source))
            file = stack.enter_context(
                arrow.parquet.ParquetFile(source, buffer_size=BUFFER, pre_buffer=False)
            )
        except (arrow.ArrowException, OSError) as error:
            fault = Fault(1, DAMAGED, f"not a whole Parquet file: {_first_line(error)}")
            yield Reading(Batch(faults=[fault]), begin, 0)
            return
        columns = _columns(path, file, settings, arrow)
        rows = begin.lines
        for group in range(begin.offset, file.num_row_groups):
            for batch, end in _read_group(file, group, columns, settings, rows, arrow):
                whole = end == rows + file.metadata.row_group(group).num_rows
                mark = Mark(group + 1 if whole else group, end)
                yield Reading(batch, mark, _position(file, group), may_end=whole)
            rows += file.metadata.row_group(group).num_rows


def _read_group(
    file: Any, group: int, columns: list[str], settings: ReadSettings, rows: int, arrow: Any
) -> Iterator[tuple[Batch, int]]:
    """Yield documents and the number of the row behind them."""
    about = file.metadata.row_group(group)
    end = rows + about.num_rows
    each = max(1, min(BATCH_ROWS, BATCH_BYTES * about.num_rows // max(about.total_byte_size, 1)))
    at = rows
    try:
        for table in file.iter_batches(each, [group], columns=columns):
            at += table.num_rows
            yield _documents(table, settings, at - table.num_rows + 1, arrow), at
    except (arrow.ArrowException, OSError) as error:
        reason = f"row group {group} is damaged: {_first_line(error)}"
        yield Batch(faults=[Fault(at + 1, DAMAGED, reason)]), end
        return
    if at < end:
        reason = f"row group {group} ends after {at - rows} of {about.num_rows} rows"
        yield Batch(faults=[Fault(at + 1, DAMAGED, reason)]), end


def _documents(table: Any, settings: ReadSettings, first: int, arrow: Any) -> Batch:
    batch = Batch()
    columns = [_values(table.column(key), arrow) for key in settings.text_keys]
    languages = [""] * table.num_rows
    if settings.language_key is not None and settings.language_key in table.schema.names:
        values = table.column(settings.language_key).to_pylist()
        languages = [language_of(value) for value in values]
    for row in range(table.num_rows):
        try:
            named = zip(settings.text_keys, columns, strict=True)
            texts = [_text(key, column[row]) for key, column in named]
        except FaultError as fault:
            batch.faults.append(fault.at(first + row))
            continue
        language = None if settings.language_key is None else languages[row]
        batch.add(settings.separator.join(texts), first + row, language)
    return batch


def _values(column: Any, arrow: Any) -> list[str | bytes | None]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:  # one of them; the others are well
        large = arrow.types.is_large_string(column.type)
        return list(column.cast(arrow.large_binary() if large else arrow.binary()).to_pylist())


def _text(key: str, value: str | bytes | None) -> str:
    if value is None:
        raise FaultError(NOT_TEXT, f"{key!r} is null; expected a string")
    return decode(value) if isinstance(value, bytes) else value


def _columns(path: str, file: Any, settings: ReadSettings, arrow: Any) -> list[str]:
    schema = file.schema_arrow
    for key in settings.text_keys:
        if key not in schema.names:
            names = ", ".join(schema.names)
            raise DataError(f"{path}: no column {key!r}; its columns: {names}. See --text-key")
        kind, types = schema.field(key).type, arrow.types
        if types.is_dictionary(kind):
            kind = kind.value_type
        tests = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
        if not any(test(kind) for test in tests):
            raise DataError(f"{path}: column {key!r} is {kind}; expected strings")
    language = settings.language_key
    extra = [language] if language is not None and language in schema.names else []
    return [*settings.text_keys, *extra]


def _import_arrow(path: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
        import pyarrow.types
    except ImportError as error:
        raise DataError(
            f"{path}: Parquet files need the package pyarrow: `make venv-corpora`, or `pip install "
            "pyarrow`"
        ) from error
    return pyarrow


def _open(path: str, stack: contextlib.ExitStack) -> Any:
    if is_remote(path):
        system, place = remote(path)
        return stack.enter_context(system.open(place, "rb"))
    return stack.enter_context(open(path, "rb"))


def _footer(file: Any) -> bytes:
    """The file's description of itself; the file is left at its start."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(size - 8, 0))
    length = int.from_bytes(file.read(4), "little")
    file.seek(max(size - 8 - length, 0))
    data = file.read(min(length, size) + 8)
    file.seek(0)
    return bytes(data)


def _position(file: Any, group: int) -> int:
    about = file.metadata.row_group(group)
    columns = [about.column(number) for number in range(about.num_columns)]
    return int(max(column.data_page_offset + column.total_compressed_size for column in columns))


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

"""Reading of Parquet tables by row group; damaged rows are reported as faults, the others are read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llava_ray.data.json_files import clean_id
from llava_ray.data.record_keys import CONVERSATION_KEYS, PREFERENCE_COLUMNS, is_read
from llava_ray.data.record_media import ORIGINS
from llava_ray.data.records import Fault
from llava_ray.errors import DataError
from llava_ray.images.reading import open_filesystem
from llava_ray.reading import describe_error

_ROWS_AT_ONCE = 64
# A file declares its own number of rows, and each is listed: bound it by the file's size.
FREE_ROWS, ROWS_PER_BYTE = 1_000_000, 8
# Raised by Arrow on damaged files; an OSError may also come from the storage.
_DAMAGE = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, MemoryError, OverflowError, RuntimeError)


def parquet_layout(path: str) -> tuple[list[int], list[str | None]]:
    """Return the number of rows of each row group, and every row's own id (None where it cannot be read).

    Raises DataError for a file that is not a Parquet table, or has neither conversations nor preferences.
    """
    with _open_parquet(path) as (file, num_bytes):
        names = file.schema_arrow.names
        forms = [*((key,) for key in CONVERSATION_KEYS), *PREFERENCE_COLUMNS]
        if not any(set(form) <= set(names) for form in forms):
            raise DataError(
                f"{path}: no column {' or '.join(map(repr, CONVERSATION_KEYS))}; found {', '.join(names)[:500]}. "
                'Write the turns into one of them, as a list of {"role": …, "content": …}; preferences have `prompt`, '
                "`chosen` and `rejected`"
            )
        groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        if min(groups, default=0) < 0 or sum(groups) > max(FREE_ROWS, ROWS_PER_BYTE * num_bytes):
            raise DataError(f"{path}: {sum(groups):,} rows in {num_bytes:,} bytes; the file is damaged: fetch it again")
        ids: list[str | None] = []
        for group, count in enumerate(groups):
            ids += _ids_of(file, group, count) if "id" in names else [None] * count
    return groups, ids


def _ids_of(file: pq.ParquetFile, group: int, count: int) -> list[str | None]:
    try:
        column = file.read_row_group(group, columns=["id"], use_threads=False)["id"]
        ids = [None if value is None else clean_id(value) for value in column.to_pylist()]
    except _DAMAGE:
        return [None] * count
    return ids if len(ids) == count else [None] * count


def read_parquet_records(
    path: str, row_groups: Sequence[int]
) -> Iterator[tuple[dict[str, Any] | Fault, tuple[str, ...]]]:
    """Yield the rows of some row groups (columns by name, or a Fault), each with the names of the unread columns."""
    with _open_parquet(path) as (file, _):
        schema = file.schema_arrow
        wanted = [field.name for field in schema if is_read(field.name) or _may_say_more(field)]
        unread = tuple(name for name in schema.names if name not in wanted)
        for group in row_groups:
            count = file.metadata.row_group(group).num_rows
            num_read = 0
            for row in _rows_of(file, group, wanted):
                if num_read == count:
                    break
                num_read += 1
                yield row, unread
                if isinstance(row, Fault) and row.of_group:
                    break
            for _ in range(count - num_read):
                yield Fault(f"row group {group} of the table is damaged; fetch the file again", of_group=True), unread


def _may_say_more(field: pa.Field) -> bool:
    """Return whether a column's values may need to be rejected, whatever its name."""
    return field.name not in ORIGINS and _may_hold_medium(field.type)


def _may_hold_medium(kind: pa.DataType) -> bool:
    """Return whether a column of this type may hold bytes or texts, which are checked for media as in JSON."""
    if isinstance(kind, pa.BaseExtensionType):
        return _may_hold_medium(kind.storage_type)
    if isinstance(kind, pa.DictionaryType):
        return _may_hold_medium(kind.value_type)
    if pa.types.is_nested(kind):
        return any(_may_hold_medium(kind.field(index).type) for index in range(kind.num_fields))
    return not (pa.types.is_primitive(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind))


def _rows_of(file: pq.ParquetFile, group: int, columns: list[str]) -> Iterator[dict[str, Any] | Fault]:
    batches = file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False)
    while True:
        try:
            batch = next(batches, None)
        except _DAMAGE as error:
            yield Fault(
                f"row group {group} of the table is damaged ({describe_error(error)}); fetch the file again",
                of_group=True,
            )
            return
        if batch is None:
            return
        try:
            rows: list[dict[str, Any] | Fault] = batch.to_pylist()
        except _DAMAGE:
            rows = [_row_of(batch, index) for index in range(batch.num_rows)]
        yield from rows


def _row_of(batch: pa.RecordBatch, index: int) -> dict[str, Any] | Fault:
    try:
        [row] = batch.slice(index, 1).to_pylist()
    except _DAMAGE as error:
        return Fault(f"a value of the table cannot be read ({describe_error(error)}); fix it, or fetch the file again")
    values: dict[str, Any] = row
    return values


@contextmanager
def _open_parquet(path: str) -> Iterator[tuple[pq.ParquetFile, int]]:
    """Open a table; yield it with its size in bytes. Raises DataError."""
    filesystem, place = open_filesystem(path)
    try:
        num_bytes = int(filesystem.size(place) or 0)
        with pq.ParquetFile(place, filesystem=filesystem) as file:
            yield file, num_bytes
    except FileNotFoundError as error:
        raise DataError(f"{path} is gone; copy it back and start again") from error
    except _DAMAGE as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a whole Parquet file ({describe_error(error)}); fetch it again") from error

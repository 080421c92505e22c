"""Parquet: typed columns, a few thousand rows at a time.

Belongs here: Parquet's types and damage. Does not belong here: casts of single values (``rows``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime, time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from assets.sources.batch import (
    JSON,
    KEPT_OF_LONG_LINE,
    MAX_ROW_BYTES,
    NUL_ESCAPE,
    Batch,
    FileRefused,
    RefusedRow,
    SourceFile,
    check_names,
    nul_refused,
    one_line,
    short,
)
from assets.sources.contract import Contract
from assets.sources.jsonl import json_text

PARQUET_ROWS = 8_192


def parquet_batches(contract: Contract, file: SourceFile) -> Iterator[Batch]:
    """The rows of a Parquet file.

    Raises:
        FileRefused: ``broken_file``, ``changed_type``, ``wrong_encoding``, or a column not as the contract says.
    """
    try:
        # Without pre-buffering, a column is read as its rows are asked for, not a row group at once.
        with pq.ParquetFile(file.path, pre_buffer=False, buffer_size=1024 * 1024) as parquet:
            schema = parquet.schema_arrow
            check_names(contract, file, schema.names)
            _check_types(contract, file, schema)
            number = 1
            for batch in parquet.iter_batches(batch_size=PARQUET_ROWS):
                yield _parquet_batch(contract, file, batch, number)
                number += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise FileRefused(
            file.name,
            "broken_file",
            f"it is no whole Parquet file: {short(one_line(error))}",
            "Deliver it again; write to a hidden name and rename when complete.",
        ) from error


def _check_types(contract: Contract, file: SourceFile, schema: pa.Schema) -> None:
    for column in contract.columns:
        if column.name in schema.names and not _castable(schema.field(column.name).type, column.type):
            raise FileRefused(
                file.name,
                "changed_type",
                f"column {column.name!r} is {schema.field(column.name).type}, the contract says {column.type}",
                f"Deliver the promised type, or correct {contract.file.name}.",
            )


def _castable(arrow: pa.DataType, logical: str) -> bool:
    """Whether values of ``arrow`` can be ``logical`` without changing what they mean."""
    if pa.types.is_dictionary(arrow):
        arrow = arrow.value_type
    if pa.types.is_null(arrow) or _is_text(arrow):
        return True
    allowed: dict[str, tuple[Callable[[pa.DataType], bool], ...]] = {
        "string": (),
        "integer": (pa.types.is_integer,),
        "number": (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal),
        "boolean": (pa.types.is_boolean,),
        "date": (pa.types.is_date,),
        "timestamp": (pa.types.is_timestamp,),
        "object": (pa.types.is_struct,),
        "array": (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list),
    }
    return any(test(arrow) for test in allowed[logical])


def _is_text(arrow: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(arrow) or pa.types.is_large_string(arrow) or pa.types.is_string_view(arrow)
    )


def _parquet_batch(contract: Contract, file: SourceFile, batch: pa.RecordBatch, first: int) -> Batch:
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        raise FileRefused(
            file.name,
            "wrong_encoding",
            f"from row {first} on: {short(one_line(error))}",
            "Write Parquet strings as UTF-8.",
        ) from error
    numbers = np.arange(first, first + batch.num_rows, dtype=np.int64)
    refused: list[RefusedRow] = []
    keep = np.ones(batch.num_rows, np.bool_)
    columns: dict[str, pa.Array] = {}
    names = set(batch.schema.names)

    def refuse(mask: Any, make: Callable[[int, Mapping[str, Any]], RefusedRow]) -> None:
        hit = pc.fill_null(mask, False).to_numpy(zero_copy_only=False) & keep
        keep[hit] = False
        refused.extend(
            make(int(numbers[index]), _parquet_row(batch, int(index))) for index in np.flatnonzero(hit)
        )

    for column in contract.columns:
        if column.name not in names:
            columns[column.name] = pa.nulls(batch.num_rows, pa.string())
            continue
        array = batch.column(column.name)
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if pa.types.is_nested(array.type):
            texts = pa.array([json_text(_jsonable(value)) for value in array.to_pylist()], pa.string())
            refuse(pc.match_substring_regex(texts, NUL_ESCAPE), nul_refused)
            array = pa.ExtensionArray.from_storage(JSON, texts)
        elif _is_text(array.type) or pa.types.is_null(array.type):
            array = array.cast(pa.string())
            refuse(pc.match_substring(array, "\0"), nul_refused)
            refuse(pc.greater(pc.binary_length(array), MAX_ROW_BYTES), _value_too_long)
        columns[column.name] = array
    if keep.all():
        return Batch(numbers, columns, lambda index: _parquet_row(batch, index), refused)
    places = np.flatnonzero(keep)
    kept = {name: array.filter(pa.array(keep)) for name, array in columns.items()}
    return Batch(numbers[keep], kept, lambda index: _parquet_row(batch, int(places[index])), refused)


def _value_too_long(number: int, row: Mapping[str, Any]) -> RefusedRow:
    return RefusedRow(
        number,
        "line_too_long",
        f"a value has more than {MAX_ROW_BYTES:,} bytes",
        "Shorten the row, or move large contents to a documents source.",
        {name: value[:KEPT_OF_LONG_LINE] if isinstance(value, str) else value for name, value in row.items()},
    )


def _parquet_row(batch: pa.RecordBatch, index: int) -> dict[str, Any]:
    return {
        name: _jsonable(column[index].as_py())
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    }


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _jsonable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(part) for part in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    return value if isinstance(value, str | int | float | None) else str(value)

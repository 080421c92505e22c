"""Bulk writes: Arrow tables and vectors into Postgres by COPY BINARY.

The wire form of a whole block of rows is built by Arrow and numpy at once; no Python code runs per row or
per value. Belongs here: that encoding. Does not belong here: which table, why, and bulk reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from psycopg import Connection, Cursor, sql

ROWS = 65_536
BYTES = 32 * 1024 * 1024
# Vectors need no work but their conversion: in small blocks it stays in the cache, and the server does not wait for it.
VECTOR_BYTES = 256 * 1024
HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"
# Days and microseconds from 1970-01-01 to 2000-01-01, where Postgres starts to count.
EPOCH_DAYS = 10_957
EPOCH_MICROSECONDS = EPOCH_DAYS * 86_400_000_000
TEXT_OID = 25

JSON = pa.json_(pa.string())
TIMESTAMP = pa.timestamp("us", tz="UTC")
TEXT_ARRAY = pa.list_(pa.string())
POSTGRES_TYPES = {
    pa.string(): "text",
    pa.int64(): "bigint",
    pa.int32(): "integer",
    pa.float64(): "double precision",
    pa.bool_(): "boolean",
    pa.date32(): "date",
    TIMESTAMP: "timestamp with time zone",
    pa.binary(): "bytea",
    JSON: "jsonb",
    TEXT_ARRAY: "text[]",
}


def postgres_type(arrow_type: pa.DataType) -> str:
    """The Postgres type that ``copy_table`` sends a column of ``arrow_type`` as.

    Raises:
        TypeError: The type is not one of ``POSTGRES_TYPES``.
    """
    found = POSTGRES_TYPES.get(arrow_type)
    if found is None:
        raise TypeError(f"no COPY encoding for {arrow_type}; cast to one of {[*map(str, POSTGRES_TYPES)]}")
    return found


def copy_table(target: Connection[Any] | Cursor[Any], table: sql.Composable | str, rows: pa.Table) -> int:
    """Append ``rows`` to ``table``, column by column name, in the caller's transaction.

    Args:
        target: Where to run COPY.
        table: The table's name, ``schema.name`` or an identifier.
        rows: Columns of the types in ``POSTGRES_TYPES``; the table's columns must be of exactly the types
            named there, as COPY BINARY converts nothing.

    Returns:
        The number of rows written.

    Raises:
        TypeError: A column's Arrow type has no encoding.
        psycopg.DataError: Postgres refused a value, e.g. a NUL character in a text.
    """
    for field in rows.schema:
        postgres_type(field.type)
    blocks = (_encode(block) for block in _blocks(rows))
    return _copy(target, table, rows.column_names, blocks, rows.num_rows)


def copy_vectors(
    target: Connection[Any] | Cursor[Any],
    table: sql.Composable | str,
    keys: NDArray[np.int32],
    vectors: NDArray[np.float32],
    type: Literal["halfvec", "vector"] = "halfvec",
) -> int:
    """Append (passage_no, embedding) rows to ``table``, in the caller's transaction.

    Args:
        target: Where to run COPY.
        table: A table with columns passage_no int and embedding of pgvector's ``type``.
        keys: int32, shape (n,).
        vectors: float32, shape (n, d).
        type: The type of the embedding column.

    Returns:
        The number of rows written.

    Raises:
        ValueError: The shapes disagree, d is beyond pgvector's 16,000, or a value is not finite (for
            halfvec: beyond 65,504); Postgres would refuse the whole COPY half-way.
    """
    if vectors.ndim != 2 or keys.shape != (len(vectors),) or not 0 < vectors.shape[1] <= 16_000:
        raise ValueError(f"keys of shape {keys.shape} and vectors of shape {vectors.shape}")
    width = 2 if type == "halfvec" else 4
    largest = float(np.finfo(np.float16 if type == "halfvec" else np.float32).max)
    dimensions = vectors.shape[1]
    # A whole row is of one width, so numpy lays it out at once: number of fields, then each field after its length.
    row = np.dtype(
        [
            ("fields", ">i2"),
            ("key_length", ">i4"),
            ("key", ">i4"),
            ("length", ">i4"),
            ("dimensions", ">i2"),
            ("unused", ">i2"),
            ("values", f">f{width}", (dimensions,)),
        ]
    )
    step = max(1, min(ROWS, VECTOR_BYTES // row.itemsize))
    # NaN is neither above nor below anything.
    if len(vectors) and not (vectors.min() >= -largest and vectors.max() <= largest):
        raise ValueError(f"a vector holds a value that {type} cannot: NaN, infinite or beyond {largest:g}")

    def blocks() -> Any:
        block = np.zeros(min(step, len(vectors)), row)
        block["fields"], block["key_length"] = 2, 4
        block["length"], block["dimensions"] = 4 + dimensions * width, dimensions
        for start in range(0, len(vectors), step):
            part = block[: len(vectors) - start]
            part["key"] = keys[start : start + step]
            part["values"] = vectors[start : start + step]
            yield part.view(np.uint8).data

    return _copy(target, table, ["passage_no", "embedding"], blocks(), len(vectors))


def _copy(
    target: Connection[Any] | Cursor[Any],
    table: sql.Composable | str,
    columns: Sequence[str],
    blocks: Any,
    rows: int,
) -> int:
    name = sql.Identifier(*table.split(".")) if isinstance(table, str) else table
    statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)").format(
        name, sql.SQL(", ").join(map(sql.Identifier, columns))
    )
    cursor = target.cursor() if isinstance(target, Connection) else target
    with cursor.copy(statement) as copy:
        copy.write(HEADER)
        for block in blocks:
            copy.write(block)
        copy.write(TRAILER)
    return rows


def _blocks(rows: pa.Table) -> Any:
    """Record batches of a bounded number of rows and, where rows are alike, of bytes."""
    step = ROWS
    if rows.nbytes > BYTES:
        step = max(1, min(ROWS, BYTES * rows.num_rows // rows.nbytes))
    for start in range(0, rows.num_rows, step):
        part = rows.slice(start, step)
        yield pa.RecordBatch.from_arrays(
            [_one_array(column) for column in part.columns], names=part.column_names
        )


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _encode(batch: pa.RecordBatch) -> memoryview:
    return _rows([_column(column) for column in batch.columns])


# A column in wire form: a big-endian length for each row (-1 for null), then the payload bytes of each row as
# a fixed-width numpy array, or, where widths differ, as an Arrow binary array (empty for null).
_Wire = tuple[NDArray[Any], Any]


def _rows(columns: Sequence[_Wire]) -> memoryview:
    """The rows' bytes: lengths and fixed-width payloads that stand side by side are laid out as one record,
    and Arrow joins those records with the payloads of varying width."""
    count = len(columns[0][0])
    parts: list[pa.Array] = []
    pending: list[NDArray[Any]] = [np.full(count, len(columns), ">i2")]
    for lengths, payload in columns:
        pending.append(lengths)
        if isinstance(payload, np.ndarray):
            pending.append(payload)
        else:
            parts += [_side_by_side(pending), payload]
            pending = []
    if pending:
        parts.append(_side_by_side(pending))
    joined = (
        parts[0] if len(parts) == 1 else pc.binary_join_element_wise(*parts, pa.scalar(b"", parts[0].type))
    )
    return _payload_bytes(joined)


def _payload_bytes(array: pa.Array) -> memoryview:
    wide = array.type == pa.large_binary()
    offsets = np.frombuffer(array.buffers()[1], np.int64 if wide else np.int32)
    first, last = int(offsets[array.offset]), int(offsets[array.offset + len(array)])
    return memoryview(array.buffers()[2])[first:last]


def _side_by_side(fields: Sequence[NDArray[Any]]) -> pa.Array:
    layout = np.dtype([(str(number), field.dtype, field.shape[1:]) for number, field in enumerate(fields)])
    records = np.empty(len(fields[0]), layout)
    for number, field in enumerate(fields):
        records[str(number)] = field
    return _binary(records, np.arange(len(records) + 1, dtype=np.int64) * layout.itemsize)


def _binary(data: NDArray[Any], offsets: NDArray[Any]) -> pa.Array:
    return pa.Array.from_buffers(
        pa.large_binary(),
        len(offsets) - 1,
        [None, pa.py_buffer(offsets.astype(np.int64)), pa.py_buffer(data)],
    )


def _fixed(values: NDArray[Any], valid: NDArray[np.bool_] | None) -> _Wire:
    """A column whose values are ``values.itemsize`` bytes each."""
    width = values.dtype.itemsize
    if valid is None:
        return np.full(len(values), width, ">i4"), values
    lengths = np.where(valid, width, -1).astype(">i4")
    return lengths, _binary(values[valid], np.concatenate([[0], np.cumsum(valid * width)]))


def _text(column: pa.Array) -> _Wire:
    """A column whose payload is the value's own bytes."""
    payload = column.cast(pa.large_binary())
    lengths = pc.fill_null(pc.binary_length(payload), -1).to_numpy(zero_copy_only=False)
    if lengths.size and int(lengths.max()) >= 2**30:
        raise ValueError("a value is larger than the 1 GB a Postgres field holds")
    if payload.null_count:
        payload = pc.fill_null(payload, b"")
    return lengths.astype(">i4"), payload


def _column(column: pa.Array) -> _Wire:
    kind = column.type
    if kind == JSON:
        # jsonb goes over the wire as its text, after one byte that tells the version of that format.
        texts = column.storage.cast(pa.large_binary())
        version, nothing = pa.scalar(b"\x01", texts.type), pa.scalar(b"", texts.type)
        return _text(pc.binary_join_element_wise(version, texts, nothing))
    if kind in (pa.string(), pa.binary()):
        return _text(column)
    if kind == TEXT_ARRAY:
        return _text_array(column)
    valid = column.is_valid().to_numpy(zero_copy_only=False) if column.null_count else None
    return _fixed(_numbers(column), valid)


def _numbers(column: pa.Array) -> NDArray[Any]:
    """Fixed-width values, big-endian, as Postgres counts them; anything where null."""
    kind = column.type
    if kind == pa.bool_():
        return _plain(column.cast(pa.int8()), 0).astype(">i1")
    if kind == pa.date32():
        return (_plain(column.cast(pa.int32()), EPOCH_DAYS) - EPOCH_DAYS).astype(">i4")
    if kind == TIMESTAMP:
        return (_plain(column.cast(pa.int64()), EPOCH_MICROSECONDS) - EPOCH_MICROSECONDS).astype(">i8")
    width = {pa.int64(): ">i8", pa.int32(): ">i4", pa.float64(): ">f8"}[kind]
    return _plain(column, 0).astype(width)


def _plain(column: pa.Array, null: int) -> NDArray[Any]:
    filled = pc.fill_null(column, pa.scalar(null, column.type)) if column.null_count else column
    values: NDArray[Any] = filled.to_numpy(zero_copy_only=False)
    return values


def _text_array(column: pa.Array) -> _Wire:
    """text[]: dimensions, null flag, element type, then (size, lower bound) if not empty, then the elements."""
    count = len(column)
    sizes = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    lengths, payload = _text(column.flatten())
    item_lengths, item_bytes = lengths.reshape(-1, 1), payload
    elements = pc.binary_join_element_wise(
        _side_by_side([item_lengths]), item_bytes, pa.scalar(b"", pa.large_binary())
    )
    # The elements of one row lie next to each other, so a row's bytes are one slice of the joined data.
    ends = np.frombuffer(elements.buffers()[1], np.int64)[elements.offset :][: len(elements) + 1]
    row_ends = np.concatenate([[0], np.cumsum(sizes)])
    bodies = pa.Array.from_buffers(
        pa.large_binary(), count, [None, pa.py_buffer(ends[row_ends].copy()), elements.buffers()[2]]
    )
    has_null = np.zeros(count, np.int32)
    nulls = np.flatnonzero(item_lengths[:, 0] < 0)
    has_null[np.searchsorted(row_ends, nulls, side="right") - 1] = 1
    head = np.zeros(count, [("ndim", ">i4"), ("has_null", ">i4"), ("oid", ">i4")])
    head["ndim"], head["has_null"], head["oid"] = sizes > 0, has_null, TEXT_OID
    bounds = np.zeros(count, [("size", ">i4"), ("lower", ">i4")])
    bounds["size"], bounds["lower"] = sizes, 1
    shape = _fixed(bounds, sizes > 0)[1]
    whole = pc.binary_join_element_wise(
        _side_by_side([head]), shape, bodies, pa.scalar(b"", pa.large_binary())
    )
    if column.null_count:
        whole = pc.if_else(column.is_valid(), whole, pa.scalar(None, pa.large_binary()))
    return _text(whole)

"""COPY BINARY encoding: every value arrives as it was sent, nulls, slices and extremes included."""

import struct
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from numpy.typing import NDArray

from storage import copy
from storage.copy import HEADER, JSON, TEXT_ARRAY, TIMESTAMP, TRAILER, copy_table, copy_vectors, postgres_type

EPOCH = date(2000, 1, 1)
START = datetime(2000, 1, 1, tzinfo=UTC)


class Sink:
    """Stands for a cursor: keeps the statement and what COPY was sent."""

    def __init__(self) -> None:
        self.sent, self.statement = bytearray(), ""

    def copy(self, statement: Any) -> "Sink":
        self.statement = statement.as_string(None)
        return self

    def __enter__(self) -> "Sink":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, data: Any) -> None:
        self.sent += data


def fields(sent: bytes) -> list[list[bytes | None]]:
    """Take the wire form apart as Postgres' documentation describes it."""
    assert sent.startswith(HEADER)
    at = len(HEADER)
    rows = []
    while (count := struct.unpack_from(">h", sent, at)[0]) != -1:
        at += 2
        row: list[bytes | None] = []
        for _ in range(count):
            (length,) = struct.unpack_from(">i", sent, at)
            at += 4
            row.append(None if length < 0 else sent[at : at + length])
            at += max(length, 0)
        rows.append(row)
    assert sent[at:] == TRAILER
    return rows


def value(payload: bytes | None, kind: pa.DataType) -> Any:
    if payload is None:
        return None
    if kind == JSON:
        assert payload[:1] == b"\x01"
        return payload[1:].decode()
    if kind == pa.string():
        return payload.decode()
    if kind == pa.binary():
        return payload
    if kind == TEXT_ARRAY:
        return text_array(payload)
    form = {
        pa.int64(): ">q",
        pa.int32(): ">i",
        pa.float64(): ">d",
        pa.bool_(): ">?",
        pa.date32(): ">i",
        TIMESTAMP: ">q",
    }[kind]
    (number,) = struct.unpack(form, payload)
    if kind == pa.date32():
        return date.fromordinal(EPOCH.toordinal() + number)
    if kind == TIMESTAMP:
        return number
    return number


def text_array(payload: bytes) -> list[str | None]:
    dimensions, has_null, oid = struct.unpack_from(">iii", payload)
    assert (dimensions, oid) in ((0, 25), (1, 25))
    if not dimensions:
        assert len(payload) == 12
        return []
    size, lower = struct.unpack_from(">ii", payload, 12)
    assert lower == 1
    at, found = 20, []
    for _ in range(size):
        (length,) = struct.unpack_from(">i", payload, at)
        at += 4
        found.append(None if length < 0 else payload[at : at + length].decode())
        at += max(length, 0)
    assert at == len(payload)
    assert has_null == (None in found)
    return found


def microseconds(moment: datetime | None) -> int | None:
    if moment is None:
        return None
    passed = moment - START
    return (passed.days * 86_400 + passed.seconds) * 1_000_000 + passed.microseconds


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.string(): TEXT,
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.int32(): st.integers(-(2**31), 2**31 - 1),
    pa.float64(): st.floats(),
    pa.bool_(): st.booleans(),
    pa.date32(): st.dates(),
    TIMESTAMP: st.datetimes(timezones=st.just(UTC)),
    pa.binary(): st.binary(max_size=12),
    JSON: TEXT,
    TEXT_ARRAY: st.lists(st.none() | TEXT, max_size=4),
}


def array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if kind == JSON:
        return pa.ExtensionArray.from_storage(JSON, pa.array(values, pa.string()))
    return pa.array(values, kind)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[list[Any]], list[pa.DataType]]:
    kinds = draw(st.lists(st.sampled_from(list(VALUES)), min_size=1, max_size=6))
    row = st.tuples(*(st.none() | VALUES[kind] for kind in kinds))
    return [list(values) for values in draw(st.lists(row, max_size=9))], kinds


@settings(deadline=None, max_examples=200)
@given(table=tables(), start=st.integers(0, 4), step=st.integers(1, 5))
def test_every_value_arrives(table: tuple[list[list[Any]], list[pa.DataType]], start: int, step: int) -> None:
    """Also from a slice, and cut into blocks of a few rows."""
    rows, kinds = table
    arrow = pa.table({str(n): array([row[n] for row in rows], kind) for n, kind in enumerate(kinds)}).slice(
        start
    )
    sink = Sink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copy, "ROWS", step)
        assert copy_table(sink, "raw.t", arrow) == len(rows[start:])  # type: ignore[arg-type]
    found = [
        [value(cell, kind) for cell, kind in zip(row, kinds, strict=True)] for row in fields(bytes(sink.sent))
    ]
    expected = [
        [microseconds(cell) if kind == TIMESTAMP else cell for cell, kind in zip(row, kinds, strict=True)]
        for row in rows[start:]
    ]
    assert repr(found) == repr(expected)  # NaN is not equal to itself, but reads the same


def test_columns_go_by_name_and_names_are_quoted() -> None:
    sink = Sink()
    copy_table(sink, "raw.t", pa.table({'a "b"': [1], "select": ["x"]}))  # type: ignore[arg-type]
    assert sink.statement == 'COPY "raw"."t" ("a ""b""", "select") FROM STDIN (FORMAT BINARY)'


def test_table_without_rows_is_header_and_trailer() -> None:
    sink = Sink()
    assert copy_table(sink, "t", pa.table({"a": pa.array([], pa.string())})) == 0  # type: ignore[arg-type]
    assert bytes(sink.sent) == HEADER + TRAILER


def test_type_without_encoding_is_refused_before_anything_is_sent() -> None:
    sink = Sink()
    with pytest.raises(TypeError, match="decimal128"):
        copy_table(sink, "t", pa.table({"a": pa.array([1], pa.decimal128(5))}))  # type: ignore[arg-type]
    assert not sink.sent
    assert postgres_type(JSON) == "jsonb"


@settings(deadline=None, max_examples=50)
@given(
    vectors=st_numpy.arrays(
        np.float32,
        st.tuples(st.integers(0, 9), st.integers(1, 5)),
        elements=st.floats(-60_000, 60_000, width=32),
    ),
    step=st.integers(1, 4),
)
@pytest.mark.parametrize(("kind", "form"), [("halfvec", ">f2"), ("vector", ">f4")])
def test_vectors_arrive(vectors: NDArray[np.float32], step: int, kind: Any, form: str) -> None:
    keys = np.arange(-1, len(vectors) - 1, dtype=np.int32)
    sink = Sink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copy, "ROWS", step)
        assert copy_vectors(sink, "v", keys, vectors, kind) == len(vectors)  # type: ignore[arg-type]
    rows = fields(bytes(sink.sent))
    assert [row[0] for row in rows] == [struct.pack(">i", key) for key in keys]
    for row, vector in zip(rows, vectors, strict=True):
        assert row[1] is not None
        assert struct.unpack_from(">HH", row[1]) == (vectors.shape[1], 0)
        assert np.array_equal(np.frombuffer(row[1], form, offset=4), vector.astype(form))


@pytest.mark.parametrize(
    ("keys", "vectors", "kind"),
    [
        ([1], np.zeros((2, 3), np.float32), "halfvec"),
        ([1], np.zeros(3, np.float32), "halfvec"),
        ([1], np.zeros((1, 0), np.float32), "halfvec"),
        ([1], np.zeros((1, 16_001), np.float32), "vector"),
        ([1], np.array([[np.nan]], np.float32), "vector"),
        ([1], np.array([[np.inf]], np.float32), "vector"),
        ([1], np.array([[70_000]], np.float32), "halfvec"),
    ],
)
def test_vectors_that_pgvector_refuses_are_refused_first(
    keys: list[int], vectors: NDArray[np.float32], kind: Any
) -> None:
    sink = Sink()
    with pytest.raises(ValueError, match="vector"):
        copy_vectors(sink, "v", np.array(keys, np.int32), vectors, kind)  # type: ignore[arg-type]
    assert not sink.sent

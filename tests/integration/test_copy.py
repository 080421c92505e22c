"""COPY BINARY against a real Postgres: what goes in by ``copy_table`` comes out by SELECT."""

import math
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pytest

from storage.copy import JSON, POSTGRES_TYPES, TEXT_ARRAY, TIMESTAMP, copy_table, copy_vectors

Connection = psycopg.Connection[Any]

TABLE = pa.table(
    {
        "t": pa.array(["x", None, "", "é\U0001f600\n\t\\N"], pa.string()),
        "i8": pa.array([0, None, -(2**63), 2**63 - 1], pa.int64()),
        "i4": pa.array([0, None, -(2**31), 2**31 - 1], pa.int32()),
        "f": pa.array([-0.0, None, math.inf, 5e-324], pa.float64()),
        "b": pa.array([True, None, False, True]),
        "d": pa.array([date(1, 1, 1), None, date(1969, 12, 31), date(9999, 12, 31)]),
        "ts": pa.array(
            [
                datetime(1, 1, 1, tzinfo=UTC),
                None,
                datetime(1999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
                datetime(9999, 12, 31, tzinfo=UTC),
            ],
            TIMESTAMP,
        ),
        "y": pa.array([b"\0\xff", None, b"", b"x"], pa.binary()),
        "j": pa.ExtensionArray.from_storage(JSON, pa.array(['{"a": [1, null]}', None, '""', "1.50"])),
        "l": pa.array([["a", None, ""], None, [], ["é"]], TEXT_ARRAY),
    }
)


def test_every_type_round_trips(conn: Connection) -> None:
    kinds = ", ".join(f"{field.name} {POSTGRES_TYPES[field.type]}" for field in TABLE.schema)
    conn.execute(f"create temp table t ({kinds})".encode())
    conn.execute("set timezone = 'UTC'")
    assert copy_table(conn, "t", TABLE) == 4
    expected = TABLE.to_pylist()
    for row, value in zip(expected, [{"a": [1, None]}, None, "", 1.5], strict=True):
        row["j"] = value
    assert conn.execute("select * from t").fetchall() == [tuple(row.values()) for row in expected]


def test_not_a_number_round_trips(conn: Connection) -> None:
    conn.execute("create temp table t (f double precision)")
    copy_table(conn, "t", pa.table({"f": pa.array([math.nan], pa.float64())}))
    assert conn.execute("select f = 'nan' from t").fetchone() == (True,)


def test_value_postgres_refuses_is_an_error_and_nothing_lands(conn: Connection) -> None:
    conn.execute("create temp table t (a text)")
    with pytest.raises(psycopg.DataError), conn.transaction():
        copy_table(conn, "t", pa.table({"a": ["good", "nul\0"]}))
    assert conn.execute("select count(*) from t").fetchone() == (0,)


@pytest.mark.parametrize("kind", ["halfvec", "vector"])
def test_vectors_round_trip(conn: Connection, kind: Any) -> None:
    vectors = np.array([[1, -2.5, 0], [0.5, 65_504, 6e-8]], np.float32)
    conn.execute(f"create temp table v (passage_no int, embedding {kind}(3))".encode())
    assert copy_vectors(conn, "v", np.array([7, 2**31 - 1], np.int32), vectors, kind) == 2
    rows = conn.execute("select passage_no, embedding::real[] from v order by 1").fetchall()
    assert [row[0] for row in rows] == [7, 2**31 - 1]
    sent = vectors.astype(np.float16) if kind == "halfvec" else vectors
    assert np.allclose([row[1] for row in rows], sent.astype(np.float32), rtol=1e-6, atol=0)

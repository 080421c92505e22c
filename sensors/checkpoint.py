"""Rows of ``registry.checkpoint``: how far a reader of a log, or of a set of inputs, has got.

Belongs here: reading and writing one row as plain values. Does not belong here: what the values mean.
"""

from typing import Any

import psycopg
from psycopg.types.json import Jsonb

Connection = psycopg.Connection[Any]


def lock(connection: Connection, name: str) -> None:
    """Wait until nobody else changes this checkpoint, and keep it so until the transaction ends.

    An advisory lock, since locking the row would take a transaction id, and a sensor asks every few seconds.
    """
    connection.execute("select pg_advisory_xact_lock(hashtext('checkpoint'), hashtext(%s))", [name])


def read(connection: Connection, name: str) -> dict[str, Any]:
    """The values of ``name``; empty if nobody has written it."""
    row = connection.execute("select value from registry.checkpoint where name = %s", [name]).fetchone()
    return row[0] if row else {}


def write(connection: Connection, name: str, value: dict[str, Any]) -> None:
    """Replace the values of ``name``."""
    connection.execute(
        "insert into registry.checkpoint (name, value) values (%s, %s)"
        " on conflict (name) do update set value = excluded.value, updated_at = now()",
        [name, Jsonb(value)],
    )

"""API keys on a real Postgres: stored once as a hash, never brought back after revocation."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from feedback.ids import uuid7
from feedback.keys import ApiKey, KeyRefused, create_key, ensure_key, list_keys, revoke_key
from feedback.migrations import upgrade
from tests.integration.conftest import Cluster

KEY = "dm_a-key-that-is-long-enough"


@pytest.fixture(scope="module")
def migrated(cluster: Cluster) -> str:
    url = cluster.new_database()
    upgrade(url)
    return url


@pytest.fixture
def conn(migrated: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(migrated) as connection:
        yield connection
        connection.rollback()


def test_the_secret_is_not_stored(conn: psycopg.Connection[Any]) -> None:
    _, key = create_key(conn, "support")
    row = conn.execute("SELECT api_key::text FROM feedback.api_key AS api_key").fetchone()
    assert row is not None
    assert key not in row[0]


def test_ensuring_a_key_at_once_stores_it_once(migrated: str) -> None:
    def ensure(_: int) -> ApiKey:
        with psycopg.connect(migrated) as connection:
            return ensure_key(connection, "support", KEY)

    with ThreadPoolExecutor(8) as pool:
        assert len({stored.key_id for stored in pool.map(ensure, range(8))}) == 1


def test_a_revoked_key_is_not_brought_back(conn: psycopg.Connection[Any]) -> None:
    record, key = create_key(conn, "support")
    first = revoke_key(conn, record.key_id)
    assert first.revoked_at is not None
    assert revoke_key(conn, record.key_id) == first
    with pytest.raises(KeyRefused, match="revoked"):
        ensure_key(conn, "support", key)
    assert first in list_keys(conn)


@pytest.mark.parametrize(
    ("app", "key", "scopes", "reason"),
    [
        ("", KEY, ["ingest"], "app name"),
        ("support", "short", ["ingest"], "20 characters"),
        ("support", KEY, ["everything"], "unknown scopes"),
        ("support", KEY, ["review"], "needs a holder"),
        ("support", KEY, [], "scopes"),
    ],
)
def test_what_cannot_be_a_key_is_refused(
    conn: psycopg.Connection[Any], app: str, key: str, scopes: list[str], reason: str
) -> None:
    with pytest.raises(KeyRefused, match=reason):
        ensure_key(conn, app, key, scopes)


def test_a_key_belongs_to_one_app(conn: psycopg.Connection[Any]) -> None:
    _, key = create_key(conn, "support")
    with pytest.raises(KeyRefused, match="another key for app other"):
        ensure_key(conn, "other", key)


def test_revoking_an_unknown_key_says_where_to_look(conn: psycopg.Connection[Any]) -> None:
    with pytest.raises(KeyRefused, match="key list"):
        revoke_key(conn, uuid7())

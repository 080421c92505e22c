"""Writing the log on a real Postgres: outcomes, poison rows, duplicates inside a batch, a dead database."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import psycopg
import pytest

from feedback import log
from feedback.ids import uuid7
from feedback.migrations import upgrade
from tests.integration.conftest import Cluster, free_port

KEY = str(UUID(int=1))


@pytest.fixture(scope="module")
def migrated(cluster: Cluster) -> str:
    url = cluster.new_database()
    upgrade(url)
    return url


def event(**changes: Any) -> dict[str, Any]:
    event_id = str(uuid7())
    row = {
        "event_id": event_id,
        "feedback_id": event_id,
        "op": "create",
        "revision": 1,
        "kind": "thumb",
        "name": "thumb",
        "score": 1.0,
        "label": "up",
        "annotator_kind": "HUMAN",
        "scope": "interaction",
        "occurred_at": datetime(2026, 1, 31, 12, tzinfo=UTC),
        "api_key_id": KEY,
        "body_sha256": "a",
    }
    return row | changes


def append(url: str, *batches: Sequence[dict[str, Any]]) -> list[list[str]]:
    async def run() -> list[list[str]]:
        pool = await log.connect(url, "datamoat_ingest")
        try:
            written = await asyncio.gather(*(log.append(pool, log.EVENTS, batch) for batch in batches))
            return [[outcome.status for outcome in outcomes] for outcomes in written]
        finally:
            await log.close(pool)

    return asyncio.run(run())


def count(url: str, *event_ids: str) -> int:
    with psycopg.connect(url) as conn:
        row = conn.execute(
            "SELECT count(*) FROM feedback.feedback_event WHERE event_id = ANY(%s::uuid[])", [list(event_ids)]
        ).fetchone()
    assert row is not None
    return int(row[0])


def test_all_columns_arrive_as_sent(migrated: str) -> None:
    row = event(
        explanation='quotes " and \\ and ünïcode \U0001f600',
        reasons=["one", 'two, "three"', "{}"],
        value={"deep": [1, 2.5, None, {"k": "v"}]},
        metadata={},
        score=0.1,
    )
    assert append(migrated, [row]) == [["created"]]
    with psycopg.connect(migrated) as conn:
        stored = conn.execute(
            "SELECT explanation, reasons, value, metadata, score, occurred_at, xact_id::text, received_at IS NOT NULL "
            "FROM feedback.feedback_event WHERE event_id = %s",
            [row["event_id"]],
        ).fetchone()
    assert stored is not None
    assert stored[:6] == tuple(
        row[name] for name in ("explanation", "reasons", "value", "metadata", "score", "occurred_at")
    )
    assert int(stored[6]) > 0
    assert stored[7]


def test_the_same_id_twice_in_one_batch(migrated: str) -> None:
    row = event()
    again, other = dict(row), row | {"body_sha256": "b"}
    assert append(migrated, [row, again, other]) == [["created", "duplicate", "conflict"]]
    assert append(migrated, [other, row]) == [["conflict", "duplicate"]]
    assert count(migrated, row["event_id"]) == 1


@pytest.mark.parametrize(
    "poison", [{"op": "delete"}, {"kind": "stars"}, {"name": None}, {"occurred_at": "soon"}]
)
def test_a_row_that_postgres_refuses_is_answered_alone(migrated: str, poison: dict[str, Any]) -> None:
    rows = [event() for _ in range(7)]
    rows.insert(3, event(**poison))
    (statuses,) = append(migrated, rows)
    assert statuses == ["created"] * 3 + ["invalid"] + ["created"] * 4
    assert count(migrated, *(row["event_id"] for row in rows)) == 7


def test_crossing_batches_do_not_deadlock(migrated: str) -> None:
    rows = [event() for _ in range(200)]
    answers = append(migrated, *[rows, rows[::-1]] * 4)
    flat = [status for statuses in answers for status in statuses]
    assert flat.count("created") == 200
    assert flat.count("duplicate") == 7 * 200


def test_a_missing_role_or_database_is_unavailable_not_invalid(migrated: str) -> None:
    for url in (f"postgresql://postgres@127.0.0.1:{free_port()}/x", migrated + "_missing"):
        with pytest.raises(log.Unavailable):
            append(url, [event()])

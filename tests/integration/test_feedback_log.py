"""Writing the log on a real Postgres: outcomes, group commit, dead letters, locks, no room, no database."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID

import psycopg
import pytest

from feedback import dead_letters, log
from feedback.ids import uuid7
from feedback.migrations import upgrade
from feedback.writer import Writer
from storage.database import Database
from tests.integration.conftest import Cluster, free_port

KEY = str(UUID(int=1))
T = TypeVar("T")


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


def test_what_was_sent_before_is_answered_by_the_statement_that_adds_the_rest(
    migrated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, changed = ([event() for _ in range(20)] for _ in range(3))
    append(migrated, old + changed)
    statements = []
    fetch = log.fetch

    async def counted(pool: log.Pool, query: str, *args: Any) -> list[log.Record]:
        statements.append(query)
        return await fetch(pool, query, *args)

    monkeypatch.setattr(log, "fetch", counted)
    sent = [
        row
        for rows in zip(new, old, changed, strict=True)
        for row in (*rows[:2], rows[2] | {"body_sha256": "b"})
    ]
    assert append(migrated, sent) == [["created", "duplicate", "conflict"] * 20]
    assert len(statements) == 1
    assert append(migrated, sent) == [["duplicate", "duplicate", "conflict"] * 20]
    assert len(statements) == 2


@pytest.mark.parametrize(
    ("kept", "statuses"), [(True, ["created", "duplicate", "conflict"]), (False, ["created"] * 3)]
)
def test_what_another_commits_meanwhile_is_seen(migrated: str, kept: bool, statuses: list[str]) -> None:
    rows = [event(), event(), event()]
    with psycopg.connect(migrated) as other, ThreadPoolExecutor() as pool:
        for row in (rows[1], rows[2] | {"body_sha256": "b"}):
            other.execute(
                "INSERT INTO feedback.feedback_event (event_id, feedback_id, op, revision, kind, name, annotator_kind,"
                " occurred_at, api_key_id, body_sha256) VALUES (%(event_id)s, %(feedback_id)s, 'create', 1, 'thumb',"
                " 'thumb', 'HUMAN', %(occurred_at)s, %(api_key_id)s, %(body_sha256)s)",
                row,
            )
        answer = pool.submit(append, migrated, rows)
        # The statement's view of the log is older than what it waits for.
        with psycopg.connect(migrated, autocommit=True) as watch:
            while not watch.execute(
                "SELECT 1 FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'"
            ).fetchone():
                time.sleep(0.01)
        other.commit() if kept else other.rollback()
        assert answer.result() == [statuses]


def test_an_app_cannot_change_what_another_sent_even_in_one_group(migrated: str) -> None:
    mine, theirs, old = event(app="shop"), event(app="desk"), event()
    append(migrated, [mine, theirs, old])

    def revision(app: str, of: dict[str, Any]) -> dict[str, Any]:
        return event(app=app, feedback_id=of["feedback_id"], op="revise", revision=2)

    group = [
        revision("shop", mine),
        revision("desk", mine),
        revision("shop", theirs),
        revision("desk", theirs),
        # Whose it is was not kept once.
        revision("desk", old),
        event(app="desk"),
        # Nobody has sent it yet.
        event(app="desk", feedback_id=str(uuid7()), op="retract", revision=2),
    ]
    assert write(migrated, *([row] for row in group)) == [
        ["created"],
        ["foreign"],
        ["foreign"],
        ["created"],
        ["created"],
        ["created"],
        ["created"],
    ]
    assert count(migrated, group[1]["event_id"], group[2]["event_id"]) == 0
    # A replay answers for what was taken already.
    assert append(migrated, [group[1]]) == [["created"]]


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


def write(url: str, *calls: Sequence[dict[str, Any]]) -> list[Any]:
    """What each of several calls of one writer, all made at once, is answered: statuses, or the error's name."""

    async def run() -> list[Any]:
        async with writer_of(url) as writer:
            written = await asyncio.gather(
                *(writer.append(rows, 100 * len(rows)) for rows in calls), return_exceptions=True
            )
        return [
            type(outcomes).__name__
            if isinstance(outcomes, BaseException)
            else [outcome.status for outcome in outcomes]
            for outcomes in written
        ]

    return asyncio.run(run())


@asynccontextmanager
async def writer_of(url: str) -> AsyncIterator[Writer]:
    pool = await log.connect(url, "datamoat_ingest")
    writer = Writer(pool, log.EVENTS)
    try:
        yield writer
    finally:
        await writer.close()
        await log.close(pool)


def test_calls_that_come_together_share_commits(migrated: str) -> None:
    rows = [event() for _ in range(300)]
    assert write(migrated, *([row] for row in rows)) == [["created"]] * 300
    with psycopg.connect(migrated) as conn:
        commits = conn.execute(
            "SELECT count(DISTINCT xact_id::text) FROM feedback.feedback_event WHERE event_id = ANY(%s::uuid[])",
            [[row["event_id"] for row in rows]],
        ).fetchone()
    assert commits is not None
    assert commits[0] <= 30


def test_a_call_that_comes_when_the_last_flush_ends_is_not_forgotten(migrated: str) -> None:
    async def run() -> list[str]:
        async with writer_of(migrated) as writer:
            statuses: list[str] = []
            for _ in range(100):  # each as soon as the answer to the one before is there
                (outcome,) = await writer.append([event()], 100)
                statuses.append(outcome.status)
        return statuses

    assert asyncio.run(run()) == ["created"] * 100


def test_within_a_group_the_first_call_wins(migrated: str) -> None:
    row = event()
    assert write(migrated, [row], [dict(row)], [row | {"body_sha256": "b"}]) == [
        ["created"],
        ["duplicate"],
        ["conflict"],
    ]
    assert count(migrated, row["event_id"]) == 1


def test_writers_that_share_ids_create_each_once(migrated: str) -> None:
    rows = [event() for _ in range(400)]

    async def run() -> list[str]:
        async with writer_of(migrated) as one, writer_of(migrated) as other:
            calls = [one.append([row], 100) for row in rows] + [
                other.append([row], 100) for row in rows[::-1]
            ]
            return [outcome.status for outcomes in await asyncio.gather(*calls) for outcome in outcomes]

    statuses = asyncio.run(run())
    assert (statuses.count("created"), statuses.count("duplicate")) == (400, 400)
    assert count(migrated, *(row["event_id"] for row in rows)) == 400


def test_a_cancelled_caller_loses_nothing_and_harms_nobody(migrated: str) -> None:
    rows = [event() for _ in range(20)]

    async def run() -> list[str]:
        async with writer_of(migrated) as writer:
            calls = [asyncio.create_task(writer.append([row], 100)) for row in rows]
            await asyncio.sleep(0)
            for call in calls[::2]:
                call.cancel()
            answered = await asyncio.gather(*calls, return_exceptions=True)
        return ["cancelled" if isinstance(found, BaseException) else found[0].status for found in answered]

    assert asyncio.run(run()) == ["cancelled", "created"] * 10
    assert count(migrated, *(row["event_id"] for row in rows)) == 20
    assert write(migrated, rows) == [["duplicate"] * 20]


@contextmanager
def refusing(url: str, label: str) -> Iterator[None]:
    """A rule of the database's own that validation does not know: no ``label``."""
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(f"ALTER TABLE feedback.feedback_event ADD CONSTRAINT poison CHECK (label <> '{label}')")
        yield
        conn.execute("ALTER TABLE feedback.feedback_event DROP CONSTRAINT IF EXISTS poison")


def admin(url: str, act: Callable[[log.Pool], Awaitable[T]]) -> T:
    async def run() -> T:
        pool = await log.connect(url, "datamoat_admin")
        try:
            return await act(pool)
        finally:
            await log.close(pool)

    return asyncio.run(run())


def test_a_refused_row_is_kept_and_can_be_replayed(migrated: str) -> None:
    good = [event() for _ in range(5)]
    poison = event(label="poison", explanation="kept whole: ünïcode", value={"deep": [1, None]})
    with refusing(migrated, "poison"):
        for _ in range(2):  # the second time, the retry of a client, adds no second letter
            calls = write(migrated, *([row] for row in [*good[:2], poison, *good[2:]]))
            assert calls[2] == ["invalid"]
        assert count(migrated, *(row["event_id"] for row in good)) == 5
        (letter,) = admin(migrated, dead_letters.list_dead_letters)
        assert (letter.log, letter.key) == ("feedback_event", poison["event_id"])
        assert "poison" in letter.reason
        assert "kept whole" not in letter.reason
        again = admin(migrated, lambda pool: dead_letters.replay(pool, letter.dead_letter_id, "ana"))
        assert again is not None
        assert again.status == "invalid"
        assert len(admin(migrated, dead_letters.list_dead_letters)) == 1

    for status in ("created", "duplicate"):
        outcome = admin(migrated, lambda pool: dead_letters.replay(pool, letter.dead_letter_id, "ana"))
        assert outcome is not None
        assert outcome.status == status
    assert admin(migrated, dead_letters.list_dead_letters) == []
    assert admin(migrated, lambda pool: dead_letters.replay(pool, uuid7(), "ana")) is None
    with psycopg.connect(migrated) as conn:
        stored = conn.execute(
            "SELECT explanation, value FROM feedback.feedback_event WHERE event_id = %s", [poison["event_id"]]
        ).fetchone()
        audited = conn.execute(
            "SELECT DISTINCT actor FROM feedback.admin_audit WHERE subject = 'dead_letter'"
        ).fetchall()
    assert stored == (poison["explanation"], poison["value"])
    assert audited == [("ana",)]


def test_a_refused_row_that_cannot_be_kept_is_not_answered_as_refused(database: Database) -> None:
    url = database.url
    with database.connect() as conn:
        conn.execute("REVOKE INSERT ON feedback.dead_letter FROM datamoat_ingest")
    with refusing(url, "poison"):
        good = event()
        assert write(url, [good], [event(label="poison")]) == [["created"], ["unknown"]]
    assert count(url, good["event_id"]) == 1


def test_more_rows_than_there_is_room_for_are_refused_at_once(
    migrated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feedback.writer.MAX_WAITING_ROWS", 10)
    rows = [event() for _ in range(30)]

    async def run() -> list[Any]:
        async with writer_of(migrated) as writer:
            with psycopg.connect(migrated) as conn:
                conn.execute("LOCK TABLE feedback.feedback_event IN ACCESS EXCLUSIVE MODE")
                calls = [asyncio.create_task(writer.append([row], 100)) for row in rows]
                refused, _ = await asyncio.wait(calls, timeout=0.3)
                assert len(refused) == 20  # while the table is locked: nobody waits to hear this
            return await asyncio.gather(*calls, return_exceptions=True)

    answered = asyncio.run(run())
    kept = [row["event_id"] for row, found in zip(rows, answered, strict=True) if isinstance(found, list)]
    assert sum(isinstance(found, log.Overloaded) for found in answered) == 20
    assert count(migrated, *(row["event_id"] for row in rows)) == count(migrated, *kept) == 10


def test_a_lock_that_is_held_too_long_fails_who_waits_and_loses_no_answer(
    migrated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "LOCK_SECONDS", 1)
    monkeypatch.setattr("feedback.writer.GROUP_ROWS", 5)
    rows = [event() for _ in range(50)]
    with psycopg.connect(migrated) as conn:
        conn.execute("LOCK TABLE feedback.feedback_event IN ACCESS EXCLUSIVE MODE")
        assert write(migrated, *([row] for row in rows)) == ["Unavailable"] * 50
    assert count(migrated, *(row["event_id"] for row in rows)) == 0
    assert write(migrated, *([row] for row in rows)) == [["created"]] * 50


def test_a_database_that_is_away_is_asked_by_one_at_a_time() -> None:
    async def run() -> None:
        pool = await log.connect(f"postgresql://postgres@127.0.0.1:{free_port()}/x", "datamoat_ingest")

        async def spared() -> bool:
            with pytest.raises(log.Unavailable) as caught:
                await log.fetch(pool, "SELECT 1")
            return "a moment ago" in str(caught.value)

        assert [await spared() for _ in range(3)] == [False, True, True]
        while await spared():
            await asyncio.sleep(0.01)
        await log.close(pool)

    asyncio.run(run())

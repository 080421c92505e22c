"""Writing the log: one statement per group of rows, acknowledged only when it is committed.

Belongs here: the asyncpg pools, the idempotent, append-only writes, and what to believe of a database that fails.
Does not belong here: which rows form a group (``feedback.writer``), validation (``feedback.payloads``), HTTP, or
reading the log (that is the pipeline's).
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import asyncpg
import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from feedback import schema

Pool: TypeAlias = asyncpg.Pool
Record: TypeAlias = asyncpg.Record

logger = logging.getLogger("feedback")

Row = Mapping[str, Any]
Status = Literal["created", "duplicate", "conflict", "foreign", "invalid", "unknown"]

ACQUIRE_SECONDS = 5.0
COMMAND_SECONDS = 30.0
# Who holds a table longer than this makes writers wait in vain; they are answered and may come again.
LOCK_SECONDS = 5
# How long a database that could not be reached is left alone, but for one call that looks whether it is back.
AWAY_SECONDS = 0.5

# What is the row's own fault: a value the column cannot hold, a violated check, a limit of Postgres.
_ROW_FAULTS = (
    asyncpg.exceptions.DataError,
    asyncpg.exceptions.IntegrityConstraintViolationError,
    asyncpg.exceptions.ProgramLimitExceededError,
)
# What says that there is no database to talk to: the next call would fail like this one.
_AWAY = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.exceptions.AdminShutdownError,
    asyncpg.exceptions.CrashShutdownError,
    asyncpg.exceptions.CannotConnectNowError,
)
_FAILURES = (*_AWAY, asyncpg.PostgresError)


class Unavailable(Exception):
    """The log cannot take or confirm a write now; sending the same items again later is safe."""


class Overloaded(Unavailable):
    """More waits to be written than there is room for; nothing of this call was taken."""


@dataclass(frozen=True)
class Outcome:
    """What became of one row.

    ``foreign``: it would change another app's feedback; ``invalid``: Postgres refuses it, for ``reason``;
    ``unknown``: it may be sent again.
    """

    status: Status
    reason: str | None = None


CREATED, DUPLICATE, CONFLICT = Outcome("created"), Outcome("duplicate"), Outcome("conflict")
FOREIGN = Outcome("foreign")


@dataclass(frozen=True, eq=False)
class Log:
    """One append-only table, and the statements that write it.

    Attributes:
        name: Of the table, without its schema.
        key: The column that tells rows apart.
        insert: Adds the rows of $1, a JSON array of objects. Returns the keys that are new.
        write: ``insert``; of each of the keys $2 that is not new, also returns what ``hashes`` does. Says nothing of
            a key whose row was committed after the statement began.
        hashes: Of those of the keys $1 that are there: key, body hash, app.
    """

    name: str
    key: str
    insert: str
    write: str
    hashes: str


def _log(table: sa.Table) -> Log:
    (key,) = table.primary_key.columns
    # The database stamps these: received_at and xact_id must be those of the inserting transaction.
    columns = [column for column in table.columns if column.name not in ("received_at", "xact_id")]
    names = ", ".join(f'"{column.name}"' for column in columns)
    dialect: sa.Dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    types = ", ".join(f'"{column.name}" {column.type.compile(dialect)}' for column in columns)
    insert = (
        f"INSERT INTO {table.fullname} ({names}) SELECT {names} FROM json_to_recordset($1::json) AS r({types}) "
        f"ON CONFLICT ({key.name}) DO NOTHING RETURNING {key.name}::text"
    )
    # Keys come as text, so that a malformed one is the row's own fault like any other value.
    stored = (
        f"SELECT {key.name}::text, body_sha256, app FROM unnest({{keys}}::text[]) AS given(key) "
        f"JOIN {table.fullname} ON {key.name} = given.key::{key.type.compile(dialect)}"
    )
    return Log(
        name=table.name,
        key=key.name,
        insert=insert,
        # Looked up are only keys that are not new: a row that is costs nothing but its insert.
        write=(
            f"WITH created AS ({insert}) SELECT {key.name}, NULL, NULL FROM created UNION ALL "
            f"{stored.format(keys='$2')} WHERE given.key NOT IN (SELECT {key.name} FROM created)"
        ),
        hashes=stored.format(keys="$1"),
    )


INTERACTIONS = _log(schema.interaction)
EVENTS = _log(schema.feedback_event)

_FOREIGN = (
    "SELECT DISTINCT given.id, given.app FROM unnest($1::text[], $2::text[]) AS given(id, app)"
    f" JOIN {schema.feedback_event.fullname} AS event ON event.feedback_id = given.id::uuid"
    " WHERE event.app <> given.app"
)


async def connect(database_url: str, role: str, size: int = 8, seconds: float = COMMAND_SECONDS) -> Pool:
    """A pool whose sessions act as ``role`` and wait for every commit to reach the disk.

    A statement that takes longer than ``seconds`` fails. No connection is made yet, so a service may start before
    its database does.
    """

    async def keep_session(_: asyncpg.Connection) -> None:
        """Nothing to reset: no statement here changes the session, and resetting costs a round trip."""

    return await asyncpg.create_pool(
        database_url,
        min_size=0,
        max_size=size,
        timeout=ACQUIRE_SECONDS,
        command_timeout=seconds,
        reset=keep_session,
        server_settings={
            "role": role,
            "synchronous_commit": "on",
            "lock_timeout": f"{LOCK_SECONDS}s",
            "application_name": "datamoat-feedback",
            "timezone": "UTC",
        },
    )


# When each pool that could not reach its database may try again, on the monotonic clock.
_retry_at: dict[Pool, float] = {}


async def fetch(pool: Pool, query: str, *args: Any) -> list[Record]:
    """Run one statement, committed when this returns. Raises Unavailable unless the fault lies in the rows.

    While the database is away, all but one call each half second fail at once: nobody waits for a timeout in vain.
    """
    if pool in _retry_at:
        if time.monotonic() < _retry_at[pool]:
            raise Unavailable("the database was away a moment ago")
        _retry_at[pool] = time.monotonic() + AWAY_SECONDS
    try:
        async with pool.acquire(timeout=ACQUIRE_SECONDS) as connection:
            try:
                found: list[Record] = await connection.fetch(query, *args)
            except _AWAY:
                # A connection that broke in the middle of a statement may not know yet that it is closed.
                connection.terminate()
                raise
    except _ROW_FAULTS:
        raise
    except _FAILURES as error:
        logger.warning("the database did not answer: %s: %s", type(error).__name__, error)
        if isinstance(error, _AWAY):
            _retry_at[pool] = time.monotonic() + AWAY_SECONDS
        raise Unavailable(f"{type(error).__name__}: {error}") from error
    _retry_at.pop(pool, None)
    return found


async def append(pool: Pool, log: Log, rows: Sequence[Row], *, guarded: bool = False) -> list[Outcome]:
    """Add rows to the log; one outcome per row, in order. All of it is committed when this returns.

    A row whose key is there already, or came earlier in ``rows``, is a ``duplicate`` if the body hash and the app are
    the same and a ``conflict`` if not. A row that Postgres refuses is ``invalid`` alone; the others are kept.
    ``guarded``: an event that names the feedback_id of another app's feedback is ``foreign`` and not added.
    Raises Unavailable when nothing can be said about any row; everything may then be sent again.
    """
    foreign = await _foreign(pool, rows) if guarded and log is EVENTS else set()
    first: dict[str, Row] = {}
    for row in rows:
        if not foreign or _claim(row) not in foreign:
            first.setdefault(row[log.key], row)
    # One order for everybody: two groups that share keys then wait for each other instead of deadlocking.
    created, stored, refused = await _write(pool, log, [first[key] for key in sorted(first)])
    if len(created) == len(rows):
        return [CREATED] * len(rows)
    unseen = [key for key in first if key not in created and key not in stored and key not in refused]
    if unseen:
        # Committed by others while the statement ran.
        stored |= _stored(await fetch(pool, log.hashes, unseen))
    stored |= {key: _same(first[key]) for key in created}
    outcomes = []
    for row in rows:
        key = row[log.key]
        if foreign and _claim(row) in foreign:
            outcomes.append(FOREIGN)
        elif key in refused:
            reason = refused[key] if row is first[key] else "an earlier item with the same id was refused"
            outcomes.append(Outcome("invalid", reason))
        elif row is first[key] and key in created:
            outcomes.append(CREATED)
        elif key not in stored:
            outcomes.append(Outcome("unknown", f"{key} was erased while it was being sent again"))
        else:
            outcomes.append(
                DUPLICATE if stored[key] in (_same(row), (row["body_sha256"], None)) else CONFLICT
            )
    return outcomes


def _same(row: Row) -> tuple[str, str | None]:
    """What tells a row sent again from another one under its key; the app is unknown of old rows."""
    return row["body_sha256"], row.get("app")


def _stored(found: Sequence[Record]) -> dict[str, tuple[str, str | None]]:
    """What ``_same`` says of the rows in the log, by key."""
    return {key: (sha256, app) for key, sha256, app in found}


def _claim(row: Row) -> tuple[str, str | None]:
    """The feedback that an event is about, and the app that says so."""
    return row["feedback_id"], row.get("app")


async def _foreign(pool: Pool, rows: Sequence[Row]) -> set[tuple[str, str | None]]:
    """The claims on feedback that another app has sent. An event that begins its own feedback claims none."""
    claims = {_claim(row) for row in rows if row["feedback_id"] != row["event_id"]}
    if not claims:
        return set()
    return {(row[0], row[1]) for row in await fetch(pool, _FOREIGN, *map(list, zip(*claims, strict=True)))}


async def _write(
    pool: Pool, log: Log, rows: Sequence[Row]
) -> tuple[set[str], dict[str, tuple[str, str | None]], dict[str, str]]:
    """Insert rows with distinct keys.

    Returns the keys that are new; of those that were there what ``_stored`` says; the refused ones with Postgres'
    reason.
    """
    if not rows:
        return set(), {}, {}
    try:
        found = await fetch(
            pool, log.write, msgspec.json.encode(rows).decode(), [row[log.key] for row in rows]
        )
    except _ROW_FAULTS as error:
        if len(rows) == 1:
            # Without the detail, which repeats the row: reasons are kept where people's texts must not be.
            return set(), {}, {rows[0][log.key]: str(error.args[0])}
        middle = len(rows) // 2
        created, stored, refused = await _write(pool, log, rows[:middle])
        more_created, more_stored, more_refused = await _write(pool, log, rows[middle:])
        return created | more_created, stored | more_stored, refused | more_refused
    return {row[0] for row in found if row[1] is None}, _stored([row for row in found if row[1]]), {}


async def close(pool: Pool) -> None:
    """Give the connections back; those that do not end within seconds are cut."""
    _retry_at.pop(pool, None)
    try:
        await asyncio.wait_for(pool.close(), timeout=ACQUIRE_SECONDS)
    except TimeoutError:
        pool.terminate()

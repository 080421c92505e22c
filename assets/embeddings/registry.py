"""Which embedding release is live, and how that changes: promotion, rollback, and the record of both.

A release is a table of vectors, ``retrieval.release_<name>``, and a row in ``registry.embedding_release``, which says
whose chunks it embeds. ``retrieval.live`` is a view over the table that is searched, ``corpus.chunk`` one over the
chunks; promoting and rolling back move both, in one transaction, under readers. Belongs here: moving them, and those
rows. Does not belong here: loading vectors (index), cutting (assets.documents), deciding whether a candidate is good
enough (checks), Dagster.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from assets.documents.chunk import DEFAULT_CHUNKING, Chunking
from assets.documents.chunkings import STALE, forget_unused_chunkings, show_chunking
from assets.embeddings.release import Release, Setting, current_release, vectors_of

Connection = psycopg.Connection[Any]

REQUIRED_CHECKS = ("coverage", "vectors_are_sound", "neighbours", "retrieval")
"""Checks of a candidate that must have passed, after its newest load, before it may be promoted."""

# Whoever waits for the view makes every later reader wait behind it: so briefly, and again.
LOCK_TIMEOUT = "25ms"
LOCK_ATTEMPTS = 400
LOCK_PAUSE_SECONDS = 0.2
# A table that nobody reads costs room until the next load, and trying costs readers a moment each time.
DROP_ATTEMPTS = 5

# The foreign key of a release's table to the passages.
KEY = "passage"
# Of one release, by its name.
LOAD_LOCK = "hashtext('release ' || %s)"

NO_VECTORS = sql.SQL("(select null::int as passage_no where false)")
RELEASE_ROWS = "select v.passage_no, p.content_hash, v.embedding from {} v left join retrieval.passage p using (passage_no)"


class ReleaseError(Exception):
    """What was asked of a release cannot be done; the message says why and what to do."""


class NotLive(ReleaseError):
    """No release can be searched; the message says what to do."""


@dataclass(frozen=True)
class LiveRelease:
    """The release that searches use.

    Attributes:
        name: Its name.
        model_folder: Folder of the model that questions must be embedded with; None for the installed one.
        dimensions: Length of a vector.
        vectors: The embedder's name for the model: what ``current_release(model_folder).vectors`` must be.
        chunking: Whose chunks it embeds.
    """

    name: str
    model_folder: Path | None
    dimensions: int
    vectors: str
    chunking: Chunking = DEFAULT_CHUNKING


@dataclass(frozen=True)
class Chain:
    """The release that a run of the assets feeds, and what a person should know about the choice.

    Attributes:
        live: Name of the release that was live when this was chosen; None if none was.
    """

    release: Release
    live: str | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReleaseState:
    """A release as the registry knows it.

    Attributes:
        state: ``candidate``, ``live`` or ``retired``.
        vectors: Rows of its table.
        missing: Texts that may be retrieved and that it has no vector of.
        uncut: Documents that may be retrieved and that its chunking has no chunks of, or only of an earlier text.
        checks: Newest outcome by name: ``passed`` and the figures.
        current: Whether the checks were run after the newest load.
    """

    name: str
    state: str
    model: Path | None
    dimensions: int
    created_at: datetime
    loaded_at: datetime | None
    retired_at: datetime | None
    chunking: Chunking
    vectors: int
    missing: int
    uncut: int
    checks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    current: bool = False

    def objections(self) -> list[str]:
        """Why it may not be promoted; empty when it may."""
        if not self.current:
            return ["its checks have not been run since its newest load"]
        never = [name for name in REQUIRED_CHECKS if name not in self.checks]
        failed = [
            name for name in REQUIRED_CHECKS if name in self.checks and not self.checks[name].get("passed")
        ]
        return (
            [f"check {name} was not run" for name in never]
            + [f"check {name} did not pass" for name in failed]
            + ([f"{self.missing:,} texts have no vector in it by now"] if self.missing else [])
            + ([f"{self.uncut:,} documents are not cut for it by now"] if self.uncut else [])
        )


def release_table(name: str) -> sql.Identifier:
    """The table of a release's vectors: ``passage_no int``, ``embedding halfvec(d)``."""
    return sql.Identifier("retrieval", f"release_{name}")


def has_table(connection: Connection, name: str) -> bool:
    """Whether the release's table is there."""
    return bool(_value(connection, "select to_regclass(%s)", [f"retrieval.release_{name}"]))


def find_live(connection: Connection) -> LiveRelease | None:
    """The release that searches use; None when none is."""
    return _known(connection, "live")


def built_release(connection: Connection, name: str | None = None) -> LiveRelease:
    """The release of that name, live or not; without a name the live one.

    Raises:
        ReleaseError: It was not built, or has no vectors yet; NotLive, where none is live.
    """
    if name is None:
        return live_release(connection)
    found = _known(connection, "release = %s", [name])
    if found is None:
        raise _unknown(connection, name)
    if not has_table(connection, name):
        raise ReleaseError(
            f"release {name} has no vectors yet: materialize candidate/index for every source first"
        )
    return found


def _known(connection: Connection, condition: str, parameters: Sequence[str] = ()) -> LiveRelease | None:
    row = connection.execute(
        "select release, model, dimensions, fingerprint, chunking from registry.embedding_release"
        f" where {condition}".encode(),
        parameters,
    ).fetchone()
    if row is None:
        return None
    name, model, dimensions, fingerprint, chunking = row
    return LiveRelease(
        name, Path(model) if model else None, dimensions, vectors_of(fingerprint), Chunking.parse(chunking)
    )


def live_release(connection: Connection) -> LiveRelease:
    """The release that searches use, and the model that a question must be embedded with.

    Raises:
        NotLive: There is none.
    """
    live = find_live(connection)
    if live is None:
        raise NotLive("the index is empty: 'make run' fills it")
    return live


def chain_release(connection: Connection, setting: Setting) -> Chain:
    """The release that the assets feed: the live one's model and chunking go on being served until another is promoted.

    ``setting`` (EMBEDDING_MODEL, DATAMOAT_CHUNKING) decides while nothing is live, says where the live model lies if it
    moved, and is otherwise not followed. The release differs from the live one where the code cuts chunks differently
    by now, or where the live one's folder holds another model: the live one can be fed no more, and its successor goes
    live by itself.

    Raises:
        EmbedderError: The model that EMBEDDING_MODEL names cannot be read.
        NotLive: The live release's model cannot be read.
    """
    from embedder.protocol import EmbedderError

    live = find_live(connection)
    if live is None:
        return Chain(current_release(setting.model, setting.chunking or DEFAULT_CHUNKING), None)
    notes = []
    if setting.chunking not in (None, live.chunking):
        notes.append(
            f"DATAMOAT_CHUNKING is {setting.chunking} while {live.name}, which is live, has chunks of {live.chunking}:"
            " this run goes on cutting as the live one does. To change that, set DATAMOAT_CHUNKING_CANDIDATE,"
            " materialize candidate/*, and run 'moat release promote'"
        )
    if setting.model == live.model_folder:
        release = current_release(setting.model, live.chunking)
    else:
        try:
            asked = current_release(setting.model, live.chunking)
            note = (
                f"EMBEDDING_MODEL makes release {asked.name} while {live.name} is live: this run goes on feeding the"
                " live one. To change the model, set EMBEDDING_CANDIDATE to its folder, materialize candidate/*, and"
                f" run 'moat release promote {asked.name}'"
            )
        except EmbedderError as error:
            asked = None
            note = f"EMBEDDING_MODEL is not the live release's model, and cannot be read: {error}"
        if asked is not None and asked.vectors == live.vectors:
            release = asked
        else:
            if setting.model is not None:
                notes.append(note)
            try:
                release = current_release(live.model_folder, live.chunking)
            except EmbedderError as error:
                raise NotLive(
                    f"the model of the live release {live.name} cannot be read ({error}): put it back, or set"
                    " EMBEDDING_MODEL to the folder where it lies now"
                ) from error
    if release.name != live.name:
        why = (
            "chunks are cut differently"
            if release.vectors == live.vectors
            else "its folder holds another model"
        )
        notes.append(
            f"the live release {live.name} can be fed no more ({why}): {release.name} follows it once it covers what"
            " the live one answers with"
        )
    return Chain(release, live.name, tuple(notes))


def candidate_release(connection: Connection, candidate: Setting, setting: Setting) -> Release:
    """The release that ``candidate`` asks for (EMBEDDING_CANDIDATE, DATAMOAT_CHUNKING_CANDIDATE): what it leaves open is
    as in the release that the assets feed.

    Raises:
        EmbedderError: Its model cannot be read.
        NotLive: It takes the live release's model, which cannot be read.
    """
    live = find_live(connection)
    chunking = candidate.chunking or (live.chunking if live else setting.chunking) or DEFAULT_CHUNKING
    if candidate.model is not None:
        return current_release(candidate.model, chunking)
    return current_release(chain_release(connection, setting).release.model, chunking)


def register(connection: Connection, release: Release) -> None:
    """Make the release known, or take note that its model lies elsewhere now."""
    connection.execute(
        "insert into registry.embedding_release as r (release, fingerprint, dimensions, model, chunking)"
        " values (%s, %s, %s, %s, %s)"
        " on conflict (release) do update set model = excluded.model where r.model is distinct from excluded.model",
        [
            release.name,
            Jsonb(dict(release.fingerprint)),
            release.dimensions,
            _text(release.model),
            str(release.chunking),
        ],
    )


def record_checks(connection: Connection, release: str, checks: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace what is known of a release's checks.

    Args:
        checks: By name, ``passed`` and the figures it was decided by.
    """
    connection.execute(
        "update registry.embedding_release set checks = %s, checked_at = clock_timestamp() where release = %s",
        [Jsonb({name: dict(outcome) for name, outcome in checks.items()}), release],
    )


def releases(connection: Connection, only: str | None = None) -> list[ReleaseState]:
    """Every release, the oldest first; or the one of that name.

    Counts vectors and missing texts, which takes a second for a million.
    """
    rows = connection.execute(
        "select release, state, model, dimensions, created_at, loaded_at, retired_at, chunking, checks,"
        " coalesce(checked_at >= loaded_at, false) from registry.embedding_release"
        " where %(only)s::text is null or release = %(only)s order by created_at, release",
        {"only": only},
    ).fetchall()
    found = []
    for name, state, model, dimensions, created_at, loaded_at, retired_at, chunking, checks, current in rows:
        # Of a candidate whose documents are being cut there is none yet.
        table = release_table(name) if has_table(connection, name) else NO_VECTORS
        found.append(
            ReleaseState(
                name,
                state,
                Path(model) if model else None,
                dimensions,
                created_at,
                loaded_at,
                retired_at,
                Chunking.parse(chunking),
                int(_value(connection, sql.SQL("select count(*) from {} v").format(table), [])),
                missing_texts(connection, name, chunking, table),
                _uncut(connection, chunking),
                checks,
                current,
            )
        )
    return found


def find_release(connection: Connection, name: str) -> ReleaseState:
    """The release of that name.

    Raises:
        ReleaseError: There is none.
    """
    found = releases(connection, name)
    if not found:
        raise _unknown(connection, name)
    return found[0]


def _unknown(connection: Connection, name: str) -> ReleaseError:
    known = connection.execute("select release from registry.embedding_release order by created_at, release")
    names = ", ".join(row[0] for row in known) or "none, for none is built"
    return ReleaseError(f"there is no release {name}: take one of {names}")


def missing_texts(
    connection: Connection, name: str, chunking: str, table: sql.Composable, *, loading: bool = False
) -> int:
    """Texts of sources that may be retrieved without a vector in this release.

    A text that was refused here and has no vector in the live release either loses nothing, and does not count.

    Args:
        chunking: Whose chunks it embeds.
        table: Where its vectors are so far.
        loading: The live release is not looked at, for who moves the view would wait for the end of the load; no
            refused text counts.
    """
    or_live = (
        " and not exists (select from retrieval.live l where l.passage_no = p.passage_no)"
        if not loading and _view_exists(connection)
        else ""
    )
    statement = sql.SQL(
        "select count(*) from retrieval.passage p where exists (select from corpus.piece c"
        " join registry.source s using (source)"
        " where c.passage_no = p.passage_no and c.chunking = {chunking} and 'rag' = any(s.allowed_uses))"
        " and not exists (select from {table} v where v.passage_no = p.passage_no)"
        " and not (exists (select from retrieval.embedding_failure f"
        f" where f.release = {{release}} and f.content_hash = p.content_hash){or_live})"
    ).format(chunking=sql.Literal(chunking), table=table, release=sql.Literal(name))
    return int(_value(connection, statement, []))


def _uncut(connection: Connection, chunking: str) -> int:
    """Documents that are cut as is live, and not by ``chunking``, or only an earlier text of theirs."""
    statement = (
        "select count(*) from corpus.document d join registry.source s using (source)"
        " where 'rag' = any(s.allowed_uses) and exists (select from corpus.chunk c"
        " where c.document_id = d.document_id and c.chunker <> %(stale)s)"
        " and not exists (select from corpus.piece c where c.document_id = d.document_id"
        " and c.chunker <> %(stale)s and c.chunking = %(chunking)s)"
    )
    return int(_value(connection, statement, {"chunking": chunking, "stale": STALE}))


def promote(connection: Connection, release: str, who: str, why: str, force: bool = False) -> ReleaseState:
    """Make ``release`` the one that is searched, in one transaction; the one before stays for a rollback.

    Args:
        who: The person, for the record.
        why: The reason, for the record.
        force: Promote although its checks object.

    Returns:
        The release as it was before.

    Raises:
        ReleaseError: It does not exist, is live already, its checks object, or readers do not let go of the view.
    """
    with _moving(connection):
        chosen = find_release(connection, release)
        if chosen.state == "live":
            raise ReleaseError(f"release {release} is live already")
        objections = chosen.objections()
        built_release(connection, release)
        if objections and not force:
            raise ReleaseError(
                f"release {release} may not be promoted: {'; '.join(objections)}. Materialize candidate/release (or run"
                f" 'moat release check {release}'), or force it and say why"
            )
        move(connection, "promote", release, who, why, forced=bool(objections))
    return chosen


def rollback(connection: Connection, who: str, why: str) -> str:
    """Go back to the release that was live before the live one was promoted; returns its name.

    Raises:
        ReleaseError: There was none, or its table was dropped.
    """
    with _moving(connection):
        live = live_release(connection)
        row = connection.execute(
            "select previous from registry.promotion where release = %s and action = 'promote' order by id desc limit 1",
            [live.name],
        ).fetchone()
        previous = row[0] if row else None
        if previous is None:
            raise ReleaseError(f"no release was live before {live.name}")
        if not has_table(connection, previous):
            raise ReleaseError(
                f"release {previous}, which was live before {live.name}, was dropped: build it again"
            )
        move(connection, "rollback", previous, who, why)
    return str(previous)


def move(
    connection: Connection, action: str, release: str, who: str, why: str, *, forced: bool = False
) -> None:
    """Point the views at ``release`` and write down who did it, and why; in the caller's transaction."""
    if not who.strip() or not why.strip():
        raise ReleaseError("say who moves the index and why: both are kept in registry.promotion")
    live = find_live(connection)
    row = connection.execute(
        "select dimensions, chunking, checks from registry.embedding_release where release = %s", [release]
    ).fetchone()
    assert row is not None
    dimensions, chunking, checks = row

    def point() -> None:
        # In the order in which a search reads them.
        if live is None or str(live.chunking) != chunking:
            show_chunking(connection, chunking)
        # A view's columns cannot change their type in place, and the dimension is part of it.
        point_view(connection, release_table(release), anew=live is None or live.dimensions != dimensions)

    patiently(connection, point)
    connection.execute(
        "update registry.embedding_release set state = 'retired', retired_at = now() where live"
    )
    connection.execute(
        "update registry.embedding_release set state = 'live', retired_at = null where release = %s",
        [release],
    )
    connection.execute(
        "insert into registry.promotion (action, release, previous, who, why, forced, checks)"
        " values (%s, %s, %s, %s, %s, %s, %s)",
        [action, release, live.name if live else None, who, why, forced, Jsonb(checks)],
    )


def drop(connection: Connection, release: str) -> None:
    """Delete a release's table and its row, and the chunks that no other release needs.

    Its vectors stay in the lake, and its promotions in the record. A load of it that is under way is waited for.

    Raises:
        ReleaseError: It does not exist or is live.
    """
    with connection.transaction():
        one_load_at_a_time(connection, release)
        one_move_at_a_time(connection)
        if find_release(connection, release).state == "live":
            raise ReleaseError(f"release {release} is live: promote another one first")
        patiently(connection, lambda: retire_table(connection, release))
        connection.execute("delete from registry.embedding_release where release = %s", [release])
    drop_retired_tables(connection)
    # In a transaction of its own, for it may take minutes; what a kill leaves, the weekly upkeep takes up.
    forget_unused_chunkings(connection)


def retired_longer_than(connection: Connection, days: float) -> list[str]:
    """Releases that have been retired for more than so many days, the oldest first."""
    rows = connection.execute(
        "select release from registry.embedding_release where retired_at < now() - make_interval(secs => %s)"
        " order by retired_at",
        [days * 86_400],
    )
    return [row[0] for row in rows]


def retire_table(connection: Connection, release: str) -> None:
    """Take the release's table, if it has one, out of its way: ``drop_retired_tables`` will drop it."""
    # Another load may come before this one is dropped, so its name must be its own.
    number = _value(connection, "select to_regclass(%s)::oid", [f"retrieval.release_{release}"])
    if number is not None:
        old = sql.Identifier(f"release_{release}_old{number}")
        connection.execute(sql.SQL("alter table {} rename to {}").format(release_table(release), old))


def drop_retired_tables(connection: Connection) -> None:
    """Drop the tables that were taken out of the way, each on its own.

    Letting go of a foreign key locks all passages, for readers too: for a moment here, but for as long as the
    transaction lasts where there is one, so that in one nothing is done. If somebody reads passages for longer, as a
    backup does, the next load tries again.
    """
    if connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
        return
    with connection.transaction():
        tables = connection.execute(
            "select tablename from pg_tables where schemaname = 'retrieval' and tablename ~ '^release_.*_old[0-9]+$'"
        ).fetchall()
    for (name,) in tables:
        with contextlib.suppress(ReleaseError):
            # Without its key, the table is dropped without passages waiting for the disk.
            for statement in (
                f"alter table if exists {{}} drop constraint if exists {KEY}",
                "drop table if exists {}",
            ):
                drop = sql.SQL(statement).format(sql.Identifier("retrieval", name))
                with connection.transaction():
                    commit_at_once(connection)
                    patiently(connection, partial(connection.execute, drop), DROP_ATTEMPTS)


def point_view(connection: Connection, table: sql.Composable, *, anew: bool = False) -> None:
    """Let ``retrieval.live`` show the vectors of ``table``.

    Args:
        anew: Drop it first, for a table of another dimension.
    """
    if anew:
        connection.execute("drop view if exists retrieval.live")
    connection.execute(sql.SQL("create or replace view retrieval.live as " + RELEASE_ROWS).format(table))


def patiently(connection: Connection, action: Callable[[], object], attempts: int | None = None) -> None:
    """Run ``action``, which needs locks that readers hold for moments, without making readers wait behind it.

    Args:
        attempts: Fewer than the usual, which take more than a minute.

    Raises:
        ReleaseError: Readers held the locks each time.
    """
    for attempt in range(attempts or LOCK_ATTEMPTS):
        if attempt:
            time.sleep(LOCK_PAUSE_SECONDS)
        try:
            with connection.transaction():
                before = _value(connection, "select current_setting('lock_timeout')", [])
                connection.execute("select set_config('lock_timeout', %s, true)", [LOCK_TIMEOUT])
                action()
                connection.execute("select set_config('lock_timeout', %s, true)", [before])
            return
        except psycopg.errors.LockNotAvailable:
            continue
    holders = connection.execute(
        "select distinct a.pid, a.application_name from pg_locks l join pg_stat_activity a using (pid)"
        " join pg_class c on c.oid = l.relation"
        " where c.relnamespace = 'retrieval'::regnamespace and l.granted and a.pid <> pg_backend_pid()"
    ).fetchall()
    raise ReleaseError(
        "the index could not be changed, for it is being read all the time"
        + "".join(f"; backend {pid} ({name})" for pid, name in holders)
        + ": end what holds it, and try again"
    )


def one_load_at_a_time(connection: Connection, release: str) -> None:
    """Until the end of this transaction nobody else loads, drops or rebuilds the release's table."""
    connection.execute(f"select pg_advisory_xact_lock({LOAD_LOCK})".encode(), [release])


def one_move_at_a_time(connection: Connection) -> None:
    """Until the end of this transaction nobody else changes which table the view shows."""
    connection.execute("select pg_advisory_xact_lock(hashtext('retrieval.live'))")


@contextlib.contextmanager
def _moving(connection: Connection) -> Iterator[None]:
    """A transaction that moves the view, durable at the end, whose readers do not wait for the disk."""
    with connection.transaction():
        commit_at_once(connection)
        one_move_at_a_time(connection)
        yield
    with connection.transaction():
        connection.execute("select pg_logical_emit_message(true, 'datamoat', 'what came before is on disk')")


def commit_at_once(connection: Connection) -> None:
    """Let this transaction end without waiting for the disk, which readers would do as well behind its locks.

    A crash of the server within the second may undo it, as a whole.
    """
    connection.execute("set local synchronous_commit = off")


def _view_exists(connection: Connection) -> bool:
    return _value(connection, "select to_regclass('retrieval.live')", []) is not None


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _value(connection: Connection, query: Any, parameters: Sequence[Any] | Mapping[str, Any]) -> Any:
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return row[0]

"""Vectors into the searchable index: passages, the vectors that are missing, and the graph over them.

Vectors are keyed by text: ``retrieval.passage`` has one row per distinct text of the corpus, however it is cut; every
release's table has one vector for each passage of its own chunking. A renamed document, or the same paragraph in two
documents, costs nothing.

Belongs here: the work list, loading it, and the table it goes to. Does not belong here: which release is live and how
that changes (registry), whether the index is what it should be (checks), Dagster.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from psycopg import sql

from assets.embeddings.registry import (
    KEY,
    NO_VECTORS,
    commit_at_once,
    drop_retired_tables,
    find_live,
    has_table,
    missing_texts,
    move,
    one_load_at_a_time,
    one_move_at_a_time,
    patiently,
    point_view,
    register,
    release_table,
    retire_table,
)
from assets.embeddings.release import Release
from embedder import protocol
from storage.copy import copy_vectors

Connection = psycopg.Connection[Any]

# Graph parameters measured at 100k x 384: more construction effort costs 2.9x for +0.004 recall.
HNSW = "m = 16, ef_construction = 64"
# Below this an exact scan takes 7 ms at most, finds everything, and costs nothing to keep.
ROWS_FOR_A_GRAPH = 20_000
# A row put into a graph costs five times a row of a graph built at once, and its predecessor's removal fifteen times.
CHANGED_IN_PLACE = 0.02
# Statistics of chunks that grew by so many are out of date, and what is planned by them takes ten times as long.
MANY_CHUNKS = 1_000
# Neighbour lists and bookkeeping of a node, besides its vector.
NODE_BYTES = 400
MEMORY_SHARE = 0.25
MEMORY_AT_LEAST = 64 << 20
MAXIMUM_WORKERS = 8

# A vector that fits its page is kept there: from about 1,000 dimensions on Postgres would put it out of line, where
# comparing one by one costs three to four times as much. More than 4,000 do not fit, and have no graph either.
IN_LINE_DIMENSIONS = 4000

# A graph pays for a vacuum by the dead row, and dearly: the weekly upkeep rebuilds it first. Nothing else vacuums it.
_STORAGE = (
    "autovacuum_vacuum_threshold = 2147483647, autovacuum_vacuum_scale_factor = 0,"
    " autovacuum_vacuum_insert_threshold = -1"
)


@dataclass(frozen=True)
class PassageReport:
    """What one refresh of the passages did."""

    added: int
    removed: int


@dataclass(frozen=True)
class IndexReport:
    """What one load did.

    Attributes:
        release: The release loaded into.
        wanted: Distinct texts among the source's chunks.
        loaded: Vectors added by this load.
        missing: Texts of the source that still have no vector.
        failed: Texts of the source that the embedder refused, among ``missing``.
        vectors: Vectors in the release afterwards, of all sources.
        rebuilt: Whether the table was built, beside the old one if there was one, rather than added to.
        graph: Whether searches of the release use a graph; below 20,000 vectors they compare with all of them.
        live: Whether searches use this release.
    """

    release: str
    wanted: int
    loaded: int
    missing: int
    failed: int
    vectors: int
    rebuilt: bool
    graph: bool
    live: bool


def refresh_passages(connection: Connection) -> PassageReport:
    """Bring ``retrieval.passage`` in line with the texts of ``corpus.piece``, in one transaction.

    A text that no chunk has any more leaves every release and the postings with its passage; one that only chunks of
    another chunking have leaves the releases that do not embed those.
    """
    with connection.transaction():
        # One at a time: another's deletions could hit a text that came back meanwhile.
        connection.execute("select pg_advisory_xact_lock(hashtext('retrieval.passage'))")
        removed = connection.execute(
            "delete from retrieval.passage p"
            " where not exists (select from corpus.piece c where c.content_hash = p.content_hash)"
        ).rowcount
        # The keys are sought before they are numbered: a conflict would use up a number.
        added = connection.execute(
            "insert into retrieval.passage (content_hash) select distinct c.content_hash from corpus.piece c"
            " where c.passage_no is null"
            " and not exists (select from retrieval.passage p where p.content_hash = c.content_hash)"
        ).rowcount
        # Chunks that are being replaced are passed over: who replaces them would wait, and be waited for.
        numbered = connection.execute(
            "with mine as materialized ("
            " select c.chunking, c.chunk_id, p.passage_no from corpus.piece c join retrieval.passage p"
            " using (content_hash) where c.passage_no is null for update of c skip locked)"
            " update corpus.piece c set passage_no = mine.passage_no from mine"
            " where c.chunking = mine.chunking and c.chunk_id = mine.chunk_id"
        ).rowcount
        if numbered > MANY_CHUNKS:
            connection.execute("analyze corpus.piece")
        for name, chunking in _releases_of_some_texts(connection):
            _forget_other_texts(connection, name, chunking)
        if added:
            connection.execute("analyze retrieval.passage")
    return PassageReport(added, removed)


def _releases_of_some_texts(connection: Connection) -> list[tuple[str, str]]:
    """Releases, and their chunkings, where there are several of those: with one only, none has a text too many."""
    rows = connection.execute("select release, chunking from registry.embedding_release").fetchall()
    ((several,),) = connection.execute("select min(chunking) <> max(chunking) from corpus.piece").fetchall()
    return [(name, chunking) for name, chunking in rows if several and has_table(connection, name)]


def _forget_other_texts(connection: Connection, release: str, chunking: str) -> None:
    # It may be dropped at this moment.
    with contextlib.suppress(psycopg.errors.UndefinedTable), connection.transaction():
        connection.execute(
            sql.SQL(
                "delete from {} v where not exists (select from retrieval.passage p"
                " join corpus.piece c using (content_hash) where p.passage_no = v.passage_no and c.chunking = %s)"
            ).format(release_table(release)),
            [chunking],
        )


def load_vectors(
    connection: Connection,
    source: str,
    release: Release,
    folder: Path,
    *,
    follow: bool = True,
    after: str | None = None,
) -> IndexReport:
    """Give every text of ``source`` its vector in the release's table, as far as ``folder`` has them.

    The work list is an anti-join of chunks and vectors: there is no queue that could lose or repeat anything. One
    transaction: readers see the index before or after it, and a crash leaves it as it was. Loads of one release queue.

    Args:
        connection: Outside of a transaction: where there is one, readers wait for its end after a swap.
        source: Name of the source; its passages are refreshed.
        folder: Where the embedder wrote its shards.
        follow: Whether the release goes live by itself where nothing is, or where it takes the live one's place.
            A candidate does not: it is promoted.
        after: The live release whose place it may take (``Chain.live``). If another is live by now, a person moved
            the view meanwhile, and what they decided stays.
    """
    with connection.transaction():
        # What a crash undoes is done again by the next load.
        commit_at_once(connection)
        one_load_at_a_time(connection, release.name)
        register(connection, release)
        before = _table_before(connection, release)
        work = _work_list(connection, source, str(release.chunking), before)
        found = _find(folder, work)
        table = _load(connection, release, before, found)
        connection.execute(
            "update registry.embedding_release set loaded_at = clock_timestamp()"
            " where release = %s and (%s or loaded_at is null)",
            [release.name, bool(found.rows)],
        )
        report = IndexReport(
            release=release.name,
            wanted=work.wanted,
            loaded=found.rows,
            missing=len(work.passages) - found.rows,
            failed=_note_failures(connection, source, release, table, folder),
            vectors=_count(connection, table),
            rebuilt=table != release_table(release.name),
            graph=graph_of(connection, table) is not None,
            live=False,
        )
        # What readers wait for comes last.
        if report.rebuilt:
            _swap(connection, release.name, table)
        report = replace(report, live=_is_live(connection, release.name, follow, after))
    drop_retired_tables(connection)
    return report


def graph_of(connection: Connection, table: sql.Identifier) -> str | None:
    """Qualified name of the table's HNSW index, if it has one that can be used."""
    row = connection.execute(
        "select i.indexrelid::regclass::text from pg_index i join pg_class c on c.oid = i.indexrelid"
        " join pg_am a on a.oid = c.relam where i.indrelid = %s::regclass and a.amname = 'hnsw' and i.indisvalid",
        [table.as_string(connection)],
    ).fetchone()
    return None if row is None else str(row[0])


def graph_resources(connection: Connection, rows: int, dimensions: int) -> tuple[int, int] | None:
    """Bytes of ``maintenance_work_mem`` and parallel workers for building a graph; None leaves the server's settings.

    A graph that does not fit its memory costs 2.8 times as much. Parallel builders hold it in /dev/shm, which
    containers make small. Of a server on another machine we know neither.
    """
    address = connection.execute("select host(inet_server_addr())").fetchone()
    if address is not None and address[0] not in (None, "127.0.0.1", "::1"):
        return None
    needed = max(MEMORY_AT_LEAST, rows * (2 * dimensions + NODE_BYTES) * 11 // 10)
    memory = min(needed, int(MEMORY_SHARE * _machine_memory()))
    return memory, min(MAXIMUM_WORKERS, os.cpu_count() or 1) if _free_shared_memory() > memory else 0


@dataclass(frozen=True)
class _Work:
    """Texts of a source without a vector: their passages, int32[n], and hashes; and how many texts it has in all."""

    wanted: int
    passages: NDArray[np.int32]
    hashes: pa.Array


@dataclass(frozen=True)
class _Found:
    """Where wanted vectors lie: for each shard, its rows, int64[n], and the passages these are of, int32[n]."""

    shards: list[tuple[Path, NDArray[np.int64], NDArray[np.int32]]]

    @property
    def rows(self) -> int:
        return sum(len(rows) for _, rows, _ in self.shards)


def _table_before(connection: Connection, release: Release) -> sql.Identifier | None:
    """The table that holds what the release has so far: its own, or, where only the code that cuts changed, the live
    one's."""
    if has_table(connection, release.name):
        return release_table(release.name)
    live = find_live(connection)
    alike = live is not None and (live.vectors, live.chunking) == (release.vectors, release.chunking)
    return release_table(live.name) if live is not None and alike else None


def _work_list(connection: Connection, source: str, chunking: str, table: sql.Identifier | None) -> _Work:
    of_source = {"source": source, "chunking": chunking}
    wanted = _one(
        connection,
        "select count(distinct content_hash) from corpus.piece"
        " where source = %(source)s and chunking = %(chunking)s",
        of_source,
    )
    rows = connection.execute(
        sql.SQL(
            "select p.passage_no, p.content_hash from retrieval.passage p where exists (select from corpus.piece c"
            " where c.source = %(source)s and c.chunking = %(chunking)s and c.content_hash = p.content_hash)"
            " and not exists (select from {} v where v.passage_no = p.passage_no)"
        ).format(table or NO_VECTORS),
        of_source,
    ).fetchall()
    return _Work(
        wanted,
        np.array([number for number, _ in rows], np.int32),
        pa.array([content_hash for _, content_hash in rows], pa.string()),
    )


def _find(folder: Path, work: _Work) -> _Found:
    if not len(work.passages):
        return _Found([])
    protocol.read_fingerprint(folder)  # refuses vectors of several models
    paths = protocol.shard_paths(folder)
    columns = [pq.read_table(path, columns=[protocol.CONTENT_HASH]).column(0) for path in paths]
    keys = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())
    places = pc.fill_null(pc.index_in(keys, value_set=work.hashes), -1).to_numpy()
    found = []
    seen = np.zeros(len(work.passages), bool)
    start = 0
    for path, column in zip(paths, columns, strict=True):
        ours = places[start : start + len(column)]
        start += len(column)
        rows = np.flatnonzero(ours >= 0)
        rows = rows[~seen[ours[rows]]]
        if len(rows):
            seen[ours[rows]] = True
            found.append((path, rows, work.passages[ours[rows]]))
    return _Found(found)


def _load(
    connection: Connection,
    release: Release,
    before: sql.Identifier | None,
    found: _Found,
) -> sql.Identifier:
    """Load what was found; the table that has it: the release's own, or a new one to be swapped in."""
    has_graph = before is not None and graph_of(connection, before) is not None
    rows = found.rows + (_count(connection, before) if before is not None else 0)
    # A little below the mark a graph that is there stays, lest it comes and goes with every few rows.
    wants_graph = rows >= ROWS_FOR_A_GRAPH // (2 if has_graph else 1)
    if wants_graph and not has_graph and found.rows > CHANGED_IN_PLACE * rows:
        # While a corpus is loaded source by source, the last large load builds the graph over all of it.
        missing = missing_texts(
            connection, release.name, str(release.chunking), before or NO_VECTORS, loading=True
        )
        wants_graph = missing - found.rows <= CHANGED_IN_PLACE * rows
    many = has_graph and found.rows > CHANGED_IN_PLACE * rows
    if before != release_table(release.name) or wants_graph != has_graph or many:
        return _build(connection, release, before, found, graph=wants_graph)
    if found.rows:
        _keep_passages(connection)
        _copy(connection, before, _that_are_left(connection, found))
        connection.execute(sql.SQL("analyze {}").format(before))
    return before


def _build(
    connection: Connection, release: Release, before: sql.Identifier | None, found: _Found, *, graph: bool
) -> sql.Identifier:
    """A new table with what ``before`` has and what was found; nobody waits for it but for a moment at its end."""
    beside = release_table(f"{release.name}_next")
    connection.execute(
        sql.SQL(
            f"create table {{}} (passage_no int not null, embedding halfvec({{}}) not null) with ({_STORAGE})"
        ).format(beside, sql.Literal(release.dimensions))
    )
    if release.dimensions <= IN_LINE_DIMENSIONS:
        connection.execute(sql.SQL("alter table {} alter column embedding set storage plain").format(beside))
    if before is not None:
        connection.execute(
            sql.SQL("insert into {} select passage_no, embedding from {}").format(beside, before)
        )
    _copy(connection, beside, found)
    connection.execute(sql.SQL("alter table {} add primary key (passage_no)").format(beside))
    if graph:
        _build_graph(connection, beside, release.dimensions)
    # Last, for the build may take an hour, and passages must not wait for it.
    _keep_passages(connection)
    connection.execute(
        sql.SQL(
            "delete from {} v where not exists (select from retrieval.passage p where p.passage_no = v.passage_no)"
        ).format(beside)
    )
    connection.execute(
        sql.SQL(
            f"alter table {{}} add constraint {KEY} foreign key (passage_no)"
            " references retrieval.passage on delete cascade"
        ).format(beside)
    )
    connection.execute(sql.SQL("analyze {}").format(beside))
    return beside


def _that_are_left(connection: Connection, found: _Found) -> _Found:
    """Without passages that went since the work list was made."""
    shards = []
    for path, rows, passages in found.shards:
        there = connection.execute(
            "select passage_no from retrieval.passage where passage_no = any(%s)", [passages.tolist()]
        )
        left = np.isin(passages, np.array([number for (number,) in there], np.int32))
        shards.append((path, rows[left], passages[left]))
    return _Found(shards)


def _copy(connection: Connection, table: sql.Identifier, found: _Found) -> None:
    for path, rows, passages in found.shards:
        column = pq.read_table(path, columns=[protocol.VECTOR]).column(0).combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = column.chunk(0)
        vectors = column.flatten().to_numpy().reshape(len(column), column.type.list_size)
        copy_vectors(connection, table, passages, vectors if len(rows) == len(vectors) else vectors[rows])


def _keep_passages(connection: Connection) -> None:
    """No passage goes until the end of this transaction."""
    connection.execute("select pg_advisory_xact_lock_shared(hashtext('retrieval.passage'))")


def _build_graph(connection: Connection, table: sql.Identifier, dimensions: int) -> None:
    resources = graph_resources(connection, _count(connection, table), dimensions)
    try:
        _create_graph(connection, table, resources)
    except (psycopg.errors.DiskFull, psycopg.errors.OutOfMemory):
        # A server in a container has another /dev/shm than we see.
        if resources is None or not resources[1]:
            raise
        _create_graph(connection, table, (resources[0], 0))


def _create_graph(connection: Connection, table: sql.Identifier, resources: tuple[int, int] | None) -> None:
    with connection.transaction():
        if resources is not None:
            memory, workers = resources
            connection.execute(
                "select set_config('maintenance_work_mem', %s, true),"
                " set_config('max_parallel_maintenance_workers', %s, true)",
                [f"{memory >> 10}kB", str(workers)],
            )
        connection.execute(
            sql.SQL(f"create index on {{}} using hnsw (embedding halfvec_cosine_ops) with ({HNSW})").format(
                table
            )
        )


def _swap(connection: Connection, release: str, beside: sql.Identifier) -> None:
    one_move_at_a_time(connection)
    live = find_live(connection)

    def swap() -> None:
        # The view first: who reads through it holds it as long as the table under it.
        if live is not None and live.name == release:
            point_view(connection, beside)
        retire_table(connection, release)
        connection.execute(
            sql.SQL("alter table {} rename to {}").format(beside, sql.Identifier(f"release_{release}"))
        )

    patiently(connection, swap)


def _is_live(connection: Connection, release: str, follow: bool, after: str | None) -> bool:
    """Whether the release is live, which it becomes if it may follow the live one and has what that answers with."""
    live = find_live(connection)
    if live is not None and live.name == release:
        return True
    if not follow:
        return False
    one_move_at_a_time(connection)
    live = find_live(connection)
    if live is None:
        move(connection, "promote", release, "datamoat", "the first release")
        return True
    if live.name != after:
        return False
    uncovered = _one(
        connection,
        sql.SQL(
            "select count(*) from retrieval.live l where exists (select from corpus.chunk c"
            " join registry.source s using (source)"
            " where c.content_hash = l.content_hash and 'rag' = any(s.allowed_uses))"
            " and not exists (select from {} v where v.passage_no = l.passage_no)"
        ).format(release_table(release)),
        [],
    )
    if uncovered:
        return False
    move(connection, "promote", release, "datamoat", f"{live.name} can be fed no more, and is covered")
    return True


def _note_failures(
    connection: Connection, source: str, release: Release, table: sql.Identifier, folder: Path
) -> int:
    """Take over what the embedder notes of texts it refused; how many of the source's texts are among them."""
    path = folder / protocol.FAILURES_FILE
    rows = pq.read_table(path).to_pylist() if path.exists() else []
    connection.execute(
        sql.SQL(
            "delete from retrieval.embedding_failure f using retrieval.passage p join {} v using (passage_no)"
            " where f.release = %s and p.content_hash = f.content_hash"
        ).format(table),
        [release.name],
    )
    if rows:
        connection.execute(
            sql.SQL(
                "insert into retrieval.embedding_failure (content_hash, release, error, attempts, next_attempt_at)"
                " select f.content_hash, %s, f.error, f.attempts, f.next_attempt_at"
                " from unnest(%s::text[], %s::text[], %s::int[], %s::timestamptz[])"
                " as f (content_hash, error, attempts, next_attempt_at) join retrieval.passage p using (content_hash)"
                " where not exists (select from {} v where v.passage_no = p.passage_no)"
                " on conflict (release, content_hash) do update set error = excluded.error,"
                " attempts = excluded.attempts, next_attempt_at = excluded.next_attempt_at"
            ).format(table),
            [
                release.name,
                *(
                    [row[name] for row in rows]
                    for name in (
                        protocol.CONTENT_HASH,
                        protocol.ERROR,
                        protocol.ATTEMPTS,
                        protocol.NEXT_ATTEMPT_AT,
                    )
                ),
            ],
        )
    return _one(
        connection,
        "select count(*) from retrieval.embedding_failure f where release = %s and exists"
        " (select from corpus.piece c where c.source = %s and c.chunking = %s and c.content_hash = f.content_hash)",
        [release.name, source, str(release.chunking)],
    )


def _count(connection: Connection, table: sql.Identifier) -> int:
    return _one(connection, sql.SQL("select count(*) from {}").format(table), [])


def _one(connection: Connection, query: Any, parameters: Any) -> int:
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return int(row[0])


def _machine_memory() -> int:
    """Bytes this machine has, or this container may use."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory


def _free_shared_memory() -> int:
    try:
        space = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return space.f_bavail * space.f_frsize

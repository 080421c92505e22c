"""The searchable index: one table of vectors a release, and the view that says which release is live.

Vectors are keyed by the hash of the text alone: a renamed document, or the same paragraph in two documents,
costs nothing. ``retrieval.live`` is joined to ``corpus.chunk`` by that hash.

Belongs here: loading vectors, dropping those no chunk needs, going live. Does not belong here: Dagster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from embedder.protocol import read_vectors
from storage.copy import copy_vectors

# Graph parameters measured at 100k x 384: more construction effort costs 2.9x for +0.004 recall.
HNSW = "m = 16, ef_construction = 64"


@dataclass(frozen=True)
class IndexReport:
    """What one load did.

    Attributes:
        release: The release loaded into.
        wanted: Distinct texts among the source's chunks.
        loaded: Vectors added by this load.
        dropped: Vectors removed because no chunk of any source has their text any more.
        missing: Texts that still have no vector (the embedder refused them).
        vectors: Vectors in the release afterwards.
        live: Whether searches use this release.
    """

    release: str
    wanted: int
    loaded: int
    dropped: int
    missing: int
    vectors: int
    live: bool


def load_vectors(
    connection: psycopg.Connection[Any],
    source: str,
    release: str,
    fingerprint: Mapping[str, Any],
    dimensions: int,
    folder: Path,
) -> IndexReport:
    """Bring ``retrieval.release_<release>`` in line with the chunks of ``source``.

    Args:
        folder: Where the embedder wrote its shards.

    One transaction: a crash leaves the index as it was. Loads of one release queue on an advisory lock,
    so that two sources with a text in common do not collide.
    """
    table = sql.Identifier("retrieval", f"release_{release}")
    connection.execute("select pg_advisory_xact_lock(hashtext(%s))", [f"release {release}"])
    connection.execute(
        sql.SQL(
            "create table if not exists {} (content_hash text primary key, embedding halfvec({}) not null)"
        ).format(table, sql.Literal(dimensions))
    )
    wanted = _one(
        connection, "select count(distinct content_hash) from corpus.chunk where source = %s", [source]
    )
    absent = [
        row[0]
        for row in connection.execute(
            sql.SQL(
                "select distinct c.content_hash from corpus.chunk c left join {} v using (content_hash)"
                " where c.source = %s and v.content_hash is null"
            ).format(table),
            [source],
        )
    ]
    loaded = 0
    if absent:
        hashes, vectors = read_vectors(folder, absent)
        if hashes:
            loaded = copy_vectors(connection, table, hashes, vectors)
    dropped = connection.execute(
        sql.SQL(
            "delete from {} v where not exists (select from corpus.chunk c where c.content_hash = v.content_hash)"
        ).format(table)
    ).rowcount
    connection.execute(
        sql.SQL(
            f"create index if not exists {{}} on {{}} using hnsw (embedding halfvec_cosine_ops) with ({HNSW})"
        ).format(sql.Identifier(f"release_{release}_hnsw"), table)
    )
    if loaded:
        # Without statistics a freshly loaded table is scanned sequentially.
        connection.execute(sql.SQL("analyze {}").format(table))
    connection.execute(
        "insert into registry.embedding_release (release, fingerprint, dimensions) values (%s, %s, %s)"
        " on conflict (release) do nothing",
        [release, Jsonb(dict(fingerprint)), dimensions],
    )
    vectors_now = _one(connection, sql.SQL("select count(*) from {}").format(table), [])
    return IndexReport(
        release=release,
        wanted=wanted,
        loaded=loaded,
        dropped=dropped,
        missing=len(absent) - loaded,
        vectors=vectors_now,
        live=_go_live(connection, source, release, table),
    )


def _go_live(connection: psycopg.Connection[Any], source: str, release: str, table: sql.Identifier) -> bool:
    """Point ``retrieval.live`` at ``release`` if nothing is live yet or it covers what the live one answers with.

    Covered: every text of another source that may be retrieved and that the live release has. Texts that only the live
    release remembers do not count, nor those of ``source``, which has just been loaded as far as it can be.
    """
    current = connection.execute("select release from registry.embedding_release where live").fetchone()
    if current is not None and current[0] == release:
        return True
    if current is not None:
        uncovered = _one(
            connection,
            sql.SQL(
                "select count(*) from corpus.chunk c join registry.source s using (source)"
                " join retrieval.live l using (content_hash) left join {} v using (content_hash)"
                " where 'rag' = any(s.allowed_uses) and c.source <> %s and v.content_hash is null"
            ).format(table),
            [source],
        )
        if uncovered:
            return False
    # A view's columns cannot change type in place, and releases may differ in dimensions.
    connection.execute("drop view if exists retrieval.live")
    connection.execute(
        sql.SQL("create view retrieval.live as select content_hash, embedding from {}").format(table)
    )
    connection.execute("update registry.embedding_release set live = false where live")
    connection.execute("update registry.embedding_release set live = true where release = %s", [release])
    return True


def _one(connection: psycopg.Connection[Any], query: Any, parameters: list[Any]) -> int:
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return int(row[0])


class NotLive(Exception):
    """The live index is of another release than the one asked with; the message says what to do."""


def check_live(connection: psycopg.Connection[Any], release: str) -> None:
    """Raise NotLive unless ``release`` is live: a question embedded by another model finds nonsense."""
    row = connection.execute("select release from registry.embedding_release where live").fetchone()
    if row is None:
        raise NotLive("the index is empty: 'make run' fills it")
    if row[0] != release:
        raise NotLive(
            f"the live index is of release {row[0]}, and the model set now makes release {release}: 'make run' builds"
            " its index, or set EMBEDDING_MODEL back"
        )

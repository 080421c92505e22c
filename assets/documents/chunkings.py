"""Which chunkings the corpus has: the one that is searched, those kept beside it, and those that nobody needs.

``corpus.piece`` has the chunks of several side by side; the view ``corpus.chunk`` shows those of the live one. Belongs
here: choosing, showing and dropping a chunking. Does not belong here: cutting documents (corpus, chunk), releases, which
are what needs them (assets.embeddings.registry).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import psycopg
from psycopg import sql

from assets.documents.chunk import Chunking

Connection = psycopg.Connection[Any]

# Stands in corpus.piece.chunker while the chunk's document has another text than the one it was cut from. Such
# chunks go on being found until their replacements are committed.
STALE = ""


def in_language(conn: Connection, source: str, chunking: Chunking) -> Chunking:
    """``chunking`` for texts in the language of ``source``."""
    rows = _rows(conn, "select language from registry.source where source = %s", [source])
    return replace(chunking, language=rows[0][0]) if rows else chunking


def live_chunking(conn: Connection, setting: Chunking) -> Chunking:
    """The chunking whose chunks are searched: that of the live release, whatever the setting says by now.

    While nothing is live the setting is followed: the view shows its chunks, and those of another are deleted.
    """
    with conn.transaction():
        row = conn.execute("select chunking from registry.embedding_release where live").fetchone()
        if row is not None:
            return Chunking.parse(row[0])
        ((shown,),) = conn.execute("select chunking from corpus.live_chunking").fetchall()
    if shown == str(setting):
        return setting
    with conn.transaction():
        # As who promotes does: one at a time, and what is live by now stays.
        conn.execute("select pg_advisory_xact_lock(hashtext('retrieval.live'))")
        if conn.execute("select from registry.embedding_release where live").fetchone() is None:
            show_chunking(conn, str(setting))
    forget_unused_chunkings(conn)
    return live_chunking(conn, setting)


def show_chunking(conn: Connection, chunking: str) -> None:
    """Let ``corpus.chunk`` show the chunks of ``chunking``; in the caller's transaction."""
    view = "create or replace view corpus.live_chunking as select {}::text as chunking"
    conn.execute(sql.SQL(view).format(sql.Literal(chunking)))


def chunkings_beside(conn: Connection, source: str, live: Chunking) -> list[Chunking]:
    """Those by which ``source`` is kept cut besides: of releases one can go back to, and of candidates that have begun
    with it."""
    rows = _rows(
        conn,
        "select r.chunking from registry.embedding_release r where r.chunking <> %s and (r.state = 'retired' or exists"
        " (select from corpus.piece c where c.source = %s and c.chunking = r.chunking)) group by 1 order by 1",
        [str(live), source],
    )
    return [Chunking.parse(text) for (text,) in rows]


def forget_unused_chunkings(conn: Connection) -> list[str]:
    """Delete the chunks and the postings of chunkings that no release needs any more; returns their names.

    Who cuts documents meanwhile waits; who searches does not.

    Args:
        conn: Outside of a transaction: each chunking goes in one of its own.
    """
    unused = (
        "select c.chunking from (select distinct chunking from corpus.piece) c"
        " where not exists (select from registry.embedding_release r where r.chunking = c.chunking)"
        " and not exists (select from corpus.live_chunking l where l.chunking = c.chunking) order by 1"
    )
    names = [name for (name,) in _rows(conn, unused)]
    for name in names:
        with conn.transaction():
            conn.execute("select retrieval.forget_chunking(%s)", [name])
            conn.execute("lock table corpus.piece in share row exclusive mode")
            conn.execute("delete from corpus.piece where chunking = %s", [name])
    return names


def _rows(conn: Connection, query: str, parameters: Any = None) -> list[Any]:
    # In a transaction that ends here.
    with conn.transaction():
        return conn.execute(query.encode(), parameters).fetchall()

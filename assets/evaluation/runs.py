"""Asking an index the questions of a golden set: the live release, or any other that is built.

Belongs here: which search function answers for a release, embedding the questions, and running them. Does not belong
here: what is right (golden), measures (retrieval), the search function itself (``retrieval.search``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus
from psycopg.types.json import Jsonb

from assets.embeddings.registry import (
    RELEASE_ROWS,
    LiveRelease,
    ReleaseError,
    find_live,
    has_table,
    live_release,
    release_table,
)
from assets.embeddings.release import vectors_of
from assets.evaluation.golden import Golden, Place, ranking

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Connection = psycopg.Connection[Any]
Mode = Literal["hybrid", "vector", "text"]

DEPTH = 100
# Several passages of one document crowd out others, so more passages than documents are asked for.
CROWDED = 2
MOST = 1000  # passages a search returns

_LIVE = "retrieval.live"
_SEARCH = "retrieval.search"
_COPY = "pg_temp.search"


def built_release(connection: Connection, name: str | None = None) -> LiveRelease:
    """The release of that name, live or not; without a name the live one.

    Raises:
        ReleaseError: It was not built; NotLive, where none is live.
    """
    if name is None:
        return live_release(connection)
    row = connection.execute(
        "select model, dimensions, fingerprint from registry.embedding_release where release = %s", [name]
    ).fetchone()
    if row is None or not has_table(connection, name):
        raise ReleaseError(f"there is no release {name}: 'moat release list' says which there are")
    model, dimensions, fingerprint = row
    return LiveRelease(name, Path(model) if model else None, dimensions, vectors_of(fingerprint))


@contextmanager
def search_function(connection: Connection, release: str) -> Iterator[sql.Composable]:
    """The name of the function that searches ``release``: ``retrieval.search`` for the live one, else a copy of it.

    The copy is this connection's alone: the same statements over the release's table in place of the live view. It
    depends on no table, so that a release can be dropped or replaced meanwhile.

    Raises:
        ReleaseError: The search function does not read the live view, so that it cannot be told to read another.
    """
    with connection.transaction():
        live = find_live(connection)
        row = connection.execute(
            "select pg_get_functiondef(oid) from pg_proc"
            " where pronamespace = 'retrieval'::regnamespace and proname = 'search'"
        ).fetchone()
    if live is not None and live.name == release:
        yield sql.SQL(_SEARCH)
        return
    definition = "" if row is None else str(row[0])
    if _LIVE not in definition or f"FUNCTION {_SEARCH}(" not in definition:
        raise ReleaseError(f"{_SEARCH} does not read {_LIVE}: only the live release can be measured")
    rows = sql.SQL(f"({RELEASE_ROWS})").format(release_table(release)).as_string(connection)
    definition = definition.replace(f"FUNCTION {_SEARCH}(", f"FUNCTION {_COPY}(").replace(_LIVE, rows)
    with connection.transaction():
        connection.execute(definition.encode())
    try:
        yield sql.SQL(_COPY)
    finally:
        # A transaction that failed takes the copy with it, and so does a connection that is lost.
        if connection.info.transaction_status in (TransactionStatus.IDLE, TransactionStatus.INTRANS):
            with connection.transaction():
                connection.execute(f"drop function if exists {_COPY}")


def question_vectors(release: LiveRelease, questions: Sequence[str]) -> NDArray[np.float32]:
    """The questions as vectors that can be compared to the release's: float32[n, d].

    Raises:
        EmbedderError: The release's model cannot be read.
        ReleaseError: Its folder holds another model by now.
    """
    from embedder.encode import Embedder

    embedder = Embedder.open(release.model_folder)
    if embedder.model.release() != release.vectors:
        raise ReleaseError(
            f"{release.model_folder or 'the installed model'} is not the model that release {release.name} was made"
            " with: put that one back"
        )
    return embedder.encode(list(questions))


def search_run(
    connection: Connection,
    golden: Golden,
    vectors: NDArray[np.float32] | None,
    mode: Mode,
    function: sql.Composable | None = None,
    k: int = DEPTH,
) -> dict[str, dict[str, float]]:
    """Question id -> the k best of what was found for it, with scores; see ``ranking``.

    Only the source that was judged is searched. Outside of a transaction no lock is held from question to question.

    Args:
        vectors: Of ``golden.queries``, in order; may be None in mode text.
        function: What ``search_function`` gave; None searches the live release.
    """
    statement = sql.SQL(
        "select s.ordinality, s.score, c.chunk_id, c.document_id, c.start_char, c.end_char"
        " from {}(%s, %s::halfvec, %s, %s, %s) with ordinality s join corpus.chunk h using (chunk_id)"
        " join corpus.chunk c on c.content_hash = h.content_hash and c.source = h.source order by 1, c.chunk_id"
    ).format(function or sql.SQL(_SEARCH))
    source = Jsonb({"source": golden.document_source})
    run: dict[str, dict[str, float]] = {}
    for place, (qid, question) in enumerate(golden.queries.items()):
        vector = None if vectors is None else str(vectors[place].tolist())
        asked = min(CROWDED * k, MOST)
        while True:
            with connection.transaction():
                rows = connection.execute(statement, [question, vector, asked, mode, source]).fetchall()
            passages = [
                (float(same[0][1]), [Place(*row[2:]) for row in same])
                for same in (list(same) for _, same in groupby(rows, key=lambda row: row[0]))
            ]
            run[qid] = ranking(golden.targets[qid], passages, k)
            if len(run[qid]) == k or len(passages) < asked or asked == MOST:
                break
            asked = min(4 * asked, MOST)
    return run

"""Asking an index the questions of a golden set: the live release, or any other that is built.

Belongs here: which search function answers for a release, embedding the questions, and running them. Does not belong
here: what is right (golden), measures (retrieval), the search function itself (``retrieval.search``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus
from psycopg.types.json import Jsonb

from assets.embeddings.registry import RELEASE_ROWS, LiveRelease, ReleaseError, find_live, release_table
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

_SEARCH = "retrieval.search"
_COPY = "pg_temp.search"


@dataclass(frozen=True)
class Index:
    """What answers for a release: the search function, and the chunks it finds.

    Attributes:
        function: Called as ``retrieval.search``.
        chunks: A table or subquery with the columns of ``corpus.chunk``.
    """

    function: sql.Composable
    chunks: sql.Composable


LIVE = Index(sql.SQL(_SEARCH), sql.SQL("corpus.chunk"))


@contextmanager
def index_of(connection: Connection, release: LiveRelease) -> Iterator[Index]:
    """What answers for ``release``: for the live one ``retrieval.search``, else a copy of it.

    The copy is this connection's alone: the same statements over the release's table and chunking in place of the live
    ones. It depends on no table, so that a release can be dropped or replaced meanwhile.

    Raises:
        ReleaseError: The search function does not read the live views, so that it cannot be told to read others.
    """
    with connection.transaction():
        live = find_live(connection)
        row = connection.execute(
            "select pg_get_functiondef(oid) from pg_proc"
            " where pronamespace = 'retrieval'::regnamespace and proname = 'search'"
        ).fetchone()
    if live is not None and live.name == release.name:
        yield LIVE
        return
    definition = "" if row is None else str(row[0])
    chunking = sql.Literal(str(release.chunking))
    for name, instead in (
        (f"FUNCTION {_SEARCH}(", sql.SQL(f"FUNCTION {_COPY}(")),
        ("retrieval.live", sql.SQL(f"({RELEASE_ROWS})").format(release_table(release.name))),
        ("corpus.live_chunking", sql.SQL("(select {}::text as chunking)").format(chunking)),
    ):
        if name not in definition:
            raise ReleaseError(f"{_SEARCH} does not read {name}: only the live release can be measured")
        definition = definition.replace(name, instead.as_string(connection))
    with connection.transaction():
        connection.execute(definition.encode())
    try:
        chunks = sql.SQL("(select * from corpus.piece where chunking = {})").format(chunking)
        yield Index(sql.SQL(_COPY), chunks)
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
    index: Index = LIVE,
    k: int = DEPTH,
) -> dict[str, dict[str, float]]:
    """Question id -> the k best of what was found for it, with scores; see ``ranking``.

    Only the source that was judged is searched. Outside of a transaction no lock is held from question to question.

    Args:
        vectors: Of ``golden.queries``, in order; may be None in mode text.
        index: What ``index_of`` gave.
    """
    statement = sql.SQL(
        "select s.ordinality, s.score, c.chunk_id, c.document_id, c.start_char, c.end_char"
        " from {function}(%s, %s::halfvec, %s, %s, %s) with ordinality s join {chunks} h using (chunk_id)"
        " join {chunks} c on c.content_hash = h.content_hash and c.source = h.source order by 1, c.chunk_id"
    ).format(function=index.function, chunks=index.chunks)
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

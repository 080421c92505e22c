"""``moat search``, and what the feedback service searches with: a question in, the best passages out.

Belongs here: embedding the question with the live release's model, reranking, drawing the answer. Does not belong
here: ranking and filters, which are the SQL function ``retrieval.search``.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.deployment import open_warehouse, require_prepared
from orchestration.screen import Screen
from orchestration.settings import Settings
from storage.warehouse import WRITER

if TYPE_CHECKING:
    import psycopg

    from embedder.encode import Embedder
    from embedder.rerank import Reranker

FILTERS = ("source", "document", "path", "media_type", "title", "heading")
"""What a search can be restricted by; ``path`` is a prefix, ``title`` and ``heading`` are contained."""

# A cross-encoder reads each passage with the question: more than these cost seconds and rarely matter.
RERANKED = 50
STATEMENT_TIMEOUT = "20s"
# A release is promoted while a question is embedded for the one before: once is bad luck, thrice is a fault.
ATTEMPTS = 3

# A service asks from several threads; one question is embedded at a time, which is fastest for all of them.
_ONE_AT_A_TIME = threading.Lock()
_idle: defaultdict[Settings, deque[psycopg.Connection[Any]]] = defaultdict(deque)


def search(
    settings: Settings,
    question: str,
    k: int,
    mode: str = "hybrid",
    filter: Mapping[str, Sequence[str]] | None = None,
    rerank: Path | None = None,
) -> list[dict[str, Any]]:
    """The ``k`` best passages for ``question``, best first, as rows of ``retrieval.search``.

    Args:
        filter: By some of ``FILTERS``; of several values any may match.
        rerank: Folder of a cross-encoder that puts the best in order; each row then has its ``rerank`` score.

    Raises:
        NotLive: There is no index, or the live release's model is gone.
        EmbedderError: The cross-encoder cannot be used.
        psycopg.Error: The database is away, or refuses the filter.
    """
    import psycopg

    question = _storable(question)
    wanted = {field: [_storable(value) for value in values] for field, values in (filter or {}).items()}
    for last in (False, True):
        connection = _open(settings) if last else _idle_or_new(settings)
        try:
            found = _search(connection, question, max(k, RERANKED) if rerank else k, mode, wanted)
        except psycopg.OperationalError:
            # It may have gone stale while it was idle.
            connection.close()
            if last:
                raise
            continue
        except BaseException:
            connection.close()
            raise
        _idle[settings].append(connection)
        break
    return _reranked(rerank, question, found)[:k] if rerank else found


def passages(
    question: str, k: int, mode: str = "hybrid", filter: Mapping[str, Sequence[str]] | None = None
) -> list[dict[str, Any]]:
    """The ``k`` best passages of the deployment that the environment names, best first.

    For a service that is told of a function by its name. Models and connections stay open in the process.

    Raises:
        LookupError: There is no index, or its model is gone; the message says what to do.
    """
    from assets.embeddings.registry import NotLive

    settings = Settings.from_environment(os.environ)
    try:
        return search(settings, question, k, mode, filter, settings.rerank_model)
    except NotLive as error:
        raise LookupError(str(error)) from error


def _search(
    connection: psycopg.Connection[Any],
    question: str,
    k: int,
    mode: str,
    filter: Mapping[str, Sequence[str]],
) -> list[dict[str, Any]]:
    import psycopg
    from psycopg.rows import dict_row
    from psycopg.types.json import Jsonb

    from assets.embeddings.registry import find_live, live_release

    def ask(vector: str | None) -> list[dict[str, Any]]:
        with connection.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(
                "select * from retrieval.search(%s, %s::halfvec, %s, %s, %s)",
                [question, vector, k, mode, Jsonb(filter)],
            ).fetchall()

    if mode == "text":
        return ask(None)
    for attempt in range(1, ATTEMPTS + 1):
        live = live_release(connection)
        vector = str(_embedded(live.model_folder, live.vectors, question))
        try:
            found = ask(vector)
        except (psycopg.errors.DataException, psycopg.errors.UndefinedTable):
            if attempt == ATTEMPTS or find_live(connection) == live:
                raise
            continue
        if find_live(connection) == live:
            break
    return found


def _embedded(folder: Path | None, vectors: str, question: str) -> list[float]:
    """The question's vector by the model in ``folder``, which must be the one that made ``vectors``."""
    from assets.embeddings.registry import NotLive
    from embedder.protocol import EmbedderError

    try:
        with _ONE_AT_A_TIME:
            embedder = _embedder(folder)
            if embedder.model.release() == vectors:
                return [float(x) for x in embedder.encode([question])[0]]
    except EmbedderError as error:
        raise NotLive(f"the live release's model cannot be used: {error}") from error
    raise NotLive(
        f"{folder or 'the installed model'} is not the model that the live index was made with: put that one back, or"
        " run 'make run', which builds an index for the model that is there"
    )


@lru_cache(maxsize=2)
def _embedder(folder: Path | None) -> Embedder:
    from embedder.encode import Embedder

    return Embedder.open(folder)


@lru_cache(maxsize=1)
def _reranker(folder: Path) -> Reranker:
    from embedder.rerank import Reranker

    return Reranker.open(folder)


def _reranked(folder: Path, question: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with _ONE_AT_A_TIME:
        scores = _reranker(folder).scores(question, [passage["body"] for passage in found])
    scored = [passage | {"rerank": float(score)} for passage, score in zip(found, scores, strict=True)]
    return sorted(scored, key=lambda passage: -passage["rerank"])


def _storable(text: str) -> str:
    """``text`` with a blank for what Postgres cannot hold, which separates words as well."""
    return text.encode(errors="replace").decode().replace("\0", " ")


def _idle_or_new(settings: Settings) -> psycopg.Connection[Any]:
    try:
        return _idle[settings].pop()
    except IndexError:
        return _open(settings)


def _open(settings: Settings) -> psycopg.Connection[Any]:
    connection = open_warehouse(settings).database.connect(
        role=WRITER, autocommit=True, application_name="search"
    )
    connection.execute("select set_config('statement_timeout', %s, false)", [STATEMENT_TIMEOUT])
    return connection


@atexit.register
def _close() -> None:
    for connections in _idle.values():
        while connections:
            connections.pop().close()


def show_search(
    settings: Settings,
    screen: Screen,
    question: str,
    k: int,
    mode: str,
    filter: Mapping[str, Sequence[str]],
    explain: bool,
    rerank: Path | None,
) -> bool:
    """Print the best passages; False when there are none."""
    require_prepared(settings)
    found = search(settings, question, k, mode, filter, rerank or settings.rerank_model)
    if not found:
        screen.line("nothing found", "no passage matches")
        return False
    for place, passage in enumerate(found, start=1):
        screen.title(f"{place}. {passage['title']}")
        score = passage.get("rerank", passage["score"])
        screen.console.print(f"   {passage['document_id']}  score {score:.4f}", style="dim")
        if explain:
            screen.console.print(f"   {explanation(passage)}", style="dim", markup=False)
        screen.console.print(passage["body"].strip(), markup=False)
    return True


def explanation(passage: Mapping[str, Any]) -> str:
    """Why a passage stands where it does, in one line."""
    parts = [f"score {passage['score']:.3f}"]
    if passage["distance"] is not None:
        place = f" (no. {passage['vector_rank']})" if passage["vector_rank"] else ""
        parts.append(f"cosine {1 - passage['distance']:.3f}{place}")
    if passage["bm25"] is not None:
        place = f" (no. {passage['text_rank']})" if passage["text_rank"] else ""
        words = ", ".join(
            f"{word} {weight:.2f}"
            for word, weight in sorted(passage["terms"].items(), key=lambda pair: -pair[1])
        )
        parts.append(f"words {passage['bm25']:.3f}{place}: {words}")
    if passage["also_in"]:
        parts.append(f"also in {', '.join(passage['also_in'])}")
    return "; ".join(parts)

"""``moat search``, and the feedback service's ask page: a question in, the best passages out.

Belongs here: embedding the question and drawing the answer. Does not belong here: ranking, which is the SQL
function ``retrieval.search``.
"""

from __future__ import annotations

import os
import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from orchestration.deployment import open_warehouse, require_prepared
from orchestration.screen import Screen
from orchestration.settings import Settings

if TYPE_CHECKING:
    from embedder.encode import Embedder

PASSAGE = ("chunk_id", "document_id", "source", "title", "body", "score")

# A service asks from several threads, and a model is opened by the first question.
_ONE_AT_A_TIME = threading.Lock()


def search(settings: Settings, question: str, k: int, mode: str) -> list[dict[str, Any]]:
    """The ``k`` best chunks for ``question``, best first.

    Raises:
        NotLive: There is no index, or it is of another model.
    """
    from psycopg.rows import dict_row

    from assets.embeddings.index import check_live
    from assets.embeddings.release import current_release

    with (
        open_warehouse(settings).connect("search") as connection,
        connection.cursor(row_factory=dict_row) as cursor,
    ):
        check_live(connection, current_release(settings.embedding_model).name)
        with _ONE_AT_A_TIME:
            vector = _embedder(settings).encode([question])[0]
        return cursor.execute(
            "select * from retrieval.search(%s, %s::halfvec, %s, %s)",
            [question, str(vector.tolist()), k, mode],
        ).fetchall()


def passages(question: str, k: int) -> list[dict[str, Any]]:
    """The ``k`` best passages of the deployment that the environment names, best first.

    For a service that is told of a function by its name. The model stays open in the process after the first question.

    Returns:
        Dicts of ``chunk_id``, ``document_id``, ``source``, ``title``, ``body`` and ``score``.

    Raises:
        LookupError: There is no index, or it is of another model; the message says what to run.
    """
    from assets.embeddings.index import NotLive

    try:
        found = search(Settings.from_environment(os.environ), question, k, "hybrid")
    except NotLive as error:
        raise LookupError(str(error)) from error
    return [{name: passage[name] for name in PASSAGE} for passage in found]


@lru_cache(maxsize=1)
def _embedder(settings: Settings) -> Embedder:
    from embedder.encode import Embedder

    return Embedder.open(settings.embedding_model)


def show_search(settings: Settings, screen: Screen, question: str, k: int, mode: str) -> bool:
    """Print the best passages; False when there are none."""
    require_prepared(settings)
    found = search(settings, question, k, mode)
    if not found:
        screen.line("nothing found", "no passage matches")
        return False
    for place, passage in enumerate(found, start=1):
        screen.title(f"{place}. {passage['title']}")
        screen.console.print(f"   {passage['document_id']}  score {passage['score']:.4f}", style="dim")
        screen.console.print(passage["body"].strip())
    return True

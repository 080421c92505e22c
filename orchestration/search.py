"""``moat search``: a question in, the best passages out.

Belongs here: embedding the question and drawing the answer. Does not belong here: ranking, which is the SQL
function ``retrieval.search``.
"""

from __future__ import annotations

from typing import Any

from orchestration.deployment import open_warehouse, require_prepared
from orchestration.screen import Screen
from orchestration.settings import Settings


def search(settings: Settings, question: str, k: int, mode: str) -> list[dict[str, Any]]:
    """The ``k`` best chunks for ``question``, best first.

    Raises:
        NotLive: There is no index, or it is of another model.
    """
    from psycopg.rows import dict_row

    from assets.embeddings.index import check_live
    from assets.embeddings.release import current_release
    from embedder.encode import Embedder

    with (
        open_warehouse(settings).connect("search") as connection,
        connection.cursor(row_factory=dict_row) as cursor,
    ):
        check_live(connection, current_release(settings.embedding_model).name)
        vector = Embedder.open(settings.embedding_model).encode([question])[0]
        return cursor.execute(
            "select * from retrieval.search(%s, %s::halfvec, %s, %s)",
            [question, str(vector.tolist()), k, mode],
        ).fetchall()


def show_search(settings: Settings, screen: Screen, question: str, k: int, mode: str) -> bool:
    """Print the best passages; False when there are none."""
    require_prepared(settings)
    passages = search(settings, question, k, mode)
    if not passages:
        screen.line("nothing found", "no passage matches")
        return False
    for place, passage in enumerate(passages, start=1):
        screen.title(f"{place}. {passage['title']}")
        screen.console.print(f"   {passage['document_id']}  score {passage['score']:.4f}", style="dim")
        screen.console.print(passage["body"].strip())
    return True

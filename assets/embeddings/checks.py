"""What is known of an index: how much of a source it covers, how far it is behind, and whether a candidate is good.

Two askers. ``index/<source>`` is checked at every load, so that coverage, backlog and lag can be followed over time; a
candidate release is checked once, before it may be promoted. Belongs here: figures and when they pass. Does not belong
here: Dagster, and what follows from them (registry).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from assets.embeddings.registry import (
    LiveRelease,
    built_release,
    find_live,
    find_release,
    has_table,
    record_checks,
    release_table,
)
from assets.evaluation.golden import golden_questions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from assets.evaluation.compare import Difference
    from assets.sources.contract import Contract

Connection = psycopg.Connection[Any]

# The nightly run, and an hour for it.
LAG_SECONDS = 25 * 3600
UNIT_LENGTH = (0.99, 1.01)

SAMPLE = 50
NEIGHBOURS = 10
RECALL = 0.9
# Share of sampled vectors that are another text's as well, above which the model says nothing of its texts.
COLLAPSED = 0.5
SAME = 1e-3  # cosine distance that halfvec's rounding may make of none

QUESTIONS = 100
SHADOW_DEPTH = 50
OVERLAP = 0.3


INDEX_CHECKS = {
    "coverage": "Every text of the source has a vector in the live release.",
    "backlog": "No text waits for a vector; those the embedder refused are counted by `failures`.",
    "lag": "The document that has waited longest for a vector changed less than 25 hours ago.",
    "failures": "The embedder refused no text of the source; words find those it refused, vectors do not.",
    "orphans": "The live release holds no vector of a text that no chunk has any more.",
}

CANDIDATE_CHECKS = {
    "coverage": "Every document that may be retrieved is cut, and every text of it has a vector, or was refused and has"
    " none in the live release either.",
    "vectors_are_sound": "Every vector has unit length, or at least one, where the model does not scale; none holds NaN.",
    "neighbours": "Sampled vectors find themselves, differ from one another, and the graph finds what an exact search finds.",
    "retrieval": "On no golden set is the candidate surely worse than the live release (paired bootstrap).",
    "shadow": "Candidate and live release find much the same for recent questions (the same texts, or, where they are cut"
    " otherwise, the same documents); where not, look before promoting.",
}


@dataclass(frozen=True)
class Outcome:
    """A check's result and the figures behind it; ``needed`` for a promotion or merely said."""

    passed: bool
    figures: Mapping[str, Any] = field(default_factory=dict)
    needed: bool = True

    def as_dict(self) -> dict[str, Any]:
        """For the registry."""
        return {"passed": self.passed, **self.figures}


Compare = Callable[[Connection, str, LiveRelease], "Iterable[Difference]"]
"""``compare(connection, candidate, live)`` on every golden set."""

Embed = Callable[[Path | None, Sequence[str]], "NDArray[np.float32]"]
"""``embed(model folder, questions)``: float32[n, d]."""


def index_checks(connection: Connection, source: str) -> dict[str, Outcome]:
    """How well the live release serves ``source``, by check; shares are of its distinct texts."""
    live = find_live(connection)
    if live is None or not has_table(connection, live.name):
        nothing = Outcome(False, {"release": "none is live"})
        return dict.fromkeys(INDEX_CHECKS, nothing)
    table = release_table(live.name)
    texts, vectors, parked, lag = connection.execute(
        sql.SQL(
            "select count(*), count(v.passage_no),"
            " count(*) filter (where v.passage_no is null and f.content_hash is not null),"
            " coalesce(extract(epoch from now() - min(t.since)"
            " filter (where v.passage_no is null and f.content_hash is null)), 0)::float8"
            " from (select c.content_hash, min(d.updated_at) as since from corpus.chunk c"
            " join corpus.document d using (document_id) where c.source = %(source)s group by 1) as t"
            " left join retrieval.passage p using (content_hash) left join {} v using (passage_no)"
            " left join retrieval.embedding_failure f on f.release = %(release)s and f.content_hash = t.content_hash"
        ).format(table),
        {"source": source, "release": live.name},
    ).fetchall()[0]
    ((orphans,),) = connection.execute(
        sql.SQL(
            "select count(*) from {} v left join retrieval.passage p using (passage_no)"
            " where not exists (select from corpus.chunk c where c.content_hash = p.content_hash)"
        ).format(table)
    ).fetchall()
    backlog = texts - vectors - parked
    return {
        "coverage": Outcome(
            vectors == texts,
            {"coverage": vectors / texts if texts else 1.0, "texts": texts, "vectors": vectors},
        ),
        "backlog": Outcome(backlog == 0, {"backlog": backlog}),
        "lag": Outcome(lag <= LAG_SECONDS, {"lag_seconds": max(lag, 0.0)}),
        "failures": Outcome(parked == 0, {"parked": parked}),
        "orphans": Outcome(orphans == 0, {"orphans": orphans}),
    }


def check_candidate(
    connection: Connection, name: str, compare: Compare, questions: Sequence[str], embed: Embed
) -> dict[str, Outcome]:
    """Run every check of a candidate and record them with the release, for ``promote`` to read.

    Args:
        compare: Measures candidate against live on the golden sets.
        questions: What people asked lately.
        embed: Embeds questions with a model.

    Raises:
        ReleaseError: There is no such release.
    """
    state = find_release(connection, name)
    candidate = built_release(connection, name)
    live = find_live(connection)
    other = live if live is not None and live.name != name else None
    outcomes = {
        "coverage": Outcome(
            not state.missing and not state.uncut,
            {"missing": state.missing, "uncut": state.uncut, "vectors": state.vectors},
        ),
        "vectors_are_sound": soundness(connection, name),
        "neighbours": neighbours(connection, name),
        "retrieval": retrieval(compare(connection, name, other)) if other else retrieval([]),
        "shadow": shadow(connection, candidate, other, questions, embed),
    }
    record_checks(connection, name, {check: outcome.as_dict() for check, outcome in outcomes.items()})
    return outcomes


def soundness(connection: Connection, name: str) -> Outcome:
    """Whether every vector is of unit length, or, where the model does not scale its vectors, of any."""
    count, unsound, shortest, longest = connection.execute(
        sql.SQL(
            "select count(*), count(*) filter (where case when scaled then not length between %s and %s"
            " else not length between 1e-6 and 1e6 end), min(length), max(length)"
            " from (select l2_norm(embedding) as length from {}) as v,"
            " (select coalesce((fingerprint ->> 'normalize')::boolean, true) as scaled"
            " from registry.embedding_release where release = %s) as r"
        ).format(release_table(name)),
        [*UNIT_LENGTH, name],
    ).fetchall()[0]
    figures = {"vectors": count, "unsound": unsound}
    if count:
        figures |= {"shortest": shortest, "longest": longest}
    return Outcome(count > 0 and unsound == 0, figures)


def neighbours(connection: Connection, name: str) -> Outcome:
    """Whether sampled vectors find themselves, and the search finds what an exact one does."""
    table = release_table(name)
    sample = connection.execute(
        sql.SQL("select embedding::text from {} order by md5(passage_no::text) limit %s").format(table),
        [SAMPLE],
    ).fetchall()
    itself = collapsed = 0
    recalls = []
    for (vector,) in sample:
        exact = _nearest(connection, name, vector, NEIGHBOURS, exact=True)
        found = _nearest(connection, name, vector, NEIGHBOURS)
        itself += bool(found) and found[0][1] <= SAME
        collapsed += len(exact) > 1 and exact[1][1] <= SAME
        # By distance: of equally near ones either may be found.
        recalls.append(sum(distance <= exact[-1][1] + SAME for _, distance in found) / len(exact))
    recall = sum(recalls) / len(recalls) if recalls else 0.0
    return Outcome(
        bool(sample) and itself == len(sample) and recall >= RECALL and collapsed <= COLLAPSED * len(sample),
        {
            "sampled": len(sample),
            "find_themselves": itself,
            "same_as_another": collapsed,
            "recall_at_10": recall,
        },
    )


def retrieval(differences: Iterable[Difference]) -> Outcome:
    """Whether the candidate is surely worse on no golden set; one without differences has nothing to lose."""
    figures: dict[str, Any] = {}
    worse = []
    for found in differences:
        if found.value is None or found.high is None:
            continue
        label = f"{found.name}/{found.mode}/{found.metric}"
        figures[label] = found.value
        if found.high < 0:
            worse.append(f"{label} by {-found.value:.4f}")
    return Outcome(not worse, figures | ({"worse": "; ".join(worse)} if worse else {}))


def shadow(
    connection: Connection,
    candidate: LiveRelease,
    live: LiveRelease | None,
    questions: Sequence[str],
    embed: Embed,
) -> Outcome:
    """Overlap of the ten nearest, and rank correlation of the common ones, of live and candidate on ``questions``.

    Of texts, or of documents where the two have other chunks.
    """
    import numpy as np

    if live is None or not questions:
        return Outcome(True, {"questions": 0}, needed=False)
    ours, theirs = embed(candidate.model_folder, questions), embed(live.model_folder, questions)
    by_document = candidate.chunking != live.chunking
    overlaps, correlations = [], []
    for mine, other in zip(ours, theirs, strict=True):
        new = _shown(connection, candidate, _text(mine), by_document)
        old = _shown(connection, live, _text(other), by_document)
        most = min(NEIGHBOURS, max(len(new), len(old)))
        if most:
            overlaps.append(len({*new[:NEIGHBOURS]} & {*old[:NEIGHBOURS]}) / most)
        common = [n for n in new if n in set(old)]
        if len(common) > 2:
            ranks = np.argsort(np.argsort([old.index(n) for n in common]))
            correlations.append(float(np.corrcoef(np.arange(len(common)), ranks)[0, 1]))
    overlap = float(np.mean(overlaps)) if overlaps else 0.0
    figures: dict[str, Any] = {"questions": len(questions), "overlap_at_10": overlap}
    if correlations:
        figures["rank_correlation"] = float(np.mean(correlations))
    return Outcome(overlap >= OVERLAP, figures, needed=False)


def recent_questions(connection: Connection, contracts: Iterable[Contract]) -> list[str]:
    """What people asked last, up to 100 different questions; filled up with those of the golden sets."""
    asked = [
        row[0]
        for row in connection.execute(
            "select question from (select (select message ->> 'content'"
            " from jsonb_array_elements(messages) with ordinality as m (message, place)"
            " where message ->> 'role' = 'user' order by place desc limit 1) as question, received_at"
            " from feedback.interaction order by received_at desc limit 1000) as recent"
            " where question ~ '\\S' group by question order by max(received_at) desc, question limit %s",
            [QUESTIONS],
        )
    ]
    for contract in contracts:
        if contract.golden is not None and len(asked) < QUESTIONS:
            golden = {question for question in golden_questions(connection, contract) if question.strip()}
            asked += sorted(golden - {*asked})[: QUESTIONS - len(asked)]
    return asked


def embed_questions(model: Path | None, questions: Sequence[str]) -> NDArray[np.float32]:
    """Questions as vectors of ``model``: float32[n, d]."""
    from embedder.encode import Embedder

    return Embedder.open(model).encode(list(questions))


def _shown(connection: Connection, release: LiveRelease, vector: str, by_document: bool) -> list[Any]:
    """The texts that are nearest, or the documents that these are in, the nearest first."""
    passages = [number for number, _ in _nearest(connection, release.name, vector, SHADOW_DEPTH)]
    if not by_document:
        return passages
    documents = dict(
        connection.execute(
            "select passage_no, min(document_id) from corpus.piece"
            " where passage_no = any(%s) and chunking = %s group by 1",
            [passages, str(release.chunking)],
        ).fetchall()
    )
    return list(dict.fromkeys(documents[number] for number in passages if number in documents))


def _nearest(
    connection: Connection, name: str, vector: str, k: int, *, exact: bool = False
) -> list[tuple[int, float]]:
    with connection.transaction():
        connection.execute("select set_config('hnsw.ef_search', '100', true)")
        return connection.execute(
            # The sum is an expression that no index serves.
            sql.SQL(
                f"select passage_no, embedding <=> %(vector)s::halfvec from {{}}"
                f" order by (embedding <=> %(vector)s::halfvec){' + 0' if exact else ''} limit %(k)s"
            ).format(release_table(name)),
            {"vector": vector, "k": k},
        ).fetchall()


def _text(vector: NDArray[np.float32]) -> str:
    return str(vector.tolist())

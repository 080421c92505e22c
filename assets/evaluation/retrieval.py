"""How well retrieval finds the right document: golden questions, their runs, and measures with intervals.

What belongs here: reading a golden set, asking the live index, measuring, comparing two runs, recording. What
does not: the index and its search function (embeddings) and what happens when a measure falls (checks).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import psycopg
from psycopg import sql
from psycopg.rows import tuple_row

from assets.datasets.canonical import digest

MINIMUM_QUESTIONS = 30
RESAMPLES = 1_000
METRICS = ("nDCG@10", "R@10", "RR@10")

_SEARCH = "select document_id, score from retrieval.search(%s, %s, %s, %s) order by score desc, chunk_id"

Qrels = Mapping[str, Mapping[str, int]]
Run = Mapping[str, Mapping[str, float]]
Mode = Literal["hybrid", "vector", "text"]


@dataclass(frozen=True, slots=True)
class Measure:
    """The mean of a metric over n questions with its 95 % interval; None where there are no questions.

    `status` is "not enough data" below 30 questions: show the figure, but let nothing depend on it.
    """

    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    status: Literal["ok", "not enough data"]


@dataclass(frozen=True, slots=True)
class Unscored:
    """A golden row that cannot be scored, and why: no_question, no_document or document_not_in_corpus."""

    question: str
    document_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Golden:
    """A golden set: question id -> text, question id -> {document id: 1}, and the rows left out."""

    source: str
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    unscored: tuple[Unscored, ...]


def evaluate(qrels: Qrels, run: Run, *, seed: int = 0) -> list[Measure]:
    """nDCG@10, recall@10 and reciprocal rank@10 with percentile bootstrap intervals over questions.

    A judged question without results counts as 0. Equal scores rank by document id, the same for every metric.
    Raises ValueError for a question without a relevant document, and for results of an unknown question.
    """
    values = _by_question(qrels, run)
    low, high = _interval(values, seed)
    return [
        _measure(metric, values[:, column], low[column], high[column])
        for column, metric in enumerate(METRICS)
    ]


def compare(qrels: Qrels, run: Run, baseline: Run, *, seed: int = 0) -> list[Measure]:
    """The same metrics as differences, run minus baseline, by paired bootstrap.

    A candidate is better, or worse, for sure when the interval leaves 0 outside; gate on that, not on the mean.
    """
    values = _by_question(qrels, run) - _by_question(qrels, baseline)
    low, high = _interval(values, seed)
    return [
        _measure(metric, values[:, column], low[column], high[column])
        for column, metric in enumerate(METRICS)
    ]


def read_golden(conn: psycopg.Connection[Any], source: str, mapping: Mapping[str, str]) -> Golden:
    """The golden set in `raw.<source>`, as its contract's `golden` property maps it.

    `mapping` has `question` and `document` (columns) and `document_source` (the source those documents are in).
    Rows with the same question are one question with several right documents. A question is scored only
    when every one of its documents is in the corpus; the others come back in `unscored`.
    """
    missing = {"question", "document", "document_source"} - set(mapping)
    if missing:
        raise ValueError(
            f"contract of {source}: customProperties golden lacks {', '.join(sorted(missing))}; "
            "name the question column, the document column and the documents' source"
        )
    statement = sql.SQL(
        """
        select distinct coalesce(golden.question, ''), coalesce(golden.document, ''),
               document.document_id is not null
          from (select {question}::text as question, {document}::text as document from {table}) as golden
          left join corpus.document on document.document_id = %(prefix)s::text || golden.document
         order by 1, 2
        """
    ).format(
        question=sql.Identifier(mapping["question"]),
        document=sql.Identifier(mapping["document"]),
        table=sql.Identifier("raw", source),
    )
    prefix = mapping["document_source"] + "/"
    judged: dict[str, list[str]] = {}
    unscored: list[Unscored] = []
    with conn.cursor(row_factory=tuple_row) as cursor:
        rows = cursor.execute(statement, {"prefix": prefix}).fetchall()
    incomplete = {question for question, document, known in rows if not document or not known}
    for question, document, known in rows:
        if not question.strip():
            unscored.append(Unscored(question, prefix + document, "no_question"))
        elif not document:
            unscored.append(Unscored(question, "", "no_document"))
        elif not known:
            unscored.append(Unscored(question, prefix + document, "document_not_in_corpus"))
        elif question not in incomplete:
            judged.setdefault(question, []).append(prefix + document)
    queries = {digest(question)[:16]: question for question in judged}
    qrels = {qid: dict.fromkeys(judged[question], 1) for qid, question in queries.items()}
    return Golden(source, queries, qrels, tuple(unscored))


def search_run(
    conn: psycopg.Connection[Any],
    queries: Iterable[tuple[str, str, Sequence[float] | None]],
    mode: Mode = "hybrid",
    k: int = 10,
) -> dict[str, dict[str, float]]:
    """The k best documents for each (question id, text, vector), each scored by its best chunk.

    The vector may be None in mode "text". A question that finds nothing has an empty entry.
    """
    run: dict[str, dict[str, float]] = {}
    with conn.cursor(row_factory=tuple_row) as cursor:
        for qid, text, vector in queries:
            embedding = None if vector is None else "[" + ",".join(repr(float(x)) for x in vector) + "]"
            # Several chunks of one document crowd out others, so more chunks than documents are asked for.
            cursor.execute(_SEARCH, (text, embedding, k * 5, mode))
            best: dict[str, float] = {}
            for document_id, score in cursor:
                if document_id not in best and len(best) < k:
                    best[document_id] = float(score)
            run[qid] = best
    return run


def inputs_digest(qrels: Qrels, run: Run) -> str:
    """SHA-256 over judgements and rankings: equal digests mean equal measures. Scores only matter by order."""
    return digest({"qrels": qrels, "run": {qid: _ranking(found) for qid, found in run.items()}})


def record(
    conn: psycopg.Connection[Any],
    name: str,
    release: str,
    mode: str,
    measures: Sequence[Measure],
    inputs_sha256: str,
) -> int:
    """Write the measures to `registry.evaluation`; returns how many were new. The same inputs add nothing.

    A measure without a value (no questions) is no figure and is not recorded.
    """
    created = 0
    with conn.transaction():
        for measure in (one for one in measures if one.value is not None):
            created += conn.execute(
                """
                insert into registry.evaluation
                       (name, release, mode, metric, value, low, high, n, inputs_sha256, created_at)
                values (%s, %s, %s, %s, %s, %s, %s, %s, %s, now())
                on conflict (name, release, mode, metric, inputs_sha256) do nothing
                """,
                (
                    name,
                    release,
                    mode,
                    measure.metric,
                    measure.value,
                    measure.low,
                    measure.high,
                    measure.n,
                    inputs_sha256,
                ),
            ).rowcount
    return created


def _ranking(found: Mapping[str, float]) -> list[str]:
    return sorted(found, key=lambda document_id: (-found[document_id], document_id))


def _by_question(qrels: Qrels, run: Run) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Values of shape (questions, metrics), questions sorted by id."""
    import ir_measures

    unjudged = sorted(set(run) - set(qrels))
    if unjudged:
        raise ValueError(f"the run answers questions that nobody judged, such as {unjudged[0]!r}: drop them")
    for qid, judged in qrels.items():
        if not any(grade > 0 for grade in judged.values()):
            raise ValueError(
                f"golden question {qid!r} has no relevant document: it can only score 0; remove it"
            )
    rows = {qid: row for row, qid in enumerate(sorted(qrels))}
    values = np.zeros((len(rows), len(METRICS)))
    if not rows:
        return values
    # Ranks as scores: the providers behind the metrics break ties differently.
    ranked = {qid: {doc: -float(rank) for rank, doc in enumerate(_ranking(run.get(qid, {})))} for qid in rows}
    measures = [ir_measures.parse_measure(metric) for metric in METRICS]
    judgements = {qid: dict(judged) for qid, judged in qrels.items()}
    for result in ir_measures.iter_calc(measures, judgements, ranked):
        values[rows[result.query_id], METRICS.index(str(result.measure))] = result.value
    return values


def _interval(
    values: np.ndarray[Any, np.dtype[np.float64]], seed: int
) -> tuple[list[float | None], list[float | None]]:
    n = len(values)
    if not n:
        nothing: list[float | None] = [None] * len(METRICS)
        return nothing, nothing
    generator = np.random.default_rng(seed)
    means = np.array([values[generator.integers(0, n, n)].mean(axis=0) for _ in range(RESAMPLES)])
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return [float(x) for x in low], [float(x) for x in high]


def _measure(
    metric: str, values: np.ndarray[Any, np.dtype[np.float64]], low: float | None, high: float | None
) -> Measure:
    n = len(values)
    value = float(values.mean()) if n else None
    return Measure(metric, value, low, high, n, "ok" if n >= MINIMUM_QUESTIONS else "not enough data")

"""How well a ranking is, in figures: measures over questions with their intervals, compared and recorded.

What belongs here: measures, paired comparison, their record in ``registry.evaluation``. What does not: golden sets
(golden), asking an index (runs), and what happens when a measure falls (checks).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg.types.json import Jsonb

from assets.datasets.canonical import digest

MINIMUM_QUESTIONS = 30
RESAMPLES = 1_000
METRICS = ("nDCG@10", "R@10", "R@100", "RR@10")
HEADLINE = METRICS[0]
"""What gates look at: of many figures one is always worse by chance."""

Qrels = Mapping[str, Mapping[str, int]]
Run = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Measure:
    """The mean of a metric over n questions with its 95 % interval; None where there are no questions.

    `status` is "not enough data" below 30 questions: show the figure, but let nothing depend on it. `by_question` has
    what each question scored.
    """

    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    status: Literal["ok", "not enough data"]
    by_question: Mapping[str, float] = field(default_factory=dict, repr=False)


def evaluate(qrels: Qrels, run: Run, *, seed: int = 0) -> list[Measure]:
    """Each of `METRICS` with a percentile bootstrap interval over questions.

    A judged question without results counts as 0. Equal scores rank by id, the same for every metric.
    Raises ValueError for a question without a relevant document, and for results of an unknown question.
    """
    import ir_measures

    _check(qrels, run)
    # Ranks as scores: the providers behind the metrics break ties differently.
    ranked = {
        qid: {name: -float(rank) for rank, name in enumerate(_ranking(run.get(qid, {})))} for qid in qrels
    }
    values: dict[str, dict[str, float]] = {metric: dict.fromkeys(sorted(qrels), 0.0) for metric in METRICS}
    measures = [ir_measures.parse_measure(metric) for metric in METRICS]
    judgements = {qid: dict(judged) for qid, judged in qrels.items()}
    for result in ir_measures.iter_calc(measures, judgements, ranked) if qrels else ():
        values[str(result.measure)][result.query_id] = float(result.value)
    return [_measure(metric, values[metric], seed) for metric in METRICS]


def compare(by_question: Mapping[str, float], baseline: Mapping[str, float], *, seed: int = 0) -> Measure:
    """What a metric gained over `baseline` on the questions of both, by paired bootstrap.

    It is better, or worse, for sure when the interval leaves 0 outside; gate on that, not on the mean.
    """
    both = sorted(set(by_question) & set(baseline))
    return _measure("difference", {qid: by_question[qid] - baseline[qid] for qid in both}, seed)


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
                       (name, release, mode, metric, value, low, high, n, inputs_sha256, by_question, created_at)
                values (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, now())
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
                    Jsonb(dict(measure.by_question)),
                ),
            ).rowcount
    return created


def last_recorded(
    conn: psycopg.Connection[Any], name: str, mode: str, metric: str, other_than: str
) -> dict[str, float] | None:
    """What each question scored in the newest evaluation whose inputs were not `other_than`, of any release."""
    row = conn.execute(
        "select by_question from registry.evaluation where name = %s and mode = %s and metric = %s"
        " and inputs_sha256 <> %s and by_question is not null order by created_at desc, id desc limit 1",
        [name, mode, metric, other_than],
    ).fetchone()
    return None if row is None else row[0]


def _check(qrels: Qrels, run: Run) -> None:
    unjudged = sorted(set(run) - set(qrels))
    if unjudged:
        raise ValueError(f"the run answers questions that nobody judged, such as {unjudged[0]!r}: drop them")
    for qid, judged in qrels.items():
        if not any(grade > 0 for grade in judged.values()):
            raise ValueError(
                f"golden question {qid!r} has no relevant document: it can only score 0; remove it"
            )


def _ranking(found: Mapping[str, float]) -> list[str]:
    return sorted(found, key=lambda name: (-found[name], name))


def _measure(metric: str, by_question: Mapping[str, float], seed: int) -> Measure:
    values = np.array(list(by_question.values()))
    n = len(values)
    if not n:
        return Measure(metric, None, None, None, 0, "not enough data")
    low, high = _interval(values, seed)
    return Measure(
        metric,
        float(values.mean()),
        low,
        high,
        n,
        "ok" if n >= MINIMUM_QUESTIONS else "not enough data",
        by_question,
    )


def _interval(values: NDArray[np.float64], seed: int) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    n = len(values)
    means = [values[generator.integers(0, n, n)].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)

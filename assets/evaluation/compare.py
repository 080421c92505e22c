"""Releases measured on golden sets, and two of them against each other.

Belongs here: putting golden sets, runs and measures together. Does not belong here: Dagster, printing, deciding on a
promotion (embeddings.checks).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import psycopg

from assets.embeddings.registry import built_release
from assets.evaluation.golden import Golden, Unscored, read_golden
from assets.evaluation.retrieval import (
    HEADLINE,
    Measure,
    compare,
    evaluate,
    inputs_digest,
    last_recorded,
    record,
)
from assets.evaluation.runs import Index, Mode, index_of, question_vectors, search_run
from assets.sources.contract import Contract

Connection = psycopg.Connection[Any]

MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A release on a golden set in a search mode; ``inputs_sha256`` names judgements and rankings."""

    name: str
    release: str
    mode: Mode
    measures: tuple[Measure, ...]
    inputs_sha256: str
    unscored: tuple[Unscored, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """What a release gains over another on a golden set, in a mode and metric, with its 95 % interval."""

    name: str
    mode: Mode
    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int


def evaluate_golden(
    connection: Connection,
    contract: Contract,
    contracts: Sequence[Contract],
    release: str | None = None,
    modes: Sequence[Mode] = MODES,
) -> list[Evaluation]:
    """Measure a release on the golden set of ``contract``; nothing is recorded.

    Args:
        connection: Best outside of a transaction: no lock then outlives a question.
        contracts: All, among which a golden set's questions may be.
        release: Its name, live or not; None takes the live one.

    Raises:
        ReleaseError: It was not built, or its model is gone.
    """
    assert contract.golden is not None
    questions = {other.name: other for other in contracts}.get(contract.golden.question_source or "")
    with connection.transaction():
        built = built_release(connection, release)
        golden = read_golden(connection, contract, questions)
    vectors = None
    if golden.queries and {*modes} != {"text"}:
        vectors = question_vectors(built, list(golden.queries.values()))
    with index_of(connection, built) as index:
        return [
            _evaluation(connection, golden, built.name, mode, None if mode == "text" else vectors, index)
            for mode in modes
        ]


def compare_releases(
    connection: Connection, contracts: Sequence[Contract], candidate: str, live: str
) -> Iterator[Difference]:
    """What ``candidate`` gains over ``live`` on each golden set that is landed, by vectors and with words.

    Of one metric only: of many differences one is always below zero by chance, and would bar the way.
    """
    for contract in golden_contracts(connection, contracts):
        new, old = (
            evaluate_golden(connection, contract, contracts, release, ("vector", "hybrid"))
            for release in (candidate, live)
        )
        yield from (one for one in differences(new, old) if one.metric == HEADLINE)


def differences(new: Sequence[Evaluation], old: Sequence[Evaluation]) -> list[Difference]:
    """By mode and metric, over the questions that both were asked; see ``retrieval.compare``."""
    return [
        _difference(one, mine.metric, compare(mine.by_question, theirs.by_question))
        for one, other in zip(new, old, strict=True)
        for mine, theirs in zip(one.measures, other.measures, strict=True)
    ]


def golden_contracts(connection: Connection, contracts: Sequence[Contract]) -> list[Contract]:
    """The contracts of golden sets whose tables are there."""
    found = []
    for contract in contracts:
        if contract.golden is not None:
            tables = [contract.name, contract.golden.question_source or contract.name]
            with connection.transaction():
                row = connection.execute(
                    "select bool_and(to_regclass(format('raw.%%I', name)) is not null)"
                    " from unnest(%s::text[]) as name",
                    [tables],
                ).fetchone()
            if row == (True,):
                found.append(contract)
    return found


def record_evaluation(connection: Connection, found: Evaluation) -> Difference | None:
    """Keep its figures in ``registry.evaluation``; the same again adds nothing.

    Returns:
        The headline metric against the evaluation recorded before it that found something else; None for the first.
    """
    with connection.transaction():
        before = last_recorded(connection, found.name, found.mode, HEADLINE, found.inputs_sha256)
        record(connection, found.name, found.release, found.mode, found.measures, found.inputs_sha256)
    if before is None:
        return None
    (now,) = (measure for measure in found.measures if measure.metric == HEADLINE)
    return _difference(found, HEADLINE, compare(now.by_question, before))


def _difference(found: Evaluation, metric: str, gained: Measure) -> Difference:
    return Difference(found.name, found.mode, metric, gained.value, gained.low, gained.high, gained.n)


def _evaluation(
    connection: Connection,
    golden: Golden,
    release: str,
    mode: Mode,
    vectors: Any,
    index: Index,
) -> Evaluation:
    run = search_run(connection, golden, vectors, mode, index)
    return Evaluation(
        golden.source,
        release,
        mode,
        tuple(evaluate(golden.qrels, run)),
        inputs_digest(golden.qrels, run),
        golden.unscored,
    )

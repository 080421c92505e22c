"""Retrieval measures: known values, honest intervals, and questions that found nothing."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assets.evaluation.retrieval import METRICS, compare, evaluate, inputs_digest, search_run


def values(qrels: dict[str, dict[str, int]], run: dict[str, dict[str, float]]) -> dict[str, float | None]:
    return {measure.metric: measure.value for measure in evaluate(qrels, run)}


def test_known_values() -> None:
    qrels = {"a": {"d1": 1, "d2": 1}, "b": {"d3": 1}}
    run = {"a": {"d9": 3.0, "d1": 2.0, "d2": 1.0}, "b": {"d3": 0.5}}
    ideal = 1 + 1 / math.log2(3)
    ndcg_a = (1 / math.log2(3) + 1 / math.log2(4)) / ideal
    found = values(qrels, run)
    assert found["nDCG@10"] == pytest.approx((ndcg_a + 1) / 2)
    assert found["R@10"] == 1
    assert found["RR@10"] == pytest.approx((1 / 2 + 1) / 2)


def test_only_the_first_ten_count() -> None:
    run = {"a": {f"x{n:02d}": 20.0 - n for n in range(10)} | {"d1": 1.0}}
    assert values({"a": {"d1": 1}}, run) == {"nDCG@10": 0, "R@10": 0, "RR@10": 0}


@pytest.mark.parametrize("nothing", [{}, {"b": {}}])
def test_a_question_without_results_counts_as_zero(nothing: dict[str, dict[str, float]]) -> None:
    qrels = {"a": {"d1": 1}, "b": {"d1": 1}}
    measures = evaluate(qrels, {"a": {"d1": 1.0}, **nothing})
    assert [(measure.value, measure.n) for measure in measures] == [(0.5, 2)] * 3


def test_equal_scores_rank_by_document_id_for_every_metric() -> None:
    qrels = {"a": {"d1": 1}}
    assert values(qrels, {"a": {"d0": 1.0, "d1": 1.0}})["RR@10"] == 0.5
    assert values(qrels, {"a": {"d1": 1.0, "d2": 1.0}}) == {"nDCG@10": 1, "R@10": 1, "RR@10": 1}


def test_below_thirty_questions_it_says_so() -> None:
    for n, status in ((29, "not enough data"), (30, "ok")):
        qrels = {f"q{i}": {"d": 1} for i in range(n)}
        assert {measure.status for measure in evaluate(qrels, {})} == {status}


def test_no_questions_no_figures() -> None:
    measures = evaluate({}, {})
    assert [measure.metric for measure in measures] == list(METRICS)
    assert {(m.value, m.low, m.high, m.n, m.status) for m in measures} == {
        (None, None, None, 0, "not enough data")
    }


def test_the_interval_has_the_width_of_a_proportion() -> None:
    qrels = {f"q{i:03d}": {"d": 1} for i in range(200)}
    run = {qid: {"d": 1.0} for i, qid in enumerate(qrels) if i % 2}
    recall = evaluate(qrels, run)[1]
    assert recall.value == 0.5
    assert recall.low == pytest.approx(0.5 - 1.96 * math.sqrt(0.25 / 200), abs=0.02)
    assert recall.high == pytest.approx(0.5 + 1.96 * math.sqrt(0.25 / 200), abs=0.02)
    assert evaluate(qrels, run) == evaluate(dict(reversed(qrels.items())), run)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("abcdef"),
        st.dictionaries(st.sampled_from(("d1", "d2", "d3")), st.floats(0, 1), max_size=3),
    )
)
def test_measures_lie_in_their_intervals_and_in_range(run: dict[str, dict[str, float]]) -> None:
    for measure in evaluate({qid: {"d1": 1} for qid in "abcdef"}, run):
        assert measure.value is not None and measure.low is not None and measure.high is not None
        assert 0 <= measure.low <= measure.value + 1e-12
        assert measure.value - 1e-12 <= measure.high <= 1 + 1e-12


def test_comparing_is_paired() -> None:
    qrels = {f"q{i:03d}": {"d": 1} for i in range(40)}
    half = {qid: {"d": 1.0} for i, qid in enumerate(qrels) if i % 2}
    same = compare(qrels, half, half)
    assert {(m.value, m.low, m.high) for m in same} == {(0, 0, 0)}
    better = compare(qrels, {qid: {"d": 1.0} for qid in qrels}, half)
    assert all(m.value == 0.5 and m.low is not None and m.low > 0 for m in better)


def test_questions_that_cannot_be_scored_are_refused() -> None:
    with pytest.raises(ValueError, match="'q' has no relevant document"):
        evaluate({"q": {"d": 0}}, {})
    with pytest.raises(ValueError, match="nobody judged, such as 'z'"):
        evaluate({"q": {"d": 1}}, {"z": {"d": 1.0}})


def test_the_digest_of_inputs_follows_the_ranking_not_the_scores() -> None:
    qrels = {"q": {"d": 1}}
    base = inputs_digest(qrels, {"q": {"d": 2.0, "e": 1.0}})
    assert inputs_digest(qrels, {"q": {"e": 0.1, "d": 0.2}}) == base
    assert inputs_digest(qrels, {"q": {"d": 1.0, "e": 2.0}}) != base
    assert inputs_digest({"q": {"e": 1}}, {"q": {"d": 2.0, "e": 1.0}}) != base


class Index:
    """A connection whose search function returns the chunks it was given, best first."""

    def __init__(self, chunks: list[tuple[str, float]]) -> None:
        self.chunks = chunks
        self.asked: list[Any] = []

    def cursor(self, row_factory: Any) -> "Index":
        return self

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def execute(self, statement: str, parameters: Any) -> None:
        self.asked.append(parameters)

    def __iter__(self) -> Any:
        return iter(self.chunks)


def test_documents_rank_by_their_best_chunk() -> None:
    index = Index([("a", 0.9), ("a", 0.8), ("b", 0.7), ("a", 0.6), ("c", 0.5)])
    run = search_run(index, [("q", "text", [0.5, -1.0])], "vector", k=2)  # type: ignore[arg-type]
    assert run == {"q": {"a": 0.9, "b": 0.7}}
    assert index.asked == [("text", "[0.5,-1.0]", 10, "vector")]


def test_text_mode_needs_no_vector_and_may_find_nothing() -> None:
    index = Index([])
    assert search_run(index, [("q", "text", None)], "text") == {"q": {}}  # type: ignore[arg-type]
    assert index.asked == [("text", None, 50, "text")]

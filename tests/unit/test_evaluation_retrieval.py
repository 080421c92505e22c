"""Retrieval measures: known values, honest intervals, and questions that found nothing."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assets.evaluation.retrieval import METRICS, compare, evaluate, inputs_digest


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
    assert values({"a": {"d1": 1}}, run) == {
        "nDCG@10": 0,
        "R@10": 0,
        "R@100": 1,
        "RR@10": 0,
    }


@pytest.mark.parametrize("nothing", [{}, {"b": {}}])
def test_a_question_without_results_counts_as_zero(nothing: dict[str, dict[str, float]]) -> None:
    qrels = {"a": {"d1": 1}, "b": {"d1": 1}}
    measures = evaluate(qrels, {"a": {"d1": 1.0}, **nothing})
    assert [(measure.value, measure.n) for measure in measures] == [(0.5, 2)] * 4


def test_equal_scores_rank_by_document_id_for_every_metric() -> None:
    qrels = {"a": {"d1": 1}}
    assert values(qrels, {"a": {"d0": 1.0, "d1": 1.0}})["RR@10"] == 0.5
    assert values(qrels, {"a": {"d1": 1.0, "d2": 1.0}}) == dict.fromkeys(METRICS, 1)


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
    half = {f"q{i:03d}": float(i % 2) for i in range(40)}
    same = compare(half, half)
    assert (same.value, same.low, same.high, same.n) == (0, 0, 0, 40)
    better = compare(dict.fromkeys(half, 1.0), half)
    assert better.value == 0.5 and better.low is not None and better.low > 0
    worse = compare(half, dict.fromkeys(half, 1.0))
    assert worse.high is not None and worse.high < 0
    assert better == compare(dict.fromkeys(reversed(half), 1.0), half)


def test_comparing_takes_the_questions_of_both() -> None:
    gained = compare({"a": 1.0, "b": 0.0}, {"b": 1.0, "c": 0.0})
    assert (gained.value, gained.n, gained.status) == (-1, 1, "not enough data")
    assert compare({"a": 1.0}, {}).value is None


def test_what_each_question_scored_is_kept() -> None:
    (ndcg, *_) = evaluate({"a": {"d": 1}, "b": {"d": 1}}, {"b": {"d": 1.0}})
    assert ndcg.by_question == {"a": 0, "b": 1}


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

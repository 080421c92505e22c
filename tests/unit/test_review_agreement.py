"""Agreement against published worked examples, and what must hold for any answers."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.review.agreement import Level, cohen_kappa, fleiss_kappa, krippendorff_alpha
from feedback.review.estimates import wilson

ANSWERS = st.sampled_from([1, 2, 3, 4])
ITEMS = st.lists(st.lists(st.none() | ANSWERS, min_size=1, max_size=5), max_size=20)
LEVELS: tuple[Level, ...] = ("nominal", "ordinal", "interval")


@pytest.mark.parametrize(
    ("table", "kappa"),
    [
        # The worked examples of the encyclopedia article "Cohen's kappa": 50 proposals read by two people, and
        # the same percentage of agreement with different marginals.
        (((20, 5), (10, 15)), 0.4),
        (((45, 15), (25, 15)), 0.1304),
        (((25, 35), (5, 35)), 0.2593),
    ],
)
def test_cohen(table: tuple[tuple[int, int], tuple[int, int]], kappa: float) -> None:
    pairs: list[tuple[Any, Any]] = []
    for one, row in enumerate(table):
        for other, times in enumerate(row):
            pairs += [(one, other)] * times
    assert cohen_kappa(pairs) == pytest.approx(kappa, abs=5e-5)


def test_fleiss() -> None:
    # The worked example of the encyclopedia article "Fleiss' kappa": 14 people put 10 items into 5 classes.
    table = [
        (0, 0, 0, 0, 14),
        (0, 2, 6, 4, 2),
        (0, 0, 3, 5, 6),
        (0, 3, 9, 2, 0),
        (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0),
        (3, 2, 6, 3, 0),
        (2, 5, 3, 2, 2),
        (6, 5, 2, 1, 0),
        (0, 2, 2, 3, 7),
    ]
    assert fleiss_kappa([dict(enumerate(row)) for row in table]) == pytest.approx(0.210, abs=5e-4)


# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section E: 4 observers, 12 units, missing data.
OBSERVERS = (
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
)


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorff(level: Level, alpha: float) -> None:
    rows = [[None if mark == "." else int(mark) for mark in row.split()] for row in OBSERVERS]
    assert krippendorff_alpha(list(zip(*rows, strict=True)), level) == pytest.approx(alpha, abs=5e-4)


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_to_compare_is_no_number(level: Level) -> None:
    nothing: list[list[list[int | None]]] = [[], [[1]], [[None, None], [2, None]], [[1, 1], [1, 1, 1]]]
    for items in nothing:
        assert krippendorff_alpha(items, level) is None
    assert cohen_kappa([]) is None
    assert cohen_kappa([("a", "a")] * 3) is None
    assert fleiss_kappa([]) is None
    assert fleiss_kappa([{"a": 3}, {"a": 3}]) is None


@pytest.mark.parametrize("counts", [[{"a": 1}], [{"a": 2}, {"a": 3}], [{}]])
def test_fleiss_refuses_incomplete_answers(counts: list[dict[str, int]]) -> None:
    with pytest.raises(ValueError, match="krippendorff_alpha"):
        fleiss_kappa(counts)


@given(ITEMS, st.sampled_from(LEVELS), st.randoms())
def test_alpha_is_at_most_one_and_knows_no_order(items: list[Any], level: Level, chance: Any) -> None:
    alpha = krippendorff_alpha(items, level)
    assert alpha is None or alpha <= 1 + 1e-12
    shuffled = [chance.sample(item, len(item)) for item in chance.sample(items, len(items))]
    again = krippendorff_alpha([*shuffled, [None, None], [3]], level)
    assert again == (alpha if alpha is None else pytest.approx(alpha))


@given(st.lists(st.tuples(ANSWERS, st.integers(2, 5)), max_size=20), st.sampled_from(LEVELS))
def test_full_agreement_is_one(units: list[tuple[int, int]], level: Level) -> None:
    items = [[answer] * times for answer, times in units]
    expected = 1.0 if len({answer for answer, _ in units}) > 1 else None
    assert krippendorff_alpha(items, level) == expected


@given(st.lists(st.tuples(ANSWERS, ANSWERS), min_size=1, max_size=30))
def test_renaming_answers_changes_nothing_nominal(pairs: list[tuple[int, int]]) -> None:
    renamed = [("abcd"[4 - one], "abcd"[4 - other]) for one, other in pairs]
    for measure in (cohen_kappa, krippendorff_alpha):
        before, after = measure(pairs), measure(renamed)
        assert after == (before if before is None else pytest.approx(before))


@given(st.lists(st.lists(ANSWERS, min_size=3, max_size=3), min_size=1, max_size=20))
def test_alpha_is_fleiss_corrected_for_small_samples(items: list[list[int]]) -> None:
    """Without missing answers: 1 - alpha = (1 - kappa) (N - 1) / N, with N answers in all (Krippendorff 2004)."""
    kappa, alpha = fleiss_kappa([Counter(item) for item in items]), krippendorff_alpha(items)
    assert (kappa is None) == (alpha is None)
    if kappa is not None and alpha is not None:
        n = 3 * len(items)
        assert 1 - alpha == pytest.approx((1 - kappa) * (n - 1) / n)


def test_wilson() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for successes, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)
    for successes, n in ((0, 0), (2, 1), (-1, 3)):
        with pytest.raises(ValueError, match="no proportion"):
            wilson(successes, n)

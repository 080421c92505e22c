"""What a passage stands for: documents and spans of them, however they are cut into chunks."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from assets.evaluation.golden import Place, Target, ranking

DOCUMENT = Target("d")
SPAN = Target("d", 10, 20)


def test_documents_rank_by_their_best_passage() -> None:
    passages = [(0.9, "a"), (0.8, "a"), (0.7, "b"), (0.6, "a"), (0.5, "c")]
    found = ranking([DOCUMENT], [(score, [Place("", name, 0, 1)]) for score, name in passages], 2)
    assert found == {"a": 0.9, "b": 0.7}


def test_a_passage_that_overlaps_the_span_is_right_and_others_stand_for_themselves() -> None:
    places = [
        Place("c1", "d", 0, 10),
        Place("c2", "e", 10, 20),
        Place("c3", "d", 19, 30),
        Place("c4", "d", 5, 11),
    ]
    found = ranking([SPAN], [(1.0 - i / 10, [place]) for i, place in enumerate(places)], 10)
    assert found == {"c1": 1.0, "c2": 0.9, "d[10:20]": 0.8}


def test_a_text_that_stands_in_several_places_is_right_if_one_of_them_is() -> None:
    twice = [Place("c1", "a", 0, 9), Place("c2", "d", 0, 9)]
    assert ranking([DOCUMENT], [(1.0, twice)], 10) == {"d": 1.0}
    assert ranking([Target("z")], [(1.0, twice)], 10) == {"a": 1.0}


@given(st.lists(st.integers(1, 99), max_size=8))
def test_where_a_document_is_cut_does_not_change_what_is_judged(cuts: list[int]) -> None:
    edges = sorted({0, *cuts, 100})
    chunks = [Place(f"c{a}", "d", a, b) for a, b in pairwise(edges)]
    assert SPAN.name in ranking([SPAN], [(1.0, [chunk]) for chunk in chunks], 100)

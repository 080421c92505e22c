"""Tokenising and batching: rows are neither lost nor doubled, budgets hold, one bad text harms no other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedder.model import open_model
from embedder.tokens import Tokeniser, cut_by_budget, pad

CLS, SEP = 101, 102


@pytest.fixture(scope="module")
def tokeniser() -> Tokeniser:
    return Tokeniser(open_model())


@given(st.lists(st.integers(1, 600), max_size=300), st.integers(1, 2000))
def test_every_row_is_in_exactly_one_batch_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = cut_by_budget(np.array(lengths, np.int64), budget)
    assert sorted(int(i) for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        cost = len(batch) * max(lengths[i] for i in batch)
        assert cost <= budget or len(batch) == 1


@given(st.lists(st.integers(1, 256), min_size=512, max_size=1024))
def test_sorting_leaves_little_filler(lengths: list[int]) -> None:
    batches = cut_by_budget(np.array(lengths, np.int64), 1024)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    spread = max(lengths) - min(lengths)
    # The filler of sorted batches telescopes: at most the spread of lengths times the largest batch.
    assert padded - sum(lengths) <= spread * max(len(batch) for batch in batches)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=20), min_size=1, max_size=10))
def test_padding_keeps_every_row(rows: list[list[int]]) -> None:
    ids, lengths = pad([np.array(row, np.int32) for row in rows])
    assert [ids[i, : lengths[i]].tolist() for i in range(len(rows))] == rows
    assert ids.sum() == sum(map(sum, rows))


def test_a_bad_text_is_an_error_of_its_own_row(tokeniser: Tokeniser) -> None:
    found = tokeniser.tokenise(["good", "", " \n\t ", None, 7, b"", "also good"])
    assert [row is not None for row in found.rows] == [True, False, False, False, False, False, True]
    assert found.errors == {
        1: "text is empty",
        2: "text is empty",
        3: "text is not a string but NoneType",
        4: "text is not a string but int",
        5: "text is not valid UTF-8",
    }


def test_a_text_the_tokenizer_refuses_does_not_take_its_neighbours_along(tokeniser: Tokeniser) -> None:
    found = tokeniser.tokenise(["one", "\ud800", "two"])
    assert list(found.errors) == [1]
    assert found.errors[1].startswith("tokenizer refused the text")
    assert found.rows[0] is not None and found.rows[2] is not None


def test_the_stored_padding_and_truncation_of_the_folder_are_off(tokeniser: Tokeniser) -> None:
    row = tokeniser.tokenise(["hello world"]).rows[0]
    assert row is not None
    assert row.tolist() == [CLS, 7592, 2088, SEP]


def test_a_text_too_long_loses_its_end_and_keeps_its_special_tokens(tokeniser: Tokeniser) -> None:
    exact, long = "hello " * 254, "hello " * 255
    found = tokeniser.tokenise([exact, long])
    assert found.truncated == 1
    assert found.rows[0] is not None and found.rows[1] is not None
    assert found.rows[0].tolist() == found.rows[1].tolist()
    assert (len(found.rows[1]), found.rows[1][0], found.rows[1][-1]) == (256, CLS, SEP)


def test_a_text_too_long_can_be_refused_instead(tokeniser: Tokeniser) -> None:
    found = tokeniser.tokenise(["hello " * 300], too_long="refuse")
    assert found.errors == {0: "text has 302 tokens, the model takes 256"}
    assert found.truncated == 0


def test_a_prefix_comes_before_every_text(tokeniser: Tokeniser) -> None:
    left = tokeniser.tokenise(["world"], prefix="hello ").rows[0]
    right = tokeniser.tokenise(["hello world"]).rows[0]
    assert left is not None and right is not None
    assert left.tolist() == right.tolist()

"""Tokenising and batching: rows are neither lost nor doubled, budgets hold, one bad text harms no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from embedder import tokens
from embedder.model import open_model
from embedder.protocol import EmbedderError
from embedder.tokens import Tokenised, Tokeniser, Tokens, cut_by_budget, open_tokenizer, pad

CLS, SEP = 101, 102

ROWS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=20), max_size=12)


@pytest.fixture(scope="module")
def tokeniser() -> Tokeniser:
    return Tokeniser(open_model())


def flat(rows: list[list[int]]) -> Tokens:
    return Tokens(
        np.array([i for row in rows for i in row], np.int32), np.array([len(r) for r in rows], np.int32)
    )


def rows_of(tokens: Tokens) -> list[list[int]]:
    return [tokens.ids[a:b].tolist() for a, b in zip(tokens.offsets, tokens.offsets[1:], strict=False)]


@given(ROWS, st.lists(st.integers(0, 11), max_size=20))
def test_taking_rows_gives_them_in_the_order_asked_for(rows: list[list[int]], wanted: list[int]) -> None:
    tokens = flat(rows)
    assert rows_of(tokens) == rows
    chosen = [i for i in wanted if i < len(rows)]
    taken = tokens.take(np.array(chosen, np.int64))
    assert rows_of(taken) == [rows[i] for i in chosen]
    assert taken.ids.dtype == taken.lengths.dtype == np.dtype(np.int32)


def test_much_text_is_tokenised_in_parts_with_the_same_result(
    tokeniser: Tokeniser, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [
        "river stone " * 300,
        "",
        "a",
        None,
        "window " * 40,
        "x" * 500,
        b"",
        "paper",
        "stone " * 400,
        " ",
    ]
    whole = tokeniser.tokenise(texts)
    encoded: list[int] = []
    encode = tokeniser._encode

    def noting(some: list[str]) -> object:
        encoded.append(sum(map(len, some)))
        return encode(some)

    monkeypatch.setattr(tokeniser, "_encode", noting)
    monkeypatch.setattr(tokens, "_CHARACTERS", 200)
    parts = tokeniser.tokenise(texts)
    assert len(encoded) > 3 and max(encoded) <= 200 + 3600
    assert np.array_equal(parts.tokens.ids, whole.tokens.ids)
    assert np.array_equal(parts.tokens.lengths, whole.tokens.lengths)
    assert np.array_equal(parts.places, whole.places)
    assert (parts.errors, parts.truncated, parts.truncated_tokens) == (
        whole.errors,
        whole.truncated,
        whole.truncated_tokens,
    )
    assert len(tokeniser.tokenise([]).places) == 0


class Panic(BaseException):
    """What a panic in Rust is in Python."""


def test_a_tokenizer_that_panics_costs_the_text_and_an_interrupt_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokeniser = Tokeniser(open_model())
    real = tokeniser._tokenizer
    raised: type[BaseException] = Panic

    class Panicking:
        def encode(self, text: str) -> object:
            if text == "bad":
                raise raised("index out of bounds")
            return real.encode(text)

        def encode_batch_fast(self, texts: list[str]) -> object:
            return [self.encode(text) for text in texts]

    monkeypatch.setattr(tokeniser, "_tokenizer", Panicking())
    found = tokeniser.tokenise(["river", "bad", "stone"])
    assert found.errors == {1: "tokenizer refused the text: index out of bounds"}
    assert found.places.tolist() == [0, 2]
    raised = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        tokeniser.tokenise(["river", "bad"])


@given(st.lists(st.integers(1, 600), max_size=300), st.integers(1, 2000), st.booleans())
def test_every_row_is_in_exactly_one_batch_within_the_budget(
    lengths: list[int], budget: int, packed: bool
) -> None:
    batches = cut_by_budget(np.array(lengths, np.int32), budget, packed)
    assert sorted(int(i) for batch in batches for i in batch) == list(range(len(lengths)))
    ordered = [lengths[i] for batch in batches for i in batch]
    assert ordered == sorted(lengths, reverse=True)
    for number, batch in enumerate(batches):
        found = [lengths[i] for i in batch]
        cost = sum(found) if packed else len(found) * max(found)
        assert cost <= budget or len(batch) == 1
        if number + 1 < len(batches):  # no batch is smaller than it could be
            more = [*found, lengths[batches[number + 1][0]]]
            assert (sum(more) if packed else len(more) * max(more)) > budget


@given(st.integers(0, 2**32), st.integers(512, 1024))
def test_sorting_leaves_little_filler(seed: int, count: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 257, count, dtype=np.int32)
    batches = cut_by_budget(lengths, 1024)
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    spread = lengths.max() - lengths.min()
    # The filler of sorted batches telescopes: at most the spread of lengths times the largest batch.
    assert padded - lengths.sum() <= spread * max(len(batch) for batch in batches)


@given(ROWS.filter(bool), st.integers(0, 9))
def test_padding_keeps_every_row(rows: list[list[int]], filler: int) -> None:
    ids = pad(flat(rows), filler)
    longest = max(map(len, rows))
    assert ids.tolist() == [row + [filler] * (longest - len(row)) for row in rows]


def test_a_bad_text_is_an_error_of_its_own_row(tokeniser: Tokeniser) -> None:
    found = tokeniser.tokenise(["good", "", " \n\t ", None, 7, b"", "also good"])
    assert (found.places.tolist(), len(found.tokens.lengths)) == ([0, 6], 2)
    assert found.errors == {
        1: "text is empty",
        2: "text is empty",
        3: "text is not a string but NoneType",
        4: "text is not a string but int",
        5: "text is not valid UTF-8",
    }


def test_no_good_text_is_no_row(tokeniser: Tokeniser) -> None:
    for texts in ([], [""]):
        found = tokeniser.tokenise(texts)
        assert (rows_of(found.tokens), found.places.tolist(), found.truncated) == ([], [], 0)
        assert cut_by_budget(found.tokens.lengths, 64) == []


def test_a_text_the_tokenizer_refuses_does_not_take_its_neighbours_along(tokeniser: Tokeniser) -> None:
    found = tokeniser.tokenise(["one", "\ud800", "two"])
    assert list(found.errors) == [1]
    assert found.errors[1].startswith("tokenizer refused the text")
    assert found.places.tolist() == [0, 2]


def test_the_stored_padding_and_truncation_of_the_folder_are_off(tokeniser: Tokeniser) -> None:
    assert rows_of(tokeniser.tokenise(["hello world"]).tokens) == [[CLS, 7592, 2088, SEP]]


def cut(tokeniser: Tokeniser, *counts: int, too_long: str = "truncate") -> Tokenised:
    return tokeniser.tokenise(["hello " * count for count in counts], too_long=too_long)


def test_a_text_too_long_loses_its_end_and_keeps_its_special_tokens(tokeniser: Tokeniser) -> None:
    found = cut(tokeniser, 254, 255, 3, 1000)
    assert (found.truncated, found.truncated_tokens) == (2, 1 + 746)
    full, over, short, far_over = rows_of(found.tokens)
    assert full == over == far_over
    assert (len(full), full[0], full[-1], len(short)) == (256, CLS, SEP, 5)
    assert found.tokens.lengths.tolist() == [256, 256, 5, 256]


def test_a_text_too_long_can_be_refused_instead(tokeniser: Tokeniser) -> None:
    found = cut(tokeniser, 300, 1, too_long="refuse")
    assert found.errors == {0: "text has 302 tokens, the model takes 256"}
    assert (found.truncated, found.places.tolist()) == (0, [1])


def test_a_prefix_comes_before_every_text(tokeniser: Tokeniser) -> None:
    left = tokeniser.tokenise(["world"], prefix="hello ").tokens
    assert left.ids.tolist() == tokeniser.tokenise(["hello world"]).tokens.ids.tolist()


def test_a_folder_can_ask_for_lower_case_where_its_tokenizer_keeps_case(tmp_path: Path) -> None:
    own = open_tokenizer(open_model().folder / "tokenizer.json")
    own.normalizer = normalizers.NFC()
    own.save(str(tmp_path / "tokenizer.json"))
    for lower_case, same in ((False, False), (True, True)):
        found = Tokeniser(replace(open_model(), folder=tmp_path, lower_case=lower_case))
        one, other = rows_of(found.tokenise(["Hello WORLD", "hello world"]).tokens)
        assert (one == other) is same


def test_a_token_that_the_weights_do_not_reach_is_an_error_of_its_text() -> None:
    model = open_model()
    found = Tokeniser(replace(model, config={**model.config, "vocab_size": 7592})).tokenise(
        ["red", "hello " * 300, "blue " * 300, ""]
    )
    assert found.errors == {1: "text has a token that the model has no weights for", 3: "text is empty"}
    assert (found.places.tolist(), found.tokens.lengths.tolist(), found.truncated) == ([0, 2], [3, 256], 1)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(EmbedderError, match=r"tokenizer\.json is not a tokenizer .*; download"):
        open_tokenizer(tmp_path / "tokenizer.json")

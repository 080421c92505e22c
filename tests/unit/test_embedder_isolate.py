"""A model in a child process: the same answers, its errors as they are here, and an end that is told from a text's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from embedder import shards
from embedder.encode import Embedder, Floats
from embedder.isolate import ChildDied, IsolatedEmbedder
from embedder.model import open_model
from embedder.protocol import EmbedderError
from embedder.tokens import Tokens

POISON = 9947  # the token "poison"
TEXTS = ["river stone", "a window", "paper", "letter and letter", "stone"]


class Engine:
    """Knows the token ids by their sum. Longer batches than three rows do not fit its memory."""

    name, device, precision, streams, token_budget, packed = "sums", "cpu", "f32", 3, 1000, True

    def encode(self, batches: Iterable[Tokens], take: Callable[[int, Floats], None]) -> None:
        for number, batch in enumerate(batches):
            if POISON in batch.ids:
                raise ValueError("poison")
            if len(batch.lengths) > 3:
                raise MemoryError("too many rows")
            sums = np.add.reduceat(batch.ids, batch.offsets[:-1]).astype(np.float32)
            take(number, np.stack([sums, np.ones_like(sums)] * 192, axis=1))


def opened() -> Embedder:
    return Embedder(open_model(), engine=Engine())


def refused() -> Embedder:
    raise EmbedderError("this model is not to be opened")


def broken() -> Embedder:
    raise RuntimeError("no such driver")


def dead(opened: Path) -> Embedder:
    opened.write_text(opened.read_text() + "x" if opened.exists() else "x")
    os._exit(3)


@pytest.fixture(scope="module")
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IsolatedEmbedder]:
    embedder = IsolatedEmbedder(open_model(), opened, tmp_path_factory.mktemp("out"))
    yield embedder
    embedder.close()


def test_texts_become_what_they_become_here_and_memory_that_runs_out_costs_half_the_budget(
    isolated: IsolatedEmbedder,
) -> None:
    assert (isolated.engine.name, isolated.engine.streams, isolated.engine.packed) == ("sums", 3, True)
    np.testing.assert_array_equal(isolated.encode(TEXTS), opened().encode(TEXTS))
    assert isolated.engine.token_budget < 1000
    assert isolated.tokeniser.tokenise(["", "stone"]).errors == {0: "text is empty"}


def test_whatever_an_engine_raises_is_the_error_of_the_text(isolated: IsolatedEmbedder) -> None:
    tokens = isolated.tokeniser.tokenise(["stone", "poison"]).tokens
    encoded = isolated.encode_tokens(tokens)
    assert encoded.errors == {1: "the engine refused the text: ValueError: poison"}
    np.testing.assert_array_equal(encoded.vectors[:1], opened().encode(["stone"]))


def test_an_answer_that_is_left_early_is_not_taken_for_the_next(isolated: IsolatedEmbedder) -> None:
    tokens = isolated.tokeniser.tokenise(TEXTS).tokens
    batches = [tokens.take(np.array([row])) for row in range(5)]

    def leave(_number: int, _vectors: Floats) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        isolated.engine.encode(batches, leave)
    taken: list[int] = []
    isolated.engine.encode(batches, lambda number, _vectors: taken.append(number))
    assert taken == [0, 1, 2, 3, 4]


def test_a_model_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    with pytest.raises(EmbedderError, match="this model is not to be opened"):
        IsolatedEmbedder(open_model(), refused, tmp_path).encode(TEXTS)


def test_a_model_that_ends_its_process_while_it_opens_is_no_texts_fault(tmp_path: Path) -> None:
    isolated = IsolatedEmbedder(open_model(), partial(dead, tmp_path / "opened"), tmp_path)
    with pytest.raises(EmbedderError, match=r"the model cannot be opened .* \(exit code 3\)"):
        isolated.engine  # noqa: B018
    assert len((tmp_path / "opened").read_text()) == 2
    with pytest.raises(ChildDied):
        isolated._child.ask("engine")
    assert not list(tmp_path.glob(".*.begun"))
    with pytest.raises(EmbedderError, match="cannot be opened in a process of its own: no such driver"):
        IsolatedEmbedder(open_model(), broken, tmp_path).encode(TEXTS)


def test_only_what_is_asked_about_texts_is_marked(
    isolated: IsolatedEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(shards, "begin", lambda _folder, name, keys: begun.append((name, keys)))
    isolated._child.open("engine")
    assert not begun
    isolated.encode(["stone"])
    isolated.encode(["stone"])
    names = [name for name, keys in begun if not keys]
    assert len(names) == 4 and names[:2] == names[2:] and names[0] != names[1]

"""Tokeniser processes: exactly the tokens of this process's tokeniser, also after a process dies; none outlives us."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedder import tokenise_pool
from embedder.machine import usable_cores
from embedder.model import open_model
from embedder.protocol import EmbedderError
from embedder.tokenise_pool import SLICE, TokeniserPool
from embedder.tokens import Tokeniser

TEXTS: list[Any] = [
    f"Section {i}: the über-invoice № {i * i} " + "was paid twice; " * (i % 4) for i in range(2 * SLICE + 77)
]
TEXTS[3] = ""
TEXTS[7] = TEXTS[SLICE + 7] = "far too long " * 300
TEXTS[SLICE + 1] = b""
TEXTS[2 * SLICE + 5] = None
TEXTS[2 * SLICE + 6] = "\ud800"  # half a character, which no encoder takes


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def pool(said: list[str]) -> Iterator[TokeniserPool]:
    with TokeniserPool(open_model(), 2, say=said.append) as opened:
        yield opened


def assert_like_here(pool: TokeniserPool, texts: list[Any], **settings: Any) -> None:
    """The pool's result is that of the tokeniser of this process, to the last id."""
    expected = Tokeniser(open_model()).tokenise(texts, **settings)
    found = pool.tokenise(texts, **settings)
    assert found.tokens.ids.dtype == found.tokens.lengths.dtype == np.int32
    assert found.places.dtype == np.int64
    assert np.array_equal(found.tokens.ids, expected.tokens.ids)
    assert np.array_equal(found.tokens.lengths, expected.tokens.lengths)
    assert np.array_equal(found.places, expected.places)
    assert (found.errors, found.truncated) == (expected.errors, expected.truncated)
    assert found.truncated_tokens == expected.truncated_tokens


def test_the_processes_give_exactly_the_tokens_of_this_one(pool: TokeniserPool) -> None:
    found = pool.tokenise(TEXTS)
    assert {3, SLICE + 1, 2 * SLICE + 5} <= found.errors.keys() and found.truncated == 2
    assert_like_here(pool, TEXTS)
    assert_like_here(pool, TEXTS, prefix="passage: ", too_long="refuse")
    assert_like_here(pool, TEXTS[10:20])
    assert_like_here(pool, [])


def test_a_killed_process_is_replaced_and_its_texts_are_tokenised_again(
    pool: TokeniserPool, said: list[str]
) -> None:
    pool.tokenise(TEXTS)
    before = {child.pid for child in multiprocessing.active_children()}
    assert len(before) == 2
    os.kill(int(next(iter(before)) or 0), signal.SIGKILL)

    assert_like_here(pool, TEXTS)

    assert any("died" in line for line in said)
    assert not before & {child.pid for child in multiprocessing.active_children()}


class Bomb:
    """Ends the process that receives it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (9,)


def test_texts_that_kill_every_process_are_an_error_and_not_a_loop(pool: TokeniserPool) -> None:
    with pytest.raises(EmbedderError, match=r"died twice over the same 2,125 texts.*out of memory"):
        pool.tokenise([*TEXTS[1:], Bomb()])
    assert_like_here(pool, TEXTS)


def test_the_processes_end_with_a_parent_that_was_killed() -> None:
    program = (
        "import multiprocessing, time; from embedder.model import open_model;"
        "from embedder.tokenise_pool import SLICE, TokeniserPool;"
        "pool = TokeniserPool(open_model(), 2); pool.tokenise(['a b'] * 2 * SLICE);"
        "print(*(child.pid for child in multiprocessing.active_children()), flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert children
    deadline = time.monotonic() + 60
    while any(map(running, children)):
        assert time.monotonic() < deadline, "a tokeniser process outlived its parent"
        time.sleep(0.05)


def running(pid: int) -> bool:
    """Whether a process is there and has not ended (an ended one may wait for whoever adopted it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_number_of_processes_leaves_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, workers in ((1, 1), (2, 1), (3, 1), (16, 14)):
        monkeypatch.setattr(tokenise_pool, "usable_cores", partial(int, cores))
        assert TokeniserPool(open_model()).workers == workers
    monkeypatch.undo()
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)

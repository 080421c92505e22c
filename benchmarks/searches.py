"""Searches through `retrieval.search`: how long they take, what they miss, and what a swap does to them.

Belongs here: asking, latencies, recall against an exact search, readers while the view moves. Does not belong here: how
the index came to be (`benchmarks.index`).
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from statistics import fmean, median
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
from psycopg.types.json import Jsonb

from benchmarks.corpus import PATHS, Corpus
from benchmarks.load import percentile
from storage.database import Database
from storage.warehouse import WRITER

Floats = npt.NDArray[np.float32]

K = 10
MODES = ("vector", "text", "hybrid")
READERS, READ_MODES, SWAPS = 2, ("vector", "hybrid"), 10
# What the product asks with, prepared.
_SEARCH = "select * from retrieval.search(%s, %s::halfvec, %s, %s, %s)"
# Two vectors whose similarities differ by less are equally near.
_SAME = 1e-6

_Read = tuple[str, float, float]
"""Mode, when it began (of the monotonic clock, which processes share), milliseconds."""


@dataclass(frozen=True)
class Question:
    """A question, and its vector as Postgres reads it."""

    text: str
    vector: str

    def ask(
        self, connection: psycopg.Connection[Any], mode: str, path: str | None = None
    ) -> tuple[float, list[int]]:
        """(seconds, rows of the corpus, best first)."""
        started = time.perf_counter()
        found = connection.execute(
            _SEARCH,
            [
                self.text,
                None if mode == "text" else self.vector,
                K,
                mode,
                Jsonb({"path": path} if path else {}),
            ],
            prepare=True,
        ).fetchall()
        return time.perf_counter() - started, [int(row[0]) for row in found]


def questions(texts: Sequence[str], vectors: Floats) -> list[Question]:
    """Each text with its row of float32[n, d]."""
    return [Question(text, str(vector.tolist())) for text, vector in zip(texts, vectors, strict=True)]


def search(
    connection: psycopg.Connection[Any], corpus: Corpus, vectors: Floats, asked: Floats, rounds: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Mode -> filter's share -> what `waits` says, rows returned of 10 in the mean, and recall@10 of vectors.

    Recall is against the similarities of the stored vectors, computed here: a chunk that is found counts if it is as
    near as the tenth nearest that the filter lets through.

    Args:
        vectors: float32[n, d] of the chunks.
        asked: float32[q, d] of the queries.
    """
    stored = vectors.astype(np.float16).astype(np.float32)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    near = asked.astype(np.float16).astype(np.float32) @ stored.T
    near /= np.linalg.norm(asked.astype(np.float16).astype(np.float32), axis=1, keepdims=True)
    every = questions(corpus.queries, asked)
    found: dict[str, dict[str, dict[str, float]]] = {mode: {} for mode in MODES}
    for share, path in {1.0: None, **PATHS}.items():
        within = corpus.within(share)
        wanted = min(K, int(within.sum()))
        worst = np.sort(np.where(within, near, -2), axis=1)[:, -wanted]
        for mode in MODES:
            every[0].ask(connection, mode, path)
            taken, rows, recalls = [], [], []
            for turn in range(rounds):
                for number, question in enumerate(every):
                    seconds, answer = question.ask(connection, mode, path)
                    taken.append(1000 * seconds)
                    if turn == 0:
                        rows.append(len(answer))
                        assert within[answer].all(), f"{path}: a chunk that the filter keeps out was found"
                        recalls.append((near[number, answer] >= worst[number] - _SAME).sum() / wanted)
            figures = waits(taken) | {"rows": fmean(rows)}
            if mode == "vector":
                figures["recall"] = fmean(recalls)
            found[mode][f"{share:g}"] = figures
    return found


def under_swaps(
    url: str, asked: Sequence[Question], swap: Callable[[int], None], seconds: float
) -> dict[str, Any]:
    """What readers see for `seconds` in which nothing happens, and then while `swap` is called ten times.

    Args:
        swap: Moves the view; is given the number of the call, and rolls back when that is odd.
        seconds: Of quiet reading, and the least for the swaps.
    """
    spawn = multiprocessing.get_context("spawn")
    stop: Event = spawn.Event()
    answers: Queue[tuple[list[_Read], list[str]]] = spawn.Queue()
    readers = [
        spawn.Process(target=_read, args=(url, list(asked), number, stop, answers), daemon=True)
        for number in range(READERS)
    ]
    for reader in readers:
        reader.start()
    swaps = []
    try:
        for _ in readers:
            answers.get(timeout=120)  # it has begun
        began = time.monotonic()
        time.sleep(seconds)
        moved = time.monotonic()
        for number in range(SWAPS):
            started = time.monotonic()
            swap(number)
            swaps.append(1000 * (time.monotonic() - started))
            time.sleep(seconds / SWAPS)
        ended = time.monotonic()
    finally:
        stop.set()
        got = [answers.get(timeout=60) for _ in readers]
        for reader in readers:
            reader.join()
    reads = [read for one, _ in got for read in one]
    failures = [failure for _, some in got for failure in some]
    return {
        "failed_reads": len(failures),
        "failures": sorted(set(failures))[:5],
        "swap_median_ms": median(swaps),
        "swap_max_ms": max(swaps),
        "rollback_max_s": max(swaps[1::2]) / 1000,
        "readers": {
            mode: {
                when: waits([wait for one, start, wait in reads if one == mode and since <= start < until])
                for when, since, until in (("without", began, moved), ("with", moved, ended))
            }
            for mode in READ_MODES
        },
    }


def waits(milliseconds: Sequence[float]) -> dict[str, float]:
    """How many, their percentiles, and the longest."""
    return {
        "reads": len(milliseconds),
        **{f"p{percent}_ms": percentile(milliseconds, percent / 100) for percent in (50, 95, 99)},
        "longest_ms": max(milliseconds),
    }


def _read(
    url: str, asked: list[Question], number: int, stop: Event, answers: Queue[tuple[list[_Read], list[str]]]
) -> None:
    """Search without a pause, in both modes in turns, until told to stop."""
    reads: list[_Read] = []
    failures: list[str] = []
    with Database.from_url(url).connect(
        role=WRITER, autocommit=True, application_name="reader"
    ) as connection:
        for mode in READ_MODES:
            for question in asked:
                question.ask(connection, mode)
        answers.put(([], []))
        while not stop.is_set():
            number += 1
            mode = READ_MODES[number % len(READ_MODES)]
            started = time.monotonic()
            try:
                seconds, found = asked[number // len(READ_MODES) % len(asked)].ask(connection, mode)
            except psycopg.Error as error:
                failures.append(repr(error))
                continue
            reads.append((mode, started, 1000 * seconds))
            if len(found) < K:
                failures.append(f"only {len(found)} rows")
    answers.put((reads, failures))

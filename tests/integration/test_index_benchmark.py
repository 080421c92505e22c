"""`python -m benchmarks.embedding --index` at a small size: it runs, its figures add up, and no read fails."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import corpus as corpora

ROOT = Path(__file__).resolve().parents[2]
ROWS = 600


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    options = f"--rows {ROWS} --embed 100 --rounds 1 --seconds 0.5".split()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.embedding", "--index", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_each_step_has_its_seconds_and_its_share(figures: dict[str, Any]) -> None:
    assert list(figures["steps"]) == [
        *("export", "vectors", "passages", "postings", "copy", "graph", "analyze", "keys", "work list")
    ]
    assert sum(figures["shares"].values()) == pytest.approx(1, abs=0.01)
    assert figures["end_to_end_s"] == pytest.approx(sum(figures["steps"].values()), abs=0.01)
    assert all(figures["steps"][name] > 0 for name in figures["steps"] if name != "graph")
    # So few are compared one by one.
    assert (figures["graph"], figures["graph_mb"], figures["maintenance_work_mem_mb"]) == (False, 0, None)


def test_what_was_not_embedded_is_said(figures: dict[str, Any]) -> None:
    assert (figures["rows"], figures["embedded"], figures["drawn"]) == (ROWS, 100, 500)
    assert (
        figures["steps"]["vectors"]
        == figures["embedding_extrapolated_s"]
        == pytest.approx(figures["embedding_s"] + 500 / figures["embedding_chunks_per_s"], rel=0.01)
    )


def test_only_what_changed_is_embedded_and_loaded(figures: dict[str, Any]) -> None:
    assert figures["changed_rows"] == ROWS / 100
    assert figures["changed_steps"]["copy"] > figures["unchanged_steps"]["copy"] == 0
    assert figures["load_vs_copy"] == pytest.approx(
        figures["load_rows_per_s"] / figures["copy_rows_per_s"], rel=0.01
    )


def test_no_read_fails_while_the_view_moves(figures: dict[str, Any]) -> None:
    assert figures["failed_reads"] == 0
    assert figures["failures"] == []
    assert figures["swap_max_ms"] >= figures["swap_median_ms"] > 0
    assert set(figures["readers"]) == {"vector", "hybrid"}
    for phases in figures["readers"].values():
        for when in ("without", "with"):
            assert phases[when]["reads"] > 0
            assert phases[when]["longest_ms"] >= phases[when]["p99_ms"] >= phases[when]["p50_ms"] > 0


def test_exact_searches_find_all_that_a_filter_lets_through(figures: dict[str, Any]) -> None:
    found = figures["search"]["vector"]
    assert {share: one["recall"] for share, one in found.items()} == dict.fromkeys(
        ("1", "0.5", "0.1", "0.01", "0.001"), 1.0
    )
    assert [one["rows"] for one in found.values()] == [10, 10, 10, 6, 1]
    assert set(figures["search"]) == {"vector", "text", "hybrid"}


def test_the_corpus_is_distinct_and_its_filters_keep_their_shares() -> None:
    corpus = corpora.make(2_000)
    assert len(set(corpus.chunks)) == 2_000
    assert [int(corpus.within(share).sum()) for share in (1.0, *corpora.PATHS)] == [2000, 1000, 200, 20, 2]
    # What is asked is not there word by word, but for phrases that every package has.
    there = sum(any(query in chunk for chunk in corpus.chunks) for query in corpus.queries)
    assert there < len(corpus.queries) / 5


def test_drawn_vectors_lie_beside_embedded_ones_of_the_same_words() -> None:
    corpus = corpora.make(400)
    known, dimensions = 100, 32
    # Vectors that turn slowly with the place in the text.
    angles = corpus.middles[:known, None] / 200 * np.arange(1, dimensions // 2 + 1)
    embedded = (np.concatenate([np.cos(angles), np.sin(angles)], axis=1) / 4).astype(np.float32)
    drawn = corpora.drawn(corpus, embedded)
    assert drawn.shape == (300, dimensions)
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1, atol=1e-5)
    nearest = np.abs(corpus.middles[known:, None] - corpus.middles[:known]).argmin(axis=1)
    assert np.median(np.einsum("ij,ij->i", drawn, embedded[nearest])) > 0.6
    np.testing.assert_array_equal(drawn, corpora.drawn(corpus, embedded))

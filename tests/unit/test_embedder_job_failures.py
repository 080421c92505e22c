"""Texts that fail: when they are tried again, and how they leave the table. Time is given, never waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest

from embedder import failures, protocol
from embedder.encode import Embedder
from embedder.failures import Failure
from embedder.model import open_model
from embedder.tokens import Tokens
from tests.unit.test_embedder_job import NOW, QuickEngine, failures_of, quick_embedder, run, some

HOUR = timedelta(hours=1)
Rows = list[tuple[str, str | None]]


class Healed(QuickEngine):
    """Takes every text."""

    def encode(self, batches: Iterable[Tokens], take: Callable[[int, npt.NDArray[np.float32]], None]) -> None:
        super().encode((batch._replace(ids=np.minimum(batch.ids, 5000)) for batch in batches), take)


def rows_of(folder: Path) -> list[dict[str, object]]:
    return list(pq.read_table(folder / "failures.parquet").to_pylist())


def poisoned() -> Rows:
    rows: Rows = [*some(20), ("poison", "some poison here")]
    return rows


def test_waits_grow_fourfold_up_to_thirty_days() -> None:
    hours = [failures.wait_after(attempts) / HOUR for attempts in range(1, 8)]
    assert hours == [1, 4, 16, 64, 256, 720, 720]
    assert failures.wait_after(10**9) == failures.LONGEST_WAIT


def test_a_time_that_only_a_wrong_clock_can_have_set_parks_nothing() -> None:
    known = {
        name: Failure("x", 1, NOW + wait)
        for name, wait in (("past", -HOUR), ("next", HOUR), ("longest", 720 * HOUR), ("wrong", 721 * HOUR))
    }
    assert failures.parked(known, NOW) == {"next", "longest"}


def test_a_failed_text_is_parked_until_it_is_due_then_tried_again(tmp_path: Path) -> None:
    first = run(tmp_path, poisoned())
    assert (first.embedded, first.failed, first.parked) == (20, 1, 0)
    assert rows_of(tmp_path / "out") == [
        {
            "content_hash": "poison",
            "error": "the engine refused the text: poison in the batch",
            "attempts": 1,
            "next_attempt_at": NOW + HOUR,
        }
    ]
    engine = QuickEngine()
    early = run(tmp_path, poisoned(), now=NOW + HOUR / 2, embedder=Embedder(open_model(), engine=engine))
    assert (early.skipped, early.failed, early.parked, engine.batches) == (20, 0, 1, 0)
    assert early.sound
    assert rows_of(tmp_path / "out")[0]["attempts"] == 1
    due = run(tmp_path, poisoned(), now=NOW + HOUR)
    assert (due.skipped, due.failed, due.parked) == (20, 1, 0)
    assert rows_of(tmp_path / "out")[0]["attempts"] == 2
    assert rows_of(tmp_path / "out")[0]["next_attempt_at"] == NOW + 5 * HOUR


def test_retry_failed_tries_all_now_and_success_leaves_the_table(tmp_path: Path) -> None:
    run(tmp_path, poisoned())
    healed = Embedder(open_model(), engine=Healed())
    summary = run(tmp_path, poisoned(), retry_failed=True, embedder=healed)
    assert (summary.embedded, summary.failed, summary.parked) == (1, 0, 0)
    assert failures_of(tmp_path / "out") == {}
    assert run(tmp_path, poisoned()).skipped == 21


def test_failures_of_another_input_of_the_folder_stay(tmp_path: Path) -> None:
    run(tmp_path, poisoned())
    run(tmp_path, [*some(3), ("empty", " ")])
    assert failures_of(tmp_path / "out").keys() == {"empty", "poison"}
    assert run(tmp_path, poisoned()).parked == 1


def test_failures_that_no_input_has_for_long_are_forgotten(tmp_path: Path) -> None:
    run(tmp_path, poisoned())
    run(tmp_path, some(3), now=NOW + failures.LONGEST_WAIT)
    assert failures_of(tmp_path / "out").keys() == {"poison"}
    run(tmp_path, some(3), now=NOW + failures.LONGEST_WAIT + HOUR)
    assert failures_of(tmp_path / "out") == {}


def test_what_another_model_refused_is_tried(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    known = {"h1": Failure("text is empty", 3, NOW + HOUR)}
    failures.write(tmp_path / "out", {"model": "other"}, known)
    assert failures.read(tmp_path / "out", {"model": "other"}) == known
    summary = run(tmp_path, some(3))
    assert (summary.embedded, summary.parked) == (3, 0)
    assert failures_of(tmp_path / "out") == {}


def test_a_damaged_table_is_moved_aside_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / protocol.FAILURES_FILE).write_bytes(b"no")
    assert failures.read(tmp_path, {}, said.append) == {}
    assert (tmp_path / "failures.unreadable").exists()
    assert len(said) == 1 and "moved aside" in said[0]


@pytest.mark.parametrize("shard_size", [1, 4, 100])
def test_nothing_but_failures_is_no_error_and_no_stall(tmp_path: Path, shard_size: int) -> None:
    rows: Rows = [(f"bad{i}", "poison" if i % 2 else "") for i in range(9)]
    summary = run(tmp_path, rows, shard_size=shard_size, embedder=quick_embedder())
    assert (summary.embedded, summary.failed, summary.shards, summary.sound) == (0, 9, 0, True)
    assert run(tmp_path, rows, shard_size=shard_size, embedder=quick_embedder()).parked == 9

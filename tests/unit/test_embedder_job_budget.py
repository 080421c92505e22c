"""Estimates, ceilings and true cost, on a clock that the test moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from embedder import job, protocol
from embedder.budget import Ledger, Limits, OverBudget
from embedder.job import Stopped
from embedder.protocol import EmbedderError
from embedder.stage import ShardStage
from tests.unit.test_embedder_job import Watching, quick_embedder, run, some


class Clock:
    """Stands still until `now` is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def ledger(folder: Path, clock: Clock, work: str = "w", **limits: Any) -> Ledger:
    return Ledger(folder, work, Limits(**limits), timer=clock)


def test_cost_is_price_times_all_seconds_start_up_included(tmp_path: Path) -> None:
    clock = Clock()
    account = ledger(tmp_path, clock, price_per_hour=7200)
    clock.now = 3
    account.start_embedding()
    clock.now = 5
    assert (account.seconds, account.startup_seconds, account.embedding_seconds) == (5, 3, 2)
    assert account.cost == account.cost_of_work == 10
    assert ledger(tmp_path, clock).cost is None


def test_an_estimate_uses_the_given_rate_then_the_measured_one_and_adds_the_start_up(tmp_path: Path) -> None:
    clock = Clock()
    account = ledger(tmp_path, clock, price_per_hour=3600)
    assert account.estimate(10, 1000).seconds is None
    clock.now = 4
    account.start_embedding()
    account.spend(500)
    clock.now = 6
    account.measure()
    account.save()
    account.close()
    later = ledger(tmp_path, Clock(), price_per_hour=3600).estimate(10, 1000)
    assert (later.tokens_per_s, later.seconds, later.cost) == (250, 8, 8)
    given = ledger(tmp_path, Clock(), rate=100).estimate(10, 1000)
    assert (given.tokens_per_s, given.seconds, given.cost) == (100, 14, None)


def test_the_rate_of_another_machine_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    account = ledger(tmp_path, clock)
    account.start_embedding()
    account.spend(500)
    clock.now = 1
    account.measure()
    account.close()
    assert ledger(tmp_path, Clock()).rate == 500
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    assert ledger(tmp_path, Clock()).rate is None


def test_the_ceiling_on_tokens_counts_earlier_attempts_at_the_same_work(tmp_path: Path) -> None:
    account = ledger(tmp_path, Clock(), max_tokens=100)
    account.reserve(60)
    account.spend(60)
    account.save()
    with pytest.raises(OverBudget, match="60 of at most 100 tokens are spent and the next shard has 41"):
        account.reserve(41)
    again = ledger(tmp_path, Clock(), max_tokens=100)
    again.reserve(40)
    with pytest.raises(OverBudget):
        again.reserve(41)
    assert not again.estimate(1, 41).fits and again.estimate(1, 40).fits
    ledger(tmp_path, Clock(), work="another", max_tokens=100).reserve(100)
    again.close()
    ledger(tmp_path, Clock(), max_tokens=100).reserve(100)


def test_the_ceiling_on_cost_stops_before_a_shard_that_would_pass_it(tmp_path: Path) -> None:
    clock = Clock()
    account = ledger(tmp_path, clock, price_per_hour=3600, max_cost=10, rate=10)
    clock.now = 4
    account.reserve(60)
    with pytest.raises(OverBudget, match=r"4\.0000 of at most 10\.0000 are spent.*costs about 6\.1000"):
        account.reserve(61)
    clock.now = 10
    account.check()
    clock.now = 10.5
    with pytest.raises(OverBudget, match="raise --max-cost to continue") as over:
        account.check()
    assert "next shard" not in str(over.value)
    account.save()
    with pytest.raises(OverBudget):
        ledger(tmp_path, Clock(), price_per_hour=3600, max_cost=10).check()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"host": "x"}', '{"tokens_per_s": "fast"}', "\\xff"])
def test_a_damaged_record_starts_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / protocol.RUN_FILE).write_text(content)
    account = ledger(tmp_path, Clock())
    assert account.rate is None
    account.save()
    assert json.loads((tmp_path / protocol.RUN_FILE).read_text())["work"] == "w"


def test_a_ceiling_on_cost_needs_a_price() -> None:
    with pytest.raises(EmbedderError, match="give --price-per-hour with --max-cost"):
        Limits(max_cost=3)


def stopped(tmp_path: Path, limits: Limits, **options: Any) -> job.Summary:
    with pytest.raises(Stopped, match="stopped by the budget") as caught:
        run(tmp_path, some(60), limits=limits, embedder=quick_embedder(), **options)
    assert caught.value.status == job.OVER_BUDGET
    assert caught.value.summary is not None
    return caught.value.summary


def test_a_run_never_embeds_above_its_tokens_and_keeps_its_shards(tmp_path: Path) -> None:
    one = stopped(tmp_path, Limits(max_tokens=400))
    assert 0 < one.tokens <= 400
    assert one.shards == len(protocol.shard_paths(tmp_path / "out"))
    two = stopped(tmp_path, Limits(max_tokens=700))
    assert one.tokens + two.tokens <= 700
    assert two.skipped == one.embedded
    rest = run(tmp_path, some(60), limits=Limits(max_tokens=10**6), embedder=quick_embedder())
    assert (rest.distinct, rest.skipped) == (60, one.embedded + two.embedded)
    whole = tmp_path / "whole"
    whole.mkdir()
    run(whole, some(60), embedder=quick_embedder())
    assert {path.name: path.read_bytes() for path in (whole / "out").glob("*.parquet")} == {
        path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.parquet")
    }


def ticking(clock: Clock) -> Watching:
    """Each batch takes a second."""

    def tick(_progress: job.Progress) -> None:
        clock.now += 1

    return Watching(tick)


def test_a_first_shard_that_costs_more_than_all_is_stopped_between_batches(tmp_path: Path) -> None:
    clock = Clock()
    limits = Limits(price_per_hour=3600, max_cost=2, rate=10**9)
    summary = stopped(tmp_path, limits, timer=clock, watcher=ticking(clock))
    assert (summary.cost, summary.embedded) == (3, 0)


def test_a_run_stops_before_a_shard_that_would_cost_too_much(tmp_path: Path) -> None:
    clock = Clock()
    limits = Limits(price_per_hour=3600, max_cost=12, rate=10**9)
    summary = stopped(tmp_path, limits, timer=clock, watcher=ticking(clock))
    assert summary.cost is not None and summary.cost <= 12
    assert 0 < summary.embedded < 60
    rest = run(
        tmp_path, some(60), limits=Limits(price_per_hour=3600), timer=Clock(), embedder=quick_embedder()
    )
    assert (rest.skipped, rest.embedded) == (summary.embedded, 60 - summary.embedded)
    assert (rest.cost, rest.cost_of_work) == (0, summary.cost)


def test_a_spent_budget_opens_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    limits = Limits(price_per_hour=3600, max_cost=12)
    stopped(tmp_path, limits, timer=clock, watcher=ticking(clock))
    monkeypatch.setattr(ShardStage, "open", lambda _self: pytest.fail("the engine was opened"))
    stopped(tmp_path, Limits(price_per_hour=3600, max_cost=8), timer=Clock())


def test_an_unknown_rate_is_estimated_after_the_first_shard(tmp_path: Path) -> None:
    watcher = Watching()
    summary = run(tmp_path, some(60), watcher=watcher, limits=Limits(price_per_hour=1))
    before, after = watcher.estimates
    assert (before.rows, before.seconds, before.cost) == (60, None, None)
    assert abs(before.tokens - summary.tokens) < summary.tokens / 5
    assert after.tokens_per_s and after.seconds and after.cost is not None
    assert summary.estimated_tokens == before.tokens
    assert summary.cost is not None
    (tmp_path / "in.parquet").unlink()
    again = Watching()
    run(tmp_path, [(f"new{i}", "river stone") for i in range(9)], watcher=again)
    (only,) = again.estimates
    assert only.seconds is not None

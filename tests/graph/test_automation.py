"""The gate across ticks: what blocks within a run must also block what automation would start next."""

from collections.abc import Callable, Iterator
from typing import Any

import dagster as dg
import pytest

from orchestration.automation import gated_eager


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


class Graph:
    """``raw`` with a blocking check, ``downstream`` of it, ``beside`` it another pair without a gate."""

    def __init__(self, instance: dg.DagsterInstance, condition: Callable[[], Any]) -> None:
        self.good = True
        self.instance = instance
        self.cursor: Any = None

        @dg.asset
        def raw() -> None: ...

        @dg.asset_check(asset=raw, blocking=True)
        def gate() -> dg.AssetCheckResult:
            return dg.AssetCheckResult(passed=self.good)

        @dg.asset(deps=[raw], automation_condition=condition())
        def downstream() -> None: ...

        @dg.asset
        def other() -> None: ...

        @dg.asset(deps=[other], automation_condition=condition())
        def beside() -> None: ...

        self.defs = dg.Definitions(assets=[raw, downstream, other, beside], asset_checks=[gate])

    def materialize(self, *names: str) -> bool:
        result = self.defs.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=self.instance,
            asset_selection=[dg.AssetKey(name) for name in names],
            raise_on_error=False,
        )
        return result.success

    def requested(self) -> set[str]:
        result = dg.evaluate_automation_conditions(
            defs=self.defs,
            asset_selection=dg.AssetSelection.all(),
            instance=self.instance,
            cursor=self.cursor,
        )
        self.cursor = result.cursor
        return {key for key in ("downstream", "beside") if result.get_num_requested(dg.AssetKey(key))}


def test_a_closed_gate_stops_the_next_tick_and_nothing_else(instance: dg.DagsterInstance) -> None:
    graph = Graph(instance, gated_eager)
    graph.materialize("raw", "downstream", "other", "beside")
    assert graph.requested() == set()

    graph.good = False
    assert not graph.materialize("raw")
    graph.materialize("other")
    assert graph.requested() == {"beside"}

    graph.good = True
    graph.materialize("raw")
    assert graph.requested() == {"downstream"}


def test_eager_alone_fires_past_a_closed_gate(instance: dg.DagsterInstance) -> None:
    """The reason gated_eager exists; if Dagster changes this, the condition can go."""
    graph = Graph(instance, dg.AutomationCondition.eager)
    graph.materialize("raw", "downstream", "other", "beside")
    graph.requested()

    graph.good = False
    graph.materialize("raw")
    assert "downstream" in graph.requested()


@pytest.mark.parametrize("good", [True, False])
def test_a_closed_gate_stops_what_depends_on_it_in_the_same_run(
    instance: dg.DagsterInstance, good: bool
) -> None:
    graph = Graph(instance, gated_eager)
    graph.good = good
    graph.materialize("raw", "downstream", "other", "beside")
    written = {
        name
        for name in ("raw", "downstream", "other", "beside")
        if graph.instance.get_latest_materialization_event(dg.AssetKey(name)) is not None
    }
    assert written == ({"raw", "other", "beside"} | ({"downstream"} if good else set()))


def test_it_does_not_wait_for_every_daily_partition(instance: dg.DagsterInstance) -> None:
    days = dg.DailyPartitionsDefinition("2026-01-01", end_date="2026-02-01")

    @dg.asset(partitions_def=days)
    def facts() -> None: ...

    @dg.asset(deps=[facts], automation_condition=gated_eager())
    def mart() -> None: ...

    defs = dg.Definitions(assets=[facts, mart])
    job = defs.resolve_implicit_global_asset_job_def()
    first = dg.evaluate_automation_conditions(
        defs=defs, asset_selection=dg.AssetSelection.all(), instance=instance
    )
    job.execute_in_process(
        instance=instance, partition_key="2026-01-10", asset_selection=[dg.AssetKey("facts")]
    )
    second = dg.evaluate_automation_conditions(
        defs=defs, asset_selection=dg.AssetSelection.all(), instance=instance, cursor=first.cursor
    )
    assert second.get_num_requested(dg.AssetKey("mart")) == 1


def test_a_quiet_upstream_is_no_reason_to_run(instance: dg.DagsterInstance) -> None:
    @dg.asset
    def log() -> None: ...

    @dg.asset
    def table() -> None: ...

    @dg.asset(deps=[log, table], automation_condition=gated_eager(quiet=dg.AssetSelection.assets("log")))
    def view() -> None: ...

    defs = dg.Definitions(assets=[log, table, view])
    job = defs.resolve_implicit_global_asset_job_def()
    job.execute_in_process(instance=instance)
    cursor: Any = None
    requested = []
    for name in (None, "log", "table"):
        if name:
            job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey(name)])
        result = dg.evaluate_automation_conditions(
            defs=defs, asset_selection=dg.AssetSelection.all(), instance=instance, cursor=cursor
        )
        cursor = result.cursor
        requested.append(result.get_num_requested(dg.AssetKey("view")))
    assert requested == [0, 0, 1]

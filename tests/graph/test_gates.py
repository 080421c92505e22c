"""Gates across runs: what runs started by the clock leave out."""

from collections.abc import Iterator

import dagster as dg
import pytest

from orchestration.gates import closed_gates, descendants, open_assets


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    # Not merely ephemeral: a schedule opens the instance anew by its reference.
    with dg.instance_for_test() as instance:
        yield instance


def definitions(outcome: str) -> dg.Definitions:
    """``raw`` (with a blocking check that passes, fails or raises) -> ``mart``; ``raw`` -> table ``shared`` -> ``inventory``."""

    @dg.asset
    def raw() -> None: ...

    @dg.asset_check(asset=raw, blocking=True)
    def gate() -> dg.AssetCheckResult:
        if outcome == "raises":
            raise ValueError("the check itself is broken")
        return dg.AssetCheckResult(passed=outcome == "passes")

    @dg.asset_check(asset=raw)
    def remark() -> dg.AssetCheckResult:
        return dg.AssetCheckResult(passed=False)

    @dg.asset(deps=[raw])
    def mart() -> None: ...

    @dg.asset(deps=["shared"])
    def inventory() -> None: ...

    return dg.Definitions(
        assets=[raw, mart, dg.AssetSpec("shared", deps=[raw]), inventory], asset_checks=[gate, remark]
    )


@pytest.mark.parametrize(("outcome", "closed"), [("passes", False), ("fails", True), ("raises", True)])
def test_a_check_that_fails_or_raises_closes_the_gate(
    instance: dg.DagsterInstance, outcome: str, closed: bool
) -> None:
    defs = definitions(outcome)
    graph = defs.resolve_asset_graph()
    raw, mart, inventory = (dg.AssetKey(name) for name in ("raw", "mart", "inventory"))
    assert closed_gates(instance, graph) == set()
    defs.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=instance, asset_selection=[raw], raise_on_error=False
    )
    assert closed_gates(instance, graph) == ({raw} if closed else set())
    wanted = {mart, inventory}
    assert open_assets(instance, graph, wanted) == ({inventory} if closed else wanted)
    # Who runs the source again runs its checks again, and Dagster stops what they stop.
    assert open_assets(instance, graph, {raw, mart}) == {raw, mart}


def test_a_table_that_others_fill_too_passes_nothing_on() -> None:
    graph = definitions("passes").resolve_asset_graph()
    assert descendants(graph, [dg.AssetKey("raw")]) == {dg.AssetKey("mart")}


def test_a_schedule_leaves_out_what_is_behind_a_closed_gate(instance: dg.DagsterInstance) -> None:
    from orchestration.jobs import _gated

    defs = definitions("fails")
    job = dg.define_asset_job("marts", selection=["mart", "inventory"])
    defs = dg.Definitions.merge(
        defs, dg.Definitions(jobs=[job], schedules=[_gated("nightly", job, "0 3 * * *", "")])
    )
    defs.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=instance, asset_selection=[dg.AssetKey("raw")], raise_on_error=False
    )
    repository = defs.get_repository_def()
    context = dg.build_schedule_context(instance=instance, repository_def=repository)
    (request,) = repository.get_schedule_def("nightly").evaluate_tick(context).run_requests or []
    assert request.asset_selection == [dg.AssetKey("inventory")]

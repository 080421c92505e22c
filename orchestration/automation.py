"""Named automation conditions: when the graph wakes itself.

Belongs here: conditions between assets. What wakes the graph from outside is in sensors; fixed times are in
schedules. An asset has one of the three, never two.
"""

from __future__ import annotations

import dagster as dg


def gated_eager(quiet: dg.AssetSelection | None = None) -> dg.AutomationCondition[dg.AssetKey]:
    """Run when an upstream asset changed, unless a blocking check on an upstream asset has not passed.

    Args:
        quiet: Upstream assets whose changes are no reason to run.

    ``eager()`` alone fires past a failed gate on the next tick, since checks only block within their run. It
    also waits until no upstream partition is missing, which for an asset downstream of daily partitions would
    mean until every day since the start date has been run.
    """
    eager = dg.AutomationCondition.eager().without(~dg.AutomationCondition.any_deps_missing())
    if quiet is not None:
        eager = eager.ignore(quiet)
    return (eager & dg.AutomationCondition.all_deps_blocking_checks_passed()).with_label("gated_eager")

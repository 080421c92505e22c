"""Gates across runs: which assets stand behind a blocking check that has not passed.

Within a run Dagster stops them, and automation asks the same by its condition; this is for runs started by the clock
or by ``moat run``. Belongs here: reading check states. Does not belong here: the checks.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from typing import Any

import dagster as dg

PASSED = "SUCCEEDED"


def closed_gates(instance: dg.DagsterInstance, graph: Any) -> set[dg.AssetKey]:
    """Assets whose newest blocking check, once it was to be run, did not pass: it failed or raised, or never ran."""
    blocking = [key for key in graph.asset_check_keys if graph.get(key).blocking]
    records = instance.event_log_storage.get_latest_asset_check_execution_by_key(blocking)
    return {key.asset_key for key, record in records.items() if record.status.value != PASSED}


def descendants(graph: Any, keys: Iterable[dg.AssetKey]) -> set[dg.AssetKey]:
    """Everything downstream of ``keys``, not passing through tables that other assets fill too."""
    found: set[dg.AssetKey] = set()
    waiting = set(keys)
    while waiting:
        children = {
            child
            for key in waiting
            for child in graph.get(key).child_keys
            if child in graph.materializable_asset_keys
        }
        waiting = children - found
        found |= children
    return found


def open_assets(
    instance: dg.DagsterInstance, graph: Any, wanted: AbstractSet[dg.AssetKey]
) -> set[dg.AssetKey]:
    """``wanted`` without what stands behind a closed gate outside of ``wanted`` itself."""
    return set(wanted) - descendants(graph, closed_gates(instance, graph) - wanted)

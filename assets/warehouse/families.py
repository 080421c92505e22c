"""Split a dbt project into families of models that may be stopped, and run, on their own.

Dagster skips a whole dbt step when one of its inputs is stopped by a gate. So that a bad source stops only
what descends from it, models are grouped by the sources they descend from; and because a daily model can only
run with a day, daily models, what they need and what needs them are three groups again.

Belongs here: reading the manifest. Does not belong here: Dagster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DAILY = "daily"


@dataclass(frozen=True)
class Family:
    """Models that run together.

    Attributes:
        name: ``<stage>`` or ``<stage>_<source>_...``; stage is ``before_days``, ``daily`` or ``after_days``.
        daily: Whether the models are partitioned by day.
        sources: The raw tables all of them descend from.
        models: dbt's unique ids, sorted.
    """

    name: str
    daily: bool
    sources: frozenset[str]
    models: tuple[str, ...]


def families(manifest: Mapping[str, Any]) -> list[Family]:
    """The families of all enabled models, in an order in which they can run."""
    nodes = {
        unique_id: node
        for unique_id, node in manifest["nodes"].items()
        if node["resource_type"] in ("model", "seed", "snapshot")
    }
    ancestors = {unique_id: _ancestors(manifest, unique_id) for unique_id in nodes}
    daily = {unique_id for unique_id, node in nodes.items() if DAILY in node["tags"]}
    groups: dict[tuple[str, frozenset[str]], list[str]] = {}
    for unique_id in sorted(nodes):
        stage = (
            "daily" if unique_id in daily else "after_days" if ancestors[unique_id] & daily else "before_days"
        )
        sources = frozenset(
            source["name"]
            for key, source in manifest["sources"].items()
            if key in ancestors[unique_id] and source["source_name"] == "raw"
        )
        groups.setdefault((stage, sources), []).append(unique_id)
    order = ("before_days", "daily", "after_days")
    return [
        Family("_".join([stage, *sorted(sources)]), stage == "daily", sources, tuple(models))
        for (stage, sources), models in sorted(
            groups.items(), key=lambda item: (order.index(item[0][0]), len(item[0][1]), sorted(item[0][1]))
        )
    ]


def _ancestors(manifest: Mapping[str, Any], unique_id: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(manifest["parent_map"][unique_id])
    while waiting:
        parent = waiting.pop()
        if parent not in seen:
            seen.add(parent)
            waiting.extend(manifest["parent_map"].get(parent, []))
    return seen

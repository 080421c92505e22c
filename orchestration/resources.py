"""Resources: what assets are handed to do their work with, opened when a run first needs them.

Belongs here: the mapping from resource keys. Does not belong here: how a deployment is opened.
"""

from __future__ import annotations

import os
from typing import Any

import dagster as dg

from assets.embeddings.launch import launcher
from orchestration.deployment import dagster_database, open_warehouse
from orchestration.settings import Settings


def resources(settings: Settings) -> dict[str, Any]:
    """Resources by key, none of them opened yet."""
    return {
        "warehouse": dg.ResourceDefinition(lambda _: open_warehouse(settings)),
        "dagster_database": dg.ResourceDefinition(lambda _: dagster_database(settings)),
        "launcher": dg.ResourceDefinition(lambda _: launcher(os.environ)),
    }

"""Resources: what assets are handed to do their work with.

Belongs here: making them from settings, when a run first needs them. Does not belong here: their classes.
"""

from __future__ import annotations

from typing import Any

import dagster as dg

from orchestration.settings import Settings
from storage.database import Database, create_if_missing, resolve
from storage.secrets import read_or_create_key
from storage.warehouse import Warehouse


def open_warehouse(settings: Settings) -> Warehouse:
    """The deployment's warehouse; starts, or joins, the embedded Postgres when no DATABASE_URL is set."""
    return Warehouse(
        database=resolve(settings.database_url, settings.home, settings.deployment),
        lake=settings.lake,
        pseudonym_key=read_or_create_key(settings.folder / "secrets" / "pseudonym.key"),
    )


def dagster_database(settings: Settings) -> Database:
    """Dagster's own database, beside the deployment's."""
    warehouse = resolve(settings.database_url, settings.home, settings.deployment)
    dagster = warehouse.with_name(f"{warehouse.name}_dagster")
    create_if_missing(warehouse, dagster.name)
    return dagster


def resources(settings: Settings) -> dict[str, Any]:
    """Resources by key, none of them opened yet."""
    return {
        "warehouse": dg.ResourceDefinition(lambda _: open_warehouse(settings)),
        "dagster_database": dg.ResourceDefinition(lambda _: dagster_database(settings)),
        "pipes": dg.PipesSubprocessClient(),
    }

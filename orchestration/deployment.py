"""Opening a deployment: its warehouse and Dagster's database, embedded or external.

Belongs here: turning settings into handles. Does not belong here: Dagster, or making anything that is missing
besides databases and keys (see prepare).
"""

from __future__ import annotations

from feedback.secret import ensure_secret
from orchestration.settings import Settings
from storage.database import Database, create_if_missing, resolve
from storage.warehouse import Warehouse


def open_warehouse(settings: Settings) -> Warehouse:
    """The deployment's warehouse; starts, or joins, the embedded Postgres when no DATABASE_URL is set."""
    return Warehouse(
        database=resolve(settings.database_url, settings.home, settings.deployment),
        lake=settings.lake,
        pseudonym_key=pseudonym_key(settings),
    )


def dagster_database(settings: Settings) -> Database:
    """Dagster's own database, beside the deployment's; made if missing."""
    warehouse = resolve(settings.database_url, settings.home, settings.deployment)
    dagster = warehouse.with_name(f"{warehouse.name}_dagster")
    create_if_missing(warehouse, dagster.name)
    return dagster


def pseudonym_key(settings: Settings) -> bytes:
    """The key of the pseudonyms and of redaction tokens; made on first use."""
    return ensure_secret(settings.pseudonym_key_file)[0]

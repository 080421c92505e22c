"""Opening a deployment: its warehouse and Dagster's database, embedded or external.

Belongs here: turning settings into handles. Does not belong here: Dagster, or making anything that is missing
besides databases and keys (see prepare).
"""

from __future__ import annotations

import getpass
import os

from psycopg import sql

from feedback.secret import ensure_secret
from orchestration.settings import Settings, SettingsError
from storage.database import Database, create_if_missing, resolve
from storage.warehouse import Warehouse


def open_warehouse(settings: Settings) -> Warehouse:
    """The deployment's warehouse; starts, or joins, the embedded Postgres when no DATABASE_URL is set."""
    return Warehouse(
        database=resolve(settings.database_url, settings.home, settings.deployment),
        lake=settings.lake,
        pseudonym_key=pseudonym_key(settings),
    )


def require_prepared(settings: Settings) -> None:
    """Raise SettingsError where nothing has been made yet, before anything is made by merely looking."""
    if not (settings.dagster_home / "dagster.yaml").exists():
        raise SettingsError(
            f"{settings.folder}: there is nothing here yet. Run 'make run' (or 'moat prepare') first."
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


def person() -> str:
    """Who works at this machine, as the operating system names them."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        # A user id without a name, as in some containers.
        return f"user {os.getuid()}"


def analyst_login(database: Database) -> str:
    """The name of the analyst's login; roles belong to the whole server, so it names its database."""
    return f"datamoat_{database.name}_reader"


def ensure_analyst(settings: Settings, database: Database) -> None:
    """Make the analyst's login, a member of ``datamoat_analyst`` and nothing else, with our password for it.

    Raises:
        psycopg.errors.InsufficientPrivilege: Our own login may not make roles.
    """
    password = ensure_secret(settings.analyst_key_file)[0].decode()
    name = sql.Identifier(analyst_login(database))
    with database.connect(application_name="prepare") as connection:
        connection.execute("select pg_advisory_xact_lock(hashtext('datamoat roles'))")
        known = connection.execute(
            "select from pg_roles where rolname = %s", [analyst_login(database)]
        ).fetchone()
        if known is None:
            connection.execute(sql.SQL("create role {} login inherit").format(name))
        connection.execute(sql.SQL("alter role {} password {}").format(name, sql.Literal(password)))
        connection.execute(sql.SQL("grant datamoat_analyst to {}").format(name))
        connection.execute(sql.SQL("alter role {} set default_transaction_read_only = on").format(name))

"""Migrations of the ``feedback`` schema: who owns it, and the revisions in ``versions/`` in order.

Belongs here: bringing a database to the current revision. Does not belong here: any other schema.
"""

import threading
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from feedback.schema import SCHEMA

OWNER = "datamoat_owner"
# The service acts as each of these, for its rooms.
SERVICE_ROLES = ("datamoat_ingest", "datamoat_review", "datamoat_admin")
ROLES = (OWNER, "datamoat_writer", "datamoat_analyst", *SERVICE_ROLES)

# Any constant will do, as long as no other user of this database takes the same advisory lock.
_LOCK = int.from_bytes(b"feedback", "big") >> 1

# Alembic keeps the context of a run in module globals: threads of one process take turns.
_ALEMBIC = threading.Lock()

# Roles belong to the whole cluster, so the lock of one database does not keep another database's migration from
# creating them at the same moment: both ways Postgres reports that race are caught.
_CREATE_ROLE = """
DO $$
BEGIN
    CREATE ROLE {role} NOLOGIN;
EXCEPTION
    WHEN duplicate_object OR unique_violation THEN NULL;
END
$$
"""


def config() -> Config:
    """Alembic's configuration, made in code: there is no alembic.ini."""
    settings = Config()
    settings.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    settings.set_main_option("path_separator", "os")
    return settings


def upgrade(url: str) -> list[str]:
    """Bring the database at ``url`` (libpq form, ``postgresql://...``) to the newest revision.

    One transaction under an advisory lock: several callers at once take turns, a killed one leaves nothing behind,
    and a second call does nothing. Roles that are missing are created; everything made belongs to ``datamoat_owner``.

    Returns the revisions applied, oldest first; empty when there was nothing to do.
    Raises ValueError on another kind of url, psycopg or SQLAlchemy errors when the database refuses.
    """
    if not url.startswith(("postgresql://", "postgres://")):
        raise ValueError("the database url must start with postgresql:// (no SQLAlchemy driver suffix)")
    applied: list[str] = []

    def record(*, step: Any, **_: Any) -> None:
        applied.append(str(step.up_revision_id))

    # libpq reads the url itself: SQLAlchemy's own parser knows fewer of its forms.
    engine = sa.create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(url), poolclass=sa.pool.NullPool
    )
    with _ALEMBIC, engine.begin() as connection:
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        _ensure_roles(connection)
        exists = connection.scalar(
            sa.text("SELECT 1 FROM pg_namespace WHERE nspname = :schema"), {"schema": SCHEMA}
        )
        if not exists:
            connection.execute(sa.text(f"CREATE SCHEMA {SCHEMA} AUTHORIZATION {OWNER}"))
        connection.execute(sa.text(f"SET LOCAL ROLE {OWNER}"))
        settings = config()
        settings.attributes["connection"] = connection
        settings.attributes["on_version_apply"] = record
        command.upgrade(settings, "head")
    return applied


def _ensure_roles(connection: sa.Connection) -> None:
    for role in ROLES:
        known = connection.scalar(sa.text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": role})
        if not known:
            connection.execute(sa.text(_CREATE_ROLE.format(role=role)))
    # Whoever migrates must be able to act as the owner, and the service as its roles; a superuser can already.
    # Since Postgres 16 being a member (as the creator of a role is) no longer includes that.
    right = "SET" if (connection.dialect.server_version_info or (0,)) >= (16,) else "MEMBER"
    for role in (OWNER, *SERVICE_ROLES):
        able = connection.scalar(
            sa.text("SELECT pg_has_role(current_user, CAST(:role AS name), :right)"),
            {"role": role, "right": right},
        )
        if not able:
            connection.execute(sa.text(f"GRANT {role} TO CURRENT_USER"))

"""Alembic migrations of the warehouse: roles, schemas, the tables every deployment has, and the search function.

Belongs here: what exists before any source is known. Tables made per contract (``raw``), per embedding
release (``retrieval``) or by dbt (``staging``, ``intermediate``, ``marts``) are made by their own stage; the
``feedback`` schema belongs to the feedback service and its own migrations.
"""

from __future__ import annotations

from pathlib import Path

from storage.database import Database

# Any constant does; it only has to differ from other users of advisory locks in the same database.
_LOCK = 7_305_111_401


def upgrade(database: Database) -> list[str]:
    """Bring the warehouse schema of ``database`` to the newest revision.

    Idempotent, and safe to call from several processes at once: callers queue on an advisory lock.

    Returns:
        The revisions applied by this call, oldest first; empty when there was nothing to do.
    """
    import sqlalchemy as sa
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    applied: list[str] = []
    engine = sa.create_engine(database.sqlalchemy_url("psycopg"), poolclass=sa.NullPool)
    try:
        with engine.connect() as connection:
            connection.execute(sa.text("select pg_advisory_lock(:key)"), {"key": _LOCK})
            connection.commit()
            config.attributes["connection"] = connection
            config.attributes["applied"] = applied
            try:
                command.upgrade(config, "head")
            finally:
                connection.rollback()
                connection.execute(sa.text("select pg_advisory_unlock(:key)"), {"key": _LOCK})
                connection.commit()
    finally:
        engine.dispose()
    return applied

"""Alembic's entry: runs the revisions on the connection that ``storage.migrations.upgrade`` opened."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import context
from alembic.runtime.migration import MigrationInfo

connection = context.config.attributes["connection"]
applied: list[str] = context.config.attributes["applied"]


def _note(*, step: MigrationInfo, **_: Any) -> None:
    applied.append(str(step.up_revision_id))


connection.execute(sa.text("create schema if not exists registry"))
connection.commit()
context.configure(
    connection=connection,
    version_table="alembic_version",
    version_table_schema="registry",
    on_version_apply=_note,  # type: ignore[arg-type]  # called with keywords only, as documented
)
with context.begin_transaction():
    context.run_migrations()

"""Alembic's entry: runs the revisions on the connection that ``feedback.migrations.upgrade`` hands over.

Belongs here: the binding of Alembic to our metadata. Does not belong here: connecting, locking, roles.
"""

from alembic import context

import feedback.review.tables  # noqa: F401 (its tables join the metadata)
from feedback.schema import SCHEMA, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table_schema=SCHEMA,
    on_version_apply=context.config.attributes["on_version_apply"],
)
with context.begin_transaction():
    context.run_migrations()

"""The tables of the ``feedback`` schema as SQLAlchemy Core metadata.

Belongs here: names, types, keys, checks and indexes of the log and of the API keys.
Does not belong here: how they came to be (``feedback.migrations``), who may touch them (grants are migrations
too), or any query.
"""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.types import UserDefinedType

SCHEMA = "feedback"

OPS = ("create", "revise", "retract")
KINDS = ("thumb", "rating", "category", "comment", "correction", "flag", "preference", "implicit")
ANNOTATOR_KINDS = ("HUMAN", "LLM", "CODE")
SCOPES = ("interaction", "session", "trace", "span")


class XID8(UserDefinedType[str]):
    """Postgres' 64-bit transaction id: what lets a reader follow the log without missing a late commit."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "XID8"


def _one_of(column: str, values: tuple[str, ...]) -> sa.CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return sa.CheckConstraint(f"{column} IN ({listed})", name=f"{column}_known")


metadata = sa.MetaData(
    schema=SCHEMA,
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "uq": "%(table_name)s_%(column_0_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s",
        "ix": "%(table_name)s_%(column_0_name)s_idx",
    },
)

api_key = sa.Table(
    "api_key",
    metadata,
    sa.Column("key_id", pg.UUID, primary_key=True),
    sa.Column("key_sha256", sa.Text, nullable=False, unique=True),
    sa.Column("app", sa.Text, nullable=False),
    sa.Column("scopes", pg.ARRAY(sa.Text), nullable=False),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
    sa.Column("revoked_at", sa.DateTime(timezone=True)),
    sa.Column("holder", sa.Text),
    sa.Column("requests_per_second", sa.Double),
    sa.Column("burst", sa.Double),
)

# Rows that passed validation and that Postgres refused, as the JSON that was to be inserted.
dead_letter = sa.Table(
    "dead_letter",
    metadata,
    sa.Column("dead_letter_id", pg.UUID, primary_key=True),
    sa.Column("log", sa.Text, nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("row", pg.BYTEA, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("api_key_id", pg.UUID, nullable=False),
    sa.Column("received_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
    sa.Column("replayed_at", sa.DateTime(timezone=True)),
    sa.Column("outcome", sa.Text),
)

# Written by triggers alone.
admin_audit = sa.Table(
    "admin_audit",
    metadata,
    sa.Column("audit_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.clock_timestamp()),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("act", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("before", pg.JSONB),
    sa.Column("after", pg.JSONB),
    sa.Index(None, "at"),
)


def _arrival() -> tuple[sa.Column[Any], ...]:
    """What every row of the log carries: when it arrived, in which transaction, by whose key, and its body's hash."""
    return (
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
        sa.Column("xact_id", XID8, nullable=False, server_default=sa.text("pg_current_xact_id()")),
        sa.Column("api_key_id", pg.UUID, nullable=False),
        sa.Column("body_sha256", sa.Text, nullable=False),
    )


interaction = sa.Table(
    "interaction",
    metadata,
    sa.Column("interaction_id", sa.Text, primary_key=True),
    sa.Column("app", sa.Text, nullable=False),
    sa.Column("session_id", sa.Text),
    sa.Column("user_ref", sa.Text),
    sa.Column("occurred_at", sa.DateTime(timezone=True), nullable=False),
    sa.Column("messages", pg.JSONB, nullable=False),
    sa.Column("output", sa.Text),
    sa.Column("retrieved", pg.JSONB),
    sa.Column("input_tokens", sa.Integer),
    sa.Column("output_tokens", sa.Integer),
    sa.Column("cost_usd", sa.Double),
    sa.Column("latency_ms", sa.Double),
    sa.Column("provider", sa.Text),
    sa.Column("model", sa.Text),
    sa.Column("prompt_name", sa.Text),
    sa.Column("prompt_version", sa.Text),
    sa.Column("prompt_hash", sa.Text),
    sa.Column("app_release", sa.Text),
    sa.Column("config_hash", sa.Text),
    sa.Column("variant", sa.Text),
    sa.Column("train_ok", sa.Boolean, nullable=False, server_default=sa.true()),
    sa.Column("metadata", pg.JSONB),
    *_arrival(),
    sa.Index(None, "xact_id"),
    sa.Index("interaction_effective_at_idx", sa.text("least(occurred_at, received_at)")),
)

feedback_event = sa.Table(
    "feedback_event",
    metadata,
    sa.Column("event_id", pg.UUID, primary_key=True),
    # Of the key that sent it; unknown of events from before it was kept.
    sa.Column("app", sa.Text),
    sa.Column("feedback_id", pg.UUID, nullable=False),
    sa.Column("op", sa.Text, nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("score", sa.Double),
    sa.Column("label", sa.Text),
    sa.Column("explanation", sa.Text),
    sa.Column("correction", sa.Text),
    sa.Column("reasons", pg.ARRAY(sa.Text)),
    sa.Column("value", pg.JSONB),
    sa.Column("annotator_kind", sa.Text, nullable=False),
    sa.Column("author_role", sa.Text),
    sa.Column("author_ref", sa.Text),
    sa.Column("identifier", sa.Text),
    sa.Column("scope", sa.Text, nullable=False, server_default="interaction"),
    # No foreign key: feedback may arrive before the interaction it is about.
    sa.Column("interaction_id", sa.Text),
    sa.Column("session_id", sa.Text),
    sa.Column("trace_id", sa.Text),
    sa.Column("span_id", sa.Text),
    sa.Column("occurred_at", sa.DateTime(timezone=True), nullable=False),
    sa.Column("metadata", pg.JSONB),
    *_arrival(),
    _one_of("op", OPS),
    _one_of("kind", KINDS),
    _one_of("annotator_kind", ANNOTATOR_KINDS),
    _one_of("scope", SCOPES),
    sa.Index(None, "xact_id"),
    sa.Index(None, "interaction_id"),
    sa.Index(None, "feedback_id"),
    sa.Index("feedback_event_effective_at_idx", sa.text("least(occurred_at, received_at)")),
)

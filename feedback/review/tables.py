"""The tables of review, on the metadata of the ``feedback`` schema.

Belongs here: names, types, keys, checks and indexes. Does not belong here: grants and triggers (migrations), queries.

No text of a person is kept in these tables but the reason of a skip: answers live in the feedback log alone. An
interaction that is erased takes its items with it, and they their slots, responses and history.
"""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from feedback.schema import XID8, metadata

RULE_KINDS = ("low_score", "judge_disagreement", "high_edit_distance", "rare_cluster", "flag")
STATES = ("open", "done", "skipped", "to_adjudicate", "adjudicated")
OUTCOMES = ("submitted", "cannot_judge")
ACTS = ("queued", "claimed", "extended", "released", "lost", "submitted", "skipped", "adjudicated")
SKIP_MODES = ("later", "others", "cannot_judge")


def _one_of(column: str, values: tuple[str, ...]) -> sa.CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return sa.CheckConstraint(f"{column} IN ({listed})", name=f"{column}_known")


def _reference(
    column: str, target: str, *, cascade: bool = False, primary_key: bool = False
) -> sa.Column[Any]:
    key = sa.ForeignKey(f"feedback.{target}.{column}", ondelete="CASCADE" if cascade else None)
    kind = sa.Text if column == "interaction_id" else pg.UUID
    return sa.Column(column, kind, key, nullable=False, primary_key=primary_key)


def _moment(name: str, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), **options)


review_queue = sa.Table(
    "review_queue",
    metadata,
    sa.Column("queue_id", pg.UUID, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("app", sa.Text, nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("rubric", pg.JSONB, nullable=False),
    sa.Column("overlap", sa.Integer, nullable=False),
    sa.Column("blind", sa.Boolean, nullable=False),
    sa.Column("lease_seconds", sa.Integer, nullable=False),
    sa.Column("control_rate", sa.Double, nullable=False),
    sa.Column("window_days", sa.Integer, nullable=False),
    _moment("created_at", nullable=False, server_default=sa.func.now()),
    _moment("closed_at"),
)

review_rule = sa.Table(
    "review_rule",
    metadata,
    sa.Column("rule_id", pg.UUID, primary_key=True),
    _reference("queue_id", "review_queue"),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("params", pg.JSONB, nullable=False),
    sa.Column("sample_rate", sa.Double, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    _moment("created_at", nullable=False, server_default=sa.func.now()),
    _moment("disabled_at"),
    _one_of("kind", RULE_KINDS),
    sa.Index(None, "queue_id"),
)

# How far into the log a rule (or the control sample of a queue) has looked.
review_progress = sa.Table(
    "review_progress",
    metadata,
    _reference("queue_id", "review_queue", primary_key=True),
    sa.Column("chooser", sa.Text, primary_key=True),
    sa.Column("seen", XID8, nullable=False),
)

review_item = sa.Table(
    "review_item",
    metadata,
    sa.Column("item_id", pg.UUID, primary_key=True, server_default=sa.text("gen_random_uuid()")),
    _reference("queue_id", "review_queue"),
    _reference("interaction_id", "interaction", cascade=True),
    sa.Column("why", pg.JSONB, nullable=False),
    sa.Column("control", sa.Boolean, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False, server_default="open"),
    _moment("queued_at", nullable=False, server_default=sa.func.now()),
    _one_of("state", STATES),
    sa.UniqueConstraint("queue_id", "interaction_id", name="review_item_once_per_queue"),
    # The order of work.
    sa.Index(
        "review_item_line_idx",
        "queue_id",
        sa.text("priority DESC"),
        "queued_at",
        "item_id",
        postgresql_where=sa.text("state = 'open'"),
    ),
    sa.Index(None, "interaction_id"),
)

review_slot = sa.Table(
    "review_slot",
    metadata,
    _reference("item_id", "review_item", cascade=True, primary_key=True),
    sa.Column("slot", sa.Integer, primary_key=True),
    sa.Column("reviewer", sa.Text),
    sa.Column("fence", sa.BigInteger, nullable=False, server_default="0"),
    _moment("leased_until"),
    _moment("done_at"),
    sa.Column("outcome", sa.Text),
    _one_of("outcome", OUTCOMES),
    sa.UniqueConstraint("item_id", "reviewer", name="review_slot_one_per_reviewer"),
    # The leases: few, however many slots there are.
    sa.Index(None, "reviewer", postgresql_where=sa.text("reviewer IS NOT NULL AND done_at IS NULL")),
)

# What was submitted, as the events that say so; slot 0 is the adjudicator's.
review_response = sa.Table(
    "review_response",
    metadata,
    _reference("item_id", "review_item", cascade=True, primary_key=True),
    sa.Column("slot", sa.Integer, primary_key=True),
    sa.Column("reviewer", sa.Text, nullable=False),
    _moment("submitted_at", nullable=False, server_default=sa.func.clock_timestamp()),
    sa.Column("event_ids", pg.ARRAY(pg.UUID), nullable=False),
)

# What happened, never changed.
review_event = sa.Table(
    "review_event",
    metadata,
    sa.Column("review_event_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    _moment("at", nullable=False, server_default=sa.func.clock_timestamp()),
    _reference("item_id", "review_item", cascade=True),
    sa.Column("act", sa.Text, nullable=False),
    sa.Column("slot", sa.Integer),
    sa.Column("fence", sa.BigInteger),
    sa.Column("reviewer", sa.Text),
    sa.Column("mode", sa.Text),
    sa.Column("reason", sa.Text),
    _one_of("act", ACTS),
    _one_of("mode", SKIP_MODES),
    sa.Index(None, "item_id"),
    sa.Index("review_event_skipped_idx", "reviewer", "item_id", postgresql_where=sa.text("act = 'skipped'")),
)

"""The log and the API keys, with what each role may do to them."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

from feedback.schema import XID8

revision = "0001_log"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    timestamp = sa.DateTime(timezone=True)
    op.create_table(
        "api_key",
        sa.Column("key_id", pg.UUID, nullable=False),
        sa.Column("key_sha256", sa.Text, nullable=False),
        sa.Column("app", sa.Text, nullable=False),
        sa.Column("scopes", pg.ARRAY(sa.Text), nullable=False),
        sa.Column("created_at", timestamp, nullable=False, server_default=sa.func.now()),
        sa.Column("revoked_at", timestamp),
        sa.PrimaryKeyConstraint("key_id", name="api_key_pkey"),
        sa.UniqueConstraint("key_sha256", name="api_key_key_sha256_key"),
        schema="feedback",
    )
    op.create_table(
        "interaction",
        sa.Column("interaction_id", sa.Text, nullable=False),
        sa.Column("app", sa.Text, nullable=False),
        sa.Column("session_id", sa.Text),
        sa.Column("user_ref", sa.Text),
        sa.Column("occurred_at", timestamp, nullable=False),
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
        sa.Column("received_at", timestamp, nullable=False, server_default=sa.func.now()),
        sa.Column("xact_id", XID8, nullable=False, server_default=sa.text("pg_current_xact_id()")),
        sa.Column("api_key_id", pg.UUID, nullable=False),
        sa.Column("body_sha256", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("interaction_id", name="interaction_pkey"),
        schema="feedback",
    )
    op.create_table(
        "feedback_event",
        sa.Column("event_id", pg.UUID, nullable=False),
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
        sa.Column("interaction_id", sa.Text),
        sa.Column("session_id", sa.Text),
        sa.Column("trace_id", sa.Text),
        sa.Column("span_id", sa.Text),
        sa.Column("occurred_at", timestamp, nullable=False),
        sa.Column("metadata", pg.JSONB),
        sa.Column("received_at", timestamp, nullable=False, server_default=sa.func.now()),
        sa.Column("xact_id", XID8, nullable=False, server_default=sa.text("pg_current_xact_id()")),
        sa.Column("api_key_id", pg.UUID, nullable=False),
        sa.Column("body_sha256", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("event_id", name="feedback_event_pkey"),
        sa.CheckConstraint("op IN ('create', 'revise', 'retract')", name=op.f("feedback_event_op_known")),
        sa.CheckConstraint(
            "kind IN ('thumb', 'rating', 'category', 'comment', 'correction', 'flag', 'preference', 'implicit')",
            name=op.f("feedback_event_kind_known"),
        ),
        sa.CheckConstraint(
            "annotator_kind IN ('HUMAN', 'LLM', 'CODE')", name=op.f("feedback_event_annotator_kind_known")
        ),
        sa.CheckConstraint(
            "scope IN ('interaction', 'session', 'trace', 'span')", name=op.f("feedback_event_scope_known")
        ),
        schema="feedback",
    )
    for table, columns in {
        "interaction": ("xact_id",),
        "feedback_event": ("xact_id", "interaction_id", "feedback_id"),
    }.items():
        for column in columns:
            op.create_index(f"{table}_{column}_idx", table, [column], schema="feedback")
        # A day is read by effective time: a clock that runs ahead does not move an event into the future.
        op.create_index(
            f"{table}_effective_at_idx",
            table,
            [sa.text("least(occurred_at, received_at)")],
            schema="feedback",
        )

    # The service may add rows and see whether an id is taken by the same body: it cannot read a text back, nor
    # change or remove what was said.
    op.execute(
        """
        GRANT USAGE ON SCHEMA feedback TO datamoat_ingest, datamoat_writer;
        GRANT SELECT ON feedback.api_key TO datamoat_ingest;
        GRANT INSERT ON feedback.interaction, feedback.feedback_event TO datamoat_ingest;
        GRANT SELECT (interaction_id, body_sha256) ON feedback.interaction TO datamoat_ingest;
        GRANT SELECT (event_id, body_sha256) ON feedback.feedback_event TO datamoat_ingest;
        GRANT SELECT ON feedback.interaction, feedback.feedback_event TO datamoat_writer;
        """
    )


def downgrade() -> None:
    raise NotImplementedError("the log is never dropped by a migration; restore a backup instead")

"""Review: queues, rules, items with their slots, responses, and the history of who did what."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

from feedback.schema import XID8

revision = "0003_review"
down_revision = "0002_access"
branch_labels = None
depends_on = None


def upgrade() -> None:
    timestamp = sa.DateTime(timezone=True)
    op.create_table(
        "review_queue",
        sa.Column("queue_id", pg.UUID, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("app", sa.Text, nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("rubric", pg.JSONB, nullable=False),
        sa.Column("overlap", sa.Integer, nullable=False),
        sa.Column("blind", sa.Boolean, nullable=False),
        sa.Column("lease_seconds", sa.Integer, nullable=False),
        sa.Column("control_rate", sa.Double, nullable=False),
        sa.Column("window_days", sa.Integer, nullable=False),
        sa.Column("created_at", timestamp, nullable=False, server_default=sa.func.now()),
        sa.Column("closed_at", timestamp),
        sa.PrimaryKeyConstraint("queue_id", name="review_queue_pkey"),
        schema="feedback",
    )
    op.create_table(
        "review_rule",
        sa.Column("rule_id", pg.UUID, nullable=False),
        sa.Column("queue_id", pg.UUID, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("params", pg.JSONB, nullable=False),
        sa.Column("sample_rate", sa.Double, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("created_at", timestamp, nullable=False, server_default=sa.func.now()),
        sa.Column("disabled_at", timestamp),
        sa.PrimaryKeyConstraint("rule_id", name="review_rule_pkey"),
        sa.ForeignKeyConstraint(["queue_id"], ["feedback.review_queue.queue_id"]),
        sa.CheckConstraint(
            "kind IN ('low_score', 'judge_disagreement', 'high_edit_distance', 'rare_cluster', 'flag')",
            name=op.f("review_rule_kind_known"),
        ),
        schema="feedback",
    )
    op.create_table(
        "review_progress",
        sa.Column("queue_id", pg.UUID, nullable=False),
        sa.Column("chooser", sa.Text, nullable=False),
        sa.Column("seen", XID8, nullable=False),
        sa.PrimaryKeyConstraint("queue_id", "chooser", name="review_progress_pkey"),
        sa.ForeignKeyConstraint(["queue_id"], ["feedback.review_queue.queue_id"]),
        schema="feedback",
    )
    op.create_table(
        "review_item",
        sa.Column("item_id", pg.UUID, nullable=False, server_default=sa.text("gen_random_uuid()")),
        sa.Column("queue_id", pg.UUID, nullable=False),
        sa.Column("interaction_id", sa.Text, nullable=False),
        sa.Column("why", pg.JSONB, nullable=False),
        sa.Column("control", sa.Boolean, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("state", sa.Text, nullable=False, server_default="open"),
        sa.Column("queued_at", timestamp, nullable=False, server_default=sa.func.now()),
        sa.PrimaryKeyConstraint("item_id", name="review_item_pkey"),
        sa.ForeignKeyConstraint(["queue_id"], ["feedback.review_queue.queue_id"]),
        sa.ForeignKeyConstraint(
            ["interaction_id"], ["feedback.interaction.interaction_id"], ondelete="CASCADE"
        ),
        sa.UniqueConstraint("queue_id", "interaction_id", name="review_item_once_per_queue"),
        sa.CheckConstraint(
            "state IN ('open', 'done', 'skipped', 'to_adjudicate', 'adjudicated')",
            name=op.f("review_item_state_known"),
        ),
        schema="feedback",
    )
    op.create_table(
        "review_slot",
        sa.Column("item_id", pg.UUID, nullable=False),
        sa.Column("slot", sa.Integer, nullable=False),
        sa.Column("reviewer", sa.Text),
        sa.Column("fence", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("leased_until", timestamp),
        sa.Column("done_at", timestamp),
        sa.Column("outcome", sa.Text),
        sa.PrimaryKeyConstraint("item_id", "slot", name="review_slot_pkey"),
        sa.ForeignKeyConstraint(["item_id"], ["feedback.review_item.item_id"], ondelete="CASCADE"),
        sa.UniqueConstraint("item_id", "reviewer", name="review_slot_one_per_reviewer"),
        sa.CheckConstraint(
            "outcome IN ('submitted', 'cannot_judge')", name=op.f("review_slot_outcome_known")
        ),
        schema="feedback",
    )
    op.create_table(
        "review_response",
        sa.Column("item_id", pg.UUID, nullable=False),
        sa.Column("slot", sa.Integer, nullable=False),
        sa.Column("reviewer", sa.Text, nullable=False),
        sa.Column("submitted_at", timestamp, nullable=False, server_default=sa.func.clock_timestamp()),
        sa.Column("event_ids", pg.ARRAY(pg.UUID), nullable=False),
        sa.PrimaryKeyConstraint("item_id", "slot", name="review_response_pkey"),
        sa.ForeignKeyConstraint(["item_id"], ["feedback.review_item.item_id"], ondelete="CASCADE"),
        schema="feedback",
    )
    op.create_table(
        "review_event",
        sa.Column("review_event_id", sa.BigInteger, sa.Identity(always=True), nullable=False),
        sa.Column("at", timestamp, nullable=False, server_default=sa.func.clock_timestamp()),
        sa.Column("item_id", pg.UUID, nullable=False),
        sa.Column("act", sa.Text, nullable=False),
        sa.Column("slot", sa.Integer),
        sa.Column("fence", sa.BigInteger),
        sa.Column("reviewer", sa.Text),
        sa.Column("mode", sa.Text),
        sa.Column("reason", sa.Text),
        sa.PrimaryKeyConstraint("review_event_id", name="review_event_pkey"),
        sa.ForeignKeyConstraint(["item_id"], ["feedback.review_item.item_id"], ondelete="CASCADE"),
        sa.CheckConstraint(
            "act IN ('queued', 'claimed', 'extended', 'released', 'lost', 'submitted', 'skipped', 'adjudicated')",
            name=op.f("review_event_act_known"),
        ),
        sa.CheckConstraint(
            "mode IN ('later', 'others', 'cannot_judge')", name=op.f("review_event_mode_known")
        ),
        schema="feedback",
    )
    for table, column in (
        ("review_rule", "queue_id"),
        ("review_item", "interaction_id"),
        ("review_event", "item_id"),
    ):
        op.create_index(f"{table}_{column}_idx", table, [column], schema="feedback")
    op.create_index(
        "review_item_line_idx",
        "review_item",
        ["queue_id", sa.text("priority DESC"), "queued_at", "item_id"],
        schema="feedback",
        postgresql_where=sa.text("state = 'open'"),
    )
    op.create_index(
        "review_slot_reviewer_idx",
        "review_slot",
        ["reviewer"],
        schema="feedback",
        postgresql_where=sa.text("reviewer IS NOT NULL AND done_at IS NULL"),
    )
    op.create_index(
        "review_event_skipped_idx",
        "review_event",
        ["reviewer", "item_id"],
        schema="feedback",
        postgresql_where=sa.text("act = 'skipped'"),
    )

    op.execute(
        r"""
        CREATE TRIGGER audited AFTER INSERT OR UPDATE OR DELETE ON feedback.review_queue
            FOR EACH ROW EXECUTE FUNCTION feedback.audit();
        CREATE TRIGGER audited AFTER INSERT OR UPDATE OR DELETE ON feedback.review_rule
            FOR EACH ROW EXECUTE FUNCTION feedback.audit();

        -- A number from 0 to 1 that depends on nothing but its arguments, evenly spread: what makes a sample stable.
        CREATE FUNCTION feedback.draw(salt text, id text) RETURNS double precision
            LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
            RETURN ('x' || substr(md5(salt || ':' || id), 1, 8))::bit(32)::bigint / 4294967296.0;

        -- The words of a text, lower case, without punctuation; where a script writes no spaces, each character.
        CREATE FUNCTION feedback.words(body text) RETURNS SETOF text
            LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE BEGIN ATOMIC
            SELECT word FROM regexp_split_to_table(
                regexp_replace(
                    regexp_replace(
                        lower(normalize(left(body, 20000), NFC)),
                        '[!-/:-@\[-`{-~\u00a0-\u00bf\u2000-\u206f\u3000-\u303f\uff00-\uff0f]', ' ', 'g'
                    ),
                    '([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff])', ' \1 ', 'g'
                ),
                '\s+'
            ) AS word
            WHERE word <> '';
        END;

        -- The share of the words of ``original`` that are still in ``edited``, each as often as it was; their order
        -- does not count, so this is never less than what a diff would call kept. NULL when there are no words.
        CREATE FUNCTION feedback.retained(original text, edited text) RETURNS double precision
            LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE BEGIN ATOMIC
            SELECT sum(least(o.times, coalesce(e.times, 0)))::double precision / sum(o.times)
            FROM (SELECT word, count(*) AS times FROM feedback.words(original) AS word GROUP BY word) AS o
            LEFT JOIN (SELECT word, count(*) AS times FROM feedback.words(edited) AS word GROUP BY word) AS e
                ON o.word = e.word;
        END;

        GRANT SELECT, INSERT, UPDATE (closed_at) ON feedback.review_queue TO datamoat_admin;
        GRANT SELECT, INSERT, UPDATE (disabled_at) ON feedback.review_rule TO datamoat_admin;
        GRANT SELECT ON feedback.review_queue, feedback.review_rule TO datamoat_review;
        GRANT SELECT, INSERT, UPDATE (seen) ON feedback.review_progress TO datamoat_review;
        GRANT SELECT, INSERT, UPDATE (why, control, priority, state) ON feedback.review_item TO datamoat_review;
        GRANT SELECT, INSERT, UPDATE (reviewer, fence, leased_until, done_at, outcome) ON feedback.review_slot
            TO datamoat_review;
        GRANT SELECT, INSERT ON feedback.review_response, feedback.review_event TO datamoat_review;
        """
    )


def downgrade() -> None:
    raise NotImplementedError("answers are never dropped by a migration; restore a backup instead")

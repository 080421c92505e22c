"""Who holds a key and how often it may be used; dead letters; the audit of admin acts; the fold for the API."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

revision = "0002_access"
down_revision = "0001_log"
branch_labels = None
depends_on = None


def upgrade() -> None:
    timestamp = sa.DateTime(timezone=True)
    op.add_column("api_key", sa.Column("holder", sa.Text), schema="feedback")
    op.add_column("api_key", sa.Column("requests_per_second", sa.Double), schema="feedback")
    op.add_column("api_key", sa.Column("burst", sa.Double), schema="feedback")
    op.add_column("feedback_event", sa.Column("app", sa.Text), schema="feedback")
    op.create_table(
        "dead_letter",
        sa.Column("dead_letter_id", pg.UUID, nullable=False),
        sa.Column("log", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("row", pg.BYTEA, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("api_key_id", pg.UUID, nullable=False),
        sa.Column("received_at", timestamp, nullable=False, server_default=sa.func.now()),
        sa.Column("replayed_at", timestamp),
        sa.Column("outcome", sa.Text),
        sa.PrimaryKeyConstraint("dead_letter_id", name="dead_letter_pkey"),
        schema="feedback",
    )
    op.create_table(
        "admin_audit",
        sa.Column("audit_id", sa.BigInteger, sa.Identity(always=True), nullable=False),
        sa.Column("at", timestamp, nullable=False, server_default=sa.func.clock_timestamp()),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("act", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("before", pg.JSONB),
        sa.Column("after", pg.JSONB),
        sa.PrimaryKeyConstraint("audit_id", name="admin_audit_pkey"),
        schema="feedback",
    )
    op.create_index("admin_audit_at_idx", "admin_audit", ["at"], schema="feedback")

    # A trigger cannot be forgotten: whoever changes a key, by whatever path, leaves a line. Secrets' hashes stay out.
    op.execute(
        """
        CREATE FUNCTION feedback.audit() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
            SET search_path = pg_catalog, pg_temp AS $$
        BEGIN
            INSERT INTO feedback.admin_audit (actor, act, subject, before, after) VALUES (
                coalesce(nullif(current_setting('datamoat.actor', true), ''), session_user),
                lower(TG_OP), TG_TABLE_NAME,
                CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) - 'key_sha256' - 'row' END,
                CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) - 'key_sha256' - 'row' END
            );
            RETURN NULL;
        END
        $$;
        CREATE TRIGGER audited AFTER INSERT OR UPDATE OR DELETE ON feedback.api_key
            FOR EACH ROW EXECUTE FUNCTION feedback.audit();
        CREATE TRIGGER audited AFTER UPDATE OR DELETE ON feedback.dead_letter
            FOR EACH ROW EXECUTE FUNCTION feedback.audit();

        -- The state of feedback items is a fold over all their events: the same order as the dbt model
        -- feedback_current, which adds redaction. A retracted item is returned with op retract.
        CREATE FUNCTION feedback.current(ids uuid[]) RETURNS SETOF feedback.feedback_event
            LANGUAGE sql STABLE PARALLEL SAFE BEGIN ATOMIC
            SELECT DISTINCT ON (e.feedback_id) e.*
            FROM feedback.feedback_event AS e
            WHERE e.feedback_id = ANY(ids)
            ORDER BY e.feedback_id, e.revision DESC, least(e.occurred_at, e.received_at) DESC, e.event_id DESC;
        END;

        -- When a row arrived and in which transaction is the database's to say, so nobody may insert that.
        REVOKE INSERT ON feedback.interaction, feedback.feedback_event FROM datamoat_ingest;
        DO $do$
        DECLARE
            role_name text;
            table_name text;
            columns text;
        BEGIN
            FOREACH table_name IN ARRAY ARRAY['interaction', 'feedback_event'] LOOP
                SELECT string_agg(quote_ident(attname), ', ') INTO columns
                FROM pg_attribute
                WHERE attrelid = ('feedback.' || table_name)::regclass AND attnum > 0 AND NOT attisdropped
                    AND attname NOT IN ('received_at', 'xact_id');
                FOREACH role_name IN ARRAY ARRAY['datamoat_ingest', 'datamoat_admin', 'datamoat_review'] LOOP
                    IF role_name <> 'datamoat_review' OR table_name = 'feedback_event' THEN
                        EXECUTE format('GRANT INSERT (%s) ON feedback.%I TO %I', columns, table_name, role_name);
                    END IF;
                END LOOP;
            END LOOP;
        END
        $do$;
        GRANT INSERT ON feedback.dead_letter TO datamoat_ingest;
        GRANT SELECT (app) ON feedback.interaction TO datamoat_ingest;
        GRANT SELECT (app, feedback_id) ON feedback.feedback_event TO datamoat_ingest;
        GRANT USAGE ON SCHEMA feedback TO datamoat_review, datamoat_admin;
        GRANT SELECT ON feedback.interaction, feedback.feedback_event TO datamoat_review;
        GRANT SELECT, INSERT, UPDATE ON feedback.api_key TO datamoat_admin;
        GRANT SELECT, UPDATE (replayed_at, outcome) ON feedback.dead_letter TO datamoat_admin;
        GRANT SELECT ON feedback.admin_audit TO datamoat_admin;
        GRANT SELECT (interaction_id, body_sha256, app) ON feedback.interaction TO datamoat_admin;
        GRANT SELECT (event_id, body_sha256, app) ON feedback.feedback_event TO datamoat_admin;
        """
    )


def downgrade() -> None:
    raise NotImplementedError("the log is never dropped by a migration; restore a backup instead")

"""Migrations of the feedback schema: repeatable, safe at once, equal to the metadata; roles see what they should."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, LiteralString

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.dialects.postgresql.base import ischema_names

from feedback.keys import create_key, list_keys
from feedback.migrations import config, upgrade
from feedback.schema import SCHEMA, XID8, metadata
from tests.integration.conftest import Cluster


@pytest.fixture(scope="module")
def migrated(cluster: Cluster) -> str:
    url = cluster.new_database()
    upgrade(url)
    return url


REVISIONS = [
    script.revision for script in reversed(list(ScriptDirectory.from_config(config()).walk_revisions()))
]
APPLIED = f"applied {', '.join(REVISIONS)}"


def test_a_second_upgrade_does_nothing(cluster: Cluster) -> None:
    url = cluster.new_database()
    assert upgrade(url) == REVISIONS
    assert upgrade(url) == []


def migrate_all(urls: list[str]) -> list[str]:
    """Run the migration of each database in a process of its own, all at once."""
    command = [sys.executable, "-m", "feedback", "migrate", "--database-url"]
    running = [subprocess.Popen([*command, url], stdout=subprocess.PIPE, text=True) for url in urls]
    return sorted(process.communicate(timeout=120)[0].strip() for process in running)


def test_four_upgrades_at_once_apply_each_revision_once(cluster: Cluster) -> None:
    assert migrate_all([cluster.new_database()] * 4) == [APPLIED, *["nothing to do"] * 3]


def test_four_databases_of_a_fresh_cluster_at_once(new_cluster: Callable[[], Cluster]) -> None:
    cluster = new_cluster()
    assert migrate_all([cluster.new_database() for _ in range(4)]) == [APPLIED] * 4


def test_threads_of_one_process_take_turns(cluster: Cluster) -> None:
    with ThreadPoolExecutor(4) as pool:
        applied = pool.map(upgrade, [cluster.new_database() for _ in range(4)])
    assert list(applied) == [REVISIONS] * 4


def test_a_login_that_is_no_superuser_can_migrate_and_serve(new_cluster: Callable[[], Cluster]) -> None:
    cluster = new_cluster()
    url = cluster.new_database()
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("CREATE ROLE deployer LOGIN CREATEROLE")
        conn.execute(
            "DO $$BEGIN EXECUTE format('GRANT CREATE ON DATABASE %I TO deployer', current_database()); END$$"
        )
    deployer = url.replace("postgres@", "deployer@")
    assert upgrade(deployer) == REVISIONS
    assert upgrade(deployer) == []
    with psycopg.connect(deployer) as conn:
        key, _ = create_key(conn, "support")
        assert [stored.key_id for stored in list_keys(conn)] == [key.key_id]
        conn.execute("SET ROLE datamoat_ingest")
        conn.execute("SELECT event_id, body_sha256 FROM feedback.feedback_event")


def test_another_kind_of_url_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="postgresql://"):
        upgrade("postgresql+psycopg://localhost/x")


def test_the_revisions_make_what_the_metadata_says(migrated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ischema_names, "xid8", XID8)
    engine = sa.create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(migrated), poolclass=sa.NullPool
    )

    def ours(name: str | None, kind: str, _: Any) -> bool:
        return kind != "schema" or name == SCHEMA

    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "include_schemas": True,
                "include_name": ours,
                "compare_type": True,
                "compare_server_default": True,
                "version_table_schema": SCHEMA,
            },
        )
        assert compare_metadata(context, metadata) == []
        checks = sa.inspect(connection).get_check_constraints("feedback_event", schema=SCHEMA)
        expected = {
            c.name
            for c in metadata.tables["feedback.feedback_event"].constraints
            if isinstance(c, sa.CheckConstraint)
        }
        assert {check["name"] for check in checks} == expected


def test_everything_belongs_to_the_owner_role(migrated: str) -> None:
    with psycopg.connect(migrated) as conn:
        owners = conn.execute(
            "SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'feedback'"
            " UNION SELECT nspowner::regrole::text FROM pg_namespace WHERE nspname = 'feedback'"
        ).fetchall()
    assert owners == [("datamoat_owner",)]


@pytest.fixture
def as_role(migrated: str) -> Callable[[LiteralString, LiteralString], None]:
    def run(role: LiteralString, statement: LiteralString) -> None:
        with psycopg.connect(migrated) as conn:
            conn.execute("SET ROLE " + role)
            conn.execute(statement)

    return run


READS_TEXT: tuple[LiteralString, ...] = (
    "SELECT messages FROM feedback.interaction",
    "SELECT output FROM feedback.interaction",
    "SELECT * FROM feedback.interaction",
    "SELECT correction FROM feedback.feedback_event",
    "SELECT author_ref FROM feedback.feedback_event",
)
CHANGES: tuple[LiteralString, ...] = (
    "UPDATE feedback.interaction SET output = 'x'",
    "DELETE FROM feedback.interaction",
    "TRUNCATE feedback.interaction",
    "UPDATE feedback.feedback_event SET score = 1",
    "DELETE FROM feedback.feedback_event",
    "DELETE FROM feedback.api_key",
    "INSERT INTO feedback.api_key (key_id, key_sha256, app, scopes) VALUES (gen_random_uuid(), 'x', 'a', '{}')",
    "DROP TABLE feedback.interaction",
)


@pytest.mark.parametrize("statement", READS_TEXT + CHANGES)
def test_the_ingest_role_reads_no_text_and_changes_nothing(as_role: Any, statement: LiteralString) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        as_role("datamoat_ingest", statement)


def test_the_ingest_role_sees_ids_hashes_and_keys(as_role: Any) -> None:
    as_role("datamoat_ingest", "SELECT interaction_id, body_sha256 FROM feedback.interaction")
    as_role("datamoat_ingest", "SELECT event_id, body_sha256 FROM feedback.feedback_event")
    as_role("datamoat_ingest", "SELECT key_id, app, scopes FROM feedback.api_key")


@pytest.mark.parametrize("statement", READS_TEXT)
def test_the_writer_reads_the_log(as_role: Any, statement: LiteralString) -> None:
    as_role("datamoat_writer", statement)


@pytest.mark.parametrize("statement", [*CHANGES, "SELECT * FROM feedback.api_key"])
def test_the_writer_changes_nothing_and_sees_no_keys(as_role: Any, statement: LiteralString) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        as_role("datamoat_writer", statement)


@pytest.mark.parametrize("table", ["interaction", "feedback_event", "api_key"])
def test_the_analyst_sees_nothing_of_the_log(as_role: Any, table: LiteralString) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        as_role("datamoat_analyst", "SELECT count(*) FROM feedback." + table)


@pytest.mark.parametrize("role", ["datamoat_ingest", "datamoat_admin", "datamoat_review"])
def test_nobody_says_when_a_row_arrived(as_role: Any, role: LiteralString) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        as_role(
            role,
            "INSERT INTO feedback.feedback_event (event_id, feedback_id, op, revision, kind, name, annotator_kind,"
            " occurred_at, api_key_id, body_sha256, xact_id) VALUES (gen_random_uuid(), gen_random_uuid(), 'create', 1,"
            " 'thumb', 'thumb', 'HUMAN', now(), gen_random_uuid(), 'x', '5'::xid8)",
        )


ADMIN_MAY_NOT: tuple[LiteralString, ...] = (
    "UPDATE feedback.dead_letter SET row = 'x'",
    "DELETE FROM feedback.dead_letter",
    "UPDATE feedback.admin_audit SET actor = 'x'",
    "DELETE FROM feedback.api_key",
    "SELECT messages FROM feedback.interaction",
)


@pytest.mark.parametrize("statement", ADMIN_MAY_NOT)
def test_the_admin_role_rewrites_no_history(as_role: Any, statement: LiteralString) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        as_role("datamoat_admin", statement)

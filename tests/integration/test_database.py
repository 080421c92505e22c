"""Resolving to a database, connecting to it, and what `check` says of servers that cannot be used.

An embedded server plays the external one; only what it cannot be (old, without pgvector) is put in by a query.
"""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from storage import database as databases
from storage import embedded
from storage.database import Database, check, release, resolve
from storage.embedded import EmbeddedPostgres, Server

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="datamoat-database-")).resolve()
    folder.chmod(0o755)
    yield folder
    release(folder)
    embedded.destroy(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Server]:
    with EmbeddedPostgres(home, durable=False) as running:
        with psycopg.connect(running.url("postgres"), autocommit=True) as admin:
            admin.execute("create database shop")
            admin.execute("create database closed")
            admin.execute("revoke connect on database closed from public")
            admin.execute("create role clerk login password 'counter'")
            admin.execute("create role planner login password 'counter' createrole")
            admin.execute("grant create on database shop to planner")
        yield running


def as_user(server: Server, user: str, password: str, name: str = "shop") -> Database:
    return Database.from_url(f"postgresql://{user}:{password}@{server.host}:{server.port}/{name}")


def admin(server: Server, *queries: str) -> None:
    with psycopg.connect(server.url("shop"), autocommit=True) as connection:
        for query in queries:
            connection.execute(query)


def refusal(database: Database, kind: type[databases.DatabaseError]) -> str:
    """What `check` says; it must be exactly of that kind, one paragraph, and not name the password."""
    with pytest.raises(databases.DatabaseError) as caught:
        check(database)
    assert type(caught.value) is kind
    text = str(caught.value)
    password = psycopg.conninfo.conninfo_to_dict(database.url).get("password")
    assert "\n" not in text
    assert not password or str(password) not in text
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


def test_without_a_url_the_embedded_server_gets_the_database(home: Path, server: Server) -> None:
    first = resolve(None, home, 'it\'s "support"')
    again = resolve("", home, 'it\'s "support"')
    assert first == again == Database(server.url('it\'s "support"'), 'it\'s "support"')
    with first.connect() as connection:
        assert connection.execute("select current_database()").fetchone() == ('it\'s "support"',)
    check(first)


def test_processes_may_create_the_same_database_at_once(home: Path, server: Server) -> None:
    script = (
        "import sys; from pathlib import Path; from storage.database import resolve\n"
        "with resolve(None, Path(sys.argv[1]), 'crowd').connect() as c: c.execute('select 1')"
    )
    command = [sys.executable, "-c", script, str(home)]
    waiting = "select count(*) from pg_stat_activity where wait_event = 'advisory'"
    with psycopg.connect(server.url("postgres"), autocommit=True) as holder:
        holder.execute("select pg_advisory_lock(%s)", [databases._CREATE_DATABASE_LOCK])
        crowd = [subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE) for _ in range(3)]
        deadline = time.monotonic() + 30
        while holder.execute(waiting).fetchone() != (3,):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert [(process.communicate()[1], process.returncode) for process in crowd] == [(b"", 0)] * 3


def test_a_url_is_taken_as_it_is_and_nothing_is_started(tmp_path: Path) -> None:
    found = resolve("postgres://ann@db.invalid/shop", tmp_path / "home", "support")
    assert found == Database("postgresql://ann@db.invalid/shop", "shop")
    assert not (tmp_path / "home").exists()


def test_resolve_brings_a_killed_server_back(home: Path, server: Server) -> None:
    resolve(None, home, "shop")
    embedded.stop(home, force=True)
    with resolve(None, home, "shop").connect() as connection:
        assert connection.execute("select 1").fetchone() == (1,)


def test_release_ends_the_use(tmp_path: Path) -> None:
    try:
        resolve(None, tmp_path, "support", durable=False)
        assert embedded.status(tmp_path).in_use
        release(tmp_path)
        assert not embedded.status(tmp_path).in_use
        release(tmp_path)
    finally:
        embedded.destroy(tmp_path)


def test_connect_takes_a_role_and_a_name(server: Server) -> None:
    database = Database(server.url("shop"), "shop")
    with database.connect(role="clerk", application_name="till") as connection:
        assert not connection.autocommit
        assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        row = connection.execute("select current_user::text, current_setting('application_name')").fetchone()
        assert row == ("clerk", "till")
        connection.rollback()
        assert connection.execute("select current_user::text").fetchone() == ("clerk",)
    with database.connect(autocommit=True) as connection:
        assert connection.autocommit
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        database.connect(role="nobody of that name")


def test_nothing_listens() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        text = refusal(
            Database.from_url(f"postgresql://a:pw1@127.0.0.1:{port}/b"), databases.ServerUnreachable
        )
    assert f"a@127.0.0.1:{port}/b" in text and "start the server" in text


def test_something_else_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(databases, "CONNECT_SECONDS", 2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        refusal(Database.from_url(f"postgresql://a:pw1@127.0.0.1:{port}/b"), databases.ServerUnreachable)


def test_wrong_password(server: Server) -> None:
    text = refusal(as_user(server, "clerk", "wrongpw"), databases.LoginFailed)
    assert "correct the user and password" in text
    assert "correct the user" in refusal(as_user(server, "ghost", "wrongpw"), databases.LoginFailed)
    no_password = Database.from_url(f"postgresql://clerk@{server.host}:{server.port}/shop")
    refusal(no_password, databases.LoginFailed)


def test_no_right_to_connect(server: Server) -> None:
    text = refusal(as_user(server, "clerk", "counter", "closed"), databases.LoginFailed)
    assert text.endswith('GRANT CONNECT ON DATABASE "closed" TO "clerk";')


def test_no_such_database(server: Server) -> None:
    text = refusal(as_user(server, "clerk", "counter", "shoe%22s"), databases.DatabaseMissing)
    assert 'CREATE DATABASE "shoe""s";' in text


def test_server_too_old(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(databases, "_VERSION", "select 140017, '14.17'")
    text = refusal(Database(server.url("shop"), "shop"), databases.ServerTooOld)
    assert "Postgres 14.17" in text and "15 or later" in text


def test_no_right_to_create_schemas(server: Server) -> None:
    text = refusal(as_user(server, "clerk", "counter"), databases.CannotCreateSchemas)
    grant = text.partition("run, as its owner, ")[2]
    assert grant == 'GRANT CREATE ON DATABASE "shop" TO "clerk";'
    admin(server, grant)
    try:
        refusal(as_user(server, "clerk", "counter"), databases.VectorNotInstalled)
    finally:
        admin(server, "revoke create on database shop from clerk")


def test_vector_must_be_installed_by_another(server: Server) -> None:
    text = refusal(as_user(server, "planner", "counter"), databases.VectorNotInstalled)
    command = text.partition("in that database, ")[2]
    assert command == "CREATE EXTENSION vector;"
    admin(server, command)
    try:
        check(as_user(server, "planner", "counter"))
    finally:
        admin(server, "drop extension vector")


@pytest.mark.parametrize(
    ("installed", "offered", "kind", "command"),
    [
        ("null", "null", databases.VectorUnavailable, "CREATE EXTENSION vector;"),
        ("'0.8.3'", "'0.8.5'", databases.VectorTooOld, "ALTER EXTENSION vector UPDATE;"),
        ("'0.7.0'", "'0.7.0'", databases.VectorTooOld, "ALTER EXTENSION vector UPDATE;"),
        ("null", "'0.8.3'", databases.VectorTooOld, "CREATE EXTENSION vector;"),
    ],
)
def test_vector_is_not_what_is_needed(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    installed: str,
    offered: str,
    kind: type[databases.DatabaseError],
    command: str,
) -> None:
    monkeypatch.setattr(databases, "_VECTOR", f"select {installed}, {offered}, true")
    text = refusal(Database(server.url("shop"), "shop"), kind)
    assert "0.8.4 or later" in text and text.endswith(command)


def test_a_recent_vector_passes(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(databases, "_VECTOR", "select '0.10.0', '0.10.0', false")
    check(Database(server.url("shop"), "shop"))


def test_roles_that_cannot_be_made_or_used(server: Server) -> None:
    admin(server, "create extension vector", "grant create on database shop to clerk")
    clerk = as_user(server, "clerk", "counter")
    names = ", ".join(databases.ROLES)
    try:
        text = refusal(clerk, databases.CannotManageRoles)
        assert names in text and text.endswith('ALTER ROLE "clerk" CREATEROLE;')
        admin(server, *(f"create role {name}" for name in databases.ROLES))
        text = refusal(clerk, databases.CannotManageRoles)
        grant = text.partition("run, as superuser, ")[2]
        assert grant == f'GRANT {names} TO "clerk";'
        admin(server, grant)
        check(clerk)
    finally:
        admin(server, "drop extension vector", "revoke create on database shop from clerk")
        admin(server, *(f"drop role if exists {name}" for name in databases.ROLES))

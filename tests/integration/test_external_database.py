"""``DATABASE_URL``: an external server with an ordinary login, prepared and used like the embedded one."""

import os
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from storage.database import ROLES
from tests.integration.conftest import Cluster


@pytest.fixture
def login(cluster: Cluster, template: str) -> str:
    """The URL of a database owned by a login that is no superuser but may create roles and databases.

    The roles are there already (``template`` made them, for the whole server), so the login is made a member.
    """
    url = cluster.new_database()
    name = url.rsplit("/", 1)[1]
    with psycopg.connect(cluster.url("postgres"), autocommit=True) as conn:
        user = f"moat_{name}"
        conn.execute(
            sql.SQL("create role {} login createdb createrole password 'secret word'").format(
                sql.Identifier(user)
            )
        )
        conn.execute(
            sql.SQL("alter database {} owner to {}").format(sql.Identifier(name), sql.Identifier(user))
        )
        # What a database administrator does once: the extension is not the login's to install.
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("create extension if not exists vector")
        for role in ROLES:
            conn.execute(
                sql.SQL("grant {} to {} with admin option").format(sql.Identifier(role), sql.Identifier(user))
            )
    host = url.split("@")[1]
    return f"postgresql://{user}:secret%20word@{host}"


def moat(home: Path, url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestration.cli", *arguments],
        env={**os.environ, "DATABASE_URL": url, "DATAMOAT_HOME": str(home), "EXAMPLE": "none"},
        capture_output=True,
        text=True,
    )


def test_it_is_prepared_twice_and_answers(login: str, tmp_path: Path) -> None:
    for _ in range(2):
        done = moat(tmp_path, login, "prepare")
        assert done.returncode == 0, done.stderr
        assert "ready" in done.stdout
    assert not (tmp_path / "postgres").exists()
    asked = moat(tmp_path, login, "sql", "select current_user as who")
    assert "_reader" in asked.stdout
    made = moat(tmp_path, login, "feedback", "key", "create", "--app", "shop", "--scope", "read")
    assert made.returncode == 0 and made.stdout.startswith("dm_"), made.stderr
    assert "shop  read" in moat(tmp_path, login, "feedback", "key", "list").stdout
    refused = moat(tmp_path, login.replace(":secret%20word", ":wrong"), "status")
    assert refused.returncode == 1
    assert "password authentication failed" in refused.stderr and "Traceback" not in refused.stderr


ATTEMPTS = (
    "commit; reset role; create table public.mine (x int)",
    "do $$ begin set role none; perform messages from feedback.interaction; end $$",
    "set role datamoat_writer; select output from feedback.interaction",
    "commit; set default_transaction_read_only = off; delete from registry.source",
    "copy (select 1) to program 'true'",
    "select text from corpus.document",
)


def test_an_analyst_can_neither_write_nor_read_texts(login: str, tmp_path: Path) -> None:
    assert moat(tmp_path, login, "prepare").returncode == 0
    for attempt in ATTEMPTS:
        done = moat(tmp_path, login, "sql", attempt)
        assert done.returncode == 1, attempt
        assert "error" in done.stdout, attempt


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda url: url.replace("secret%20word", "wrong"), "password"),
        (lambda url: url.replace(":secret", ":secret").rsplit("/", 1)[0] + "/absent", "CREATE DATABASE"),
        (lambda url: "postgresql://moat:x@127.0.0.1:1/moat", "127.0.0.1:1"),
        (lambda url: "mysql://moat:x@127.0.0.1/moat", "postgresql://"),
    ],
    ids=["password", "database", "unreachable", "scheme"],
)
def test_what_is_wrong_is_one_sentence(login: str, tmp_path: Path, change: object, words: str) -> None:
    assert callable(change)
    done = moat(tmp_path, change(login), "prepare")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("moat: ")
    assert words in done.stderr
    assert "secret" not in done.stderr and "wrong" not in done.stderr.split("password")[0]

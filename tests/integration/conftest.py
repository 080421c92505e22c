"""A real Postgres and a real feedback service for the tests of this folder.

Belongs here: what several test files start. Does not belong here: any assertion.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from feedback.keys import create_key
from feedback.migrations import upgrade as upgrade_feedback
from storage import embedded, migrations
from storage.database import Database
from storage.embedded import EmbeddedPostgres
from storage.migrations import upgrade as upgrade_warehouse
from storage.warehouse import Warehouse

TEMPLATE = "migrated"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    """An embedded Postgres of our own supervisor, without fsync; several processes may share its folder."""

    home: Path
    postgres: EmbeddedPostgres = field(init=False)

    def __post_init__(self) -> None:
        self.postgres = EmbeddedPostgres(self.home, durable=False)

    def start(self) -> None:
        self.postgres.acquire()

    def kill(self) -> None:
        """End supervisor and postmaster as a crash of the machine would; ``start`` brings them back."""
        data = self.postgres.acquire().data_dir
        postmaster = int((data / "postmaster.pid").read_text().splitlines()[0])
        supervisor = embedded.status(self.home).pid
        assert supervisor is not None
        os.kill(supervisor, signal.SIGKILL)
        os.kill(postmaster, signal.SIGKILL)

    def stop(self) -> None:
        self.postgres.release()

    def new_database(self, template: str = "template1") -> str:
        """The URL of a new database, a copy of ``template``."""
        name = f"test_{secrets.token_hex(6)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as conn:
            # Two copies of one template at once refuse each other.
            conn.execute("select pg_advisory_lock(hashtext(%s))", [template])
            conn.execute(
                sql.SQL("create database {} template {}").format(
                    sql.Identifier(name), sql.Identifier(template)
                )
            )
        return self.url(name)

    def drop_database(self, url: str) -> None:
        name = Database.from_url(url).name
        with psycopg.connect(self.url("postgres"), autocommit=True) as conn:
            conn.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))

    def url(self, database: str) -> str:
        return self.postgres.acquire().url(database)


@pytest.fixture(scope="session")
def new_cluster() -> Iterator[Callable[[], Cluster]]:
    """A function that starts one more Postgres, for tests that kill it or must be alone on it."""
    clusters: list[Cluster] = []

    def start() -> Cluster:
        cluster = Cluster(Path(tempfile.mkdtemp(prefix="datamoat-test-")))
        clusters.append(cluster)
        cluster.start()
        return cluster

    yield start
    for cluster in clusters:
        cluster.stop()
        embedded.destroy(cluster.home)
        shutil.rmtree(cluster.home, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The Postgres that all tests share, in parallel workers too; it stops by itself after the last."""
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "embedded"
    cluster = Cluster(home)
    cluster.start()
    yield cluster
    cluster.stop()


def migrated(cluster: Cluster) -> str:
    """The name of a database with every migration applied, to be copied."""
    with psycopg.connect(cluster.url("postgres"), autocommit=True) as conn:
        conn.execute("select pg_advisory_lock(hashtext(%s))", [TEMPLATE])
        if conn.execute("select from pg_database where datname = %s", [TEMPLATE]).fetchone() is None:
            conn.execute(sql.SQL("create database {}").format(sql.Identifier("migrating")))
            upgrade_warehouse(Database.from_url(cluster.url("migrating")))
            upgrade_feedback(cluster.url("migrating"))
            conn.execute(f"alter database migrating rename to {TEMPLATE}")
    return TEMPLATE


def database_of(cluster: Cluster, revision: str) -> Database:
    """A new database with the warehouse's migrations up to an earlier ``revision``, to be upgraded."""
    import sqlalchemy as sa
    from alembic import command
    from alembic.config import Config

    database = Database.from_url(cluster.new_database())
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    engine = sa.create_engine(database.sqlalchemy_url("psycopg"), poolclass=sa.NullPool)
    with engine.connect() as connection:
        config.attributes |= {"connection": connection, "applied": []}
        command.upgrade(config, revision)
        connection.commit()
    return database


@pytest.fixture(scope="session")
def template(cluster: Cluster) -> str:
    """That database of the server that all tests share."""
    return migrated(cluster)


@pytest.fixture(scope="session")
def database_url(cluster: Cluster) -> str:
    """A fresh, empty database that the tests of one session share."""
    return cluster.new_database()


@pytest.fixture(scope="session")
def alone(new_cluster: Callable[[], Cluster]) -> Cluster:
    """A Postgres of this worker alone."""
    return new_cluster()


@pytest.fixture
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """A migrated database of the test's own; on a server of its worker's own if the test is marked ``alone``."""
    marked = request.node.get_closest_marker("alone") is not None
    cluster: Cluster = request.getfixturevalue("alone" if marked else "cluster")
    url = cluster.new_database(migrated(cluster))
    yield Database.from_url(url)
    cluster.drop_database(url)


@pytest.fixture
def conn(database: Database) -> Iterator[psycopg.Connection[Any]]:
    """A connection to the test's own migrated database, in a transaction."""
    with database.connect() as connection:
        yield connection


@pytest.fixture
def warehouse(database: Database, tmp_path: Path) -> Warehouse:
    """The test's own warehouse: database, lake and key."""
    return Warehouse(database, tmp_path / "lake", b"k" * 32)


@dataclass
class FeedbackService:
    """A running feedback service, as a child process, and a key for it."""

    database_url: str
    pseudonym_key_file: Path
    api_key: str = ""
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[str] | None = None
    ready_line: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, workers: int = 1) -> None:
        upgrade_feedback(self.database_url)
        with psycopg.connect(self.database_url) as conn:
            self.api_key = create_key(conn, "support")[1]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "feedback", "serve", "--port", str(self.port), "--workers", str(workers)],
            env={
                "PATH": os.environ["PATH"],
                "DATABASE_URL": self.database_url,
                "DATAMOAT_PSEUDONYM_KEY_FILE": str(self.pseudonym_key_file),
                **self.environment,
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline()
        assert "ready" in self.ready_line, self.ready_line

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        code = self.process.wait(timeout=60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@pytest.fixture(scope="session")
def feedback_service(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeedbackService]:
    """One service over a database of its own, shared by the tests of one session."""
    key_file = tmp_path_factory.mktemp("feedback") / "pseudonym.key"
    service = FeedbackService(cluster.new_database(), key_file)
    service.start()
    yield service
    service.stop()

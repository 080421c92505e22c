"""The process that owns an embedded Postgres: creates its data folder, runs it as a child, stops it when unused.

Belongs here: the layout of a cluster's folder, `initdb`, starting, restarting and stopping `postgres`, and its
settings. Does not belong here: finding a server, proving it, or talking SQL to it (`storage.embedded`).

Only the standard library is imported: the file is run by its path (`python -I -S supervisor.py FOLDER --bin DIR`),
so that it starts in a few hundredths of a second and whatever the caller's import path is.

How it hangs together:

- `supervisor.lock` is held exclusively for the whole life of the one supervisor of a folder. Whoever finds it
  free knows that there is none; process ids are never trusted for that.
- `clients.lock` is held shared by each process that uses the server, and the kernel frees it when such a process
  dies. The supervisor stops the server once it could take that lock exclusively for `GRACE_SECONDS`; it keeps it
  while stopping, so that a late client waits and then starts a new supervisor.
- On Linux the kernel sends `postgres` a fast-shutdown signal when the supervisor dies. Elsewhere the next
  supervisor stops what it finds and starts its own.
"""

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

HOST = "127.0.0.1"
USER = "datamoat"
MAJOR_VERSION = "18"

GRACE_SECONDS = 3.0
POLL_SECONDS = 0.5
FAST_SHUTDOWN_SECONDS = 120.0
ORPHAN_SECONDS = 10.0
BLOCKED_START_SECONDS = 60.0
CRASH_LIMIT = 5
CRASH_WINDOW_SECONDS = 60.0

LOG_BYTES = 16 * 1024**2

EXIT_ALREADY_RUNNING = 3

Phase = Literal["none", "initialising", "starting", "running", "stopping", "stopped", "failed"]

_MIB = 1024**2
_GIB = 1024**3


class SupervisorError(Exception):
    """The server cannot be run; the text says what is wrong and what to do."""


@dataclass(frozen=True)
class Cluster:
    """The folder of one embedded server; `root` is absolute and free of symbolic links."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def password(self) -> Path:
        return self.root / "password"

    @property
    def clients_lock(self) -> Path:
        return self.root / "clients.lock"

    @property
    def supervisor_lock(self) -> Path:
        return self.root / "supervisor.lock"

    @property
    def state(self) -> Path:
        return self.root / "state.json"

    @property
    def throwaway(self) -> Path:
        """Present where nothing is worth a sync: folders made for tests."""
        return self.root / "throwaway"

    @property
    def log(self) -> Path:
        return self.root / "server.log"


@dataclass(frozen=True)
class State:
    """What the supervisor last said; true only while `supervisor.lock` is held. `port` is remembered between runs."""

    pid: int = 0
    phase: Phase = "none"
    message: str = ""
    port: int = 0


@dataclass(frozen=True)
class Postmaster:
    """What `postmaster.pid` says: a hint, for the file outlives a killed server."""

    pid: int
    port: int
    status: str


@dataclass(frozen=True)
class Account:
    """The system account that `postgres` runs under when we are root."""

    uid: int
    gid: int
    name: str


def read_state(cluster: Cluster) -> State:
    """The last state written, or the default one when there is none or it cannot be understood."""
    try:
        return State(**json.loads(cluster.state.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return State()


def write_state(cluster: Cluster, state: State) -> None:
    """Replace the state in one step, so that a reader never sees half of it."""
    temporary = cluster.state.with_suffix(".new")
    temporary.write_text(json.dumps(asdict(state)))
    temporary.replace(cluster.state)


def read_postmaster(cluster: Cluster) -> Postmaster | None:
    """The content of `postmaster.pid`, or None when it is absent or incomplete."""
    try:
        lines = (cluster.data / "postmaster.pid").read_text().splitlines()
        return Postmaster(pid=int(lines[0]), port=int(lines[3]), status=lines[7].strip())
    except (FileNotFoundError, IndexError, ValueError):
        return None


def log_tail(cluster: Cluster, lines: int = 8, start: int = 0) -> str:
    """The last lines of the server's log written at or after byte `start`."""
    try:
        with cluster.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - 64 * 1024))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def server_account(cluster: Cluster | None = None) -> Account | None:
    """The account to run `postgres` under: None (as we are) unless root, whom Postgres refuses.

    An existing data folder decides by its owner; else the system's `postgres`, else `nobody`.
    """
    if os.geteuid() != 0:
        return None
    if cluster is not None and cluster.data.exists():
        owner = cluster.data.stat()
        if owner.st_uid == 0:
            raise SupervisorError(
                f"{cluster.data} belongs to root, and Postgres never runs as root. Give the folder and what it holds "
                f"to an unprivileged user: chown -R nobody '{cluster.data}'"
            )
        return Account(owner.st_uid, owner.st_gid, _user_name(owner.st_uid))
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(entry.pw_uid, entry.pw_gid, name)
    raise SupervisorError(
        "Postgres never runs as root, and this system has neither a user 'postgres' nor 'nobody'. "
        "Run Datamoat as an ordinary user, or set DATABASE_URL to a server of your own."
    )


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # containers run under ids that nobody has entered
        return str(uid)


def settings(*, memory: int, shared_memory: int | None, free_disk: int, durable: bool) -> dict[str, str]:
    """Postgres settings for a machine; all sizes in bytes, `shared_memory` the size of /dev/shm or None."""

    def megabytes(share: int, least: int, most: int) -> str:
        return f"{min(max(memory // share // _MIB, least), most)}MB"

    chosen = {
        "listen_addresses": HOST,
        "unix_socket_directories": "",
        "max_connections": "100",
        "cluster_name": "datamoat",
        "shared_buffers": megabytes(8, 32, 256),
        "maintenance_work_mem": megabytes(16, 64, 512),
        "effective_cache_size": megabytes(2, 128, 64 * 1024),
        "random_page_cost": "1.1",
        # Nothing replicates from here, and bulk loads into new tables then need no WAL.
        "wal_level": "minimal",
        "max_wal_senders": "0",
        "max_wal_size": "4GB" if free_disk > 40 * _GIB else "1GB",
        "checkpoint_timeout": "15min",
        "timezone": "UTC",
        "log_timezone": "UTC",
        "lc_messages": "C",
        "log_checkpoints": "off",
        "logging_collector": "off",
        "log_destination": "stderr",
        "log_line_prefix": "%m [%p] ",
    }
    if shared_memory is not None and shared_memory < _GIB:
        # Containers give /dev/shm 64 MB, where a parallel index build fails; System V memory has no such limit.
        chosen["dynamic_shared_memory_type"] = "sysv"
    if not durable:
        chosen |= {"fsync": "off", "full_page_writes": "off"}
    return chosen


def _machine_memory() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such limit, or "max"
        return memory


def _shared_memory() -> int | None:
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:
        return None


def die_with_parent(number: signal.Signals) -> Callable[[], None] | None:
    """For `preexec_fn`: ask the Linux kernel to send the child `number` when this process dies."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def ask() -> None:
        prctl(1, int(number), 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    return ask


def _port_is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Supervisor:
    """Runs one cluster's server from preparation to stop. Made and used by `main` only, in its own process."""

    def __init__(self, cluster: Cluster, binaries: Path) -> None:
        self.cluster = cluster
        self.binaries = binaries
        self.durable = not cluster.throwaway.exists()
        self.account: Account | None = None
        self._state = replace(read_state(cluster), pid=os.getpid())
        self._stop_requested = False
        self._idle_since: float | None = None
        self._clients = os.open(cluster.clients_lock, os.O_RDWR | os.O_CREAT, 0o600)
        self._wake, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request_stop)

    def run(self) -> None:
        """Serve until nobody uses the server or a stop is requested; raises SupervisorError when it cannot."""
        self._say("starting")
        self.account = server_account(self.cluster)
        self._prepare()
        crashes: deque[float] = deque()
        blocked_since: float | None = None
        while not self._stop_requested:
            self._clear_leftovers()
            self._say("starting")
            offset = self.cluster.log.stat().st_size
            child = self._start()
            was_ready = self._watch(child)
            if was_ready is None:
                break
            now = time.monotonic()
            text = log_tail(self.cluster, start=offset, lines=200)
            code = child.returncode
            self._log(f"postgres ended with status {code}")
            if not was_ready and code > 0:
                if "could not bind" in text:
                    self._state = replace(self._state, port=0)
                elif (
                    "pre-existing shared memory block" in text
                    or 'lock file "postmaster.pid" already exists' in text
                ):
                    blocked_since = blocked_since or now
                    if now - blocked_since > BLOCKED_START_SECONDS:
                        raise SupervisorError(
                            f"Processes of an earlier server still use {self.cluster.data}; end them and start again. "
                            f"{self.cluster.log} says:\n{log_tail(self.cluster, start=offset)}"
                        )
                    self._sleep(1.0)
                    continue
                else:
                    raise SupervisorError(self._explain(log_tail(self.cluster, start=offset)))
            crashes.append(now)
            while now - crashes[0] > CRASH_WINDOW_SECONDS:
                crashes.popleft()
            if len(crashes) >= CRASH_LIMIT:
                raise SupervisorError(
                    f"Postgres ended {CRASH_LIMIT} times within {CRASH_WINDOW_SECONDS:.0f} s, the last time with status "
                    f"{code}. {self.cluster.log} says:\n{log_tail(self.cluster, start=offset)}"
                )
        self._say("stopped")

    def _prepare(self) -> None:
        """Check the data folder, or create it: `initdb` into a temporary folder, then one rename."""
        data = self.cluster.data
        if data.exists():
            version_file = data / "PG_VERSION"
            if not version_file.exists():
                raise SupervisorError(
                    f"{data} is not a Postgres data folder (it has no PG_VERSION), so it is left alone. "
                    "Move it away or choose another home."
                )
            version = version_file.read_text().strip()
            if version != MAJOR_VERSION:
                raise SupervisorError(
                    f"{data} was written by Postgres {version} and this is Postgres {MAJOR_VERSION}. Dump it with the "
                    f"version that wrote it (pg_dumpall), move {self.cluster.root} away, start again and load the dump."
                )
            return
        for leftover in self.cluster.root.glob("init-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._say("initialising")
        scratch = Path(tempfile.mkdtemp(prefix="init-", dir=self.cluster.root))
        try:
            self._initdb(scratch)
            if self.durable:
                _sync(self.cluster.root)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _initdb(self, scratch: Path) -> None:
        password = scratch / "password"
        password.write_text(self.cluster.password.read_text())
        if self.account:
            for path in (scratch, password):
                os.chown(path, self.account.uid, self.account.gid)
        arguments = [
            str(self.binaries / "initdb"),
            "-D",
            str(scratch / "data"),
            f"--username={USER}",
            f"--pwfile={password}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            # The builtin provider (Postgres 17+) does not depend on the C library: a data folder can change machines.
            "--locale=C",
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
        ]
        if not self.durable:
            arguments.append("--no-sync")
        child = self._spawn(arguments, signal.SIGKILL, subprocess.PIPE)
        output, _ = child.communicate()
        text = output.decode("utf-8", "replace")
        self._log(text.rstrip())
        if child.returncode != 0:
            raise SupervisorError(self._explain("\n".join(text.splitlines()[-8:])))
        (scratch / "data").rename(self.cluster.data)

    def _explain(self, text: str) -> str:
        folder = self.cluster.root
        if "No space left on device" in text:
            free = shutil.disk_usage(folder).free // _MIB
            return (
                f"The disk is full: Postgres could not write in {folder} ({free} MB free). Free some space (a new "
                "folder needs about 100 MB) or choose a home on another disk, then start again."
            )
        if "Permission denied" in text:
            who = self.account.name if self.account else _user_name(os.geteuid())
            return (
                f"Postgres runs as '{who}', who is not allowed what it needs in {folder}; give the folder to that user "
                f"or choose another home. It says:\n{text}"
            )
        if "could not look up effective user ID" in text:
            return (
                f"Postgres needs a user with a name, and the id {os.geteuid()} has none: add a line for it to "
                "/etc/passwd, run as another user, or set DATABASE_URL to a server of your own."
            )
        return f"Postgres did not start on {folder}. It says:\n{text}"

    def _start(self) -> subprocess.Popen[bytes]:
        port = self._state.port
        if not (port and _port_is_free(port)):
            port = _free_port()
        chosen = settings(
            memory=_machine_memory(),
            shared_memory=_shared_memory(),
            free_disk=shutil.disk_usage(self.cluster.root).free,
            durable=self.durable,
        )
        arguments = [str(self.binaries / "postgres"), "-D", str(self.cluster.data), "-p", str(port)]
        for name, value in chosen.items():
            arguments += ["-c", f"{name}={value}"]
        child = self._spawn(arguments, signal.SIGINT, None)
        self._say("running", port=port)
        return child

    def _spawn(
        self, arguments: list[str], on_our_death: signal.Signals, stdout: int | None
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT if stdout else None,
            cwd="/",
            umask=0o077,
            user=self.account.uid if self.account else None,
            group=self.account.gid if self.account else None,
            extra_groups=[] if self.account else None,
            preexec_fn=die_with_parent(on_our_death),
        )

    def _watch(self, child: subprocess.Popen[bytes]) -> bool | None:
        """Wait until the server ends. None: we stopped it. Else whether it had ever been ready."""
        ready = False
        while child.poll() is None:
            if self._stop_requested or self._unused():
                self._shut_down(child)
                return None
            if not ready:
                postmaster = read_postmaster(self.cluster)
                ready = (
                    postmaster is not None and postmaster.pid == child.pid and postmaster.status == "ready"
                )
            self._sleep(POLL_SECONDS if ready else 0.1)
        return ready

    def _unused(self) -> bool:
        """True once no client was seen for the grace time; `clients.lock` then stays ours until we end."""
        if not _try_lock(self._clients):
            self._idle_since = None
            return False
        now = time.monotonic()
        self._idle_since = self._idle_since or now
        if now - self._idle_since >= GRACE_SECONDS:
            return True
        fcntl.flock(self._clients, fcntl.LOCK_UN)
        return False

    def _shut_down(self, child: subprocess.Popen[bytes]) -> None:
        self._say("stopping")
        child.send_signal(signal.SIGINT)
        try:
            child.wait(FAST_SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            # Nothing committed is lost: the next start replays the log.
            child.send_signal(signal.SIGQUIT)
            child.wait()

    def _clear_leftovers(self) -> None:
        """End what an earlier server on this folder left running, and disarm its `postmaster.pid`."""
        signalled: set[int] = set()
        orphaned_since: float | None = None
        while pids := set(self._leftovers()):
            postmaster = read_postmaster(self.cluster)
            if postmaster and postmaster.pid in pids:
                # It ends its own children, and takes the time that its last checkpoint needs.
                targets, number = {postmaster.pid}, signal.SIGINT
            else:
                targets, number = pids, signal.SIGTERM
                orphaned_since = orphaned_since or time.monotonic()
                if time.monotonic() - orphaned_since > ORPHAN_SECONDS:
                    number = signal.SIGKILL
                    signalled.clear()
            for pid in targets - signalled:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            signalled |= targets
            self._sleep(0.1)
        pid_file = self.cluster.data / "postmaster.pid"
        try:
            lines = pid_file.read_text().splitlines()
        except FileNotFoundError:
            return
        # The number may by now belong to some other process, and Postgres would then refuse to start. It takes its
        # parent's number for stale; the rest of the file stays, since it guards against backends still attached.
        with pid_file.open("r+") as file:
            file.write("\n".join([str(os.getpid()), *lines[1:], ""]))
            file.truncate()

    def _leftovers(self) -> Iterator[int]:
        """Ids of living server processes of this data folder; they all have it as their working folder."""
        if Path("/proc/self/cwd").exists():
            data = str(self.cluster.data)
            for entry in Path("/proc").iterdir():
                if entry.name.isdigit() and int(entry.name) != os.getpid():
                    with contextlib.suppress(OSError):
                        link = (entry / "cwd").readlink()
                        if str(link) == data and (entry / "comm").read_text() == "postgres\n":
                            yield int(entry.name)
            return
        postmaster = read_postmaster(self.cluster)
        if postmaster:
            listing = subprocess.run(
                ["ps", "-ww", "-p", str(postmaster.pid), "-o", "command="],
                capture_output=True,
                text=True,
                check=False,
            )
            if f"-D {self.cluster.data} " in listing.stdout:
                yield postmaster.pid

    def _request_stop(self, *_: object) -> None:
        self._stop_requested = True

    def _sleep(self, seconds: float) -> None:
        """Wait, but no longer than until a signal (a stop request, the child's end) arrives."""
        if select.select([self._wake], [], [], seconds)[0]:
            os.read(self._wake, 512)

    def _say(self, phase: Phase, *, port: int | None = None) -> None:
        self._state = replace(
            self._state, phase=phase, message="", port=self._state.port if port is None else port
        )
        write_state(self.cluster, self._state)

    def _log(self, text: str) -> None:
        print(f"supervisor [{os.getpid()}] {text}", file=sys.stderr, flush=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_log(cluster: Cluster) -> None:
    """Send our output and the server's to the log; one earlier file of `LOG_BYTES` is kept."""
    if cluster.log.exists() and cluster.log.stat().st_size > LOG_BYTES:
        cluster.log.replace(cluster.log.with_suffix(".log.1"))
    descriptor = os.open(cluster.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def main() -> int:
    """Become the supervisor of a folder, in the background; EXIT_ALREADY_RUNNING when it has one."""
    parser = argparse.ArgumentParser(description="Supervise the embedded Postgres of a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bin", type=Path, required=True, help="the folder of initdb and postgres")
    arguments = parser.parse_args()
    cluster = Cluster(arguments.folder.resolve())
    lock = os.open(cluster.supervisor_lock, os.O_RDWR | os.O_CREAT, 0o600)
    if not _try_lock(lock):
        return EXIT_ALREADY_RUNNING
    _open_log(cluster)
    write_state(cluster, State(phase="starting", port=read_state(cluster).port))
    if os.fork():
        os._exit(0)  # the child has the lock too; the caller has nothing left to reap
    try:
        Supervisor(cluster, arguments.bin).run()
    except (SupervisorError, OSError) as error:
        state = replace(read_state(cluster), pid=os.getpid(), phase="failed", message=str(error))
        with contextlib.suppress(OSError):
            write_state(cluster, state)
        print(f"supervisor [{os.getpid()}] {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

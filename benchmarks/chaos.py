"""What the feedback service does when things break: each fault against real processes, under load, with a ledger.

Run by hand: `python -m benchmarks.chaos` (`make chaos`), `--only NAME` for one fault, `--scale full` for the long
version. A table goes to stderr and the last line of stdout is one JSON object; the exit code is 1 if anything failed.

A fault passes when nothing that was acknowledged is missing, nothing is stored or acknowledged as new twice, no
answer is a 5xx other than 503, clients that simply send again get everything through afterwards, and the fault's own
conditions hold. A fault that this machine cannot have (a full disk needs root) is skipped with the reason.

Belongs here: the faults and the verdict. Does not belong here: making load (`benchmarks.load`), starting processes
(`benchmarks.processes`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AsyncExitStack, ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import psycopg
from psycopg.conninfo import conninfo_to_dict

from benchmarks.load import LOST, Background, Ledger, Load, Request, Target, event_body
from benchmarks.processes import Postgres, Service
from feedback import log
from feedback.ids import uuid7
from feedback.review import Reviewer
from feedback.review.leases import claim, release
from feedback.review.queues import create_queue
from feedback.review.rubric import Question
from feedback.review.rules import fill
from feedback.service import ADMIN_ROLE, REVIEW_ROLE

Scale = Literal["small", "full"]

WORKERS = 2
CONNECTIONS = 16
RECOVERY_SECONDS = 60.0
MEMORY_BOUND_MB = 150
SMALL_DISK_MB = 320


class Failed(Exception):
    """A condition of a fault does not hold."""


class Skipped(Exception):
    """This machine cannot have the fault."""


@dataclass
class Verdict:
    """What became of one fault; ``statuses`` counts all answers, ``0`` the connections that ended before one.

    ``outage`` is the longest time, in seconds, in which no client of the load was served.
    """

    fault: str
    passed: bool
    seconds: float = 0.0
    acknowledged: int = 0
    lost: int = 0
    duplicates: int = 0
    outage: float = 0.0
    statuses: dict[int, int] = field(default_factory=dict)
    note: str = ""
    skipped: bool = False


@dataclass
class Stage:
    """Where faults happen: a Postgres, a service with ``WORKERS`` workers, and the loads that one fault has sent."""

    folder: Path
    postgres: Postgres
    service: Service
    scale: Scale
    loads: list[Load] = field(default_factory=list)

    def pick(self, small: int, full: int) -> int:
        return small if self.scale == "small" else full

    @property
    def refused(self) -> int:
        """How often the load was told to come again later."""
        return self.running.ledger.statuses[503]

    @property
    def running(self) -> Load:
        """The load that goes on while the fault happens."""
        return self.loads[0]

    def load(
        self, requests: Iterable[Request], *, connections: int = CONNECTIONS, port: int | None = None
    ) -> Load:
        """Send ``requests`` once each, and wait for the answers."""
        target = replace(self.service.target, port=port or self.service.port)
        self.loads.append(Load(target, requests, connections=connections))
        return self.loads[-1].run()

    def recovered(self) -> None:
        """Wait until the load is served again."""
        before = self.running.answers
        until(lambda: self.running.answers > before + 2 * CONNECTIONS, "the load is not served again")

    def connect(self) -> psycopg.Connection[Any]:
        """To the service's database, wherever its server came back."""
        return psycopg.connect(self.postgres.url(str(conninfo_to_dict(self.service.database_url)["dbname"])))

    def workers(self) -> list[int]:
        """The process ids of the workers, when all of them are there."""
        until(lambda: len(self.service.worker_pids()) >= WORKERS, "not all workers are there")
        return self.service.worker_pids()

    def stored(self, ids: bytes) -> int:
        """How many of these ids the log has."""
        wanted = [UUID(bytes=ids[start : start + 16]) for start in range(0, len(ids), 16)]
        with self.connect() as conn:
            row = conn.execute(
                "SELECT count(*) FROM feedback.feedback_event WHERE event_id = ANY(%s)", [wanted]
            ).fetchone()
        assert row is not None
        return int(row[0])


@dataclass(frozen=True)
class Fault:
    """``work`` does the damage and may return a note; ``expected`` are statuses that the load may then see."""

    name: str
    work: Callable[[Stage], str | None]
    expected: frozenset[int]
    small_disk: bool


FAULTS: dict[str, Fault] = {}


def fault(
    *expected: int, small_disk: bool = False
) -> Callable[[Callable[[Stage], str | None]], Callable[[Stage], str | None]]:
    def register(work: Callable[[Stage], str | None]) -> Callable[[Stage], str | None]:
        FAULTS[work.__name__] = Fault(work.__name__, work, frozenset({200, 201, *expected}), small_disk)
        return work

    return register


def check(condition: bool, text: str) -> None:
    if not condition:
        raise Failed(text)


def until(condition: Callable[[], bool], text: str, seconds: float = RECOVERY_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        check(time.monotonic() < deadline, f"{text} after {seconds:.0f} s")
        time.sleep(0.02)


@contextmanager
def memory_bound(stage: Stage) -> Iterator[Callable[[], str]]:
    """Watch the service's memory during the block, and refuse that it rises much; says by how much it rose."""
    samples = [stage.service.memory_mb()]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            samples.append(stage.service.memory_mb())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: f"memory {max(samples) - samples[0]:+.0f} MB"
    finally:
        done.set()
        thread.join()
    growth = max(samples) - samples[0]
    check(growth < MEMORY_BOUND_MB, f"memory rose from {samples[0]:.0f} by {growth:.0f} MB")


# --- processes ------------------------------------------------------------------------------------------------------


@fault(LOST)
def worker_killed(stage: Stage) -> None:
    """SIGKILL to one worker after the other; the service replaces them by itself."""
    for number in range(stage.pick(1, 5)):
        if number:
            # A worker that dies again within 5.5 s is not replaced: the service ends, and its manager starts it again.
            time.sleep(6)
        for victim in stage.workers():
            os.kill(victim, signal.SIGKILL)
            until(lambda: victim not in stage.workers(), "the killed worker lives")  # noqa: B023
    stage.workers()
    stage.recovered()


@fault(LOST)
def service_killed(stage: Stage) -> None:
    """SIGKILL to all workers and their parent at once; the service is started again."""
    for pid in (stage.service.process.pid, *stage.service.worker_pids()):
        os.kill(pid, signal.SIGKILL)
    stage.service.stop(signal.SIGKILL)
    stage.service.start()
    stage.recovered()


@fault(LOST)
def service_drained(stage: Stage) -> None:
    """SIGTERM: the service ends by itself, with exit code 0, and is started again."""
    code = stage.service.stop()
    check(code == 0, f"the service ended with exit code {code}")
    stage.service.start()
    stage.recovered()


# --- the database ---------------------------------------------------------------------------------------------------


def _postgres_ends(stage: Stage, how: signal.Signals) -> None:
    for _ in range(stage.pick(1, 3)):
        refused = stage.refused
        os.kill(stage.postgres.pid, how)
        until(lambda: stage.refused > refused, "the end of Postgres has no effect")  # noqa: B023
        stage.postgres.start()
        stage.recovered()


@fault(503)
def postgres_killed(stage: Stage) -> None:
    """SIGKILL to the postmaster."""
    _postgres_ends(stage, signal.SIGKILL)


@fault(503)
def postgres_stopped_immediately(stage: Stage) -> None:
    """What `pg_ctl stop -m immediate` does: no checkpoint, no goodbye to clients."""
    _postgres_ends(stage, signal.SIGQUIT)


@fault(503)
def database_away(stage: Stage) -> str:
    """No database for a minute while clients storm: 503, little memory, then everything gets through."""
    storm = Load(stage.service.target, stage.service.target.endless(), connections=64, retry=0.2)
    stage.loads.append(storm)
    with memory_bound(stage) as growth:
        stage.postgres.stop()
        with Background(storm, wait=False):
            time.sleep(stage.pick(3, 60))
            refused = storm.ledger.statuses[503]
            stage.postgres.start()
            stage.recovered()
            until(lambda: storm.answers > 0, "the storm is not served")
    check(refused > 0, "nothing was refused while the database was away")
    return f"{refused} refused, {growth()}"


@fault(503)
def lock_storm(stage: Stage) -> str:
    """The table is locked against everybody, again and again."""
    rounds = stage.pick(5, 60)
    with stage.connect() as conn:
        for _ in range(rounds):
            conn.execute("LOCK TABLE feedback.feedback_event IN ACCESS EXCLUSIVE MODE")
            time.sleep(0.3)
            conn.commit()
            time.sleep(0.1)
    stage.recovered()
    return f"{rounds} locks of 0.3 s"


@fault(503, small_disk=True)
def disk_full(stage: Stage) -> None:
    """The disk with log and data is full; Postgres comes back when there is space again."""
    ballast = stage.folder / "ballast"
    with ballast.open("wb") as file:
        while (free := shutil.disk_usage(stage.folder).free) > 4_000_000:
            file.write(bytes(min(free - 3_000_000, 1_000_000)))
            file.flush()
    try:
        until(lambda: stage.refused > 0, "the full disk has no effect")
        time.sleep(stage.pick(1, 20))
    finally:
        ballast.unlink()
    stage.postgres.start()
    stage.recovered()


# --- the network ----------------------------------------------------------------------------------------------------


@contextmanager
def _cutting_proxy(target: Target) -> Iterator[int]:
    """A proxy's port: it passes one request on, waits for the first byte of the answer, and resets the connection."""

    class Cut(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            request = _whole_request(self.request)
            if not request:  # the client had nothing more to send
                return
            with closing(socket.create_connection((target.host, target.port), RECOVERY_SECONDS)) as service:
                service.sendall(request)
                service.recv(1)
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.request.close()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Cut) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def _whole_request(client: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        more = client.recv(65536)
        if not more:
            return b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
    while len(body) < length and (more := client.recv(65536)):
        body += more
    return head + b"\r\n\r\n" + body


@fault()
def answer_lost(stage: Stage) -> str:
    """The connection is reset after the commit and before the answer: sent again, each event is a duplicate."""
    requests = stage.service.target.events(stage.pick(200, 5000))
    with _cutting_proxy(stage.service.target) as port:
        cut = stage.load(requests, port=port)
    check(set(cut.ledger.statuses) == {LOST}, f"the proxy let answers through: {dict(cut.ledger.statuses)}")
    again = stage.load(requests)
    check(
        dict(again.ledger.statuses) == {200: len(requests)},
        f"sent again, {len(requests)} events were answered {dict(again.ledger.statuses)}",
    )
    return f"{len(requests)} answers lost, all duplicates the second time"


@fault()
def body_truncated(stage: Stage) -> str:
    """Clients that go away in the middle of a body leave nothing behind."""
    requests = stage.service.target.events(stage.pick(50, 1000))
    for request in requests:
        with closing(socket.create_connection(("127.0.0.1", stage.service.port))) as client:
            client.sendall(request.data[: random.randrange(1, len(request.data))])
    stage.recovered()
    ids = b"".join(request.ids for request in requests)
    check(stage.stored(ids) == 0, "a truncated event was stored")
    return f"{len(requests)} bodies cut short, none stored"


@fault()
def slow_loris(stage: Stage) -> str:
    """Many connections that send a byte now and then, in the head or in the body, do not hold up others."""
    request = stage.service.target.events(1)[0].data
    head = request.index(b"\r\n\r\n")
    with ExitStack() as stack:
        clients = []
        for number in range(stage.pick(100, 1000)):
            client = stack.enter_context(closing(socket.create_connection(("127.0.0.1", stage.service.port))))
            client.sendall(request[: head - 10 if number % 2 else head + 10])
            clients.append(client)
        began, before = time.monotonic(), stage.running.answers
        for _ in range(stage.pick(2, 30)):
            for client in clients:
                try:
                    client.send(b"x")
                except OSError:  # the service may lose its patience
                    continue
            time.sleep(1)
        speed = (stage.running.answers - before) / (time.monotonic() - began)
        stage.recovered()
    return f"{len(clients)} slow connections, others at {speed:.0f}/s"


@fault()
def gzip_bomb(stage: Stage) -> str:
    """Small bodies that unpack to much are refused before they do."""
    size = stage.pick(200, 2000) * 1_000_000
    packer = zlib.compressobj(9, wbits=31)
    bomb = packer.compress(b"[")
    for _ in range(size // 1_000_000):
        bomb += packer.compress(b" " * 1_000_000)
    bomb += packer.compress(b"]") + packer.flush()
    request = stage.service.target.request(bomb, head="Content-Encoding: gzip\r\n")
    with memory_bound(stage) as growth:
        load = stage.load([request] * stage.pick(48, 480), connections=8)
    # A refusal before all was read may also end the connection.
    check(set(load.ledger.statuses) <= {413, LOST}, f"a bomb was answered {dict(load.ledger.statuses)}")
    stage.recovered()
    return f"{size / 1e6:.0f} MB in {len(bomb) / 1e3:.0f} KB, {growth()}"


# --- what is sent ---------------------------------------------------------------------------------------------------


@fault()
def retry_storm(stage: Stage) -> str:
    """The same events from everywhere at once: each is new once; another body under the same id is a conflict."""
    target = stage.service.target
    singles = target.events(stage.pick(100, 2000))
    bodies = [request.data.partition(b"\r\n\r\n")[2] for request in singles]
    ids = [request.ids for request in singles]
    storm = singles * 10
    for _ in range(len(singles) // 5):
        some = random.sample(range(len(singles)), 20)
        array = b"[" + b",".join(bodies[index] for index in some) + b"]"
        storm.append(target.request(array, b"".join(ids[index] for index in some)))
    random.shuffle(storm)
    load = stage.load(storm, connections=64)
    check(
        sorted(ids)
        == sorted(bytes(load.ledger.created[i : i + 16]) for i in range(0, len(load.ledger.created), 16)),
        "an event was not answered as new exactly once",
    )
    other = [
        target.request(body.replace(b'"answer"', b'"another"'), one)
        for body, one in zip(bodies, ids, strict=True)
    ]
    answered = stage.load(other).ledger.statuses
    check(dict(answered) == {409: len(other)}, f"contradictions were answered {dict(answered)}")
    return f"{len(storm)} requests with {len(ids)} events, each new once"


HOSTILE: dict[str, tuple[bytes, bool]] = {
    # field and value put into an event; whether it must be refused
    "NUL escaped": (rb'"explanation": "a\u0000b"', True),
    "NUL in metadata": (rb'"metadata": {"a": ["\u0000"]}', True),
    "NUL in a key": (rb'"metadata": {"a\u0000": 1}', True),
    "NUL byte": (b'"explanation": "a\0b"', True),
    "lone surrogate": (rb'"explanation": "a\ud800b"', True),
    "lone surrogate in metadata": (rb'"metadata": {"a": "\udfff"}', True),
    "surrogate in UTF-8": (b'"explanation": "a\xed\xa0\x80b"', True),
    "invalid UTF-8": (b'"explanation": "a\xffb"', True),
    "NaN": (b'"score": NaN', True),
    "Infinity": (b'"metadata": {"a": -Infinity}', True),
    "a number no float holds": (b'"score": 1e999', True),
    "an integer of 400 digits": (b'"metadata": {"a": ' + b"9" * 400 + b"}", False),
    "an integer past 64 bits": (b'"metadata": {"a": 18446744073709551616}', False),
    "a float in its last digits": (b'"metadata": {"a": 1.7976931348623157e308}', False),
    "a denormal": (b'"score": 5e-324', False),
    "a revision past 32 bits": (b'"revision": 2147483648', True),
    "a negative revision": (b'"revision": -1', True),
    "deep nesting": (b'"metadata": {"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", True),
    "a megabyte of text": (b'"explanation": "' + b"x" * 1_000_001 + b'"', True),
    "the last plane of Unicode": ('"explanation": "\U0010ffff\u202e\ufeff"'.encode(), False),
}


@fault()
def hostile_values(stage: Stage) -> str:
    """NUL bytes, half characters, numbers that are none: refused alone, and what is taken is stored."""
    target = stage.service.target
    for name, (member, refused) in HOSTILE.items():
        one, good = uuid7(), target.events(1)[0]
        item = b'{"event_id": "%s", "kind": "comment", "interaction_id": "i", %s}' % (
            str(one).encode(),
            member,
        )
        if not member.startswith(b'"explanation"'):
            item = item[:-1] + b', "explanation": "hostile"}'
        single = stage.load([target.request(item, one.bytes)], connections=1).ledger
        taken = not refused
        check(
            (set(single.statuses) == {201}) if taken else set(single.statuses) <= {400, 422},
            f"{name}: answered {dict(single.statuses)}",
        )
        check(stage.stored(one.bytes) == taken, f"{name}: {'not ' if taken else ''}stored")
        # Bytes that are no UTF-8 make no JSON, so nothing can be cut out of such an array.
        if refused and member.isascii() and name != "deep nesting":
            body = b"[" + item + b"," + good.data.partition(b"\r\n\r\n")[2] + b"]"
            beside = stage.load([target.request(body, one.bytes + good.ids)], connections=1).ledger
            if set(beside.statuses) != {400}:
                check(bytes(beside.created) == good.ids, f"{name}: its neighbour was not taken")
    return f"{len(HOSTILE)} values"


@fault()
def clock_off(stage: Stage) -> str:
    """Clocks a day ahead or behind, at the ends of the day, in every offset: taken, and never counted in the future."""
    template, now, ids = event_body(random.Random(0)), time.time(), []
    requests = []
    for hours in (-24, -1, 1, 24):
        for offset in ("Z", "+14:00", "-12:00", "+05:45"):
            one = uuid7(int((now + hours * 3600) * 1000))
            moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now + hours * 3600)) + offset
            body = template.replace(b"%EVENT%", str(one).encode())
            body = body.replace(b"2026-01-31T12:00:00Z", moment.encode())
            requests.append(stage.service.target.request(body, one.bytes))
            ids.append(one)
    answered = stage.load(requests).ledger.statuses
    check(dict(answered) == {201: len(requests)}, f"answered {dict(answered)}")
    with stage.connect() as conn:
        row = conn.execute(
            "SELECT count(*), count(*) FILTER (WHERE least(occurred_at, received_at) > now())"
            " FROM feedback.feedback_event WHERE event_id = ANY(%s)",
            [ids],
        ).fetchone()
    check(row == (len(ids), 0), f"(stored, in the future) is {row}")
    return f"{len(ids)} clocks"


# --- reviewers ------------------------------------------------------------------------------------------------------


@fault()
def reviewers_race(stage: Stage) -> str:
    """Two reviewers claim the same item at the same moment, again and again: it never has two owners, nor none."""
    target = stage.service.target
    body = b'{"interaction_id": "raced", "messages": [{"role": "user", "content": "q"}], "output": "a"}'
    stage.load([target.request(body, path="/v1/interactions")], connections=1)
    rounds = stage.pick(200, 10_000)
    asyncio.run(_race(stage.service.database_url, rounds))
    return f"{rounds} races"


async def _race(database_url: str, rounds: int) -> None:
    async with AsyncExitStack() as stack:
        admin = await log.connect(database_url, ADMIN_ROLE, 1)
        stack.push_async_callback(log.close, admin)
        pool = await log.connect(database_url, REVIEW_ROLE, 2)
        stack.push_async_callback(log.close, pool)
        queue = await create_queue(
            admin,
            actor="chaos",
            name="race",
            app="shop",
            rubric=[Question(name="good", kind="choice", title="Good?", options=("yes", "no"))],
            control_rate=1.0,
        )
        await fill(pool, queue.queue_id)
        reviewers = [Reviewer(str(uuid7()), "shop", name) for name in ("ada", "bob")]
        fence = 0
        for _ in range(rounds):
            random.shuffle(reviewers)
            claims = await asyncio.gather(*(claim(pool, queue.queue_id, who) for who in reviewers))
            won = [(who, got.lease) for who, got in zip(reviewers, claims, strict=True) if got is not None]
            check(len(won) == 1, f"the item has {len(won)} owners")
            who, lease = won[0]
            check(lease.fence > fence, f"fence {lease.fence} came after {fence}")
            fence = lease.fence
            await release(pool, who, lease)


# --- running them ---------------------------------------------------------------------------------------------------


@contextmanager
def stage(folder: Path, scale: Scale, *, durable: bool = True) -> Iterator[Stage]:
    """Processes of their own below ``folder``, gone afterwards."""
    postgres = Postgres(folder / "home", durable=durable)
    try:
        postgres.start()
        with Service(postgres.new_database(), folder, workers=WORKERS) as service:
            yield Stage(folder, postgres, service, scale)
    finally:
        postgres.destroy()


@contextmanager
def small_disk() -> Iterator[Path]:
    """A folder on a disk of its own that is soon full. Raises Skipped."""
    with scratch() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_MB}m,mode=0711", "tmpfs", str(folder)]
        if os.geteuid() != 0 or not sys.platform.startswith("linux"):
            raise Skipped("a small disk needs root on Linux")
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
        if mounted.returncode != 0:
            raise Skipped(f"no small disk can be mounted: {mounted.stderr.strip()}")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder through which the server's account may pass."""
    folder = Path(tempfile.mkdtemp(prefix="datamoat-chaos-", dir="/var/tmp"))
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def suffer(chosen: Fault, stage: Stage) -> Verdict:
    """Let ``chosen`` happen under load, and judge."""
    verdict = Verdict(chosen.name, passed=False)
    if stage.service.process.poll() is not None:
        stage.service.start()
    began = time.monotonic()
    target = stage.service.target
    running = Load(target, target.endless(), connections=CONNECTIONS, retry=0.1, pause=0.01)
    stage.loads = [running]
    problems = []
    try:
        with Background(running):
            verdict.note = chosen.work(stage) or ""
    except Skipped as reason:
        return replace(verdict, passed=True, skipped=True, note=str(reason))
    except (
        Exception
    ) as error:  # whatever happened, the ledger is compared and the other faults have their turn
        problems.append(str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}")
    total = Ledger()
    for load in stage.loads:
        total.created += load.ledger.created
        total.duplicate += load.ledger.duplicate
        total.statuses += load.ledger.statuses
        if load.unanswered:
            problems.append(f"{load.unanswered} requests were never answered")
    with stage.connect() as conn:
        verdict.lost, verdict.duplicates = total.check(conn)
    verdict.acknowledged, verdict.statuses = total.acknowledged, dict(total.statuses)
    verdict.outage = round(running.gap, 2)
    verdict.seconds = round(time.monotonic() - began, 1)
    if verdict.lost or verdict.duplicates:
        problems.append(f"{verdict.lost} lost, {verdict.duplicates} duplicates")
    if strange := {code for code in total.statuses if code >= 500 and code != 503}:
        problems.append(f"answers {sorted(strange)}")
    if strange := set(running.ledger.statuses) - chosen.expected:
        problems.append(f"the load was answered {sorted(strange)}")
    verdict.passed = not problems
    verdict.note = "; ".join(problems) or verdict.note
    return verdict


def show(verdict: Verdict) -> None:
    word = "skipped" if verdict.skipped else "passed" if verdict.passed else "FAILED"
    print(
        f"{verdict.fault:30} {word:8} {verdict.seconds:6.1f} s {verdict.outage:8.2f} s {verdict.acknowledged:9,} "
        f"{verdict.lost:6} {verdict.duplicates:6}  {verdict.note}",
        file=sys.stderr,
        flush=True,
    )


def main() -> int:
    """Let everything happen, print, and say whether all of it passed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", action="append", choices=FAULTS, metavar="NAME", help=", ".join(FAULTS))
    parser.add_argument("--scale", choices=("small", "full"), default="small")
    options = parser.parse_args()
    chosen = [FAULTS[name] for name in options.only or FAULTS]
    print(
        f"{'fault':30} {'verdict':8} {'time':>8} {'outage':>10} {'acked':>9} {'lost':>6} {'twice':>6}",
        file=sys.stderr,
        flush=True,
    )
    verdicts = []
    for disk, small in ((scratch, False), (small_disk, True)):
        faults = [one for one in chosen if one.small_disk is small]
        if not faults:
            continue
        try:
            with disk() as folder, stage(folder, options.scale) as where:
                for one in faults:
                    verdicts.append(suffer(one, where))
                    show(verdicts[-1])
        except Skipped as reason:
            verdicts += [Verdict(one.name, passed=True, skipped=True, note=str(reason)) for one in faults]
            show(verdicts[-1])
    passed = all(verdict.passed for verdict in verdicts)
    print(json.dumps({"passed": passed, "faults": [asdict(verdict) for verdict in verdicts]}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

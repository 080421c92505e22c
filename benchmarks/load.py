"""Load for the feedback service, cheap enough to share the machine with it, and a ledger of what was acknowledged.

Belongs here: events to send, keep-alive connections that send them in a closed loop or at a rate, and the comparison
of the ledger with the table. Does not belong here: what is measured (`benchmarks.feedback`) or broken
(`benchmarks.chaos`), the processes under load (`benchmarks.processes`).

Requests are bytes made beforehand and of an answer only the status is read (of a batch's, the item states too), so
one event costs about 20 microseconds of processor time. At a rate, arrivals are random and independent as `pgbench
--rate` makes them, and the wait of a request counts from the moment it was due, not from when a connection was free
for it: a stall of the service shows in every request that should have been sent meanwhile.
"""

import asyncio
import json
import random
import threading
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, cast
from uuid import UUID

import msgspec
import psycopg
import uvloop

from feedback.ids import uuid7

RETRIED = (429, 503)
LOST = 0  # the status of a request whose connection ended before its answer

_WORDS = [
    "the",
    "answer",
    "names",
    "a",
    "refund",
    "within",
    "thirty",
    "days",
    "but",
    "our",
    "policy",
    "for",
    "opened",
    "items",
    "says",
    "fourteen",
    "and",
    "asks",
    "for",
    "the",
    "receipt",
    "so",
    "please",
    "point",
    "customers",
    "to",
    "section",
    "four",
    "of",
    "the",
    "returns",
    "page",
    "and",
    "do",
    "not",
    "promise",
    "a",
    "courier",
]


class Request(msgspec.Struct, frozen=True, gc=False):
    """A whole HTTP request, and the event ids it carries, 16 bytes each."""

    data: bytes
    ids: bytes = b""


@dataclass(frozen=True)
class Target:
    """Where to send, and with which API key."""

    port: int
    key: str
    host: str = "127.0.0.1"

    def request(
        self,
        body: bytes,
        ids: bytes = b"",
        *,
        path: str = "/v1/feedback",
        head: str = "",
        method: str = "POST",
    ) -> Request:
        """``head``: more header lines, each ended by CRLF."""
        lines = (
            f"{method} {path} HTTP/1.1\r\nHost: {self.host}\r\nAuthorization: Bearer {self.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n{head}\r\n"
        )
        return Request(lines.encode() + body, ids)

    def events(self, count: int, size: int = 1) -> list[Request]:
        """``count`` requests with ``size`` new events each; an array unless ``size`` is 1."""
        return list(self.endless(size, count))

    def endless(self, size: int = 1, count: int | None = None) -> Iterator[Request]:
        """Requests with ``size`` new events each, without end unless ``count`` is given."""
        template = event_body(random.Random(0))
        before, after = template.split(b"%EVENT%")
        made = 0
        while count is None or made < count:
            made += 1
            minted = [uuid7() for _ in range(size)]
            bodies = [before + str(one).encode() + after for one in minted]
            body = bodies[0] if size == 1 else b"[" + b",".join(bodies) + b"]"
            yield self.request(body, b"".join(one.bytes for one in minted))


def event_body(source: random.Random) -> bytes:
    """A correction of about 1 KB as JSON, with ``%EVENT%`` in the place of its id."""
    explanation, correction = (" ".join(source.choices(_WORDS, k=count)) for count in (35, 90))
    return json.dumps(
        {
            "event_id": "%EVENT%",
            "kind": "correction",
            "name": "answer",
            "explanation": explanation,
            "correction": correction,
            "reasons": ["outdated source", "incomplete"],
            "author_id": "user-4711",
            "author_role": "end_user",
            "interaction_id": "answer-0192c7a4",
            "session_id": "session-0192c7",
            "occurred_at": "2026-01-31T12:00:00Z",
            "metadata": {"page": "/returns", "locale": "en"},
        }
    ).encode()


class _Item(msgspec.Struct):
    status: str


class _Batch(msgspec.Struct):
    results: list[_Item]


_batches = msgspec.json.Decoder(_Batch)


@dataclass
class Ledger:
    """What the service acknowledged: ids of 16 bytes one after another, and how often each status came."""

    created: bytearray = field(default_factory=bytearray)
    duplicate: bytearray = field(default_factory=bytearray)
    statuses: Counter[int] = field(default_factory=Counter)

    def note(self, request: Request, status: int, body: bytes) -> None:
        self.statuses[status] += 1
        if status == 201:
            self.created += request.ids
        elif status in (200, 207):
            if len(request.ids) == 16:
                self.duplicate += request.ids
                return
            for index, item in enumerate(_batches.decode(body).results):
                book = {"created": self.created, "duplicate": self.duplicate}.get(item.status)
                if book is not None:
                    book += request.ids[16 * index : 16 * index + 16]

    @property
    def acknowledged(self) -> int:
        """How many acknowledgements there were; an event sent twice may have two."""
        return (len(self.created) + len(self.duplicate)) // 16

    def check(self, conn: psycopg.Connection[Any], table: str = "feedback.feedback_event") -> tuple[int, int]:
        """(lost, duplicates) against ``table``.

        Lost: acknowledged and not stored. Duplicates: stored more than once, or acknowledged as created more
        than once.
        """
        conn.execute("CREATE TEMP TABLE acknowledged (event_id uuid, created boolean)")
        with conn.cursor().copy("COPY acknowledged FROM STDIN (FORMAT binary)") as copy:
            copy.set_types(["uuid", "bool"])
            for ids, created in ((self.created, True), (self.duplicate, False)):
                for start in range(0, len(ids), 16):
                    copy.write_row((UUID(bytes=bytes(ids[start : start + 16])), created))
        conn.execute("ANALYZE acknowledged")
        row = conn.execute(
            f"""
            WITH sent AS (SELECT event_id, count(*) FILTER (WHERE created) AS created FROM acknowledged GROUP BY 1),
            stored AS (SELECT event_id, count(*) AS rows FROM {table} GROUP BY 1)
            SELECT count(*) FILTER (WHERE rows IS NULL), count(*) FILTER (WHERE rows > 1 OR created > 1)
            FROM sent LEFT JOIN stored USING (event_id)
            """
        ).fetchone()
        conn.execute("DROP TABLE acknowledged")
        assert row is not None
        return row[0], row[1]


Note = Callable[[Request, int, bytes], None]


class _Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on its way."""

    def __init__(self, load: "Load") -> None:
        self.load = load
        self.transport: asyncio.Transport | None = None
        self.request: Request | None = None
        self.due = 0.0
        self.waiting = False  # for the answer to ``request``
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by type

    def send(self, request: Request, due: float) -> None:
        assert self.transport is not None
        self.request, self.due, self.waiting = request, due, True
        self.transport.write(request.data)

    def data_received(self, data: bytes) -> None:
        received = self._received + data if self._received else data
        end = received.find(b"\r\n\r\n")
        if end < 0:
            self._received = received
            return
        head = received[:end].lower()
        at = head.find(b"\r\ncontent-length:")
        length = int(head[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(received) < end + 4 + length:
            self._received = received
            return
        self._received = b""
        if b"\r\nconnection: close" in head and self.transport is not None:
            self.transport.close()
            self.transport = None
        if self.waiting:  # else the service refused a connection on which nothing was sent
            self.load.answered(self, int(head[9:12]), received[end + 4 : end + 4 + length])

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self._received = b""
        self.load.disconnected(self)


class Load:
    """Sends ``requests`` over ``connections``: each sends the next when answered, or all together ``rate`` a second.

    With ``retry``, what was refused for a while (429, 503) or lost with its connection is sent again after so many
    seconds, until it is answered, and its wait counts from the first time. ``pause``: seconds between an answer and
    the next request of its connection. ``note`` gets each answer, ``LOST`` included; else ``ledger`` does. ``gap`` is
    the longest time, in seconds, in which nobody was served.
    """

    def __init__(
        self,
        target: Target,
        requests: Iterable[Request],
        *,
        connections: int = 64,
        rate: float | None = None,
        retry: float | None = None,
        pause: float = 0.0,
        ledger: Ledger | None = None,
        note: Note | None = None,
    ) -> None:
        self.target = target
        self.connections = connections
        self.rate = rate
        self.retry = retry
        self.pause = pause
        self.ledger = ledger or Ledger()
        self.waits = array("d")
        self.answers = 0
        self.unanswered = 0
        self.elapsed = 0.0
        self.gap = 0.0
        self._note = note or self.ledger.note
        self._requests = iter(requests)
        self._backlog: deque[tuple[Request, float]] = deque()
        self._idle: dict[_Connection, None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._more = True
        self._loop: asyncio.AbstractEventLoop | None = None
        self._done = asyncio.Event()
        self._ending = False

    def run(self, seconds: float = float("inf"), *, drain: float = 60.0) -> "Load":
        """Send for ``seconds`` or until there is nothing more, then wait for the answers; blocks.

        Raises TimeoutError when there is no connection for ``drain`` seconds. What is not answered when nothing was
        for so long stays ``unanswered``.
        """
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._run(seconds, drain))
        return self

    def stop(self) -> None:
        """Send nothing new; from any thread."""
        self._more = False
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._finish)

    @property
    def per_second(self) -> float:
        """Answers a second."""
        return self.answers / self.elapsed

    def wait(self, share: float) -> float:
        """The wait that ``share`` of the requests did not exceed, in milliseconds."""
        return percentile(self.waits, share) * 1000

    async def _run(self, seconds: float, drain: float) -> None:
        loop = self._loop = asyncio.get_running_loop()
        clients = [_Connection(self) for _ in range(self.connections)]
        await asyncio.wait_for(asyncio.gather(*(self._connect(client) for client in clients)), drain)
        began = self._last = time.perf_counter()
        if self.rate is not None:
            self._idle = dict.fromkeys(clients)
            self._next, self._end = began, began + seconds
            self._arrive()
        else:
            for client in clients:
                self._free(client)
            if seconds != float("inf"):
                loop.call_later(seconds, self._finish)
        while not self._done.is_set():
            before = self.answers
            try:
                await asyncio.wait_for(self._done.wait(), drain)
            except TimeoutError:
                if not self._more and self.answers == before:
                    break
        self.elapsed = self._last - began
        self._ending = True
        for client in clients:
            if client.transport is not None:
                client.transport.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.sleep(0)

    async def _connect(self, client: _Connection) -> None:
        while True:
            try:
                await asyncio.get_running_loop().create_connection(
                    lambda: client, self.target.host, self.target.port
                )
                return
            except OSError:
                await asyncio.sleep(0.02)

    async def _reconnect(self, client: _Connection, pause: float) -> None:
        await asyncio.sleep(pause)
        await self._connect(client)
        self._free(client)

    def _arrive(self) -> None:
        assert self.rate is not None
        now = time.perf_counter()
        while self._more and self._next <= now:
            request = next(self._requests, None)
            if request is None or self._next >= self._end:
                self._finish()
                return
            self.unanswered += 1
            if self._idle:  # the longest idle one, so that all of them are used
                client = next(iter(self._idle))
                del self._idle[client]
                client.send(request, self._next)
            else:
                self._backlog.append((request, self._next))
            self._next += random.expovariate(self.rate)
        if self._more:
            # A finer clock would keep a core busy; what is sent late counts as waited.
            asyncio.get_running_loop().call_later(max(0.001, self._next - now), self._arrive)

    def _free(self, client: _Connection) -> None:
        """Give a connection that may send something to send."""
        # A connection that ended during its pause is free again when it is made anew, and then once more.
        if client.transport is None or client.waiting or client in self._idle:
            return
        if client.request is not None:
            client.send(client.request, client.due)
        elif self._backlog:
            client.send(*self._backlog.popleft())
        elif self.rate is None and self._more and (request := next(self._requests, None)) is not None:
            self.unanswered += 1
            client.send(request, time.perf_counter())
        else:
            self._idle[client] = None
            if self.rate is None:
                self._finish()

    def _finish(self) -> None:
        """Take nothing more from the requests."""
        self._more = False
        if not self.unanswered:
            self._done.set()

    def answered(self, client: _Connection, status: int, body: bytes) -> None:
        assert client.request is not None
        client.waiting = False
        self._note(client.request, status, body)
        again = self.retry is not None and (status in RETRIED or status == LOST)
        if not again:
            client.request = None
            now = time.perf_counter()
            self.gap = max(self.gap, now - self._last)
            self._last = now
            self.waits.append(self._last - client.due)
            self.answers += 1
            self.unanswered -= 1
            if not self._more and not self.unanswered:
                self._done.set()
        if client.transport is None:
            return
        pause = self.retry if again and self.retry else self.pause
        if pause:
            asyncio.get_running_loop().call_later(pause, self._free, client)
        else:
            self._free(client)

    def disconnected(self, client: _Connection) -> None:
        if self._ending:
            return
        self._idle.pop(client, None)
        if client.waiting:
            self.answered(client, LOST, b"")
        task = asyncio.get_running_loop().create_task(self._reconnect(client, self.retry or 0.02))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class Background:
    """A load that runs in a thread while something else happens; it ends, and is waited for, with the block.

    The block begins with the first answer, unless ``wait`` is false.
    """

    def __init__(self, load: Load, *, wait: bool = True, drain: float = 60.0) -> None:
        self.load = load
        self._wait = wait
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(drain,))

    def __enter__(self) -> Load:
        self._thread.start()
        while self._wait and not self.load.answers and self._thread.is_alive():
            time.sleep(0.005)
        if self._failure is not None:
            raise self._failure
        return self.load

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self.load.stop()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _work(self, drain: float) -> None:
        try:
            self.load.run(drain=drain)
        except BaseException as error:
            self._failure = error


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of ``values`` that ``share`` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, ceil(share * len(ordered)) - 1)]

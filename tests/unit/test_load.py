"""The load that benchmarks and faults are measured with: nothing is counted twice, no wait is hidden."""

import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from benchmarks.load import LOST, Background, Ledger, Load, Request, Target, percentile

CREATED, DUPLICATE, BUSY = (
    b"HTTP/1.1 %s\r\nContent-Length: 2\r\n\r\n{}" % word for word in (b"201 Created", b"200 OK", b"503 Busy")
)


@contextmanager
def server(answer: Callable[[int], bytes | None]) -> Iterator[Target]:
    """Answers the n-th request of all with ``answer(n)``; None ends the connection instead."""
    count = iter(range(1_000_000))

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while line := self.rfile.readline():
                length = 0
                while (line := self.rfile.readline()) != b"\r\n":
                    if line.startswith(b"Content-Length:"):
                        length = int(line.split()[1])
                self.rfile.read(length)
                data = answer(next(count))
                if data is None:
                    return
                # In two pieces, as the network may cut it.
                for piece in (data[:20], data[20:]):
                    self.wfile.write(piece)
                    self.wfile.flush()
                if b"Connection: close" in data:
                    return

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield Target(running.server_address[1], "key")
        running.shutdown()


def test_each_request_is_sent_once_and_its_answer_noted() -> None:
    with server(lambda n: DUPLICATE if n % 4 == 0 else CREATED) as target:
        load = Load(target, target.events(40), connections=4).run()
    assert (load.answers, load.unanswered, dict(load.ledger.statuses)) == (40, 0, {201: 30, 200: 10})
    assert load.ledger.acknowledged == 40


def test_what_was_refused_for_a_while_or_lost_is_sent_again() -> None:
    with server(lambda n: (BUSY, None, CREATED)[min(n, 2)]) as target:
        (request,) = target.events(1)
        load = Load(target, [request], connections=1, retry=0.001).run()
    assert (load.answers, dict(load.ledger.statuses)) == (1, {503: 1, LOST: 1, 201: 1})
    assert bytes(load.ledger.created) == request.ids


def test_a_connection_that_ends_during_its_pause_sends_nothing_twice() -> None:
    asked = []

    def closes(n: int) -> bytes:
        asked.append(n)
        return CREATED.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)

    with server(closes) as target:
        load = Load(target, target.events(10), connections=2, retry=0.001, pause=0.05).run()
    assert (load.answers, len(asked), dict(load.ledger.statuses)) == (10, 10, {201: 10})


def test_a_stall_shows_in_every_request_that_was_due_meanwhile() -> None:
    def stalls_once(n: int) -> bytes:
        time.sleep(0.5 if n == 0 else 0)
        return CREATED

    with server(stalls_once) as target:
        load = Load(target, target.endless(), connections=1, rate=200).run(0.5)
    assert load.answers > 20
    assert load.wait(1) >= 0.5 * 1000 * 0.9
    assert sum(wait > 0.1 for wait in load.waits) > 10


def test_a_load_in_the_background_ends_with_its_block() -> None:
    with server(lambda n: CREATED) as target:
        with Background(Load(target, target.endless(), connections=2)) as load:
            assert load.answers
        assert load.unanswered == 0
    with pytest.raises(TimeoutError), Background(Load(target, target.endless(), connections=1), drain=0.1):
        pass


def test_a_batch_is_noted_item_by_item() -> None:
    ids = [bytes([n]) * 16 for n in range(4)]
    ledger = Ledger()
    states = ("created", "duplicate", "invalid", "created")
    body = ", ".join(f'{{"id": null, "status": "{state}"}}' for state in states)
    ledger.note(Request(b"", b"".join(ids)), 207, f'{{"results": [{body}], "created": 2}}'.encode())
    assert (bytes(ledger.created), bytes(ledger.duplicate)) == (ids[0] + ids[3], ids[1])


def test_percentiles() -> None:
    assert [percentile(range(1, 101), share) for share in (0.5, 0.99, 1)] == [50, 99, 100]
    assert percentile([7.0], 0.5) == 7.0

"""From call to acknowledgement, with a service that is played: order, retries, refusals, limits, a fork, the end."""

import errno
import json
import logging
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import pytest

from feedback.answers import Error, ItemResult
from feedback.client import outbox as outbox_module
from feedback.client.delivery import Connection, RequestFailed, backoff, deliver
from feedback.client.outbox import FEEDBACK, INTERACTION, Outbox, SpoolFull
from feedback.client.spool import REFUSED, unpack

MEGABYTE = 1 << 20
SECONDS = 30.0


class Service:
    """Acknowledges what it gets; ``answers`` are given, or raised, first. While ``away`` nothing is acknowledged."""

    def __init__(self, *answers: Error | Exception) -> None:
        self.posted: list[tuple[str, list[bytes]]] = []
        self.answers = list(answers)
        self.away = False

    def post(self, path: str, bodies: Sequence[bytes]) -> list[ItemResult] | Error:
        if self.away:
            raise RequestFailed("away")
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        self.posted.append((path, list(bodies)))
        return [
            ItemResult("x", "conflict", error=Error("conflict", "stored with another body"))
            if b"bad" in body
            else ItemResult("x", "created")
            for body in bodies
        ]

    @property
    def feedback(self) -> list[bytes]:
        return [body for path, bodies in self.posted if path == "/v1/feedback" for body in bodies]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "backoff", lambda *_: 0.01)


def new_outbox(folder: Path, service: Service, max_bytes: int = MEGABYTE) -> Outbox:
    return Outbox(folder, service.post, max_bytes=max_bytes, fsync=False)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def body(n: int) -> bytes:
    return json.dumps({"n": n}).encode()


def test_everything_arrives_in_order_and_the_folder_is_empty(tmp_path: Path) -> None:
    service = Service()
    outbox = new_outbox(tmp_path, service)
    for n in range(1200):
        outbox.put(FEEDBACK, body(n))
    assert outbox.close(SECONDS)
    assert service.feedback == [body(n) for n in range(1200)]
    assert max(len(bodies) for _, bodies in service.posted) <= 500
    status = outbox.status()
    assert (status.recorded, status.written, status.acknowledged) == (1200, 1200, 1200)
    assert (status.waiting_bytes, status.problem) == (0, None)
    assert names(tmp_path) == []


def test_an_answer_goes_before_what_was_said_about_it(tmp_path: Path) -> None:
    service = Service()
    service.away = True
    outbox = new_outbox(tmp_path, service)
    for n in range(3):
        outbox.put(FEEDBACK, body(n))
        outbox.put(INTERACTION, body(n))
    assert outbox.flush(SECONDS)
    assert not outbox.close(0)
    heir = new_outbox(tmp_path, service := Service())
    assert heir.close(SECONDS)
    assert service.posted == [(path, [body(n) for n in range(3)]) for path in outbox_module.PATHS.values()]


def test_what_one_process_left_the_next_one_sends(tmp_path: Path) -> None:
    away = Service()
    away.away = True
    first = new_outbox(tmp_path, away)
    for n in range(10):
        first.put(FEEDBACK, body(n))
    assert not first.close(0.1)
    assert first.status().written == 10
    service = Service()
    assert new_outbox(tmp_path, service).close(SECONDS)
    assert service.feedback == [body(n) for n in range(10)]


def test_a_service_in_trouble_is_tried_again_after_the_time_it_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waits: list[float | None] = []

    class Hurry(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            return super().wait(0)

    troubles = [RequestFailed("no", 503, wait_seconds=7.0), RequestFailed("no", 404), RequestFailed("no")]
    service = Service(*troubles, Exception("a bug"))
    outbox = new_outbox(tmp_path, service)
    outbox._stopping = Hurry()
    with caplog.at_level(logging.INFO, "feedback.client.outbox"):
        outbox.put(FEEDBACK, body(1))
        assert outbox.close(SECONDS)
    assert 7.0 in waits
    assert service.feedback == [body(1)]
    assert caplog.text.count("is kept in") == 1
    assert caplog.text.count("flows again") == 1


def test_refused_items_are_kept_with_their_reason_and_hold_nothing_up(tmp_path: Path) -> None:
    service = Service()
    outbox = new_outbox(tmp_path, service)
    for item in (b'{"n":1}', b'{"n":"bad"}', b'{"n":2}'):
        outbox.put(FEEDBACK, item)
    assert outbox.close(SECONDS)
    assert (outbox.status().acknowledged, outbox.status().refused) == (2, 1)
    [line] = (tmp_path / REFUSED).read_text().splitlines()
    refused = json.loads(line)
    assert refused["item"] == {"n": "bad"}
    assert refused["path"] == "/v1/feedback"
    assert refused["error"] == {"code": "conflict", "message": "stored with another body"}


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_not_accepted_stops_the_sending_and_not_the_taking(
    tmp_path: Path, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = new_outbox(tmp_path, Service(RequestFailed("the key is unknown", status)))
    outbox.put(FEEDBACK, body(1))
    with outbox._changed:
        assert outbox._changed.wait_for(lambda: outbox._status.stopped, SECONDS)
    outbox.put(FEEDBACK, body(2))
    assert outbox.flush(SECONDS)
    found = outbox.status()
    assert found.stopped
    assert found.problem is not None and "the key is unknown" in found.problem
    assert found.acknowledged == 0
    assert not outbox.close(SECONDS)
    assert caplog.text.count("the key is unknown") == 1
    service = Service()
    assert new_outbox(tmp_path, service).close(SECONDS)
    assert service.feedback == [body(1), body(2)]


def test_a_full_spool_refuses_aloud_until_there_is_room(tmp_path: Path) -> None:
    service = Service()
    service.away = True
    outbox = new_outbox(tmp_path, service, max_bytes=1000)
    large = b'"' + b"x" * 400 + b'"'
    taken = 0
    with pytest.raises(SpoolFull, match=r"at most 1000 bytes.*away.*max_spool_bytes"):
        for _ in range(4):
            outbox.put(FEEDBACK, large)
            taken += 1
            assert outbox.flush(SECONDS)
    assert taken == 2
    assert outbox.status().full == 1
    service.away = False
    with outbox._changed:
        assert outbox._changed.wait_for(lambda: outbox._status.acknowledged == 2, SECONDS)
    outbox.put(FEEDBACK, large)
    assert outbox.close(SECONDS)
    assert service.feedback == [large] * 3


def test_what_an_earlier_process_left_counts_against_the_limit(tmp_path: Path) -> None:
    (tmp_path / REFUSED).write_bytes(b"x" * 1000)
    outbox = new_outbox(tmp_path, Service(), max_bytes=1000)
    with pytest.raises(SpoolFull, match=REFUSED):
        outbox.put(FEEDBACK, body(1))
    outbox.close(0)


def test_a_full_disk_is_reported_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service()
    outbox = new_outbox(tmp_path, service)
    monkeypatch.setattr(outbox_module, "MAX_UNWRITTEN_BYTES", 100)
    append = outbox._spool.append

    def full(_packed: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(outbox._spool, "append", full)
    outbox.put(FEEDBACK, body(1))
    assert not outbox.flush(0.1)
    with pytest.raises(SpoolFull, match=r"No space left.*make room"):
        for n in range(2, 100):
            outbox.put(FEEDBACK, body(n))
    recorded = outbox.status().recorded
    assert "No space left" in (outbox.status().problem or "")
    monkeypatch.setattr(outbox._spool, "append", append)
    assert outbox.close(SECONDS)
    assert service.feedback == [body(n) for n in range(1, recorded + 1)]
    assert outbox.status().problem is None
    assert "never written" not in caplog.text


def test_what_could_not_be_written_by_the_end_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = new_outbox(tmp_path, Service())

    def full(_packed: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(outbox._spool, "append", full)
    outbox.put(FEEDBACK, body(1))
    assert not outbox.close(0.1)
    assert "1 feedback items were never written" in caplog.text
    with pytest.raises(RuntimeError, match="closed"):
        outbox.put(FEEDBACK, body(2))


def test_too_large_batches_are_halved_and_single_items_refused() -> None:
    asked: list[list[bytes]] = []

    def post(_path: str, bodies: Sequence[bytes]) -> list[ItemResult] | Error:
        asked.append(list(bodies))
        if sum(map(len, bodies)) > 3:
            return Error("body_too_large", "too large")
        return [ItemResult(each.decode(), "created") for each in bodies]

    results = deliver(post, "/", [b"a", b"b", b"large", b"c"])
    assert [result.id for result in results] == ["a", "b", None, "c"]
    assert results[2].error == Error("body_too_large", "too large")
    assert len(asked) == 5


def answering(response: Callable[[httpx.Request], httpx.Response]) -> Connection:
    connection = Connection("http://service", "key", 1.0)
    connection._client = httpx.Client(base_url="http://service", transport=httpx.MockTransport(response))
    return connection


@pytest.mark.parametrize(
    ("status", "header", "temporary", "wait"),
    [(503, "7", True, 7.0), (429, "1000000", True, 300.0), (500, "x", True, 0.0), (404, None, False, 0.0)],
)
def test_answers_are_told_apart(status: int, header: str | None, temporary: bool, wait: float) -> None:
    headers = {"Retry-After": header} if header else {}
    connection = answering(lambda _: httpx.Response(status, headers=headers, text="why"))
    with pytest.raises(RequestFailed, match=f"{status}: why") as caught:
        connection.post("/v1/feedback", [b"{}"])
    assert (caught.value.status, caught.value.temporary, caught.value.wait_seconds) == (
        status,
        temporary,
        wait,
    )


def test_an_answer_of_something_else_is_no_acknowledgement() -> None:
    for content in (b"<html>", b"{}", b'{"results":[],"created":0,"duplicate":0,"conflict":0,"invalid":0}'):
        connection = answering(lambda _, content=content: httpx.Response(200, content=content))  # type: ignore[misc]
        with pytest.raises(RequestFailed, match="not the feedback service"):
            connection.post("/v1/feedback", [b"{}"])


def test_waits_grow_to_a_limit() -> None:
    assert all(0.125 <= backoff(0, 30.0) <= 0.25 for _ in range(100))
    assert all(15.0 <= backoff(10_000, 30.0) <= 30.0 for _ in range(100))


def run(script: str, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), *arguments], check=True, timeout=60
    )


def spooled(folder: Path) -> list[int]:
    found = []
    for path in sorted(folder.glob("*.spool")):
        records, _ = unpack(path.read_bytes().partition(b"\n")[2])
        found += [int(json.loads(record.body)["n"]) for record in records]
    return sorted(found)


STUCK = """
    import os, sys, threading
    from pathlib import Path
    from feedback.client.outbox import FEEDBACK, Outbox

    def post(path, bodies):
        threading.Event().wait()

    outbox = Outbox(Path(sys.argv[1]), post, max_bytes=10**6, fsync=False)
"""


def test_the_end_of_the_interpreter_writes_what_was_taken(tmp_path: Path) -> None:
    script = STUCK + (
        """
    import feedback.client.outbox
    feedback.client.outbox.EXIT_SECONDS = 0.5
    for n in range(100):
        outbox.put(FEEDBACK, b'{"n":%d}' % n)
    """
    )
    run(script, str(tmp_path))
    assert spooled(tmp_path) == list(range(100))


def test_after_a_fork_both_processes_go_on(tmp_path: Path) -> None:
    """What the parent had taken is written once, by the parent; the child's calls go to a segment of its own."""
    script = STUCK + (
        """
    for n in range(100):
        outbox.put(FEEDBACK, b'{"n":%d}' % n)
    child = os.fork()
    for n in range(100):
        outbox.put(FEEDBACK, b'{"n":%d}' % (n + (1000 if child == 0 else 100)))
    assert outbox.flush(30)
    assert outbox.status().written == (100 if child == 0 else 200)
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    os._exit(0)
    """
    )
    run(script, str(tmp_path))
    assert spooled(tmp_path) == [*range(200), *range(1000, 1100)]
    assert len(list(tmp_path.glob("*.spool"))) == 2


def test_a_child_does_not_keep_a_dead_parents_segment(tmp_path: Path) -> None:
    script = STUCK + (
        """
    outbox.put(FEEDBACK, b'{"n":1}')
    assert outbox.flush(30)
    if os.fork():
        os._exit(0)
    print(flush=True)
    sys.stdin.read()
    """
    )
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdin is not None
        parent.stdout.readline()
        parent.wait(60)  # the child lives on, reading
        service = Service()
        assert new_outbox(tmp_path, service).close(SECONDS)
        assert service.feedback == [b'{"n":1}']
        parent.stdin.close()

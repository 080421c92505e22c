"""The app on its own protocol, by the short way and through ASGI: nothing a client sees may differ.

Run as a program, this file is the service under test: ``feedback.server`` with an app that needs no database.
"""

import asyncio
import contextlib
import functools
import gzip
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from feedback import http, protocol, server
from feedback.front import Front
from feedback.http import WHOLE_BODY, Refused, answer, install_errors, read_body

PAGE = "https://app.example.com"
JSON = {"Content-Type": "application/json"}
PLAIN = "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n"
LARGE = 300_000
HEAD_SECONDS = 1.0
REFUSED: list[str] = []


@contextlib.asynccontextmanager
async def lifespan(_: object) -> AsyncIterator[None]:
    if os.environ.get("BROKEN") == "begin":
        raise OSError("no database")
    log = Path(os.environ["LIFE"])
    log.write_text("began\n")
    yield
    log.write_text("began\nended\n")


async def echo(request: Request) -> Response:
    short = WHOLE_BODY in request.scope
    try:
        body = await read_body(request, gzip=True)
    except Refused as error:
        REFUSED.append(error.error.code)
        raise
    if body == b'"fault"':
        raise RuntimeError("a fault of ours")
    return answer(201, {"bytes": len(body), "short": short})


async def page(request: Request) -> Response:
    assert request.client is not None
    return PlainTextResponse(f"{request.client.host} {request.query_params['q']}")


async def stream(_: Request) -> Response:
    async def parts() -> AsyncIterator[bytes]:
        for number in range(3):
            await asyncio.sleep(0)
            yield b"%d" % number

    return StreamingResponse(parts(), media_type="text/plain")


async def slow(_: Request) -> Response:
    await asyncio.sleep(2 * HEAD_SECONDS)
    return PlainTextResponse("done")


async def refused(_: Request) -> Response:
    return answer(200, REFUSED)


def create_app(*_: object, **__: object) -> Front:
    if os.environ.get("BROKEN") == "load":
        raise ImportError("no module")
    app = Front(allowed_origins=[PAGE], lifespan=lifespan)
    install_errors(app)
    app.direct = {"/v1/direct": echo}
    for path, endpoint, method in (
        ("/v1/direct", echo, "POST"),
        ("/v1/asgi", echo, "POST"),
        ("/page", page, "GET"),
        ("/v1/page", page, "GET"),
        ("/stream", stream, "GET"),
        ("/slow", slow, "GET"),
        ("/refused", refused, "GET"),
        ("/healthz", refused, "GET"),
    ):
        app.add_route(path, endpoint, methods=[method])
    return app


if __name__ in ("__main__", "__mp_main__"):  # the service, and its worker, which is a fresh interpreter
    server.create_app = create_app  # type: ignore[attr-defined]
    http.BODY_SECONDS = 0.5
    protocol.HEAD_SECONDS = HEAD_SECONDS
if __name__ == "__main__":
    server.serve("", pseudonym_key=b"", port=int(sys.argv[1]), on_ready=functools.partial(print, flush=True))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_service(port: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, port],
        env={"PATH": os.environ["PATH"], **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if "BROKEN" in environment else None,
        text=True,
    )


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    port, life = free_port(), tmp_path_factory.mktemp("protocol") / "life"
    process = run_service(str(port), LIFE=str(life))
    assert process.stdout is not None
    with process.stdout, httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        try:
            assert "ready" in process.stdout.readline()
            yield client
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    assert life.read_text() == "began\nended\n"


def chunks() -> Iterator[bytes]:
    for _ in range(LARGE // 1000):
        yield b" " * 1000


def send(service: httpx.Client, request: str, rest: str) -> socket.socket:
    """A connection on which a request was sent: its first line, of version 1.1 unless it says so, then ``rest``."""
    assert service.base_url.port is not None
    connection = socket.create_connection(("127.0.0.1", service.base_url.port), timeout=20)
    line = request if " HTTP/" in request else f"{request} HTTP/1.1"
    connection.sendall(f"{line}\r\nHost: x\r\n{rest}".encode())
    return connection


def connect(service: httpx.Client, path: str, rest: str) -> socket.socket:
    """A connection on which the head of a POST was sent, and whatever ``rest`` has of its body."""
    return send(service, f"POST {path}", f"Content-Type: application/json\r\n{rest}")


class Answered(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def answers(connection: socket.socket, count: int) -> list[Answered]:
    """The next answers on a connection."""
    found: list[Answered] = []
    with connection.makefile("rb") as stream:
        while len(found) < count:
            status = int(stream.readline().split()[1])
            headers = {}
            while line := stream.readline().strip().decode():
                name, _, value = line.partition(": ")
                headers[name.lower()] = value
            if status != 100:
                found.append(Answered(status, headers, stream.read(int(headers["content-length"]))))
    return found


# Small bodies, large ones and those of unknown length, each cut short.
CUT = [
    "Content-Length: 9\r\n\r\n{",
    f"Content-Length: {LARGE}\r\n\r\n{{",
    "Transfer-Encoding: chunked\r\n\r\n2\r\n[]\r\n",
]
PATHS = pytest.mark.parametrize("path", ["/v1/direct", "/v1/asgi"])


def test_only_small_posts_to_the_busiest_routes_take_the_short_way(service: httpx.Client) -> None:
    for request, short in (
        ("POST /v1/direct", True),
        ("POST /v1/direct?a=b", False),
        (f"POST /v1/direct HTTP/1.1\r\nOrigin: {PAGE}", False),
        ("POST /v1/direct HTTP/1.1\r\nExpect: 100-continue", False),
        ("POST /v1/asgi", False),
    ):
        with send(service, request, PLAIN + "{}") as connection:
            found = answers(connection, 1)[0]
        assert (found.status, json.loads(found.body)) == (201, {"bytes": 2, "short": short})
        assert found.headers["content-type"] == "application/json"
        assert found.headers["date"]
    # A body that comes behind its head: soon, later than the short way waits, and a large one.
    for size, seconds, short in ((2, 0.05, True), (2, 0.3, False), (8193, 0.05, False)):
        with connect(service, "/v1/direct", f"Content-Length: {size}\r\n\r\n") as connection:
            for part in (b" ", b" " * (size - 1)):
                time.sleep(seconds)
                connection.sendall(part)
            assert json.loads(answers(connection, 1)[0].body) == {"bytes": size, "short": short}
    assert service.put("/v1/direct", content=b"{}", headers=JSON).status_code == 405


def test_requests_sent_together_are_answered_in_their_order(service: httpx.Client) -> None:
    """Of both kinds, one cut in the middle, while the first of them is slow."""
    sizes = [2, 7, 3, 9, 4]
    whole = "".join(
        f"POST /v1/{'asgi' if size % 3 == 0 else 'direct'} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {size}\r\n\r\n{' ' * size}"
        for size in sizes
    ).encode()
    for cut in range(0, len(whole), 41):
        with socket.create_connection(("127.0.0.1", service.base_url.port or 0), timeout=20) as connection:
            connection.sendall(whole[:cut])
            time.sleep(0.002)
            connection.sendall(whole[cut:])
            assert [json.loads(one.body)["bytes"] for one in answers(connection, len(sizes))] == sizes


@PATHS
@pytest.mark.parametrize(
    "version, header, kept",
    [("1.1", "", True), ("1.1", "Connection: close\r\n", False), ("1.0", "", False)],
)
def test_a_connection_is_kept_unless_the_client_wants_otherwise(
    service: httpx.Client, path: str, version: str, header: str, kept: bool
) -> None:
    with send(service, f"POST {path} HTTP/{version}", header + PLAIN + "{}") as connection:
        found = answers(connection, 1)[0]
        assert (found.headers.get("connection") != "close") == kept
        connection.settimeout(0.2 if kept else 20)
        with pytest.raises(TimeoutError) if kept else contextlib.nullcontext():
            assert connection.recv(1) == b""


def test_what_is_no_request_is_400_and_ends_the_connection(service: httpx.Client) -> None:
    for rest in (
        "\x00\r\n\r\n",
        "Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        "Content-Length: -1\r\n\r\n",
        # Whose word is to be believed about where the next request begins?
        "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    ):
        with connect(service, "/v1/direct", rest) as connection:
            assert connection.recv(4096).split(b" ")[1] == b"400"
            assert connection.recv(1) == b""


def test_what_follows_a_request_is_not_its_answer(service: httpx.Client) -> None:
    for request in ("POST /v1/direct", "POST /v1/asgi"):
        with send(service, request, PLAIN + "{}\x00 no request\r\n\r\n") as connection:
            found = answers(connection, 1)[0]
            assert (found.status, found.headers["connection"]) == (201, "close")
            assert connection.recv(1) == b""


@PATHS
def test_what_is_odd_about_a_request_does_not_change_it(service: httpx.Client, path: str) -> None:
    for rest in (
        f"Content-Length: {'0' * 5000}2\r\n\r\n{{}}",
        "Transfer-Encoding: chunked\r\n\r\n2;a=b\r\n{}\r\n0\r\nContent-Type: text/plain\r\n\r\n",
        # As clients that would like to go on in HTTP/2 send it.
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\nContent-Length: 2\r\n\r\n{}",
    ):
        with connect(service, path, rest) as connection:
            connection.sendall(f"POST {path} HTTP/1.1\r\n{PLAIN}{{}}".encode())
            for found in answers(connection, 2):
                assert (found.status, json.loads(found.body)["bytes"]) == (201, 2)


@pytest.mark.parametrize("rest", ["", "Transfer-Encoding: chunked\r\n\r\n0\r\n"])
def test_a_head_without_an_end_is_400(service: httpx.Client, rest: str) -> None:
    with connect(service, "/v1/direct", rest) as connection:
        for part in (b"X: y\r\n" * 12_000, b"X"):
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                connection.sendall(part)
        assert connection.recv(4096).split(b" ")[1] == b"400"


def test_a_connection_has_only_so_many_requests_wait(service: httpx.Client) -> None:
    """What is read of one is bounded; who sends more before the answers is read later, or told to come again."""
    with send(service, "GET /refused", f"X: {'y' * 1000}\r\n\r\n") as connection:
        connection.sendall(f"GET /refused HTTP/1.1\r\nX: {'y' * 1000}\r\n\r\n".encode() * 2999)
        assert len(answers(connection, 3000)) == 3000
    with send(service, "GET /slow", "\r\n" + "GET /refused HTTP/1.1\r\n\r\n" * 5000) as connection:
        assert len(answers(connection, 513)) == 513
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""


def test_a_client_that_reads_no_answers_is_not_read_either(service: httpx.Client) -> None:
    request = (
        f"POST /v1/direct HTTP/1.1\r\nContent-Type: {'x' * 10_000}\r\nContent-Length: 2\r\n\r\n{{}}".encode()
    )
    with connect(service, "/v1/direct", PLAIN + "{}") as connection, pytest.raises(ConnectionError):
        for _ in range(5000):
            connection.sendall(request)


def test_a_worker_may_hold_as_many_files_as_connections() -> None:
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        server._allow_files()
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert allowed[1] == hard
    assert hard in (resource.RLIM_INFINITY, allowed[0]) or allowed[0] > server.MAX_CONNECTIONS


def test_a_connection_that_says_nothing_is_ended(service: httpx.Client) -> None:
    """Also one that sends its head byte by byte, but not one whose request is being worked on."""
    with (
        send(service, "GET /slow", "\r\n") as working,
        connect(service, "/v1/direct", "") as silent,
        connect(service, "/v1/direct", "") as slow,
    ):
        with pytest.raises(OSError):
            while True:
                slow.sendall(b"X: y\r\n")
                slow.settimeout(0.1)
                with contextlib.suppress(TimeoutError):
                    assert slow.recv(1) == b""
        assert silent.recv(1) == b""
        assert answers(working, 1)[0].body == b"done"


@pytest.mark.parametrize("when, why", [("load", "no module"), ("begin", "no database")])
def test_an_app_that_cannot_start_ends_the_service(when: str, why: str) -> None:
    found = run_service("0", BROKEN=when)
    output, errors = found.communicate(timeout=60)
    assert found.returncode != 0
    assert output == ""
    assert why in errors
    assert "NotStarted" in errors


@PATHS
def test_bodies_of_any_size_and_encoding_arrive_whole(service: httpx.Client, path: str) -> None:
    packed = JSON | {"Content-Encoding": "gzip"}
    for size in (0, 1, 16_384, 16_385, LARGE):
        for content, headers in ((b" " * size, JSON), (gzip.compress(os.urandom(size)), packed)):
            assert service.post(path, content=content, headers=headers).json()["bytes"] == size
    assert service.post(path, content=chunks(), headers=JSON).json()["bytes"] == LARGE
    found = service.post(path, content=b" " * (8 * 1_048_576 + 1), headers=JSON)
    assert (found.status_code, found.json()["error"]["code"]) == (413, "body_too_large")


@PATHS
@pytest.mark.parametrize("cut", CUT)
def test_a_body_that_does_not_come_is_408(service: httpx.Client, path: str, cut: str) -> None:
    with connect(service, path, cut) as connection:
        assert connection.recv(4096).split(b" ")[1] == b"408"


@PATHS
@pytest.mark.parametrize("cut", CUT)
def test_a_client_that_leaves_in_the_middle_of_a_body_is_not_taken_at_half_its_word(
    service: httpx.Client, path: str, cut: str
) -> None:
    before = len(service.get("/refused").json())
    with connect(service, path, cut):
        time.sleep(0.3)  # longer than the short way waits: it drops a small body in silence
    deadline = time.monotonic() + 20
    while len(found := service.get("/refused").json()) == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert found[before:] == ["incomplete_body"]


@PATHS
def test_a_fault_is_500_and_the_connection_goes_on(service: httpx.Client, path: str) -> None:
    assert service.post(path, content=b'"fault"', headers=JSON).status_code == 500
    assert service.post(path, content=b"{}", headers=JSON).status_code == 201


def test_a_page_of_an_allowed_origin_may_ask_and_reads_the_answer(service: httpx.Client) -> None:
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    for method, headers, status in (("OPTIONS", asked, 200), ("POST", JSON | {"Origin": PAGE}, 201)):
        found = service.request(method, "/v1/direct", headers=headers)
        assert (found.status_code, found.headers["Access-Control-Allow-Origin"]) == (status, PAGE)
    other = service.post("/v1/direct", headers=JSON | {"Origin": "https://evil.example"})
    assert "Access-Control-Allow-Origin" not in other.headers


def test_pages_are_served_whole_in_parts_and_by_their_head_alone(service: httpx.Client) -> None:
    found = service.get("/page", params={"q": "Zoë"})
    assert (found.status_code, found.text) == (200, "127.0.0.1 Zoë")
    head = service.head("/page", params={"q": "Zoë"})
    assert (head.status_code, head.content, head.headers["content-length"]) == (
        200,
        b"",
        str(len(found.content)),
    )
    assert service.get("/stream").text == "012"
    assert service.get("/nothing").status_code == 404

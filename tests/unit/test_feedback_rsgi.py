"""The app as Granian serves it through RSGI, by the short way and through the bridge: nothing a client sees may differ.

Run as a program, this file is the service under test: ``feedback.server`` with an app that needs no database.
"""

import asyncio
import contextlib
import functools
import gzip
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from feedback import http, server
from feedback.front import Front
from feedback.http import Refused, answer, install_errors, read_body
from feedback.rsgi import Rsgi

PAGE = "https://app.example.com"
JSON = {"Content-Type": "application/json"}
LARGE = 300_000
REFUSED: list[str] = []


@contextlib.asynccontextmanager
async def lifespan(_: object) -> AsyncIterator[None]:
    log = Path(os.environ["LIFE"])
    log.write_text("began\n")
    yield
    log.write_text("began\nended\n")


async def echo(request: Request) -> Response:
    bridged = "asgi" in request.scope
    try:
        body = await read_body(request, gzip=True)
    except Refused as error:
        REFUSED.append(error.error.code)
        raise
    if body == b'"fault"':
        raise RuntimeError("a fault of ours")
    return answer(201, {"bytes": len(body), "bridged": bridged})


async def page(request: Request) -> Response:
    assert request.client is not None
    return PlainTextResponse(f"{request.client.host} {request.query_params['q']}")


async def stream(_: Request) -> Response:
    async def parts() -> AsyncIterator[bytes]:
        for number in range(3):
            await asyncio.sleep(0)
            yield b"%d" % number

    return StreamingResponse(parts(), media_type="text/plain")


async def refused(_: Request) -> Response:
    return answer(200, REFUSED)


def create_app(*_: object, **__: object) -> Front:
    app = Front(allowed_origins=[PAGE], lifespan=lifespan)
    install_errors(app)
    app.direct = {"/v1/direct": echo}
    for path, endpoint, method in (
        ("/v1/direct", echo, "POST"),
        ("/v1/bridged", echo, "POST"),
        ("/page", page, "GET"),
        ("/v1/page", page, "GET"),
        ("/stream", stream, "GET"),
        ("/refused", refused, "GET"),
        ("/healthz", refused, "GET"),
    ):
        app.add_route(path, endpoint, methods=[method])
    return app


if __name__ in ("__main__", "__mp_main__"):  # the service, and its worker, which is a fresh interpreter
    server.create_app = create_app  # type: ignore[attr-defined]
    http.BODY_SECONDS = 0.5
if __name__ == "__main__":
    server.serve("", pseudonym_key=b"", port=int(sys.argv[1]), on_ready=functools.partial(print, flush=True))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    port, life = free_port(), tmp_path_factory.mktemp("rsgi") / "life"
    process = subprocess.Popen(
        [sys.executable, __file__, str(port)],
        env={"PATH": os.environ["PATH"], "LIFE": str(life)},
        stdout=subprocess.PIPE,
        text=True,
    )
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


def connect(service: httpx.Client, path: str, rest: str) -> socket.socket:
    """A connection on which the head of a POST was sent, and whatever ``rest`` has of its body."""
    assert service.base_url.port is not None
    connection = socket.create_connection(("127.0.0.1", service.base_url.port), timeout=20)
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{rest}".encode()
    )
    return connection


# Bodies that are read at once, those that are not, and those of unknown length, each cut short.
CUT = [
    "Content-Length: 9\r\n\r\n{",
    f"Content-Length: {LARGE}\r\n\r\n{{",
    "Transfer-Encoding: chunked\r\n\r\n2\r\n[]\r\n",
]
PATHS = pytest.mark.parametrize("path", ["/v1/direct", "/v1/bridged"])


def test_only_posts_to_the_busiest_routes_take_the_short_way(service: httpx.Client) -> None:
    for path, headers, bridged in (
        ("/v1/direct", {}, False),
        ("/v1/direct?a=b", {}, False),
        ("/v1/direct", {"Origin": PAGE}, True),
        ("/v1/bridged", {}, True),
    ):
        found = service.post(path, content=b"{}", headers=JSON | headers)
        assert (found.status_code, found.json()) == (201, {"bytes": 2, "bridged": bridged})
        assert found.headers["content-type"] == "application/json"
    assert service.put("/v1/direct", content=b"{}", headers=JSON).status_code == 405


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
def test_a_length_beside_a_transfer_encoding_is_not_believed(service: httpx.Client, path: str) -> None:
    """Else a body of any size would be read at once, into memory that nobody counts."""
    body = f"{9 * 1_048_576:x}\r\n"
    with connect(
        service, path, f"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{body}"
    ) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(b" " * 9 * 1_048_576)
        assert connection.recv(4096).split(b" ")[1] == b"413"


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
    connect(service, path, cut).close()
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


def test_a_cookie_that_cannot_be_read_is_told_on_pages_and_ignored_elsewhere(service: httpx.Client) -> None:
    """Granian leaves the header out: who is signed in would seem not to be, again and again."""
    cookie: dict[Any, Any] = {b"Cookie": "session=s; name=Zoë".encode()}
    found = service.get("/page?q=", headers=cookie)
    assert (found.status_code, found.json()["error"]["field"]) == (400, "Cookie")
    assert found.json()["error"]["remedy"]
    assert service.get("/v1/page?q=", headers=cookie).status_code == 200


def test_an_app_that_cannot_start_ends_its_worker() -> None:
    @contextlib.asynccontextmanager
    async def broken(_: object) -> AsyncIterator[None]:
        raise OSError("no database")
        yield

    with asyncio.Runner() as runner, pytest.raises(OSError, match="no database"):
        Rsgi(Front(lifespan=broken)).__rsgi_init__(runner.get_loop())

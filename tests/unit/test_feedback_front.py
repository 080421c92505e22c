"""What every request meets first: room in memory, slow and oversized bodies, pages of other origins."""

import asyncio
import gzip
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from feedback import http
from feedback.app import create_app
from feedback.front import Front
from feedback.http import answer, install_errors, read_body
from feedback.log import Overloaded, Unavailable

JSON = {"Content-Type": "application/json"}
PAGE = "https://app.example.com"


async def echo(request: Request) -> Response:
    body = await read_body(request, gzip=True)
    if body == b'"busy"':
        raise Overloaded("too many rows")
    if body == b'"away"':
        raise Unavailable("no database")
    return answer(201, {"bytes": len(body)})


@pytest.fixture(params=["direct", "routed"])
def front(request: pytest.FixtureRequest) -> Front:
    """An app with one route, reached by the short way and through FastAPI: both must behave alike."""
    app = Front(allowed_origins=[PAGE])
    install_errors(app)
    app.add_route("/v1/echo", echo, methods=["POST"])
    if request.param == "direct":
        app.direct = {"/v1/echo": echo}
    return app


def send(app: Front, method: str = "POST", path: str = "/v1/echo", **more: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.request(method, path, **more)

    return asyncio.run(run())


def post(app: Front, receive: Callable[[], Awaitable[Message]]) -> int:
    """The status of a POST whose body comes from ``receive``."""
    sent: list[Message] = []

    async def collect(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/echo",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    asyncio.run(app(scope, receive, collect))
    return int(sent[0]["status"])


def test_a_body_is_read_and_answered(front: Front) -> None:
    for content, headers in ((b"{}", JSON), (gzip.compress(b"{}"), JSON | {"Content-Encoding": "gzip"})):
        found = send(front, content=content, headers=headers)
        assert (found.status_code, found.json()) == (201, {"bytes": 2})
        assert found.headers["content-type"] == "application/json"


def test_gzip_that_ends_early_or_late_is_refused(front: Front) -> None:
    packed = gzip.compress(b"{}")
    headers = JSON | {"Content-Encoding": "gzip"}
    for content in (packed[:-1], packed + b"x", b"", b"{}"):
        assert send(front, content=content, headers=headers).status_code == 400
    # What comes behind the end unpacks to nothing, and counts all the same.
    assert send(front, content=packed + b"x" * 8 * 1024 * 1024, headers=headers).status_code == 413

    async def behind_its_end() -> AsyncIterator[bytes]:
        yield packed
        for _ in range(9):
            yield b"x" * 1_048_576
        raise AssertionError("all of it was read")

    assert send(front, content=behind_its_end(), headers=headers).status_code == 413


def test_a_failing_log_is_503_with_the_time_to_wait(front: Front) -> None:
    for content, code in ((b'"busy"', "overloaded"), (b'"away"', "unavailable")):
        found = send(front, content=content, headers=JSON)
        assert (found.status_code, found.json()["error"]["code"]) == (503, code)
        assert int(found.headers["Retry-After"]) > 0


def test_bodies_beyond_the_memory_for_them_are_503_and_room_comes_back(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "MAX_HELD_BYTES", 1000)
    bomb = gzip.compress(b" " * 100_000)
    for content, headers in ((b" " * 2000, JSON), (bomb, JSON | {"Content-Encoding": "gzip"})):
        for _ in range(3):
            found = send(front, content=content, headers=headers)
            assert (found.status_code, found.json()["error"]["code"]) == (503, "overloaded")
            assert int(found.headers["Retry-After"]) > 0
            assert send(front, content=b" " * 400, headers=JSON).status_code == 201


def test_no_route_reads_its_body_in_its_own_way() -> None:
    """FastAPI would read it before asking who sends it, and without a limit."""
    app = create_app("postgresql://nowhere/x", pseudonym_key=b"k" * 32)
    assert [route.path for route in app.routes if isinstance(route, APIRoute) and route.body_field] == []


@pytest.mark.parametrize("path", ["/v1/feedback", "/api/public/scores", "/widget/feedback.js"])
def test_pages_of_other_origins_may_use_what_they_need(path: str) -> None:
    app = create_app("postgresql://nowhere/x", pseudonym_key=b"k" * 32, allowed_origins=[PAGE])
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    found = send(app, "OPTIONS", path, headers=asked | {"Access-Control-Request-Headers": "authorization"})
    assert (found.status_code, found.headers["Access-Control-Allow-Origin"]) == (200, PAGE)
    assert "Access-Control-Allow-Origin" not in send(app, "GET", "/login", headers={"Origin": PAGE}).headers


def test_requests_beyond_the_limit_are_503_before_their_body_is_read(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "MAX_HELD_REQUESTS", 1)

    async def run() -> list[int]:
        arrived, go_on = asyncio.Event(), asyncio.Event()

        async def body() -> Any:
            arrived.set()
            await go_on.wait()
            yield b"{}"

        transport = httpx.ASGITransport(front)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            first = asyncio.create_task(client.post("/v1/echo", content=body(), headers=JSON))
            await arrived.wait()
            second = await client.post("/v1/echo", content=b"{}", headers=JSON)
            go_on.set()
            third = await first
            last = await client.post("/v1/echo", content=b"{}", headers=JSON)
        return [second.status_code, third.status_code, last.status_code]

    assert asyncio.run(run()) == [503, 201, 201]


def test_a_body_that_never_comes_is_408(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_SECONDS", 0.01)

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError("never")

    assert post(front, receive) == 408


def test_a_client_that_leaves_in_the_middle_of_a_body_is_400(front: Front) -> None:
    messages: Iterator[Message] = iter(
        [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    )

    async def receive() -> Message:
        return next(messages)

    assert post(front, receive) == 400


def test_a_page_of_an_allowed_origin_may_ask_and_reads_every_answer(front: Front) -> None:
    preflight = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    found = send(front, "OPTIONS", headers=preflight)
    assert (found.status_code, found.headers["Access-Control-Allow-Origin"]) == (200, PAGE)
    for content, status in ((b"{}", 201), (b'"away"', 503)):
        found = send(front, content=content, headers=JSON | {"Origin": PAGE})
        assert (found.status_code, found.headers["Access-Control-Allow-Origin"]) == (status, PAGE)
        assert "Retry-After" in found.headers["Access-Control-Expose-Headers"]
        assert "Origin" in found.headers["Vary"]


def test_a_page_of_another_origin_may_not(front: Front) -> None:
    other = "https://evil.example"
    preflight = {"Origin": other, "Access-Control-Request-Method": "POST"}
    assert "Access-Control-Allow-Origin" not in send(front, "OPTIONS", headers=preflight).headers
    found = send(front, content=b"{}", headers=JSON | {"Origin": other})
    assert "Access-Control-Allow-Origin" not in found.headers

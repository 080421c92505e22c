"""What every room of the service shares of HTTP: refusing, answering, and reading a body within limits.

Belongs here: error answers, content types and encodings, the size of bodies and the time they take.
Does not belong here: who is asking (``feedback.access``), what a body means, any route.
"""

import asyncio
import re
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from feedback.answers import Error, ErrorBody, error_of
from feedback.log import Overloaded, Unavailable
from feedback.payloads import PayloadError

MAX_BODY_BYTES = 8 * 1024 * 1024
BODY_SECONDS = 30.0
RETRY_AFTER_SECONDS = 2
# What one process holds of bodies and of requests that are not answered yet; what comes beyond is refused at once.
MAX_HELD_BYTES = 64 * 1024 * 1024
MAX_HELD_REQUESTS = 4096

JSON = "application/json"
_TYPE = re.compile(r'^\s*(?P<type>[^;\s]+)\s*(;\s*charset="?utf-8"?\s*)?$', re.IGNORECASE)


class Refused(Exception):
    """A request that is answered with one error."""

    def __init__(self, status: int, error: Error, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error.message)
        self.status = status
        self.error = error
        self.headers = headers


def forbidden(message: str, remedy: str) -> Refused:
    return Refused(403, Error("forbidden", message, remedy=remedy))


def not_found(message: str, remedy: str) -> Refused:
    return Refused(404, Error("not_found", message, remedy=remedy))


def unreadable(error: PayloadError) -> Refused:
    """What is answered when a whole body cannot be cut into items."""
    return Refused(413 if error.code == "too_many_items" else 400, error_of(error))


def too_large(most: int = MAX_BODY_BYTES) -> Refused:
    return Refused(
        413,
        Error(
            "body_too_large",
            f"The body is larger than {most} bytes",
            remedy="Send smaller batches",
        ),
        {"Connection": "close"},
    )


def busy() -> Refused:
    return Refused(
        503,
        Error(
            "overloaded",
            "More requests are waiting than there is room for; nothing of this one was taken",
            remedy="Wait for the seconds in Retry-After and send the same items again, with the same ids",
        ),
        {"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


class Room:
    """The memory of one process for requests on their way: refuses what does not fit."""

    def __init__(self) -> None:
        self.requests = 0
        self.bytes = 0

    def enter(self) -> "Held":
        """Room for one more request. Raises Refused with 503."""
        if self.requests >= MAX_HELD_REQUESTS:
            raise busy()
        self.requests += 1
        return Held(self)


class Held:
    """What one request holds of a room, until ``leave``. The request's scope carries it, under ``HELD``."""

    __slots__ = ("_bytes", "_room")

    def __init__(self, room: Room) -> None:
        self._room = room
        self._bytes = 0

    def take(self, size: int) -> None:
        """Hold ``size`` bytes more. Raises Refused with 503."""
        self._room.bytes += size
        self._bytes += size
        if self._room.bytes > MAX_HELD_BYTES:
            raise busy()

    def leave(self) -> None:
        self._room.requests -= 1
        self._room.bytes -= self._bytes


HELD = "datamoat.held"
# In a request's scope: its body, if all of it is there already.
WHOLE_BODY = "datamoat.whole_body"


class Answer(Response):
    """A JSON response, made with fewer steps than Starlette's: it is made for each request of the busiest routes."""

    def __init__(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.status_code = status
        self.body = body
        self.background = None
        self.raw_headers = [
            (b"content-length", str(len(body)).encode()),
            (b"content-type", b"application/json"),
        ]
        if headers:
            self.headers.update(headers)


def answer(status: int, content: Any, headers: Mapping[str, str] | None = None) -> Response:
    """``content``, a msgspec struct or plain data, as JSON."""
    return Answer(status, msgspec.json.encode(content), headers)


def header(request: Request, name: bytes) -> str:
    """A header's value, or an empty text; ``name`` in lower case."""
    for found, value in request.scope["headers"]:
        if found == name:
            return bytes(value).decode("latin-1")
    return ""


async def read_body(
    request: Request, types: Collection[str] = (JSON,), *, gzip: bool = False, most: int = MAX_BODY_BYTES
) -> bytes:
    """The whole body, at most ``most`` bytes, also when unpacked. Raises Refused with 400, 408, 413, 415 or 503.

    Ask who sends it first: who has no key is not to fill the memory there is.
    """
    headers = dict(request.scope["headers"])
    _check_type(headers, types)
    taken = _Taken(most, _packed(headers, gzip), request.scope.get(HELD))
    whole: bytes | None = request.scope.get(WHOLE_BODY)
    if whole is not None:
        taken.add(whole)
        return taken.body()
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared[-20:]) > most:  # a text of digits has no limit, int has
        raise too_large(most)
    more = True
    deadline = _Deadline(BODY_SECONDS)
    try:
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, Error("incomplete_body", "The client went away while sending"))
            more = message.get("more_body", False)
            taken.add(message.get("body", b""))
    except asyncio.CancelledError:
        if deadline.passed():
            raise _too_slow() from None
        raise
    finally:
        deadline.lift()
    return taken.body()


class _Taken:
    """What of a body has arrived, unpacked if it is ``packed``, within ``most`` bytes and the room that is ``held``."""

    def __init__(self, most: int, packed: bool, held: Held | None) -> None:
        self._most = most
        self._unpack = zlib.decompressobj(wbits=31) if packed else None
        self._held = held
        self._arrived = 0
        self._body = bytearray()

    def add(self, part: bytes) -> None:
        self._arrived += len(part)
        if self._unpack is not None:
            try:
                # One byte more than is allowed is all that a bomb gets unpacked.
                part = self._unpack.decompress(part, self._most + 1 - len(self._body))
            except zlib.error as error:
                raise Refused(400, Error("malformed_gzip", f"The body is not gzip: {error}")) from None
        if self._held is not None:
            self._held.take(len(part))
        self._body += part
        if max(self._arrived, len(self._body)) > self._most:
            raise too_large(self._most)

    def body(self) -> bytes:
        if self._unpack is not None and (not self._unpack.eof or self._unpack.unused_data):
            raise Refused(
                400,
                Error("malformed_gzip", "The gzip body is cut short, or there is something behind its end"),
            )
        return bytes(self._body)


class _Deadline:
    """Cancels the task that made it after ``seconds``: ``asyncio.timeout`` at a quarter of its cost, for each body."""

    def __init__(self, seconds: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._passed = False
        self._timer = asyncio.get_running_loop().call_later(seconds, self._cancel)

    def _cancel(self) -> None:
        self._passed = True
        self._task.cancel()

    def passed(self) -> bool:
        """Whether the cancellation just caught was this one; then the task goes on as if it had not been."""
        return self._passed and self._task.uncancel() == 0

    def lift(self) -> None:
        self._timer.cancel()


def _too_slow() -> Refused:
    return Refused(
        408,
        Error(
            "body_too_slow",
            f"The body did not arrive within {BODY_SECONDS:g} seconds",
            remedy="Send smaller batches",
        ),
        {"Connection": "close"},
    )


def check_type(request: Request, types: Collection[str]) -> str:
    """The content type without its parameters. Raises Refused with 415 unless it is one of ``types``."""
    return _check_type(dict(request.scope["headers"]), types)


def _check_type(headers: Mapping[bytes, bytes], types: Collection[str]) -> str:
    content_type = headers.get(b"content-type", b"").decode("latin-1")
    if content_type in types:
        return content_type
    match = _TYPE.match(content_type)
    if match is None or match["type"].lower() not in types:
        raise Refused(
            415,
            Error(
                "unsupported_media_type",
                f"Content-Type {content_type or '(none)'} is not accepted",
                remedy=f"Send Content-Type: {' or '.join(types)}, encoded as UTF-8",
            ),
        )
    return match["type"].lower()


def _packed(headers: Mapping[bytes, bytes], gzip: bool) -> bool:
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").lower()
    if encoding == "identity":
        return False
    if gzip and encoding == "gzip":
        return True
    raise Refused(
        415,
        Error(
            "unsupported_encoding",
            f"Content-Encoding {encoding} is not accepted",
            remedy="Send it uncompressed or as gzip" if gzip else "Send it uncompressed",
        ),
    )


def install_errors(app: Starlette) -> None:
    """Make ``app`` answer refusals, an absent database and unknown paths in the one shape of errors."""
    app.add_exception_handler(Refused, _answer_refusal)
    app.add_exception_handler(Unavailable, _answer_refusal)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_fault)


def refusal(error: Refused | Unavailable) -> Response:
    """The answer to a request that was refused, or that the database could not serve."""
    if isinstance(error, Overloaded):
        error = busy()
    if isinstance(error, Refused):
        return answer(error.status, ErrorBody(error.error), error.headers)
    content = ErrorBody(
        Error(
            "unavailable",
            "The database does not answer; nothing was acknowledged",
            remedy="Send the same items again, with the same ids; an operator finds the cause in the service's log",
        )
    )
    return answer(503, content, {"Retry-After": str(RETRY_AFTER_SECONDS)})


async def _answer_refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused | Unavailable)
    return refusal(error)


async def _answer_invalid(_: Request, error: Exception) -> Response:
    """What FastAPI's own routes refuse, in the shape of all others."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:])
    content = ErrorBody(
        Error("invalid", first["msg"], field=field or None, remedy="See /docs for the type and the limits")
    )
    return answer(422, content)


def fault() -> Response:
    """The answer to a fault of ours; what it was is in the service's log alone."""
    return answer(
        500, ErrorBody(Error("fault", "The service failed", remedy="An operator finds the cause in its log"))
    )


async def _answer_fault(_: Request, __: Exception) -> Response:
    return fault()


async def _answer_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    content = ErrorBody(Error("http_error", str(error.detail), remedy="See /docs for what there is"))
    return answer(error.status_code, content, error.headers)

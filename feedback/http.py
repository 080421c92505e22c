"""What every room of the service shares of HTTP: refusing, answering, and reading a body within limits.

Belongs here: error answers, content types and encodings, the size of bodies.
Does not belong here: who is asking (``feedback.access``), what a body means, any route.
"""

import re
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from feedback.answers import Error, ErrorBody
from feedback.log import Unavailable

MAX_BODY_BYTES = 8 * 1024 * 1024
RETRY_AFTER_SECONDS = 2

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


def too_large() -> Refused:
    return Refused(
        413,
        Error(
            "body_too_large",
            f"The body is larger than {MAX_BODY_BYTES} bytes",
            remedy="Send smaller batches",
        ),
        {"Connection": "close"},
    )


def answer(status: int, content: Any, headers: Mapping[str, str] | None = None) -> Response:
    """``content``, a msgspec struct or plain data, as JSON."""
    return Response(msgspec.json.encode(content), status, headers, JSON)


async def read_body(request: Request, types: Collection[str] = (JSON,), *, gzip: bool = False) -> bytes:
    """The whole body, at most 8 MiB, also when unpacked. Raises Refused with 400, 413 or 415."""
    check_type(request, types)
    packed = _packed(request, gzip)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_BODY_BYTES:
        raise too_large()
    body = bytearray()
    unpack = zlib.decompressobj(wbits=31) if packed else None
    try:
        async for chunk in request.stream():
            # One byte more than is allowed is all that a bomb gets unpacked.
            body += unpack.decompress(chunk, MAX_BODY_BYTES + 1 - len(body)) if unpack else chunk
            if len(body) > MAX_BODY_BYTES:
                raise too_large()
    except ClientDisconnect:
        raise Refused(400, Error("incomplete_body", "The client went away while sending")) from None
    except zlib.error as error:
        raise Refused(400, Error("malformed_gzip", f"The body is not gzip: {error}")) from None
    if unpack is not None and not unpack.eof:
        raise Refused(400, Error("malformed_gzip", "The gzip body is cut short"))
    return bytes(body)


def check_type(request: Request, types: Collection[str]) -> str:
    """The content type without its parameters. Raises Refused with 415 unless it is one of ``types``."""
    content_type = request.headers.get("content-type", "")
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


def _packed(request: Request, gzip: bool) -> bool:
    encoding = request.headers.get("content-encoding", "identity").lower()
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
    app.add_exception_handler(Refused, _answer_refused)
    app.add_exception_handler(Unavailable, _answer_unavailable)
    app.add_exception_handler(HTTPException, _answer_http_error)


async def _answer_refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return answer(error.status, ErrorBody(error.error), error.headers)


async def _answer_unavailable(_: Request, error: Exception) -> Response:
    content = ErrorBody(
        Error(
            "unavailable",
            "The database does not answer; nothing was acknowledged",
            remedy="Send the same items again, with the same ids; an operator finds the cause in the service's log",
        )
    )
    return answer(503, content, {"Retry-After": str(RETRY_AFTER_SECONDS)})


async def _answer_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    content = ErrorBody(Error("http_error", str(error.detail), remedy="See /docs for what there is"))
    return answer(error.status_code, content, error.headers)

"""The capture service as an ASGI app: who may write, what is answered, and the pages about it.

Belongs here: routes, authentication, limits, status codes, rows made from validated payloads.
Does not belong here: validation rules (``feedback.payloads``), SQL (``feedback.log``), the process that serves
the app (``feedback.server``).
"""

import hashlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response

from feedback import log, openapi
from feedback.answers import BatchResult, Error, ErrorBody, ItemResult
from feedback.ids import pseudonym, uuid7
from feedback.payloads import (
    FeedbackEvent,
    Interaction,
    PayloadError,
    body_sha256,
    item_id,
    parse_event,
    parse_interaction,
    split,
)

MAX_BODY_BYTES = 8 * 1024 * 1024
MAX_ITEMS = 1000
KEY_CACHE_SECONDS = 5.0
KEY_CACHE_SIZE = 1024
RETRY_AFTER_SECONDS = 2

_DOCS = Path(__file__).with_name("docs.html")
_DOCS_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
_JSON_TYPE = re.compile(r'^application/json\s*(;\s*charset="?utf-8"?\s*)?$', re.IGNORECASE)


class Refused(Exception):
    """A request that is answered with one error."""

    def __init__(self, status: int, error: Error, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error.message)
        self.status = status
        self.error = error
        self.headers = headers


@dataclass(frozen=True)
class Caller:
    """Whose key a request carries."""

    key_id: str
    app: str
    scopes: tuple[str, ...]


@dataclass
class Service:
    """What a running app holds: its pool, its secret, and the keys it saw within the last seconds."""

    database_url: str
    pseudonym_key: bytes
    role: str
    callers: dict[str, tuple[float, Caller]] = field(default_factory=dict)
    _pool: log.Pool | None = None

    @property
    def pool(self) -> log.Pool:
        assert self._pool is not None, "the app serves only inside its lifespan"
        return self._pool

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self._pool = await log.connect(self.database_url, self.role)
        try:
            yield
        finally:
            await log.close(self._pool)

    async def caller(self, request: Request) -> Caller:
        """Who sent this. Raises Refused with 401."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        if not key:
            raise _unauthorized("No API key was sent")
        key_hash = hashlib.sha256(key.encode()).hexdigest()
        known = self.callers.get(key_hash)
        if known is not None and known[0] > time.monotonic():
            return known[1]
        self.callers.pop(key_hash, None)
        rows = await log.fetch(
            self.pool,
            "SELECT key_id::text, app, scopes FROM feedback.api_key WHERE key_sha256 = $1 AND revoked_at IS NULL",
            key_hash,
        )
        if not rows:
            raise _unauthorized("The API key is unknown or revoked")
        caller = Caller(rows[0][0], rows[0][1], tuple(rows[0][2]))
        if len(self.callers) >= KEY_CACHE_SIZE:
            self.callers.clear()
        self.callers[key_hash] = (time.monotonic() + KEY_CACHE_SECONDS, caller)
        return caller


@dataclass(frozen=True)
class Accepted:
    """A valid item on its way into the log."""

    id: str
    row: Mapping[str, Any]
    feedback_id: str | None = None


Prepare = Callable[[bytes, Caller, bytes, datetime], Accepted]


def prepare_interaction(raw: bytes, caller: Caller, pseudonym_key: bytes, now: datetime) -> Accepted:
    """Validate an interaction and make its row. Raises PayloadError."""
    item: Interaction = parse_interaction(raw)
    if item.app not in (None, caller.app):
        raise PayloadError(
            f"The API key belongs to app {caller.app}",
            field="app",
            remedy="Leave app out, or send the key of that app",
            code="forbidden",
        )
    item.app = caller.app
    user_ref = pseudonym(pseudonym_key, caller.app, item.user_id) if item.user_id else None
    row = msgspec.structs.asdict(item)
    del row["user_id"]
    row |= {
        "user_ref": user_ref,
        "occurred_at": item.occurred_at or now,
        "api_key_id": caller.key_id,
        "body_sha256": body_sha256(item, user_ref),
    }
    return Accepted(item.interaction_id, row)


def prepare_event(raw: bytes, caller: Caller, pseudonym_key: bytes, now: datetime) -> Accepted:
    """Validate a feedback event and make its row. Raises PayloadError."""
    item: FeedbackEvent = parse_event(raw)
    author_ref = pseudonym(pseudonym_key, caller.app, item.author_id) if item.author_id else None
    event_id = item.event_id or uuid7()
    # A create without a feedback_id takes its event_id, so that a retry of it is answered with the same one.
    feedback_id = item.feedback_id or event_id
    row = msgspec.structs.asdict(item)
    del row["author_id"]
    row |= {
        "event_id": str(event_id),
        "feedback_id": str(feedback_id),
        "revision": item.revision if item.revision is not None else (1 if item.op == "create" else 2),
        "name": item.name or item.kind,
        "author_ref": author_ref,
        "occurred_at": item.occurred_at or now,
        "api_key_id": caller.key_id,
        "body_sha256": body_sha256(item, author_ref),
    }
    return Accepted(str(event_id), row, str(feedback_id))


def create_app(database_url: str, *, pseudonym_key: bytes, role: str = "datamoat_ingest") -> FastAPI:
    """The service over the database at ``database_url`` (libpq form), acting as ``role``.

    ``pseudonym_key`` turns people's ids into pseudonyms; with another key the same person looks like another one.
    """
    service = Service(database_url, pseudonym_key, role)
    app = FastAPI(
        title="Datamoat feedback",
        description=openapi.DESCRIPTION,
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=service.lifespan,
        # Exception texts can hold what people wrote; nothing is exported, whatever the environment asks for.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.add_exception_handler(Refused, _answer_refused)
    app.add_exception_handler(log.Unavailable, _answer_unavailable)
    app.add_exception_handler(HTTPException, _answer_http_error)
    for path, table, prepare in (
        ("/v1/interactions", log.INTERACTIONS, prepare_interaction),
        ("/v1/feedback", log.EVENTS, prepare_event),
    ):
        app.add_route(path, _ingest(service, table, prepare), methods=["POST"], include_in_schema=False)
    docs = _DOCS.read_text(encoding="utf-8")

    @app.get("/healthz", summary="Is the process alive?", tags=["health"])
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="Can it write? 503 while the database is away", tags=["health"])
    async def readyz() -> dict[str, str]:
        await log.fetch(service.pool, "SELECT FROM feedback.api_key LIMIT 1")
        return {"status": "ready"}

    @app.get("/docs", include_in_schema=False)
    async def docs_page() -> HTMLResponse:
        return HTMLResponse(docs, headers={"Content-Security-Policy": _DOCS_POLICY})

    openapi.install(app)
    return app


def _ingest(service: Service, table: log.Log, prepare: Prepare) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        caller = await service.caller(request)
        if "ingest" not in caller.scopes:
            raise Refused(
                403, Error("forbidden", "The API key may not write", remedy="Use a key with scope ingest")
            )
        body = await _read_body(request)
        try:
            parts, single = split(body)
        except PayloadError as error:
            raise Refused(400, _error(error)) from None
        if len(parts) > MAX_ITEMS:
            raise Refused(
                413,
                Error(
                    "too_many_items",
                    f"The array has {len(parts)} items, more than {MAX_ITEMS}",
                    remedy=f"Send at most {MAX_ITEMS} items per request",
                ),
            )
        now = datetime.now(UTC)
        items = [_prepared(part, table, prepare, caller, service.pseudonym_key, now) for part in parts]
        accepted = [item for item in items if isinstance(item, Accepted)]
        outcomes = iter(await log.append(service.pool, table, [item.row for item in accepted]))
        results = [_stored(item, next(outcomes)) if isinstance(item, Accepted) else item for item in items]
        return _answer_single(results[0]) if single else _answer_batch(results)

    return endpoint


def _prepared(
    raw: bytes, table: log.Log, prepare: Prepare, caller: Caller, pseudonym_key: bytes, now: datetime
) -> Accepted | ItemResult:
    try:
        return prepare(raw, caller, pseudonym_key, now)
    except PayloadError as error:
        return ItemResult(item_id(raw, table.key), "invalid", error=_error(error))


def _stored(item: Accepted, outcome: log.Outcome) -> ItemResult:
    error = None
    if outcome.status == "invalid":
        error = Error(
            "invalid",
            f"The database refused it: {outcome.reason}",
            remedy="Correct the item and send it again",
        )
    elif outcome.status == "conflict":
        error = Error(
            "conflict",
            f"{item.id} is stored with another body",
            remedy="The log is append-only: use a new id (feedback: a new event_id with op revise)",
        )
    return ItemResult(item.id, outcome.status, feedback_id=item.feedback_id, error=error)


async def _read_body(request: Request) -> bytes:
    """The whole body, at most 8 MiB. Raises Refused with 413 or 415."""
    content_type = request.headers.get("content-type", "")
    if not _JSON_TYPE.match(content_type):
        raise Refused(
            415,
            Error(
                "unsupported_media_type",
                f"Content-Type {content_type or '(none)'} is not accepted",
                remedy="Send Content-Type: application/json, encoded as UTF-8",
            ),
        )
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise Refused(
            415,
            Error(
                "unsupported_encoding",
                f"Content-Encoding {encoding} is not accepted",
                remedy="Send it uncompressed",
            ),
        )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_BODY_BYTES:
        raise _too_large()
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise _too_large()
    except ClientDisconnect:
        raise Refused(400, Error("incomplete_body", "The client went away while sending")) from None
    return bytes(body)


def _too_large() -> Refused:
    return Refused(
        413,
        Error(
            "body_too_large",
            f"The body is larger than {MAX_BODY_BYTES} bytes",
            remedy="Send smaller batches",
        ),
        {"Connection": "close"},
    )


def _unauthorized(message: str) -> Refused:
    return Refused(
        401,
        Error(
            "unauthorized",
            message,
            remedy="Send Authorization: Bearer KEY; `python -m feedback key create --app NAME` makes a key",
        ),
        {"WWW-Authenticate": "Bearer"},
    )


def _error(error: PayloadError) -> Error:
    return Error(error.code, error.message, field=error.field, remedy=error.remedy)


def _answer(status: int, content: msgspec.Struct, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def _answer_single(result: ItemResult) -> Response:
    if result.error is None:
        return _answer(201 if result.status == "created" else 200, result)
    status = {"conflict": 409, "forbidden": 403}.get(result.error.code, 422)
    return _answer(status, ErrorBody(result.error))


def _answer_batch(results: Sequence[ItemResult]) -> Response:
    counts = dict.fromkeys(("created", "duplicate", "conflict", "invalid"), 0)
    for result in results:
        counts[result.status] += 1
    refused = counts["conflict"] + counts["invalid"]
    return _answer(207 if refused else 200, BatchResult(list(results), **counts))


async def _answer_refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _answer(error.status, ErrorBody(error.error), error.headers)


async def _answer_unavailable(_: Request, error: Exception) -> Response:
    content = ErrorBody(
        Error(
            "unavailable",
            "The database does not answer; nothing was acknowledged",
            remedy="Send the same items again, with the same ids; an operator finds the cause in the service's log",
        )
    )
    return _answer(503, content, {"Retry-After": str(RETRY_AFTER_SECONDS)})


async def _answer_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    content = ErrorBody(Error("http_error", str(error.detail), remedy="See /docs for what there is"))
    return _answer(error.status_code, content, error.headers)

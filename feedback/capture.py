"""Taking items in: from validated payload to committed row, and the two JSON routes that do it.

Belongs here: rows made from payloads, what is answered for each item. Every way in ends here, whatever its format.
Does not belong here: validation rules (``feedback.payloads``), SQL (``feedback.log``), other formats.
"""

import functools
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec
import prometheus_client
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from feedback import log, metrics, openapi, tokens
from feedback.access import Caller, bearer
from feedback.answers import BatchResult, Error, ErrorBody, ItemResult, error_of
from feedback.http import answer, header, read_body, unreadable
from feedback.ids import pseudonym, uuid7
from feedback.payloads import (
    PayloadError,
    body_sha256,
    item_id,
    parse_event,
    parse_interaction,
    split,
)
from feedback.service import Service


class Accepted(NamedTuple):
    """A valid item on its way into the log."""

    id: str
    row: Mapping[str, Any]
    feedback_id: str | None = None


@dataclass(frozen=True)
class Kind:
    """One kind of item: the log it goes to, and how its JSON becomes a row."""

    log: log.Log
    prepare: Callable[[bytes, Caller, bytes, datetime], Accepted]


def prepare_interaction(raw: bytes, caller: Caller, pseudonym_key: bytes, now: datetime) -> Accepted:
    """Validate an interaction and make its row. Raises PayloadError."""
    item = parse_interaction(raw)
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


def prepare_event(
    raw: bytes,
    caller: Caller,
    pseudonym_key: bytes,
    now: datetime,
    claims: tokens.Claims | None = None,
) -> Accepted:
    """Validate a feedback event and make its row; ``claims`` are those of the token it came with, if it did.

    Raises PayloadError.
    """
    if claims is None:
        item = parse_event(raw)
        author_ref = pseudonym(pseudonym_key, caller.app, item.author_id) if item.author_id else None
    else:
        item = parse_event(raw, functools.partial(tokens.bind, claims))
        author_ref = claims.author_ref
    event_id = str(item.event_id or uuid7())
    # A create without a feedback_id takes its event_id, so that a retry of it is answered with the same one.
    feedback_id = str(item.feedback_id) if item.feedback_id else event_id
    row = msgspec.structs.asdict(item)
    del row["author_id"]
    row |= {
        "event_id": event_id,
        "app": caller.app,
        "feedback_id": feedback_id,
        "revision": item.revision if item.revision is not None else (1 if item.op == "create" else 2),
        "name": item.name or item.kind,
        "author_ref": author_ref,
        "occurred_at": item.occurred_at or now,
        "api_key_id": caller.key_id,
        "body_sha256": body_sha256(item, author_ref),
    }
    return Accepted(event_id, row, feedback_id)


INTERACTIONS = Kind(log.INTERACTIONS, prepare_interaction)
EVENTS = Kind(log.EVENTS, prepare_event)


OPENAPI = {
    "/v1/interactions": openapi.ingest(
        "Record interactions",
        "Interaction",
        {"one": openapi.INTERACTION, "several": [openapi.INTERACTION]},
    ),
    "/v1/feedback": openapi.ingest(
        "Record feedback",
        "FeedbackEvent",
        {
            "thumb": openapi.THUMB,
            "correction": openapi.CORRECTION,
            "several": [openapi.THUMB, openapi.CORRECTION],
        },
    ),
}


def routes(service: Service) -> list[Route]:
    """The JSON routes."""
    return [
        Route("/v1/interactions", _endpoint(service, INTERACTIONS), methods=["POST"]),
        Route("/v1/feedback", _endpoint(service, EVENTS), methods=["POST"]),
    ]


async def accept(service: Service, caller: Caller, kind: Kind, items: Sequence[bytes]) -> list[ItemResult]:
    """Validate items, each the JSON of one, and commit the valid ones; one result per item, in order.

    Raises Unavailable when nothing can be said about some item; everything may then be sent again.
    """
    now = datetime.now(UTC)
    prepared = [_prepared(item, kind, caller, service.pseudonym_key, now) for item in items]
    accepted = [item for item in prepared if isinstance(item, Accepted)]
    writer = service.writers[kind.log]
    outcomes = iter(await writer.append([item.row for item in accepted], sum(map(len, items))))
    results = [_stored(item, next(outcomes)) if isinstance(item, Accepted) else item for item in prepared]
    for status, count in Counter([result.status for result in results]).items():
        _items(kind.log.name, status).inc(count)
    return results


@functools.cache
def _items(log_name: str, status: str) -> prometheus_client.Counter:
    return metrics.ITEMS.labels(log_name, status)


_NOT_YOURS = Error(
    "forbidden",
    "The feedback_id belongs to another app",
    field="feedback_id",
    remedy="Revise or retract with a key of the app that sent it first",
)


def _endpoint(service: Service, kind: Kind) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        token = bearer(request)
        if kind is EVENTS and token.startswith(tokens.PREFIX):
            claims = await tokens.verify(service, token)
            caller = claims.caller
            sent = Kind(log.EVENTS, functools.partial(prepare_event, claims=claims))
        else:
            caller = await service.access.holder_in(token or header(request, b"x-api-key"), "ingest")
            sent = kind
        body = await read_body(request, gzip=True)
        try:
            parts, single = split(body)
        except PayloadError as error:
            raise unreadable(error) from None
        results = await accept(service, caller, sent, parts)
        return _answer_single(results[0]) if single else _answer_batch(results)

    return endpoint


def _prepared(
    raw: bytes, kind: Kind, caller: Caller, pseudonym_key: bytes, now: datetime
) -> Accepted | ItemResult:
    try:
        return kind.prepare(raw, caller, pseudonym_key, now)
    except PayloadError as error:
        return ItemResult(item_id(raw, kind.log.key), "invalid", error=error_of(error))


def _stored(item: Accepted, outcome: log.Outcome) -> ItemResult:
    if outcome.status == "unknown":
        raise log.Unavailable(f"{item.id}: {outcome.reason}")
    if outcome.status == "foreign":
        return ItemResult(item.id, "invalid", feedback_id=item.feedback_id, error=_NOT_YOURS)
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


def _answer_single(result: ItemResult) -> Response:
    if result.error is None:
        return answer(201 if result.status == "created" else 200, result)
    status = {"conflict": 409, "forbidden": 403}.get(result.error.code, 422)
    return answer(status, ErrorBody(result.error))


def _answer_batch(results: Sequence[ItemResult]) -> Response:
    counts = dict.fromkeys(("created", "duplicate", "conflict", "invalid"), 0)
    for result in results:
        counts[result.status] += 1
    refused = counts["conflict"] + counts["invalid"]
    return answer(207 if refused else 200, BatchResult(list(results), **counts))

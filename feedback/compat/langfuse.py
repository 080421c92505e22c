"""Langfuse's two ways to send scores: one at a time, and the batches of events that its SDKs send.

A score's ``id`` is that of one feedback item: another body under it is a new revision.

Belongs here: Langfuse's requests and answers. Does not belong here: what a score means (``feedback.formats.langfuse``).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from feedback.access import Caller
from feedback.answers import Error, error_of
from feedback.compat.shared import (
    REFUSALS,
    TEXT,
    Endpoint,
    authenticated,
    described,
    inline,
    json_object,
    sentence,
    too_many,
)
from feedback.compat.upsert import upsert
from feedback.formats import Item, given, langfuse
from feedback.http import JSON, Refused, answer, read_body
from feedback.ids import uuid7
from feedback.payloads import MAX_ITEMS, PayloadError
from feedback.service import Service


def routes(service: Service) -> list[Route]:
    return [
        Route("/api/public/scores", _score(service), methods=["POST"]),
        Route("/api/public/ingestion", _ingestion(service), methods=["POST"]),
    ]


def _score(service: Service) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        caller = await authenticated(service, request)
        body = await read_body(request, gzip=True)
        try:
            score, item = _scored(json_object(body), caller)
        except PayloadError as error:
            raise Refused(400, error_of(error)) from None
        (result,) = await upsert(service, caller, [item.body])
        if result.error is not None:
            raise Refused(403 if result.error.code == "forbidden" else 400, result.error)
        return answer(200, {"id": score})

    return endpoint


def _ingestion(service: Service) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        caller = await authenticated(service, request)
        body = await read_body(request, gzip=True)
        try:
            events = json_object(body).get("batch")
        except PayloadError as error:
            raise Refused(400, error_of(error)) from None
        if not isinstance(events, list):
            raise Refused(
                400, Error("invalid", "batch is not an array", field="batch", remedy="Send {batch: [...]}")
            )
        if len(events) > MAX_ITEMS:
            raise too_many(len(events))
        reasons: dict[int, Error] = {}
        bodies: dict[int, dict[str, Any]] = {}
        for place, event in enumerate(events):
            try:
                content = _ingested(event)
                if content is not None:
                    bodies[place] = _scored(content, caller)[1].body
            except PayloadError as error:
                reasons[place] = error_of(error)
        for place, result in zip(bodies, await upsert(service, caller, list(bodies.values())), strict=True):
            if result.error is not None:
                reasons[place] = result.error
        return answer(207, _ingestion_answer(events, reasons))

    return endpoint


def _ingested(event: Any) -> Mapping[str, Any] | None:
    """The score in one event of a batch; None for the SDK's own log. Raises PayloadError for other events."""
    kind = event.get("type") if isinstance(event, Mapping) else None
    if kind == "sdk-log":
        return None
    if kind != "score-create":
        raise PayloadError(
            f"Events of type {kind} are not taken",
            field="type",
            code="unsupported_type",
            remedy="Send scores here, and traces by OTLP to /v1/traces (Langfuse's SDKs from version 3 on do)",
        )
    body = event.get("body")
    if not isinstance(body, Mapping):
        raise PayloadError("body is not an object", field="body", remedy="Send the score as body")
    # The time of the envelope is when the score was given; a body has none of its own.
    return {**body, **given(timestamp=event.get("timestamp"))}


def _ingestion_answer(events: Sequence[Any], reasons: Mapping[int, Error]) -> dict[str, Any]:
    answers: dict[str, list[dict[str, Any]]] = {"successes": [], "errors": []}
    for place, event in enumerate(events):
        name = event.get("id") if isinstance(event, Mapping) else None
        if place in reasons:
            error = reasons[place]
            content = {"id": name, "status": 400, "message": sentence(error), "error": error}
            answers["errors"].append(content)
        else:
            answers["successes"].append({"id": name, "status": 201})
    return answers


def _scored(record: Mapping[str, Any], caller: Caller) -> tuple[str, Item]:
    """A score and its id, one made for it if it has none. Raises PayloadError."""
    name = record.get("id")
    if name in (None, ""):
        name = str(uuid7())
    if not isinstance(name, str):
        raise PayloadError("id is not a text", field="id", remedy="Send a text, or leave id out")
    if "value" not in record:
        raise PayloadError("A score needs a value", field="value", remedy="Send value")
    score = {field: value for field, value in record.items() if value is not None and field != "startTime"}
    (item,) = langfuse.to_items(score | {"id": name}, caller.app)
    return name, item


_SCORE = {
    "type": "object",
    "required": ["name", "value"],
    "properties": {
        "id": {"type": "string", "description": "Another body under the same id is a new revision."},
        "name": TEXT,
        "value": {"type": ["number", "string", "boolean"]},
        "dataType": {"enum": ["NUMERIC", "CATEGORICAL", "BOOLEAN", "TEXT", "CORRECTION"]},
        "traceId": TEXT,
        "observationId": TEXT,
        "sessionId": TEXT,
        "comment": TEXT,
        "metadata": {"type": "object"},
    },
}
_EXAMPLE = {
    "id": "score-a1",
    "name": "user-feedback",
    "value": 1,
    "dataType": "BOOLEAN",
    "traceId": "4bf0a1c2d3e4f5a6b7c8d9e0f1a2b3c4",
    "observationId": "a1b2c3d4e5f6a7b8",
    "comment": "Right",
}
_BATCH = {
    "batch": [
        {
            "id": "event-a2",
            "type": "score-create",
            "timestamp": "2026-01-31T12:00:00Z",
            "body": _EXAMPLE | {"id": "score-a2"},
        }
    ]
}
OPENAPI = {
    "/api/public/scores": described(
        "Record a score, as Langfuse does",
        "The key goes where Langfuse's public or secret key goes. The same id and body again changes nothing.",
        "langfuse_score",
        {JSON: {"schema": _SCORE, "examples": {"score": {"value": _EXAMPLE}}}},
        {
            "200": inline("Stored", {"type": "object", "properties": {"id": TEXT}}),
            **REFUSALS,
        },
    ),
    "/api/public/ingestion": described(
        "Record a batch of scores, as Langfuse's SDKs send them",
        "Events of type score-create, at most 1000. Each is answered by the id of its envelope.",
        "langfuse_ingestion",
        {
            JSON: {
                "schema": {
                    "type": "object",
                    "required": ["batch"],
                    "properties": {
                        "batch": {
                            "type": "array",
                            "maxItems": MAX_ITEMS,
                            "items": {
                                "type": "object",
                                "properties": {
                                    "id": TEXT,
                                    "type": TEXT,
                                    "timestamp": TEXT,
                                    "body": _SCORE,
                                },
                            },
                        }
                    },
                },
                "examples": {"batch": {"value": _BATCH}},
            }
        },
        {
            "207": inline(
                "What became of each event",
                {
                    "type": "object",
                    "properties": {
                        name: {"type": "array", "items": {"type": "object"}}
                        for name in ("successes", "errors")
                    },
                },
            ),
            **REFUSALS,
        },
    ),
}

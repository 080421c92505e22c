"""What the foreign protocols share: credentials, storing items of both kinds, reading JSON, describing routes.

Belongs here: what at least two of the protocols need. Does not belong here: any one protocol.
"""

import base64
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from feedback.access import Caller
from feedback.answers import Error, ItemResult
from feedback.capture import EVENTS, INTERACTIONS, accept
from feedback.formats import Item
from feedback.formats.messages import MAX_DEPTH, too_deep
from feedback.http import JSON, Refused, forbidden
from feedback.openapi import response
from feedback.payloads import MAX_ITEMS, PayloadError
from feedback.service import Service

PIECE_BYTES = 4 * 1024 * 1024

Endpoint = Callable[[Request], Awaitable[Response]]


async def authenticated(service: Service, request: Request) -> Caller:
    """Who sent this request. Raises Refused as ``Access.caller``."""
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return await service.access.caller(request, "ingest")
    try:
        public, _, secret = base64.b64decode(credentials, validate=True).decode().partition(":")
    except ValueError:
        raise Refused(
            401, Error("unauthorized", "The Basic credentials are not base64 of public:secret")
        ) from None
    # Keys that we made look like it; the other half is then never looked up.
    *others, last = sorted((public, secret), key=lambda key: key.startswith("dm_"), reverse=True)
    for key in filter(None, others):
        try:
            return _ingesting(await service.access.holder_of(key))
        except Refused as refused:
            if refused.status != 401:
                raise
    return _ingesting(await service.access.holder_of(last))


def _ingesting(caller: Caller) -> Caller:
    if "ingest" not in caller.scopes:
        raise forbidden("The API key may not do this: it lacks scope ingest", "Use a key with scope ingest")
    return caller


async def store(service: Service, caller: Caller, items: Sequence[Item]) -> list[ItemResult]:
    """Commit items of both kinds; one result per item, in order. Raises Unavailable as ``accept`` does."""
    results: dict[int, ItemResult] = {}
    for name, kind in (("interaction", INTERACTIONS), ("feedback", EVENTS)):
        for places, bodies in _pieces(items, name):
            results |= zip(places, await accept(service, caller, kind, bodies), strict=True)
    return [results[place] for place in range(len(items))]


def _pieces(items: Sequence[Item], kind: str) -> Iterator[tuple[list[int], list[bytes]]]:
    """The items of a kind, as their places and their JSON, in pieces between which other requests get their turn.

    A piece is encoded when it is asked for: the whole of a request may be much larger than the request was.
    """
    places: list[int] = []
    bodies: list[bytes] = []
    size = 0
    for place, item in enumerate(items):
        if item.kind != kind:
            continue
        body = encoded(item.body)
        if bodies and (len(bodies) == MAX_ITEMS or size + len(body) > PIECE_BYTES):
            yield places, bodies
            places, bodies, size = [], [], 0
        places.append(place)
        bodies.append(body)
        size += len(body)
    if bodies:
        yield places, bodies


def encoded(body: Mapping[str, Any]) -> bytes:
    """JSON in which NaN and lone surrogates stay what they are, for validation to name them."""
    return json.dumps(body).encode()


def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``. Raises PayloadError."""
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise PayloadError(
            f"Malformed JSON: {reason}", code="malformed_json", remedy="Send valid JSON encoded as UTF-8"
        ) from None
    if not isinstance(content, dict):
        raise PayloadError("The JSON is not an object", code="malformed_json", remedy="Send one object")
    if too_deep(content):
        raise PayloadError(
            f"The JSON is nested more than {MAX_DEPTH} levels deep",
            code="malformed_json",
            remedy="Flatten it",
        )
    return content


def too_many(count: int) -> Refused:
    return Refused(
        413,
        Error(
            "too_many_items",
            f"The request has {count} items, more than {MAX_ITEMS}",
            remedy=f"Send at most {MAX_ITEMS} items per request",
        ),
    )


def sentence(error: Error) -> str:
    parts = (error.field and f"{error.field}: ", error.message, error.remedy and f". {error.remedy}")
    return "".join(part for part in parts if part)


REFUSALS = {
    "400": response("Not what the format demands; sending it again is of no use", "ErrorBody"),
    "401": response("No valid API key", "ErrorBody"),
    "403": response("The key may not do this", "ErrorBody"),
    "413": response("Too large, or too many items", "ErrorBody"),
    "415": response("Another content type, or compressed otherwise than by gzip", "ErrorBody"),
    "429": response("The key is used more often than it may be; see Retry-After", "ErrorBody"),
    "503": response("The database is away; retry after the seconds in Retry-After", "ErrorBody"),
}
TEXT = {"type": "string"}


def described(summary: str, description: str, operation: str, content: Any, responses: Any) -> dict[str, Any]:
    return {
        "post": {
            "summary": summary,
            "description": description,
            "tags": ["other formats"],
            "operationId": operation,
            "security": [{"bearer": []}, {"api_key": []}],
            "requestBody": {"required": True, "content": content},
            "responses": responses,
        }
    }


def inline(description: str, schema: Mapping[str, Any], types: Sequence[str] = (JSON,)) -> dict[str, Any]:
    return {"description": description, "content": {name: {"schema": schema} for name in types}}

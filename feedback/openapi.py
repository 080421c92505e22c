"""The description of the API: schemas taken from the payload types themselves, and examples that work.

Belongs here: the OpenAPI document. Does not belong here: the page that shows it (``docs.html``), behaviour.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from feedback.answers import BatchResult, ErrorBody, ItemResult
from feedback.payloads import FeedbackEvent, Interaction

DESCRIPTION = (
    "Append-only capture of interactions and of the feedback on them. A 2xx answer means committed. Ids are chosen "
    "by the client, so sending the same item again is safe: it is answered as a duplicate. The same id with another "
    "body is a conflict."
)

INTERACTION = {
    "interaction_id": "01932f6e-4a00-7000-8000-0000000000a1",
    "session_id": "session-42",
    "user_id": "customer-7",
    "occurred_at": "2026-01-31T12:00:00Z",
    "messages": [{"role": "user", "content": "How do I return a parcel?"}],
    "output": "Print the label in your account and drop the parcel at any shop.",
    "retrieved": [{"document_id": "handbook/returns.md", "source": "handbook", "rank": 1, "score": 0.83}],
    "model": "in-house-7b",
    "prompt_name": "answer",
    "prompt_version": "12",
}
THUMB = {
    "event_id": "01932f6e-4a00-7000-8000-0000000000b1",
    "kind": "thumb",
    "score": 0,
    "reasons": ["outdated_source"],
    "interaction_id": INTERACTION["interaction_id"],
    "author_id": "customer-7",
}
CORRECTION = {
    "event_id": "01932f6e-4a00-7000-8000-0000000000b2",
    "kind": "correction",
    "correction": "Order a courier in your account; parcels are no longer taken at shops.",
    "interaction_id": INTERACTION["interaction_id"],
    "author_id": "agent-3",
    "author_role": "reviewer",
}
_SECURITY: list[dict[str, list[str]]] = [{"bearer": []}, {"api_key": []}]
_REF = "#/components/schemas/{name}"


def install(app: FastAPI, paths: Mapping[str, Any], schemas: Sequence[type[msgspec.Struct]]) -> None:
    """Make ``app`` describe ``paths`` (what its plain routes take and answer) beside those FastAPI knows.

    ``schemas`` are structs that the paths refer to, besides those of capture.
    """

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, paths, schemas)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(
    app: FastAPI, paths: Mapping[str, Any], schemas: Sequence[type[msgspec.Struct]]
) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    types = (Interaction, FeedbackEvent, ItemResult, BatchResult, ErrorBody, *schemas)
    _, components = msgspec.json.schema_components(types, ref_template=_REF)
    document["paths"] = {**paths, **document["paths"]}
    for operation in (one for methods in document["paths"].values() for one in methods.values()):
        if "401" in operation["responses"]:
            operation.setdefault("security", _SECURITY)
    document.setdefault("components", {}).setdefault("schemas", {}).update(components)
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    return document


def ingest(summary: str, schema: str, examples: dict[str, Any]) -> dict[str, Any]:
    """The path of a JSON route that takes one item or several."""
    item = {"$ref": _REF.format(name=schema)}
    array = {"type": "array", "items": item, "maxItems": 1000}
    return {
        "post": {
            "summary": summary,
            "description": "Send one object or an array of at most 1000 (at most 8 MiB).",
            "tags": ["capture"],
            "operationId": f"create_{schema}",
            "security": _SECURITY,
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": {"oneOf": [item, array]},
                        "examples": {name: {"value": value} for name, value in examples.items()},
                    }
                },
            },
            "responses": {
                "201": response("One object: stored", "ItemResult"),
                "200": response(
                    "One object: already stored. An array: all stored", "ItemResult", "BatchResult"
                ),
                "207": response("An array: some items were refused", "BatchResult"),
                "400": response("Not JSON", "ErrorBody"),
                "401": response("No valid API key or feedback token", "ErrorBody"),
                "403": response("The key may not do this", "ErrorBody"),
                "408": response("The body did not arrive in time", "ErrorBody"),
                "409": response("One object: the id is stored with another body", "ErrorBody"),
                "413": response("Too large, or too many items", "ErrorBody"),
                "415": response("Not application/json, or compressed otherwise than by gzip", "ErrorBody"),
                "422": response("One object: invalid; the field and the remedy are named", "ErrorBody"),
                "429": response("The key is used more often than it may be; see Retry-After", "ErrorBody"),
                "503": response(
                    "The database is away, or too much is waiting; retry after the seconds in Retry-After",
                    "ErrorBody",
                ),
            },
        }
    }


def response(description: str, *schemas: str) -> dict[str, Any]:
    """An answer in JSON whose body is one of the named schemas."""
    refs: list[dict[str, Any]] = [{"$ref": _REF.format(name=name)} for name in schemas]
    schema: dict[str, Any] = refs[0] if len(refs) == 1 else {"oneOf": refs}
    return {"description": description, "content": {"application/json": {"schema": schema}}}

"""Chat logs as JSON Lines: one result for each line.

Belongs here: the route. Does not belong here: what a line means (``feedback.formats.chatlog``).
"""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from feedback.answers import BatchResult, ItemResult, error_of
from feedback.compat.shared import REFUSALS, Endpoint, authenticated, described, json_object, store, too_many
from feedback.formats import Item, chatlog
from feedback.http import answer, read_body
from feedback.openapi import response
from feedback.payloads import MAX_ITEMS, PayloadError
from feedback.service import Service

JSON_LINES = ("application/x-ndjson", "application/jsonl", "application/x-jsonlines")


def routes(service: Service) -> list[Route]:
    return [Route("/v1/chatlogs", _chatlogs(service), methods=["POST"])]


def _chatlogs(service: Service) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        caller = await authenticated(service, request)
        body = await read_body(request, JSON_LINES, gzip=True)
        lines = [line for line in body.splitlines() if line.strip()]
        if len(lines) > MAX_ITEMS:
            raise too_many(len(lines))
        results: dict[int, ItemResult] = {}
        items: dict[int, Item] = {}
        for place, line in enumerate(lines):
            try:
                (items[place],) = chatlog.to_items(json_object(line), caller.app)
            except PayloadError as error:
                results[place] = ItemResult(None, "invalid", error=error_of(error))
        results |= zip(items, await store(service, caller, list(items.values())), strict=True)
        return _lines_answer([results[place] for place in range(len(lines))])

    return endpoint


def _lines_answer(results: list[ItemResult]) -> Response:
    counts = {
        status: sum(result.status == status for result in results)
        for status in ("created", "duplicate", "conflict", "invalid")
    }
    refused = counts["conflict"] + counts["invalid"]
    return answer(207 if refused else 200, BatchResult(results, **counts))


_LINE = {
    "type": "object",
    "properties": {
        "messages": {"type": "array", "minItems": 1, "items": {"type": "object"}},
        "request": {"type": "object"},
        "response": {"type": "object"},
    },
}
_EXAMPLE = {
    "timestamp": 1769860800,
    "workload_id": "answer",
    "request": {
        "model": "in-house-7b",
        "messages": [{"role": "user", "content": "How do I return a parcel?"}],
    },
    "response": {
        "id": "chatcmpl-a1",
        "choices": [{"message": {"role": "assistant", "content": "Print the label in your account."}}],
    },
}
OPENAPI = {
    "/v1/chatlogs": described(
        "Record chat logs",
        "JSON Lines: {timestamp, workload_id, client_id, request, response} as OpenAI's chat completions have them, or "
        "{messages} as fine-tuning files do. At most 1000 lines (at most 8 MiB); one result per line, in order.",
        "chatlogs",
        {name: {"schema": _LINE, "examples": {"line": {"value": _EXAMPLE}}} for name in JSON_LINES},
        {
            "200": response("All lines are stored", "BatchResult"),
            "207": response("Some lines were refused", "BatchResult"),
            **REFUSALS,
        },
    ),
}

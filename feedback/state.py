"""What was said about an answer, as it stands now: the folded feedback items, read as soon as they are committed.

Belongs here: the route that answers states. Does not belong here: the fold (SQL function ``feedback.current``),
writing feedback (``feedback.capture``), rates over many answers (the marts).
"""

import typing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from feedback import log, openapi, tokens
from feedback.access import bearer
from feedback.answers import Error, FeedbackState, FeedbackStates
from feedback.http import Refused, answer, forbidden
from feedback.payloads import Kind
from feedback.service import Service

MAX_INTERACTIONS = 100
MAX_ITEMS = 1000


# An item is found by any of its events: a retraction need not repeat what it is about. It belongs to the app whose
# key sent it, so what one app says about another's interaction stays between that app and its own key.
_STATES = """
WITH about AS (
    SELECT DISTINCT ON (feedback_id) feedback_id, interaction_id
    FROM feedback.feedback_event
    WHERE interaction_id = ANY($1::text[])
    ORDER BY feedback_id, event_id DESC
)
SELECT c.feedback_id::text, c.event_id::text, coalesce(c.interaction_id, about.interaction_id) AS interaction_id,
    c.kind, c.name, c.identifier, c.score, c.label, c.explanation, c.correction, c.reasons, c.annotator_kind,
    c.author_role, c.op, c.revision, c.op = 'retract' AS retracted, c.occurred_at
FROM feedback.current(ARRAY(SELECT feedback_id FROM about)) AS c
INNER JOIN about ON about.feedback_id = c.feedback_id
WHERE coalesce(c.interaction_id, about.interaction_id) = ANY($1::text[])
    AND c.api_key_id = ANY($2::uuid[])
    AND ($3::text IS NULL OR right(c.feedback_id::text, 12) = $3)
    AND ($4::text[] IS NULL OR c.kind = ANY($4::text[]))
ORDER BY c.received_at DESC, c.event_id DESC
LIMIT $5
"""


def routes(service: Service) -> list[Route]:
    """The route that answers states."""

    async def states(request: Request) -> Response:
        wanted = request.query_params.getlist("interaction_id")
        kinds = request.query_params.getlist("kind")
        app, node = await _asker(request, service, wanted)
        _check(wanted, kinds)
        keys = await log.fetch(service.ingest, "SELECT key_id FROM feedback.api_key WHERE app = $1", app)
        rows = await log.fetch(
            service.review, _STATES, wanted, [row[0] for row in keys], node, kinds or None, MAX_ITEMS + 1
        )
        found = [FeedbackState(**dict(row)) for row in rows]
        return answer(
            200,
            FeedbackStates(found[:MAX_ITEMS], len(found) > MAX_ITEMS),
            {"Cache-Control": "no-store"},
        )

    return [Route("/v1/feedback", states, methods=["GET"])]


async def _asker(request: Request, service: Service, wanted: list[str]) -> tuple[str, str | None]:
    """The app that asks and, with a token, the node that its author's items end in. Raises Refused."""
    token = bearer(request)
    if not token.startswith(tokens.PREFIX):
        return (await service.access.caller(request, "read")).app, None
    claims = await tokens.verify(service, token)
    if not set(wanted) <= {claims.interaction_id}:
        raise forbidden(
            "The token is for another interaction", "Ask for the interaction that the token was minted for"
        )
    return claims.app, claims.node


def _check(wanted: list[str], kinds: list[str]) -> None:
    if not 1 <= len(wanted) <= MAX_INTERACTIONS or any("\0" in name for name in wanted):
        raise _invalid(
            "interaction_id",
            f"Ask for 1 to {MAX_INTERACTIONS} interactions by their ids",
            "Repeat the parameter: ?interaction_id=a&interaction_id=b",
        )
    unknown = set(kinds) - set(typing.get_args(Kind))
    if unknown:
        raise _invalid("kind", "There is no such kind", f"Ask for some of {', '.join(typing.get_args(Kind))}")


def _invalid(field: str, message: str, remedy: str) -> Refused:
    return Refused(422, Error("invalid", message, field=field, remedy=remedy))


def _several(name: str, description: str, most: int) -> dict[str, Any]:
    return {
        "name": name,
        "in": "query",
        "required": name == "interaction_id",
        "description": description,
        "schema": {"type": "array", "items": {"type": "string"}, "maxItems": most},
    }


OPENAPI: dict[str, Any] = {
    "/v1/feedback": {
        "get": {
            "summary": "Read feedback back",
            "description": (
                "The items of some interactions as they stand, each folded from all its events; what was "
                "answered with 201 is there. A feedback token reads its own author's items and no others."
            ),
            "tags": ["widget"],
            "operationId": "read_Feedback",
            "security": [{"bearer": []}, {"api_key": []}],
            "parameters": [
                _several("interaction_id", "May be repeated", MAX_INTERACTIONS),
                _several("kind", "Only items of these kinds; all by default", len(typing.get_args(Kind))),
            ],
            "responses": {
                "200": {
                    "description": "Items, last changed first; more is true when there are over 1000",
                    "content": {
                        "application/json": {
                            "schema": {
                                "type": "object",
                                "required": ["feedback", "more"],
                                "properties": {
                                    "feedback": {
                                        "type": "array",
                                        "items": tokens.schema_of(FeedbackState),
                                        "maxItems": MAX_ITEMS,
                                    },
                                    "more": {"type": "boolean"},
                                },
                            }
                        }
                    },
                },
                "401": openapi.response("No valid API key or token", "ErrorBody"),
                "403": openapi.response("Without scope read; another interaction's token", "ErrorBody"),
                "422": openapi.response("No interaction_id, or too many", "ErrorBody"),
                "429": openapi.response("More often than it may be; see Retry-After", "ErrorBody"),
                "503": openapi.response("The database is away", "ErrorBody"),
            },
        }
    },
}

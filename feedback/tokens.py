"""Signed tokens of browsers: one answer, one author, for a while.

Belongs here: minting a token, recognising it, holding an event to it, and the route that mints.
Does not belong here: API keys (``feedback.access``), storing what a token's bearer sends (``feedback.capture``).

A token is ``dmt_<claims>.<signature>``: base64url of JSON, and of HMAC-SHA256 over the first part. Nothing is stored:
whoever holds the pseudonym key can mint and verify. Every id that a bearer sends ends in the token's ``node``, which
follows from the answer and the author; so a page can add to, revise or retract its own feedback and nobody else's.
"""

import secrets
import time
import typing
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from feedback import openapi, signing
from feedback.access import Bucket, Caller, too_often
from feedback.answers import Error, Token
from feedback.http import Refused, answer, read_body, unreadable
from feedback.ids import pseudonym
from feedback.payloads import MAX_ITEMS, FeedbackEvent, Kind, PayloadError, PersonId, Short, split
from feedback.service import Service

PREFIX = "dmt_"
# Claims at their largest (two ids and an app of 200 characters, four bytes each) need 3.6 kB.
MAX_TOKEN_LENGTH = 4096
DAY_SECONDS = 86_400
NODE_LENGTH = 12
# Of one author on one answer, in each worker process: more than a person does, less than a script wants.
REQUESTS_PER_SECOND, BURST = 5.0, 50.0
MAX_BUCKETS = 10_000


class TokenRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a token is asked for: one answer of the product, and the person who sees it."""

    interaction_id: Short
    user_id: (
        Annotated[PersonId, Meta(description="Raw id of the person; the token holds only its pseudonym.")]
        | None
    ) = None
    session_id: Short | None = None
    kinds: (
        Annotated[list[Kind], Meta(min_length=1, max_length=20, description="Defaults to all kinds.")] | None
    ) = None
    expires_in: Annotated[int, Meta(ge=60, le=30 * DAY_SECONDS, description="Seconds; a day by default.")] = (
        DAY_SECONDS
    )


class Claims(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a token says; ``expires_at`` in Unix seconds, ``node`` as 12 hex digits."""

    v: Literal[1]
    interaction_id: str
    app: str
    api_key_id: str
    kinds: tuple[Kind, ...]
    expires_at: int
    node: str
    session_id: str | None = None
    author_ref: str | None = None

    @property
    def caller(self) -> Caller:
        """The key that the token was minted with, as far as the token may use it."""
        return Caller(self.api_key_id, self.app, ("ingest",))


_claims = msgspec.json.Decoder(Claims)
_requests = msgspec.json.Decoder(TokenRequest)


def mint(pseudonym_key: bytes, caller: Caller, wanted: TokenRequest, now: float | None = None) -> Token:
    """A token with which a browser may send feedback on one answer, as one author, in the name of ``caller``'s key.

    Without a ``user_id`` the author stays unknown; those who share a session then share what they said, and without
    a session each token stands alone: a page that asks for a new one does not see what it said before.
    """
    author_ref = pseudonym(pseudonym_key, caller.app, wanted.user_id) if wanted.user_id else None
    key = _signing_key(pseudonym_key)
    whose = author_ref or wanted.session_id or secrets.token_hex(16)
    about = [caller.app, wanted.interaction_id, author_ref is None, whose]
    claims = Claims(
        v=1,
        interaction_id=wanted.interaction_id,
        app=caller.app,
        api_key_id=caller.key_id,
        kinds=tuple(sorted(set(wanted.kinds or typing.get_args(Kind)))),
        expires_at=int(time.time() if now is None else now) + wanted.expires_in,
        node=signing.digest(key, b"node:" + msgspec.json.encode(about)).hex()[:NODE_LENGTH],
        session_id=wanted.session_id,
        author_ref=author_ref,
    )
    token = PREFIX + signing.sign(key, msgspec.json.encode(claims))
    return Token(claims.interaction_id, token, claims.expires_at)


def read(pseudonym_key: bytes, token: str, now: float | None = None) -> Claims:
    """The claims of a token that we signed and that has not expired. Raises Refused with 401."""
    if not token.startswith(PREFIX) or len(token) > MAX_TOKEN_LENGTH:
        raise _refused("invalid_token", "This is not a feedback token")
    payload = signing.opened(_signing_key(pseudonym_key), token.removeprefix(PREFIX))
    if payload is None:
        raise _refused("invalid_token", "The feedback token was not signed by this service")
    try:
        claims = _claims.decode(payload)
    except msgspec.DecodeError:
        raise _refused("invalid_token", "The feedback token is of another version of this service") from None
    if claims.expires_at <= (time.time() if now is None else now):
        raise _refused("token_expired", "The feedback token has expired")
    return claims


async def verify(service: Service, token: str) -> Claims:
    """``read``; and the key that the token was minted with is still in use, and its bearer not too busy.

    Raises Refused with 401 or 429.
    """
    claims = read(service.pseudonym_key, token)
    _take(claims.node)
    if await service.access.by_id(claims.api_key_id) is None:
        raise _refused("invalid_token", "The API key that made this feedback token was revoked")
    return claims


# The requests of each author on each answer. Nodes are unique everywhere, so one table serves any number of services.
_buckets: dict[str, Bucket] = {}


def _take(node: str) -> None:
    bucket = _buckets.get(node)
    if bucket is None:
        if len(_buckets) >= MAX_BUCKETS:
            _buckets.clear()
        bucket = _buckets[node] = Bucket(REQUESTS_PER_SECOND, BURST)
    wait = bucket.wait()
    if wait:
        raise too_often(
            wait,
            "The bearer of this feedback token sends more requests than a person would",
            "Wait for the seconds in Retry-After, and send arrays",
        )


def bind(claims: Claims, item: FeedbackEvent) -> None:
    """Hold an event to the token it came with: fill what the token says, refuse what it does not allow.

    The author's pseudonym is ``claims.author_ref``; the caller puts it into the row. Raises PayloadError.
    """
    if item.kind not in claims.kinds:
        raise _violation(
            "kind", f"The token does not allow kind {item.kind}", "Ask for a token with that kind"
        )
    if item.event_id is None:
        raise _violation("event_id", "With a token, event_id is required", "Mint a UUIDv7 ending in the node")
    for field, given in (("event_id", item.event_id), ("feedback_id", item.feedback_id)):
        if given is not None and not _ends_in(given, claims.node):
            raise _violation(
                field,
                f"{field} is not an id of this token's author",
                f"Send a UUIDv7 whose last {NODE_LENGTH} digits are the token's node",
            )
    for field, allowed in (
        ("interaction_id", claims.interaction_id),
        ("session_id", claims.session_id),
        ("scope", "interaction"),
        ("annotator_kind", "HUMAN"),
        ("author_role", "end_user"),
        ("author_id", None),
        ("trace_id", None),
        ("span_id", None),
    ):
        if getattr(item, field) not in (None, allowed):
            raise _violation(field, f"The token speaks for another {field}", f"Leave {field} out")
        setattr(item, field, allowed)


def schema_of(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """The JSON schema of a struct that holds no other struct, to be written out where it is used."""
    _, found = msgspec.json.schema_components((struct,))
    schema: dict[str, Any] = found[struct.__name__]
    return schema


def _one_or_several(struct: type[msgspec.Struct]) -> dict[str, Any]:
    one = schema_of(struct)
    return {"schema": {"oneOf": [one, {"type": "array", "items": one, "maxItems": MAX_ITEMS}]}}


OPENAPI: dict[str, Any] = {
    "/v1/tokens": {
        "post": {
            "summary": "Mint tokens for browsers",
            "description": (
                "A token lets a page send feedback on one answer as one person, and read back what that person "
                "said. Send one object, or an array of at most 1000: it is answered with an array, in order."
            ),
            "tags": ["widget"],
            "operationId": "create_Token",
            "security": [{"bearer": []}, {"api_key": []}],
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        **_one_or_several(TokenRequest),
                        "examples": {
                            "one": {
                                "value": {
                                    "interaction_id": openapi.INTERACTION["interaction_id"],
                                    "user_id": "customer-7",
                                }
                            }
                        },
                    }
                },
            },
            "responses": {
                "201": {
                    "description": "Minted",
                    "content": {"application/json": _one_or_several(Token)},
                },
                "400": openapi.response("Not JSON", "ErrorBody"),
                "401": openapi.response("No valid API key", "ErrorBody"),
                "403": openapi.response("The key lacks scope ingest", "ErrorBody"),
                "413": openapi.response("Too many at once", "ErrorBody"),
                "415": openapi.response("Not application/json", "ErrorBody"),
                "422": openapi.response("Invalid; the field and the remedy are named", "ErrorBody"),
                "429": openapi.response("The key is used more often than it may be", "ErrorBody"),
            },
        }
    }
}


def routes(service: Service) -> list[Route]:
    """The route that mints."""

    async def create(request: Request) -> Response:
        caller = await service.access.caller(request, "ingest")
        body = await read_body(request)
        try:
            items, single = split(body)
        except PayloadError as error:
            raise unreadable(error) from None
        tokens = [
            mint(service.pseudonym_key, caller, _request(item, "" if single else f"[{index}]"))
            for index, item in enumerate(items)
        ]
        return answer(201, tokens[0] if single else tokens, {"Cache-Control": "no-store"})

    return [Route("/v1/tokens", create, methods=["POST"])]


def _request(raw: bytes, path: str) -> TokenRequest:
    try:
        return _requests.decode(raw)
    except msgspec.DecodeError as error:
        message, _, field = str(error).partition(" - at `$")
        raise Refused(
            422,
            Error(
                "invalid",
                message,
                field=(path + field.rstrip("`")).lstrip(".") or None,
                remedy="See /docs for the fields of a token request",
            ),
        ) from None


def _signing_key(pseudonym_key: bytes) -> bytes:
    return signing.key_for(pseudonym_key, b"datamoat widget token")


def _ends_in(value: UUID, node: str) -> bool:
    return value.version == 7 and value.hex[-NODE_LENGTH:] == node


def _refused(code: str, message: str) -> Refused:
    return Refused(
        401,
        Error(code, message, remedy="Let the app ask POST /v1/tokens for a new token"),
        {"WWW-Authenticate": "Bearer"},
    )


def _violation(field: str, message: str, remedy: str) -> PayloadError:
    return PayloadError(message, field=field, remedy=remedy, code="forbidden")

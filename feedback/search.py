"""Searching the corpus over HTTP, and for the ask page, by a function that the service is told of.

Belongs here: calling that function, its answers, the route. Does not belong here: how it finds anything. It is the
pipeline's, named by an import string when the service is started, so that this service needs nothing of it.
"""

import asyncio
import importlib
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from feedback import openapi
from feedback.answers import Error, error_of
from feedback.http import RETRY_AFTER_SECONDS, Refused, answer, read_body
from feedback.payloads import PayloadError, decode
from feedback.service import Service

logger = logging.getLogger("feedback")

SEARCH_SECONDS = 60.0
MAX_QUESTION = 2000
MAX_RESULTS = 100
MAX_FILTER_VALUES = 1000

Mode = Literal["hybrid", "vector", "text"]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
Values = Text | Annotated[list[Text], msgspec.Meta(min_length=1, max_length=MAX_FILTER_VALUES)] | None


class Search(Protocol):
    """``(question, k, mode, filter)`` to at most k passages, best first, as the fields of ``Found``.

    Raises LookupError, saying what to run, when there is nothing to search in yet.
    """

    def __call__(
        self, question: str, k: int, mode: str = ..., filter: Mapping[str, Sequence[str]] | None = ...
    ) -> Sequence[Mapping[str, Any]]: ...


class Filter(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What passages must have: of several values of a field any may match, and every field given must."""

    source: Values = None
    document: Values = None
    path: Annotated[Values, msgspec.Meta(description="What the document's path begins with")] = None
    media_type: Values = None
    title: Annotated[Values, msgspec.Meta(description="What the document's title contains")] = None
    heading: Annotated[Values, msgspec.Meta(description="What the section's heading contains")] = None


class Query(msgspec.Struct, forbid_unknown_fields=True):
    """A question, and how to answer it."""

    query: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_QUESTION, pattern=r"\S")]
    k: Annotated[int, msgspec.Meta(ge=1, le=MAX_RESULTS)] = 10
    mode: Mode = "hybrid"
    filter: Filter | None = None
    explain: bool = False


class Explanation(msgspec.Struct):
    """What a score is made of; null where a leg did not take part or did not find the passage."""

    distance: Annotated[float | None, msgspec.Meta(description="Cosine distance, 0 to 2")] = None
    vector_rank: int | None = None
    bm25: float | None = None
    text_rank: int | None = None
    terms: Annotated[
        dict[str, float] | None, msgspec.Meta(description="Matched words, and what each adds to bm25")
    ] = None
    rerank: Annotated[
        float | None, msgspec.Meta(description="The cross-encoder's score, by which it stands")
    ] = None


class Found(msgspec.Struct):
    """A passage that was found. ``also_in``: other documents that hold the same text."""

    chunk_id: str
    document_id: str
    source: str
    title: str
    heading: str
    body: str
    score: float
    also_in: list[str]
    explanation: Explanation | msgspec.UnsetType = msgspec.UNSET


class Results(msgspec.Struct):
    """Passages, best first."""

    results: list[Found]


class NoSearch(Exception):
    """Nothing can be searched; the message says why, ``remedy`` what to do if more is known."""

    def __init__(self, message: str, remedy: str | None = None, *, configured: bool = True) -> None:
        super().__init__(message)
        self.remedy = remedy
        self.configured = configured

    @property
    def error(self) -> Error:
        """What is answered."""
        return Error("no_search", str(self), remedy=self.remedy)


def check_search(name: str) -> str:
    """``name`` if it reads as MODULE:FUNCTION. Raises ValueError."""
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        raise ValueError(f"--search {name}: give MODULE:FUNCTION, such as orchestration.search:passages")
    return name


async def find(
    name: str | None,
    question: str,
    k: int,
    mode: Mode = "hybrid",
    filter: Mapping[str, Sequence[str]] | None = None,
) -> list[Found]:
    """Passages by the function of that name, in a thread: searching may take its time. Raises NoSearch."""
    if name is None:
        raise NoSearch(
            "No search is configured", "Start the service with --search MODULE:FUNCTION", configured=False
        )
    try:
        return await asyncio.wait_for(
            asyncio.to_thread(_find, name, question, k, mode, filter), SEARCH_SECONDS
        )
    except TimeoutError:
        raise NoSearch(f"The search took more than {SEARCH_SECONDS:g} seconds", "Try again") from None
    except Exception as error:
        # Its subclasses, such as KeyError, are faults and no message for people.
        if type(error) is LookupError:
            raise NoSearch(str(error)) from None
        logger.warning("the search %s failed: %s: %s", name, type(error).__name__, error)
        raise NoSearch(
            f"The search failed ({type(error).__name__})", "An operator finds the cause in the service's log"
        ) from error


def _find(
    name: str, question: str, k: int, mode: Mode, filter: Mapping[str, Sequence[str]] | None
) -> list[Found]:
    module, _, function = name.partition(":")
    search: Search = getattr(importlib.import_module(module), function)
    return [
        Found(
            chunk_id=str(found["chunk_id"]),
            document_id=str(found["document_id"]),
            source=str(found["source"]),
            title=str(found["title"] or found["document_id"]),
            heading=str(found.get("heading") or ""),
            body=str(found["body"]),
            score=float(found["score"]),
            also_in=list(found.get("also_in") or ()),
            explanation=Explanation(**{one: found.get(one) for one in Explanation.__struct_fields__}),
        )
        for found in search(question, k, mode=mode, filter=filter)
    ]


def routes(service: Service) -> list[Route]:
    """The route that answers questions with passages."""

    async def search(request: Request) -> Response:
        await service.access.caller(request, "read")
        asked = _query(await read_body(request))
        try:
            found = await find(service.search, asked.query, asked.k, asked.mode, _wanted(asked.filter))
        except NoSearch as error:
            if not error.configured:
                raise Refused(404, error.error) from None
            raise Refused(503, error.error, {"Retry-After": str(RETRY_AFTER_SECONDS)}) from None
        if not asked.explain:
            for one in found:
                one.explanation = msgspec.UNSET
        return answer(200, Results(found), {"Cache-Control": "no-store"})

    return [Route("/v1/search", search, methods=["POST"])]


_queries = msgspec.json.Decoder(Query)


def _query(body: bytes) -> Query:
    try:
        asked: Query = decode(_queries, body)
    except PayloadError as error:
        refused = error_of(error)
        if refused.message.startswith("Unknown field"):
            refused.remedy = "Remove it; see /docs for what can be asked"
        raise Refused(422 if error.field else 400, refused) from None
    return asked


def _wanted(filter: Filter | None) -> dict[str, list[str]]:
    given = {} if filter is None else msgspec.structs.asdict(filter)
    return {
        name: [value] if isinstance(value, str) else value
        for name, value in given.items()
        if value is not None
    }


OPENAPI: dict[str, Any] = {
    "/v1/search": {
        "post": {
            "summary": "Search the corpus",
            "description": (
                "The passages that answer a question best, by words, by vectors or by both. Only what its source "
                "allows to be retrieved is found."
            ),
            "tags": ["search"],
            "operationId": "search",
            "security": [{"bearer": []}, {"api_key": []}],
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": {"$ref": "#/components/schemas/Query"},
                        "examples": {
                            "a question": {"value": {"query": "How long is the warranty?", "k": 3}},
                            "within one source, with reasons": {
                                "value": {
                                    "query": "How long is the warranty?",
                                    "mode": "hybrid",
                                    "filter": {"source": "manuals", "path": "products/"},
                                    "explain": True,
                                }
                            },
                        },
                    }
                },
            },
            "responses": {
                "200": openapi.response("Passages, best first; none when nothing matches", "Results"),
                "400": openapi.response("Not JSON", "ErrorBody"),
                "401": openapi.response("No valid API key", "ErrorBody"),
                "403": openapi.response("The key lacks scope read", "ErrorBody"),
                "404": openapi.response("The service was started without a search", "ErrorBody"),
                "408": openapi.response("The body did not arrive in time", "ErrorBody"),
                "413": openapi.response("Too large", "ErrorBody"),
                "415": openapi.response("Not application/json, or compressed", "ErrorBody"),
                "422": openapi.response("Invalid; the field and the remedy are named", "ErrorBody"),
                "429": openapi.response("More often than it may be; see Retry-After", "ErrorBody"),
                "503": openapi.response(
                    "There is no index yet, or it cannot be searched now; the remedy is named", "ErrorBody"
                ),
            },
        }
    },
}
SCHEMAS = (Query, Results)

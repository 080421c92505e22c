"""Ask the corpus: a question in, passages out, and each answer is an interaction that people can judge.

Belongs here: the page, recording what was asked and found. What people say about it goes to the API, with tokens
that this page gets. Does not belong here: searching. That is a function of
the pipeline's, named by an import string when the service is started, so that this service needs nothing of it.
"""

import asyncio
import importlib
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from feedback import tokens
from feedback.answers import Error
from feedback.capture import INTERACTIONS, accept
from feedback.http import Refused
from feedback.ids import uuid7
from feedback.pages.session import Person, Sessions
from feedback.pages.views import aside, call_route, fragment, page, page_route
from feedback.payloads import Interaction, Kind, Message, Retrieved
from feedback.service import Service

logger = logging.getLogger("feedback")

PASSAGES = 5
SEARCH_SECONDS = 60.0
MAX_QUESTION = 2000
_KINDS: tuple[Kind, Kind] = ("thumb", "correction")

Search = Callable[[str, int], Sequence[Mapping[str, Any]]]
"""``(question, k)`` to at most k passages, best first: chunk_id, document_id, source, title, body, score.

Raises LookupError, saying what to run, when there is nothing to search in yet.
"""


@dataclass(frozen=True)
class Passage:
    """One thing that was found."""

    chunk_id: str
    document_id: str
    source: str
    title: str
    body: str
    score: float


class Question(msgspec.Struct, forbid_unknown_fields=True):
    question: str


def routes(service: Service, sessions: Sessions) -> list[Route]:
    async def show(_: Request, person: Person) -> Response:
        return page("ask.html", person, search=service.search, max_question=MAX_QUESTION)

    async def ask(person: Person, asked: Question) -> Any:
        question = asked.question.strip()
        if not 0 < len(question) <= MAX_QUESTION:
            text = f"A question has 1 to {MAX_QUESTION} characters"
            raise Refused(422, Error("refused", text, "question", "Change it and ask again"))
        started = time.monotonic()
        passages = await _search(service.search, question)
        interaction = Interaction(
            interaction_id=f"ask-{uuid7()}",
            messages=[Message(role="user", content=question)],
            output=passages[0].body if passages else "",
            retrieved=[
                Retrieved(
                    document_id=passage.document_id,
                    chunk_id=passage.chunk_id,
                    source=passage.source,
                    rank=rank,
                    score=passage.score,
                )
                for rank, passage in enumerate(passages, start=1)
            ],
            session_id=person.session_id,
            user_id=person.name,
            latency_ms=round((time.monotonic() - started) * 1000, 1),
            provider="datamoat",
            model="retrieval",
        )
        recorded = await accept(service, person.caller, INTERACTIONS, [msgspec.json.encode(interaction)])
        if recorded[0].error is not None:
            raise Refused(422, recorded[0].error)
        judge, correct = (_token(service, person, interaction, kind) for kind in _KINDS)
        html = await aside(fragment, "passages.html", passages=passages, judge=judge, correct=correct)
        return {"html": html}

    return [
        page_route(sessions, "/ask", show),
        call_route(sessions, "/ask/api/ask", Question, ask),
    ]


def _token(service: Service, person: Person, interaction: Interaction, kind: Kind) -> str:
    """What lets the page send feedback of this kind on this interaction, as this person."""
    wanted = tokens.TokenRequest(
        interaction_id=interaction.interaction_id,
        user_id=person.name,
        session_id=person.session_id,
        kinds=[kind],
    )
    return tokens.mint(service.pseudonym_key, person.caller, wanted).token


async def _search(name: str | None, question: str) -> list[Passage]:
    """Passages for ``question``, from a thread: searching may take its time. Raises Refused with 424."""
    if name is None:
        raise _no_search("No search is configured", "Start the service with --search MODULE:FUNCTION")
    try:
        return await asyncio.wait_for(asyncio.to_thread(_found, name, question), SEARCH_SECONDS)
    except TimeoutError:
        raise _no_search(f"The search took more than {SEARCH_SECONDS:g} seconds", "Try again") from None
    except Exception as error:
        # Its subclasses, such as KeyError, are faults and no message for people.
        if type(error) is LookupError:
            raise _no_search(str(error), None) from None
        logger.warning("the search %s failed: %s: %s", name, type(error).__name__, error)
        raise _no_search(
            f"The search failed ({type(error).__name__})", "An operator finds the cause in the service's log"
        ) from error


def _found(name: str, question: str) -> list[Passage]:
    module, _, function = name.partition(":")
    search: Search = getattr(importlib.import_module(module), function)
    return [
        Passage(
            chunk_id=str(found["chunk_id"]),
            document_id=str(found["document_id"]),
            source=str(found["source"]),
            title=str(found["title"] or found["document_id"]),
            body=str(found["body"]),
            score=float(found["score"]),
        )
        for found in search(question, PASSAGES)
    ]


def check_search(name: str) -> str:
    """``name`` if it reads as MODULE:FUNCTION. Raises ValueError."""
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        raise ValueError(f"--search {name}: give MODULE:FUNCTION, such as orchestration.search:passages")
    return name


def _no_search(message: str, remedy: str | None) -> Refused:
    return Refused(424, Error("no_search", message, remedy=remedy))

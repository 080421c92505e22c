"""Ask the corpus: a question in, passages out, and each answer is an interaction that people can judge.

Belongs here: the page, recording what was asked and found. What people say about it goes to the API, with tokens
that this page gets. Does not belong here: searching (``feedback.search``).
"""

import time
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
from feedback.search import MAX_QUESTION, NoSearch, find
from feedback.service import Service

PASSAGES = 5
_KINDS: tuple[Kind, Kind] = ("thumb", "correction")


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
        try:
            passages = await find(service.search, question, PASSAGES)
        except NoSearch as error:
            raise Refused(424, error.error) from None
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

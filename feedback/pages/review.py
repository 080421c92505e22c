"""Reviewing: the page with three panes, and what its script asks for.

Belongs here: claiming, keeping, answering, skipping and flagging items over HTTP; an item as HTML; adjudication.
Does not belong here: leases and answers themselves (``feedback.review``), queues and rules (``feedback.pages.queues``).
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from feedback.log import fetch
from feedback.pages.queues import queue_of
from feedback.pages.session import Person, Sessions
from feedback.pages.views import aside, call_route, fragment, page, page_route
from feedback.review.adjudication import adjudicate, reviewed, to_adjudicate
from feedback.review.leases import Assignment, Lease, assignment, claim, extend
from feedback.review.preview import preview
from feedback.review.queues import list_queues
from feedback.review.submissions import SkipMode, flag, skip, submit
from feedback.service import Service

TITLE_LENGTH = 80
# Answered items that the page shows again after a reload.
REMEMBERED = 20
FLAGS = ("personal data", "unsafe", "broken", "other")


class OfQueue(msgspec.Struct, forbid_unknown_fields=True):
    queue_id: UUID


class Held(msgspec.Struct, forbid_unknown_fields=True):
    """An item this person holds, by its lease."""

    lease: Lease


class Answered(Held):
    answers: dict[str, Any]


class Skipped(Held):
    reason: str
    mode: SkipMode


class Flagged(Held):
    """``event_id`` is minted by the page, so that the same flag sent again counts once."""

    event_id: UUID
    label: str
    note: str = ""


class OfItem(msgspec.Struct, forbid_unknown_fields=True):
    item_id: UUID


class Decided(OfItem):
    """Either the slot whose answers hold, or merged answers."""

    pick: int | None = None
    answers: dict[str, Any] | None = None


def routes(service: Service, sessions: Sessions) -> list[Route]:
    async def show_review(request: Request, person: Person) -> Response:
        queue = await queue_of(service, person, request.path_params["queue_id"])
        answered = await _answered(service, person, queue.queue_id)
        return page("review.html", person, queue=queue, flags=FLAGS, answered=answered)

    async def show_adjudication(request: Request, person: Person) -> Response:
        queue = await queue_of(service, person, request.path_params["queue_id"])
        waiting = await to_adjudicate(service.review, queue.queue_id, by=person.reviewer)
        item = await reviewed(service.review, person.reviewer, waiting[0]) if waiting else None
        return await aside(page, "adjudicate.html", person, queue=queue, item=item, waiting=len(waiting))

    async def progress(person: Person, asked: OfQueue) -> Any:
        for status in await list_queues(service.review, person.caller.app):
            if status.queue.queue_id == asked.queue_id:
                through = status.done + status.skipped + status.to_adjudicate
                return {
                    "done": through,
                    "total": through + status.open + status.leased,
                    "to_adjudicate": len(
                        await to_adjudicate(service.review, asked.queue_id, by=person.reviewer)
                    ),
                }
        return {"done": 0, "total": 0, "to_adjudicate": 0}

    async def take(person: Person, asked: OfQueue) -> Any:
        work = await claim(service.review, asked.queue_id, person.reviewer)
        return {"item": None if work is None else await aside(_item, work)}

    async def keep(person: Person, asked: Held) -> Any:
        return _lease(await extend(service.review, person.reviewer, asked.lease))

    async def finish(person: Person, asked: Answered) -> Any:
        events = await submit(
            service.review, service.pseudonym_key, person.reviewer, asked.lease, asked.answers
        )
        return {"events": len(events)}

    async def pass_on(person: Person, asked: Skipped) -> Any:
        await skip(service.review, person.reviewer, asked.lease, asked.reason, asked.mode)
        return {}

    async def would_create(person: Person, asked: Answered) -> Any:
        work = await assignment(service.review, person.reviewer, asked.lease)
        rows = preview(work, asked.answers)
        return {"html": await aside(fragment, "preview.html", rows=rows)}

    async def raise_flag(person: Person, asked: Flagged) -> Any:
        await flag(
            service.review,
            service.pseudonym_key,
            person.reviewer,
            asked.lease,
            asked.event_id,
            asked.label,
            asked.note,
        )
        return {}

    async def look_back(person: Person, asked: OfItem) -> Any:
        item = await reviewed(service.review, person.reviewer, asked.item_id)
        return {"html": await aside(fragment, "past.html", item=item, person=person)}

    async def decide(person: Person, asked: Decided) -> Any:
        events = await adjudicate(
            service.review,
            service.pseudonym_key,
            person.reviewer,
            asked.item_id,
            asked.answers,
            pick=asked.pick,
        )
        return {"events": len(events)}

    return [
        page_route(sessions, "/review/{queue_id:uuid}", show_review),
        page_route(sessions, "/review/{queue_id:uuid}/adjudicate", show_adjudication),
        call_route(sessions, "/review/api/progress", OfQueue, progress),
        call_route(sessions, "/review/api/claim", OfQueue, take),
        call_route(sessions, "/review/api/extend", Held, keep),
        call_route(sessions, "/review/api/submit", Answered, finish),
        call_route(sessions, "/review/api/skip", Skipped, pass_on),
        call_route(sessions, "/review/api/preview", Answered, would_create),
        call_route(sessions, "/review/api/flag", Flagged, raise_flag),
        call_route(sessions, "/review/api/reviewed", OfItem, look_back),
        call_route(sessions, "/review/api/adjudicate", Decided, decide),
    ]


def _item(work: Assignment) -> dict[str, Any]:
    """What the page needs of an item: its two panes as HTML, and the plain output for prefill and difference."""
    return _lease(work.lease) | {
        "title": title(work.interaction),
        "output": work.interaction.get("output") or "",
        "centre": fragment("item.html", item=work),
        "questions": fragment("questions.html", rubric=work.queue.rubric),
    }


async def _answered(service: Service, person: Person, queue_id: UUID) -> list[dict[str, Any]]:
    """The items that this person answered last, oldest first, as the page's list of items holds them."""
    # Of long conversations only the start of what was asked last leaves the database.
    rows = await fetch(
        service.review,
        "SELECT r.item_id, (SELECT left(m ->> 'content', $4)"
        " FROM jsonb_array_elements(x.messages) WITH ORDINALITY AS listed (m, place)"
        " ORDER BY m ->> 'role' = 'user' DESC, place DESC LIMIT 1) AS asked"
        " FROM feedback.review_response AS r JOIN feedback.review_item AS i ON i.item_id = r.item_id"
        " JOIN feedback.interaction AS x ON x.interaction_id = i.interaction_id"
        " WHERE i.queue_id = $1 AND r.reviewer = $2 AND r.slot > 0 ORDER BY r.submitted_at DESC LIMIT $3",
        queue_id,
        person.reviewer.name,
        REMEMBERED,
        10 * TITLE_LENGTH,
    )
    return [
        {"id": row["item_id"], "title": _short(row["asked"] or ""), "state": "done"} for row in reversed(rows)
    ]


def _lease(lease: Lease) -> dict[str, Any]:
    """The lease, and how long it still holds by this clock: the browser's may be wrong."""
    return {"lease": lease, "seconds_left": (lease.expires_at - datetime.now(UTC)).total_seconds()}


def title(interaction: Mapping[str, Any]) -> str:
    """An item in one line: the start of the last thing that was asked."""
    asked = [message["content"] for message in interaction["messages"] if message["role"] == "user"]
    return _short((asked or [interaction["messages"][-1]["content"]])[-1])


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= TITLE_LENGTH else words[: TITLE_LENGTH - 1].rstrip() + "…"

"""The queues: how far along each is, making one, and the rules that fill it.

Belongs here: ``/review``, ``/review/new``, ``/review/{queue}/rules`` and what their scripts ask for. Reviewers read,
a key with scope admin changes. Does not belong here: reviewing (``feedback.pages.review``), what rules find.
"""

import asyncio
from dataclasses import asdict
from typing import Any
from uuid import UUID

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from feedback.log import fetch
from feedback.pages.session import Person, Sessions
from feedback.pages.views import call_route, page, page_route, require_admin
from feedback.review.estimates import Estimate, control_estimate, has_estimate
from feedback.review.queues import (
    MAX_LEASE_SECONDS,
    MAX_WINDOW_DAYS,
    NoSuchQueue,
    Queue,
    QueueStatus,
    close_queue,
    create_queue,
    get_queue,
    list_queues,
)
from feedback.review.rubric import Question
from feedback.review.rules import (
    PARAMS,
    Rule,
    disable_rule,
    dry_run,
    fill,
    list_rules,
    save_rule,
)
from feedback.service import Service

DRY_RUN_DAYS = 7

RULES = {
    "low_score": ("Low score", "Any rating or thumb below", "below"),
    "judge_disagreement": (
        "People and judge disagree",
        "A person's score and an LLM's differ by at least",
        "at_least",
    ),
    "high_edit_distance": (
        "Heavily edited",
        "The share of the output that its user kept is below",
        "retained_below",
    ),
    "rare_cluster": ("Rare question", "Questions like it are a smaller share of all than", "share_below"),
    "flag": ("Flagged", "Somebody flagged it", None),
}
"""How each kind of rule is called, what it looks for, and its one parameter."""

QUESTION_KINDS = {
    "choice": "one of several options",
    "score": "a grade: options from worst to best, or a number from 0 to 1",
    "text": "free text",
    "correction": "the right answer",
    "golden": "make it a golden case, yes or no",
}


class NewQueue(msgspec.Struct, forbid_unknown_fields=True):
    """What the form of a new queue sends."""

    name: str
    rubric: list[Question]
    description: str = ""
    overlap: int = 1
    blind: bool = False
    lease_minutes: float = 10
    control_percent: float = 2
    window_days: int = 30


class OfQueue(msgspec.Struct, forbid_unknown_fields=True):
    queue_id: UUID


class RuleOfQueue(msgspec.Struct, forbid_unknown_fields=True):
    queue_id: UUID
    rule: Rule


class OldRule(msgspec.Struct, forbid_unknown_fields=True):
    queue_id: UUID
    rule_id: UUID


async def queue_of(service: Service, person: Person, queue_id: UUID) -> Queue:
    """The queue, if it is one of the person's app. Raises NoSuchQueue."""
    queue = await get_queue(service.review, queue_id)
    if queue.app != person.caller.app:
        raise NoSuchQueue(f"There is no queue {queue_id}")
    return queue


async def _estimates(service: Service, queue: Queue) -> list[Estimate]:
    """What the control sample says about the first question it can say something about."""
    for question in queue.rubric:
        if has_estimate(question):
            return await control_estimate(service.review, queue.queue_id, question.name)
    return []


async def _reviewers(service: Service) -> dict[UUID, int]:
    """How many people have answered items of each queue."""
    rows = await fetch(
        service.review,
        "SELECT i.queue_id, count(DISTINCT r.reviewer) FROM feedback.review_response AS r"
        " JOIN feedback.review_item AS i ON i.item_id = r.item_id WHERE r.slot > 0 GROUP BY i.queue_id",
    )
    return {row[0]: row[1] for row in rows}


def routes(service: Service, sessions: Sessions) -> list[Route]:
    # A dry run reads a week of the log: several at once would take the connections that reviewing needs.
    trying = asyncio.Lock()

    async def show_queues(_: Request, person: Person) -> Response:
        found: list[tuple[QueueStatus, list[Estimate]]] = [
            (status, await _estimates(service, status.queue))
            for status in await list_queues(service.review, person.caller.app)
        ]
        return page("queues.html", person, queues=found, reviewers=await _reviewers(service))

    async def show_new(_: Request, person: Person) -> Response:
        require_admin(person)
        return page("new_queue.html", person, kinds=QUESTION_KINDS, max_window_days=MAX_WINDOW_DAYS)

    async def show_rules(request: Request, person: Person) -> Response:
        queue = await queue_of(service, person, request.path_params["queue_id"])
        rules = await list_rules(service.review, queue.queue_id)
        return page(
            "rules.html", person, queue=queue, rules=rules, kinds=RULES, defaults=PARAMS, days=DRY_RUN_DAYS
        )

    async def create(person: Person, new: NewQueue) -> Any:
        require_admin(person)
        # What is out of range stays so, as a whole number, and is refused with the range.
        seconds = round(max(0, min(new.lease_minutes * 60, MAX_LEASE_SECONDS + 1)))
        queue = await create_queue(
            service.admin,
            actor=person.actor,
            name=new.name,
            app=person.caller.app,
            rubric=new.rubric,
            description=new.description,
            overlap=new.overlap,
            blind=new.blind,
            lease_seconds=seconds,
            control_rate=new.control_percent / 100,
            window_days=new.window_days,
        )
        return {"queue_id": queue.queue_id}

    async def try_rule(person: Person, asked: RuleOfQueue) -> Any:
        require_admin(person)
        await queue_of(service, person, asked.queue_id)
        async with trying:
            found = asdict(await dry_run(service.review, asked.queue_id, asked.rule, DRY_RUN_DAYS))
        return {
            "sentence": "Would have queued {would_queue:,} of {total:,} last week.".format(**found)
        } | found

    async def add_rule(person: Person, asked: RuleOfQueue) -> Any:
        require_admin(person)
        await queue_of(service, person, asked.queue_id)
        saved = await save_rule(service.admin, asked.queue_id, asked.rule, actor=person.actor)
        return {"rule_id": saved.rule_id}

    async def stop_rule(person: Person, asked: OldRule) -> Any:
        require_admin(person)
        queue = await queue_of(service, person, asked.queue_id)
        if asked.rule_id not in {saved.rule_id for saved in await list_rules(service.review, queue.queue_id)}:
            raise NoSuchQueue(f"Queue {queue.name} has no rule {asked.rule_id}")
        await disable_rule(service.admin, asked.rule_id, actor=person.actor)
        return {}

    async def fill_queue(person: Person, asked: OfQueue) -> Any:
        require_admin(person)
        await queue_of(service, person, asked.queue_id)
        queued = sum(filled.queued for filled in await fill(service.review, asked.queue_id))
        return {"sentence": f"Queued {queued:,} new {'item' if queued == 1 else 'items'}."}

    async def close(person: Person, asked: OfQueue) -> Any:
        require_admin(person)
        await queue_of(service, person, asked.queue_id)
        await close_queue(service.admin, asked.queue_id, actor=person.actor)
        return {}

    return [
        page_route(sessions, "/review", show_queues),
        page_route(sessions, "/review/new", show_new),
        page_route(sessions, "/review/{queue_id:uuid}/rules", show_rules),
        call_route(sessions, "/review/api/create", NewQueue, create),
        call_route(sessions, "/review/api/try-rule", RuleOfQueue, try_rule),
        call_route(sessions, "/review/api/add-rule", RuleOfQueue, add_rule),
        call_route(sessions, "/review/api/stop-rule", OldRule, stop_rule),
        call_route(sessions, "/review/api/fill", OfQueue, fill_queue),
        call_route(sessions, "/review/api/close", OfQueue, close),
    ]

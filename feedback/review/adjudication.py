"""Adjudication: reviewers answered differently, one more person decides.

Belongs here: reading the answers side by side, the final events.
Does not belong here: which answers differ (``feedback.review.rubric``), measuring agreement (``.agreement``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from feedback import log
from feedback.review import Reviewer
from feedback.review.database import Connection, fetch, transaction
from feedback.review.leases import Item, Lease, note, read_item
from feedback.review.queues import Queue
from feedback.review.rubric import AnswerRefused, differing
from feedback.review.submissions import ADJUDICATION, read_answers, rows_of, set_state, write_response


@dataclass(frozen=True)
class Response:
    """One person's submission, by question name; the adjudicator's has slot 0."""

    slot: int
    reviewer: str
    submitted_at: datetime
    answers: Mapping[str, Any]
    event_ids: tuple[UUID, ...]


@dataclass(frozen=True)
class Reviewed:
    """An item with every submission so far; ``differing`` are the questions on which reviewers differ.

    ``interaction``, ``feedback``, ``why`` as in Assignment, nothing hidden.
    """

    item_id: UUID
    queue: Queue
    state: str
    interaction: Mapping[str, Any]
    feedback: tuple[Mapping[str, Any], ...]
    why: tuple[Mapping[str, Any], ...]
    control: bool
    responses: tuple[Response, ...]
    differing: tuple[str, ...]


class NotYet(Exception):
    """What others said about an item is shown only after one's own answers."""


class NoSuchItem(LookupError):
    """There is no such item in a queue of this app."""


class AlreadyDecided(Exception):
    """The item does not wait for a decision (any more)."""


class OwnAnswers(Exception):
    """Who has answered an item is a party to the difference, and does not decide it."""


async def reviewed(pool: log.Pool, reviewer: Reviewer, item_id: UUID) -> Reviewed:
    """The item with all submissions: for those who have submitted, for all when it is complete, for all in a queue that
    is not blind. Raises NoSuchItem, NotYet.
    """
    async with transaction(pool) as connection:
        item = await _item(connection, reviewer, item_id)
        answers = await read_answers(connection, item)
        responses = tuple(
            Response(
                row["slot"],
                row["reviewer"],
                row["submitted_at"],
                answers.get(row["slot"], {}),
                tuple(row["event_ids"]),
            )
            for row in await connection.fetch(
                "SELECT slot, reviewer, submitted_at, event_ids FROM feedback.review_response"
                " WHERE item_id = $1 ORDER BY slot",
                item_id,
            )
        )
    own = any(response.reviewer == reviewer.name for response in responses)
    if item.queue.blind and item.state == "open" and not own:
        raise NotYet("This queue is blind: what others said is shown after your own answers")
    given = [response.answers for response in responses if response.slot != ADJUDICATION]
    return Reviewed(
        item_id,
        item.queue,
        item.state,
        item.interaction,
        item.feedback,
        item.why,
        item.control,
        responses,
        differing(item.queue.rubric, given),
    )


async def to_adjudicate(
    pool: log.Pool, queue_id: UUID, limit: int = 100, *, by: Reviewer | None = None
) -> list[UUID]:
    """Items whose answers differ, oldest first; with ``by`` only those that this person has not answered."""
    rows = await fetch(
        pool,
        "SELECT i.item_id FROM feedback.review_item AS i WHERE i.queue_id = $1 AND i.state = 'to_adjudicate'"
        " AND NOT EXISTS (SELECT FROM feedback.review_response AS r WHERE r.item_id = i.item_id AND r.reviewer = $3)"
        " ORDER BY i.queued_at, i.item_id LIMIT $2",
        queue_id,
        limit,
        by and by.name,
    )
    return [row["item_id"] for row in rows]


async def adjudicate(
    pool: log.Pool,
    pseudonym_key: bytes,
    adjudicator: Reviewer,
    item_id: UUID,
    answers: Mapping[str, Any] | None = None,
    *,
    pick: int | None = None,
) -> list[UUID]:
    """Decide an item: ``pick`` the slot whose answers hold, or give merged ``answers``. Ids of the final events, whose
    author_role is adjudicator; what the reviewers said stays as it was.

    Raises NoSuchItem, AlreadyDecided, OwnAnswers, AnswerRefused.
    """
    if (pick is None) == (answers is None):
        raise AnswerRefused("pick", "is needed, or answers are, and not both", "Pick a slot or send answers")
    async with transaction(pool) as connection:
        await connection.execute(
            "SELECT FROM feedback.review_item WHERE item_id = $1 FOR NO KEY UPDATE", item_id
        )
        item = await _item(connection, adjudicator, item_id)
        if item.state != "to_adjudicate":
            raise AlreadyDecided(f"item {item_id} does not wait for a decision: it is {item.state}")
        if await connection.fetchval(
            "SELECT EXISTS (SELECT FROM feedback.review_response WHERE item_id = $1 AND reviewer = $2)",
            item_id,
            adjudicator.name,
        ):
            raise OwnAnswers("You have answered this item yourself: somebody else decides it")
        if pick is not None:
            given = await read_answers(connection, item)
            if pick not in given:
                raise AnswerRefused("pick", f"slot {pick} has no answers", "Pick a slot that was submitted")
            answers = given[pick]
        # The adjudicator has seen every vote, and decides.
        rows = rows_of(item, pseudonym_key, adjudicator, ADJUDICATION, 0, answers or {}, disliked=False)
        event_ids = await write_response(connection, adjudicator, item, ADJUDICATION, rows)
        await set_state(connection, item_id, "adjudicated")
        decision = Lease(item_id, ADJUDICATION, 0, datetime.max)
        await note(
            connection, adjudicator, decision, "adjudicated", reason=f"slot {pick}" if pick else "merged"
        )
    return event_ids


async def _item(connection: Connection, reviewer: Reviewer, item_id: UUID) -> Item:
    try:
        item = await read_item(connection, item_id)
    except LookupError:
        item = None
    if item is None or item.queue.app != reviewer.app:
        raise NoSuchItem(f"there is no item {item_id} of app {reviewer.app}")
    return item

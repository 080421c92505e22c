"""Submissions: a reviewer's answers become feedback events, or a skip with its reason; a flag does at any time.

Belongs here: submit, skip, flag, and writing the events that answers become. Does not belong here: which answers are valid
(``feedback.review.rubric``), several reviewers' answers together (``feedback.review.adjudication``).

The ids of the events follow from item, slot, fence and question. A submission that is sent again, because its answer
got lost on the way, therefore finds itself and is answered the same.
"""

import hashlib
import hmac
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Literal, get_args
from uuid import UUID, uuid5

import msgspec

from feedback import log
from feedback.access import Caller
from feedback.capture import prepare_event
from feedback.payloads import PayloadError
from feedback.review import Reviewer
from feedback.review.database import Connection, transaction
from feedback.review.leases import Item, Lease, LostLease, free, held, hold, lost, note, read_item
from feedback.review.rubric import AnswerRefused, answer_of, check_answers, differing, event_of, is_text

SkipMode = Literal["later", "others", "cannot_judge"]
MAX_REASON = 1_000
ADJUDICATION = 0
"""The slot that stands for the adjudicator."""


async def submit(
    pool: log.Pool, pseudonym_key: bytes, reviewer: Reviewer, lease: Lease, answers: Mapping[str, Any]
) -> list[UUID]:
    """Commit the answers and end the lease; ids of the feedback events written. A retry is answered the same.

    Raises LostLease, AnswerRefused.
    """
    async with transaction(pool) as connection:
        try:
            await hold(connection, reviewer, lease)
        except LostLease:
            return await _submitted_before(connection, pseudonym_key, reviewer, lease, answers)
        item = await read_item(connection, lease.item_id)
        rows = rows_of(
            item, pseudonym_key, reviewer, lease.slot, lease.fence, answers, disliked=item.disliked
        )
        event_ids = await write_response(connection, reviewer, item, lease.slot, rows)
        await _finish(connection, item, lease, "submitted")
        await note(connection, reviewer, lease, "submitted")
    return event_ids


async def skip(pool: log.Pool, reviewer: Reviewer, lease: Lease, reason: str, mode: SkipMode) -> None:
    """End the lease without answers. later: this reviewer sees it again, last; others: only others do;
    cannot_judge: the slot is used up. A reason is needed. Raises LostLease, AnswerRefused.
    """
    if mode not in get_args(SkipMode):
        raise AnswerRefused("mode", f"{mode!r} is unknown", f"Use one of: {', '.join(get_args(SkipMode))}")
    if not is_text(reason, MAX_REASON):
        raise AnswerRefused("reason", "is empty or too long", f"Say why, in 1 to {MAX_REASON} characters")
    async with transaction(pool) as connection:
        await hold(connection, reviewer, lease)
        if mode == "cannot_judge":
            await _finish(connection, await read_item(connection, lease.item_id), lease, mode)
        else:
            await free(connection, lease)
        await note(connection, reviewer, lease, "skipped", mode, reason.strip())


async def flag(
    pool: log.Pool,
    pseudonym_key: bytes,
    reviewer: Reviewer,
    lease: Lease,
    event_id: UUID,
    label: str,
    note: str,
) -> None:
    """Flag the item of a lease, which goes on. ``event_id``, a UUIDv7, is the caller's: a retry adds nothing.

    Raises LostLease, AnswerRefused.
    """
    event = {"event_id": str(event_id), "kind": "flag", "label": label, "explanation": note.strip() or None}
    async with transaction(pool) as connection:
        await hold(connection, reviewer, lease)
        item = await read_item(connection, lease.item_id)
        row = _row(item, pseudonym_key, reviewer, lease.slot, event, {}, "label", item.read_at)
        if not await connection.fetch(log.EVENTS.insert, msgspec.json.encode([row]).decode()):
            stored = await connection.fetchval(
                "SELECT body_sha256 FROM feedback.feedback_event WHERE event_id = $1", event_id
            )
            if stored != row["body_sha256"]:
                raise AnswerRefused(
                    "label", "this flag was taken with other words", "Close and flag again to add one"
                )


def rows_of(
    item: Item,
    pseudonym_key: bytes,
    reviewer: Reviewer,
    slot: int,
    fence: int,
    answers: Mapping[str, Any],
    *,
    disliked: bool,
) -> list[log.Row]:
    """The rows of the log that answers become, made and checked as those of the API are. Raises AnswerRefused."""
    output = item.interaction["output"]
    given = check_answers(item.queue.rubric, answers, output=output, disliked=disliked)
    # Before the moment of arrival, which the fold would take instead.
    now = item.read_at - timedelta(milliseconds=1)
    rows = []
    # A correction comes last in time: of several votes by one person the latest counts.
    for question in sorted(item.queue.rubric, key=lambda question: question.kind == "correction"):
        if question.name not in given:
            continue
        now += timedelta(microseconds=1)
        event_id = str(uuid5(item.item_id, f"{slot} {fence} {question.name}"))
        event = event_of(question, given[question.name]) | {"event_id": event_id}
        about = {"question": question.title}
        rows.append(_row(item, pseudonym_key, reviewer, slot, event, about, question.name, now))
    return rows


def reviewers_key(pseudonym_key: bytes) -> bytes:
    """What reviewers' names are turned into pseudonyms with: no id that a product sends gives the same one."""
    return hmac.digest(pseudonym_key, b"datamoat reviewers", hashlib.sha256)


def _row(
    item: Item,
    pseudonym_key: bytes,
    reviewer: Reviewer,
    slot: int,
    event: Mapping[str, Any],
    about: Mapping[str, Any],
    field: str,
    now: datetime,
) -> log.Row:
    """The row of the log that says ``event`` on an item; ``field`` is what a refusal names. Raises AnswerRefused."""
    complete = {
        **event,
        "interaction_id": item.interaction["interaction_id"],
        "session_id": item.interaction["session_id"],
        "author_id": reviewer.name,
        "author_role": "reviewer" if slot else "adjudicator",
        "metadata": {
            "queue_id": str(item.queue.queue_id),
            "item_id": str(item.item_id),
            "slot": slot,
            **about,
        },
    }
    caller = Caller(reviewer.key_id, reviewer.app, ("review",), reviewer.name)
    try:
        return prepare_event(msgspec.json.encode(complete), caller, reviewers_key(pseudonym_key), now).row
    except PayloadError as error:
        raise AnswerRefused(field, error.message, error.remedy or "Answer otherwise") from None
    except UnicodeEncodeError:
        raise AnswerRefused(field, "holds half a character", "Send valid UTF-8") from None


async def write_response(
    connection: Connection, reviewer: Reviewer, item: Item, slot: int, rows: list[log.Row]
) -> list[UUID]:
    """Add events to the log and the response that they make up."""
    written = await connection.fetch(log.EVENTS.insert, msgspec.json.encode(rows).decode())
    if len(written) != len(rows):
        raise RuntimeError(
            f"item {item.item_id}, slot {slot}: events of this submission are in the log already"
        )
    event_ids = [UUID(row["event_id"]) for row in rows]
    await connection.execute(
        "INSERT INTO feedback.review_response (item_id, slot, reviewer, event_ids) VALUES ($1, $2, $3, $4)",
        item.item_id,
        slot,
        reviewer.name,
        event_ids,
    )
    return event_ids


async def set_state(connection: Connection, item_id: UUID, state: str) -> None:
    await connection.execute("UPDATE feedback.review_item SET state = $2 WHERE item_id = $1", item_id, state)


async def read_answers(connection: Connection, item: Item) -> dict[int, dict[str, Any]]:
    """What was answered so far, by slot and question, read back from the events."""
    rows = await connection.fetch(
        "SELECT r.slot, e.name, e.score, e.label, e.explanation, e.correction FROM feedback.review_response AS r"
        " JOIN feedback.feedback_event AS e ON e.event_id = ANY (r.event_ids) WHERE r.item_id = $1 ORDER BY r.slot",
        item.item_id,
    )
    questions = {question.name: question for question in item.queue.rubric}
    answers: dict[int, dict[str, Any]] = {}
    for row in rows:
        answers.setdefault(row["slot"], {})[row["name"]] = answer_of(questions[row["name"]], row)
    return answers


async def _finish(connection: Connection, item: Item, lease: Lease, outcome: str) -> None:
    """Use the slot up; after the last one, say what has become of the item."""
    await connection.execute(
        "UPDATE feedback.review_slot SET done_at = clock_timestamp(), outcome = $3 WHERE item_id = $1 AND slot = $2",
        lease.item_id,
        lease.slot,
        outcome,
    )
    waiting = await connection.fetchval(
        "SELECT count(*) FROM feedback.review_slot WHERE item_id = $1 AND done_at IS NULL", lease.item_id
    )
    if not waiting:
        responses = list((await read_answers(connection, item)).values())
        if not responses:
            state = "skipped"
        else:
            state = "to_adjudicate" if differing(item.queue.rubric, responses) else "done"
        await set_state(connection, lease.item_id, state)


async def _submitted_before(
    connection: Connection,
    pseudonym_key: bytes,
    reviewer: Reviewer,
    lease: Lease,
    answers: Mapping[str, Any],
) -> list[UUID]:
    """The event ids of the same submission by the same reviewer under the same lease. Raises LostLease."""
    row = await connection.fetchrow(
        "SELECT r.event_ids FROM feedback.review_slot AS s"
        " JOIN feedback.review_response AS r ON r.item_id = s.item_id AND r.slot = s.slot"
        " JOIN feedback.review_item AS i ON i.item_id = s.item_id"
        " JOIN feedback.review_queue AS q ON q.queue_id = i.queue_id"
        " WHERE s.item_id = $1 AND s.slot = $2 AND s.fence = $3 AND s.reviewer = $4 AND q.app = $5"
        " AND s.outcome = 'submitted'",
        *held(reviewer, lease),
    )
    if row is None:
        raise lost()
    item = await read_item(connection, lease.item_id)
    # Votes that came after the submission do not make it wrong.
    rows = rows_of(item, pseudonym_key, reviewer, lease.slot, lease.fence, answers, disliked=False)
    stored = await connection.fetch(
        "SELECT event_id::text, body_sha256 FROM feedback.feedback_event WHERE event_id = ANY ($1)",
        row["event_ids"],
    )
    if {(row["event_id"], row["body_sha256"]) for row in rows} != {tuple(kept) for kept in stored}:
        raise LostLease(
            "This item was submitted with other answers: what was said is not changed, claim again"
        )
    return list(row["event_ids"])

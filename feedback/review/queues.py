"""Queues: what is to be judged by whom, how often, and how far along it is.

Belongs here: making, closing, reading queues and their figures.
Does not belong here: what gets into a queue (``feedback.review.rules``), who works on it (``.leases``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from feedback import log
from feedback.ids import uuid7
from feedback.review import rubric as rubrics
from feedback.review.agreement import Level, krippendorff_alpha
from feedback.review.database import fetch, transaction
from feedback.review.rubric import Question, RubricRefused, check_rubric, is_text

MAX_OVERLAP = 20
MAX_DESCRIPTION = 10_000
MIN_LEASE_SECONDS, MAX_LEASE_SECONDS = 1, 86_400
MAX_WINDOW_DAYS = 3_660
AGREEMENT_ITEMS = 2_000
"""Agreement is measured over this many items with several answers, the latest."""

_COLUMNS = (
    "queue_id, name, app, description, rubric, overlap, blind, lease_seconds, control_rate, window_days, "
    "created_at, closed_at"
)


class NoSuchQueue(LookupError):
    """There is no queue with this id."""


@dataclass(frozen=True)
class Queue:
    """A queue of one app. Nothing about it changes after it was made, so answers stay comparable; it can be closed.

    ``overlap`` reviewers judge each item. ``blind`` hides other people's opinions, the reason why an item is there and
    which model answered until one's own answers are in. ``control_rate`` (0 to 1) is the share of *all* interactions
    that is reviewed whatever the rules say: rates are estimated from these alone. ``window_days``: how far back it looks.
    """

    queue_id: UUID
    name: str
    app: str
    description: str
    rubric: tuple[Question, ...]
    overlap: int
    blind: bool
    lease_seconds: int
    control_rate: float
    window_days: int
    created_at: datetime
    closed_at: datetime | None


@dataclass(frozen=True)
class QueueStatus:
    """A queue with its figures. Items: ``open`` (nobody works on it), ``leased``, ``done``, ``skipped`` (nobody could
    judge it), ``to_adjudicate``. ``p90_age_seconds`` is of items that still wait, None without any.

    ``agreement`` maps choice, score and golden questions to Krippendorff's alpha over items with two or more answers;
    None when there are too few or the answers never vary.
    """

    queue: Queue
    open: int
    leased: int
    done: int
    skipped: int
    to_adjudicate: int
    p90_age_seconds: float | None
    agreement: Mapping[str, float | None]


async def create_queue(
    pool: log.Pool,
    *,
    actor: str,
    name: str,
    app: str,
    rubric: Sequence[Question],
    description: str = "",
    overlap: int = 1,
    blind: bool = False,
    lease_seconds: int = 600,
    control_rate: float = 0.02,
    window_days: int = 30,
) -> Queue:
    """Make a queue (``pool``: the admin pool; ``actor``: who, for the audit). Raises RubricRefused."""
    for field, text, limit in (
        ("name", name, 200),
        ("app", app, 200),
        ("description", description or "none", MAX_DESCRIPTION),
    ):
        if not is_text(text, limit):
            raise RubricRefused(
                field, "is empty, too long or no valid text", f"Give it 1 to {limit} characters"
            )
    for field, value, low, high in (
        ("overlap", overlap, 1, MAX_OVERLAP),
        ("lease_seconds", lease_seconds, MIN_LEASE_SECONDS, MAX_LEASE_SECONDS),
        ("control_rate", control_rate, 0, 1),
        ("window_days", window_days, 1, MAX_WINDOW_DAYS),
    ):
        if not low <= value <= high:
            raise RubricRefused(field, f"is {value}", f"Give a number from {low} to {high}")
    check_rubric(rubric)
    async with transaction(pool, actor) as connection:
        row = await connection.fetchrow(
            f"INSERT INTO feedback.review_queue ({_COLUMNS})"
            " VALUES ($1, $2, $3, $4, $5::jsonb, $6, $7, $8, $9, $10, default, default)"
            f" RETURNING {_COLUMNS}",
            uuid7(),
            name,
            app,
            description,
            rubrics.to_json(rubric),
            overlap,
            blind,
            lease_seconds,
            control_rate,
            window_days,
        )
    return queue_of(row)


async def close_queue(pool: log.Pool, queue_id: UUID, *, actor: str) -> Queue:
    """Take no more items and hand out no more work; what was answered stays. Admin pool. Raises NoSuchQueue."""
    async with transaction(pool, actor) as connection:
        await connection.execute(
            "UPDATE feedback.review_queue SET closed_at = now() WHERE queue_id = $1 AND closed_at IS NULL",
            queue_id,
        )
    return await get_queue(pool, queue_id)


async def get_queue(pool: log.Pool, queue_id: UUID) -> Queue:
    """Raises NoSuchQueue. Review or admin pool."""
    rows = await fetch(pool, f"SELECT {_COLUMNS} FROM feedback.review_queue WHERE queue_id = $1", queue_id)
    if not rows:
        raise NoSuchQueue(f"there is no queue {queue_id}")
    return queue_of(rows[0])


async def list_queues(pool: log.Pool, app: str | None = None) -> list[QueueStatus]:
    """All queues (of one app), oldest first, closed ones last, each with its figures. Review pool."""
    statuses = []
    for row in await fetch(pool, _FIGURES, app):
        queue = queue_of(row)
        figures = {name: row[name] for name in ("open", "leased", "done", "skipped", "to_adjudicate")}
        age = row["p90_age_seconds"]
        statuses.append(
            QueueStatus(queue, **figures, p90_age_seconds=age, agreement=await _agreement(pool, queue))
        )
    return statuses


async def list_open(pool: log.Pool) -> list[Queue]:
    """The queues that are not closed, oldest first."""
    rows = await fetch(
        pool,
        f"SELECT {_COLUMNS} FROM feedback.review_queue WHERE closed_at IS NULL ORDER BY created_at, queue_id",
    )
    return [queue_of(row) for row in rows]


def queue_of(row: Mapping[str, Any]) -> Queue:
    """The queue in a row that holds the columns of ``review_queue``."""
    fields = {name: row[name] for name in Queue.__dataclass_fields__}
    return Queue(**fields | {"rubric": rubrics.from_json(row["rubric"])})


async def _agreement(pool: log.Pool, queue: Queue) -> dict[str, float | None]:
    levels: dict[str, Level] = {}
    for question in queue.rubric:
        if question.kind in ("choice", "golden"):
            levels[question.name] = "nominal"
        elif question.kind == "score":
            levels[question.name] = "ordinal" if question.options else "interval"
    answers: dict[str, list[list[Any]]] = {name: [] for name in levels}
    if queue.overlap > 1 and levels:
        for row in await fetch(pool, _ANSWERS, queue.queue_id, list(levels), AGREEMENT_ITEMS):
            column = "labels" if levels[row["name"]] == "nominal" else "scores"
            answers[row["name"]].append(row[column])
    return {name: krippendorff_alpha(answers[name], level) for name, level in levels.items()}


_FIGURES = f"""
    SELECT {", ".join(f"q.{column}" for column in _COLUMNS.split(", "))}, coalesce(f.open, 0) AS open,
        coalesce(f.leased, 0) AS leased, coalesce(f.done, 0) AS done, coalesce(f.skipped, 0) AS skipped,
        coalesce(f.to_adjudicate, 0) AS to_adjudicate, f.p90_age_seconds
    FROM feedback.review_queue AS q
    LEFT JOIN (
        SELECT i.queue_id,
            count(*) FILTER (WHERE i.state = 'open' AND l.item_id IS NULL) AS open,
            count(l.item_id) AS leased,
            count(*) FILTER (WHERE i.state IN ('done', 'adjudicated')) AS done,
            count(*) FILTER (WHERE i.state = 'skipped') AS skipped,
            count(*) FILTER (WHERE i.state = 'to_adjudicate') AS to_adjudicate,
            percentile_cont(0.9) WITHIN GROUP (ORDER BY extract(epoch FROM now() - i.queued_at)::double precision)
                FILTER (WHERE i.state = 'open') AS p90_age_seconds
        FROM feedback.review_item AS i
        LEFT JOIN (
            SELECT DISTINCT item_id FROM feedback.review_slot
            WHERE done_at IS NULL AND reviewer IS NOT NULL AND leased_until > now()
        ) AS l ON l.item_id = i.item_id
        GROUP BY i.queue_id
    ) AS f ON f.queue_id = q.queue_id
    WHERE $1::text IS NULL OR q.app = $1
    ORDER BY q.closed_at IS NOT NULL, q.created_at, q.queue_id
"""

_ANSWERS = """
    WITH several AS (
        SELECT r.item_id
        FROM feedback.review_response AS r JOIN feedback.review_item AS i ON i.item_id = r.item_id
        WHERE i.queue_id = $1 AND r.slot > 0
        GROUP BY r.item_id
        HAVING count(*) > 1
        ORDER BY max(r.submitted_at) DESC
        LIMIT $3
    )
    SELECT e.name, array_agg(e.label) AS labels, array_agg(e.score) AS scores
    FROM several
    JOIN feedback.review_response AS r ON r.item_id = several.item_id AND r.slot > 0
    JOIN feedback.feedback_event AS e ON e.event_id = ANY (r.event_ids)
    WHERE e.name = ANY ($2::text[])
    GROUP BY several.item_id, e.name
"""

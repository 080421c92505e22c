"""Estimates from the control sample: rates that hold for all interactions, not for what rules picked.

Belongs here: rates with their interval and n. Does not belong here: dashboards over all feedback (dbt).

Why they are unbiased: the control sample is drawn by a hash of the id alone, and its items keep their place in line
whatever rules add to them, so which of them have been judged by now does not depend on what the rules found.
"""

import math
from collections import Counter
from dataclasses import dataclass
from uuid import UUID

from feedback import log
from feedback.review.database import fetch
from feedback.review.queues import get_queue
from feedback.review.rubric import Question, answer_of

MIN_N = 30
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """Of ``n`` judged control items, share ``rate`` got ``label``, with its 95 % Wilson interval; None below MIN_N
    items ("not enough data"). ``waiting`` control items are not judged yet, ``not_judged`` could not be or were left
    without an answer to this question.
    """

    question: str
    label: str
    n: int
    rate: float | None
    low: float | None
    high: float | None
    waiting: int
    not_judged: int


def wilson(successes: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927). Raises ValueError unless 0 <= successes <= n, n > 0."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} of {n} is no proportion")
    share = successes / n
    centre = share + z * z / (2 * n)
    margin = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


def has_estimate(question: Question) -> bool:
    """Whether a question has fixed answers, whose shares can be estimated; free text and plain numbers have none."""
    return bool(question.options) or question.kind == "golden"


async def control_estimate(pool: log.Pool, queue_id: UUID, question: str) -> list[Estimate]:
    """One estimate per fixed answer to a question that ``has_estimate``, from control items alone. Review pool.

    Where reviewers differed, the adjudicator's answer counts, and until then the item waits.
    Raises NoSuchQueue, ValueError when the queue has no such question or it has no options.
    """
    queue = await get_queue(pool, queue_id)
    asked = next((q for q in queue.rubric if q.name == question), None)
    if asked is None or not has_estimate(asked):
        raise ValueError(f"{question}: queue {queue.name} has no question of this name with fixed options")
    rows = await fetch(pool, _CONTROL, queue_id, question)
    waiting = sum(row["count"] for row in rows if row["state"] in ("open", "to_adjudicate"))
    judged = Counter[str]()
    not_judged = 0
    for row in rows:
        if row["state"] not in ("open", "to_adjudicate"):
            if row["label"] is None:
                not_judged += row["count"]
            else:
                answer = answer_of(asked, row)
                judged[("no", "yes")[answer] if asked.kind == "golden" else answer] += row["count"]
    n = judged.total()
    estimates = []
    for label in asked.options or ("yes", "no"):
        low, high = wilson(judged[label], n) if n >= MIN_N else (None, None)
        rate = judged[label] / n if n >= MIN_N else None
        estimates.append(Estimate(question, label, n, rate, low, high, waiting, not_judged))
    return estimates


# One answer per item: slot 0 is the adjudicator's, and without one the reviewers said the same.
_CONTROL = """
    SELECT i.state, a.label, count(*) AS count
    FROM feedback.review_item AS i
    LEFT JOIN LATERAL (
        SELECT e.label
        FROM feedback.review_response AS r
        JOIN feedback.feedback_event AS e ON e.event_id = ANY (r.event_ids)
        WHERE r.item_id = i.item_id AND e.name = $2
        ORDER BY r.slot
        LIMIT 1
    ) AS a ON true
    WHERE i.queue_id = $1 AND i.control
    GROUP BY i.state, a.label
"""

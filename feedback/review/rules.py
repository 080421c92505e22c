"""Rules: which interactions are worth a person's time.

Belongs here: keeping rules, trying one out, filling queues. Does not belong here: what each rule looks for
(``feedback.review.selection``), handing items out (``feedback.review.leases``).
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import asyncpg
import msgspec

from feedback import log
from feedback.ids import uuid7
from feedback.review.database import Connection, fetch, transaction
from feedback.review.queues import NoSuchQueue, Queue, get_queue, list_open
from feedback.review.rubric import Refused
from feedback.review.selection import EVERYTHING, QUEUE, chosen
from feedback.service import REVIEW_ROLE

RuleKind = Literal["low_score", "judge_disagreement", "high_edit_distance", "rare_cluster", "flag"]

PARAMS: Mapping[RuleKind, Mapping[str, float]] = {
    "low_score": {"below": 0.5},
    "judge_disagreement": {"at_least": 0.5},
    "high_edit_distance": {"retained_below": 0.5},
    "rare_cluster": {"share_below": 0.01},
    "flag": {},
}
"""Every rule's parameters with their defaults; all are numbers from 0 to 1."""

MAX_PRIORITY = 1_000
FILL_SECONDS = 300.0
DRY_RUN_SECONDS = 10.0


@dataclass(frozen=True)
class Rule:
    """What to look for, what share of the hits to queue, and how urgent they are (higher first; control items have 0)."""

    kind: RuleKind
    params: Mapping[str, Any]
    sample_rate: float = 1.0
    priority: int = 0


@dataclass(frozen=True)
class SavedRule:
    """A rule of a queue. A rule is never changed: it is disabled, and a new one takes its place."""

    rule_id: UUID
    queue_id: UUID
    rule: Rule
    created_at: datetime
    disabled_at: datetime | None


@dataclass(frozen=True)
class DryRun:
    """ "Would have queued ``would_queue`` of ``total`` interactions"."""

    would_queue: int
    total: int


@dataclass(frozen=True)
class Filled:
    """What one rule (or the control sample: ``rule_id`` None, kind ``control``) newly chose for a queue, and how many of
    these were not in the queue for another reason.
    """

    queue_id: UUID
    rule_id: UUID | None
    kind: RuleKind | Literal["control"]
    chosen: int
    queued: int


class RuleRefused(Refused):
    """A rule that makes no sense; ``field`` is a path such as ``params.below``."""


class TooSlow(Exception):
    """A dry run that takes longer than somebody waits for it."""


async def save_rule(
    pool: log.Pool, queue_id: UUID, rule: Rule, *, actor: str, replaces: UUID | None = None
) -> SavedRule:
    """Add a rule to a queue, disabling the one it ``replaces`` in the same transaction. Admin pool.

    Raises RuleRefused, NoSuchQueue.
    """
    params = checked_params(rule)
    async with transaction(pool, actor) as connection:
        if replaces is not None:
            await _disable(connection, replaces, queue_id)
        try:
            row = await connection.fetchrow(
                "INSERT INTO feedback.review_rule (rule_id, queue_id, kind, params, sample_rate, priority)"
                f" VALUES ($1, $2, $3, $4::jsonb, $5, $6) RETURNING {_COLUMNS}",
                uuid7(),
                queue_id,
                rule.kind,
                json.dumps(params),
                rule.sample_rate,
                rule.priority,
            )
        except asyncpg.ForeignKeyViolationError:
            raise NoSuchQueue(f"there is no queue {queue_id}") from None
    return _saved(row)


async def disable_rule(pool: log.Pool, rule_id: UUID, *, actor: str) -> SavedRule:
    """Stop a rule, or find it stopped; what it queued stays. Admin pool. Raises RuleRefused."""
    async with transaction(pool, actor) as connection:
        return await _disable(connection, rule_id)


async def list_rules(pool: log.Pool, queue_id: UUID) -> list[SavedRule]:
    """The rules of a queue, oldest first, disabled ones included. Review or admin pool."""
    rows = await fetch(
        pool,
        f"SELECT {_COLUMNS} FROM feedback.review_rule WHERE queue_id = $1 ORDER BY created_at, rule_id",
        queue_id,
    )
    return [_saved(row) for row in rows]


async def dry_run(pool: log.Pool, queue_id: UUID, rule: Rule, days: int = 7) -> DryRun:
    """What the rule would have chosen of the app's last ``days``, by the SQL that ``fill`` runs, as if the queue looked
    back that far. What is in the queue already counts too. Review pool.

    Raises RuleRefused, NoSuchQueue, TooSlow.
    """
    queue = await get_queue(pool, queue_id)
    arguments = _arguments(queue, rule.kind, checked_params(rule), rule.sample_rate, days, EVERYTHING)
    async with transaction(pool) as connection:
        # The server itself ends it: giving up here alone would leave it at work.
        await connection.execute(f"SET LOCAL statement_timeout = {round(DRY_RUN_SECONDS * 1000)}")
        try:
            row = await connection.fetchrow(
                f"{chosen(rule.kind)} SELECT (SELECT count(*) FROM chosen), (SELECT count(*) FROM scope)",
                *arguments,
            )
        except asyncpg.QueryCanceledError:
            raise TooSlow(f"Trying this rule takes more than {DRY_RUN_SECONDS:g} seconds") from None
    return DryRun(*row)


async def fill(pool: log.Pool, queue_id: UUID | None = None) -> list[Filled]:
    """Put what the rules and the control sample choose into the open queues (or one). Review pool.

    Each queue is filled in one transaction. Only interactions that have arrived, or had feedback, since the rule last
    looked are judged, so running it often is cheap; running it twice, or at once, changes nothing.
    Raises NoSuchQueue.
    """
    queues = [await get_queue(pool, queue_id)] if queue_id else await list_open(pool)
    filled: list[Filled] = []
    for queue in queues:
        if queue.closed_at is None:
            rules = [saved for saved in await list_rules(pool, queue.queue_id) if saved.disabled_at is None]
            async with transaction(pool) as connection:
                filled += await _fill(connection, queue, rules)
    return filled


def fill_now(database_url: str, queue_id: UUID | None = None) -> list[Filled]:
    """``fill`` for callers without an event loop: a job, a command line. Raises NoSuchQueue, Unavailable."""

    async def run() -> list[Filled]:
        pool = await log.connect(database_url, REVIEW_ROLE, size=1)
        try:
            return await fill(pool, queue_id)
        finally:
            await log.close(pool)

    return asyncio.run(run())


def checked_params(rule: Rule) -> dict[str, float]:
    """The rule's parameters with defaults filled in. Raises RuleRefused."""
    known = PARAMS.get(rule.kind)
    if known is None:
        raise RuleRefused("kind", f"{rule.kind!r} is unknown", f"Use one of: {', '.join(PARAMS)}")
    for name in rule.params:
        if name not in known:
            raise RuleRefused(
                f"params.{name}",
                f"rule {rule.kind} does not know it",
                f"It takes: {', '.join(known) or 'nothing'}",
            )
    params = {**known, **rule.params}
    shares = {"sample_rate": rule.sample_rate, **{f"params.{name}": value for name, value in params.items()}}
    for field, value in shares.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise RuleRefused(field, f"is {value!r}", "Give a number from 0 to 1")
    if type(rule.priority) is not int or abs(rule.priority) > MAX_PRIORITY:
        raise RuleRefused(
            "priority", f"is {rule.priority!r}", f"Give a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}"
        )
    return params


_COLUMNS = "rule_id, queue_id, kind, params, sample_rate, priority, created_at, disabled_at"


def _saved(row: Mapping[str, Any]) -> SavedRule:
    rule = Rule(row["kind"], msgspec.json.decode(row["params"]), row["sample_rate"], row["priority"])
    return SavedRule(row["rule_id"], row["queue_id"], rule, row["created_at"], row["disabled_at"])


async def _disable(connection: Connection, rule_id: UUID, queue_id: UUID | None = None) -> SavedRule:
    await connection.execute(
        "UPDATE feedback.review_rule SET disabled_at = now()"
        " WHERE rule_id = $1 AND disabled_at IS NULL AND ($2::uuid IS NULL OR queue_id = $2)",
        rule_id,
        queue_id,
    )
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM feedback.review_rule WHERE rule_id = $1 AND ($2::uuid IS NULL OR queue_id = $2)",
        rule_id,
        queue_id,
    )
    if row is None:
        raise RuleRefused("rule_id", f"there is no rule {rule_id} in this queue", "List the queue's rules")
    return _saved(row)


async def _fill(connection: Connection, queue: Queue, rules: list[SavedRule]) -> list[Filled]:
    # Fills of one queue take turns, however long one takes, so that each starts where the one before it has ended.
    await connection.execute("SET LOCAL lock_timeout = 0")
    await connection.execute(
        "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))",
        f"fill {queue.queue_id}",
        timeout=FILL_SECONDS,
    )
    await connection.execute("SET LOCAL lock_timeout TO DEFAULT")
    # Taken before looking: all that commits after this is younger, and is looked at again next time.
    horizon = await connection.fetchval("SELECT pg_snapshot_xmin(pg_current_snapshot())::text")
    progress = dict(
        await connection.fetch(
            "SELECT chooser, seen::text FROM feedback.review_progress WHERE queue_id = $1", queue.queue_id
        )
    )
    choosers: list[tuple[UUID | None, RuleKind | Literal["control"], Mapping[str, float], float, int]] = [
        (None, "control", {}, queue.control_rate, 0),
        *(
            (s.rule_id, s.rule.kind, checked_params(s.rule), s.rule.sample_rate, s.rule.priority)
            for s in rules
        ),
    ]
    filled = []
    for rule_id, kind, params, rate, priority in choosers:
        chooser = str(rule_id or kind)
        seen = progress.get(chooser, EVERYTHING)
        if int(seen) > int(horizon):
            # Restored into a cluster that counts its transactions anew.
            seen = EVERYTHING
        row = await connection.fetchrow(
            chosen(kind) + QUEUE,
            *_arguments(queue, kind, params, rate, queue.window_days, seen),
            queue.queue_id,
            rule_id,
            priority,
            queue.overlap,
            timeout=FILL_SECONDS,
        )
        filled.append(Filled(queue.queue_id, rule_id, kind, row["chosen"], row["queued"]))
        await connection.execute(
            "INSERT INTO feedback.review_progress (queue_id, chooser, seen) VALUES ($1, $2, $3::text::xid8)"
            " ON CONFLICT (queue_id, chooser) DO UPDATE SET seen = excluded.seen",
            queue.queue_id,
            chooser,
            horizon,
        )
    return filled


def _arguments(
    queue: Queue, kind: str, params: Mapping[str, float], rate: float, days: int, seen: str
) -> tuple[Any, ...]:
    """What ``chosen`` takes, $1 to $7: app, days to look back, xact_id to start from, salt, rate, threshold, kind."""
    threshold = next(iter(params.values()), 0.0)
    return queue.app, days, seen, f"{queue.queue_id} {kind}", rate, threshold, kind

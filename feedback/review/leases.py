"""Leases: one reviewer at a time has an item's slot, for a limited time, provably.

Belongs here: claiming, extending, releasing, holding; what an item shows. Does not belong here: answers
(``feedback.review.submissions``).

An item has as many slots as its queue has overlap. A claim takes a free slot of the first item in line that the
reviewer has no slot of yet, and raises the slot's fence: whoever comes back with an older fence has lost the lease,
however late. A reviewer holds one lease per queue at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from feedback import log
from feedback.review import Reviewer
from feedback.review.database import Connection, transaction
from feedback.review.queues import MAX_OVERLAP, NoSuchQueue, Queue, get_queue, queue_of


@dataclass(frozen=True)
class Lease:
    """The right to answer for one slot of an item until ``expires_at``; ``fence`` grows with every new owner."""

    item_id: UUID
    slot: int
    fence: int
    expires_at: datetime


@dataclass(frozen=True)
class Assignment:
    """What a reviewer works on.

    ``interaction``: interaction_id, session_id, occurred_at, messages, output, retrieved, train_ok, and (not in a blind queue)
    provider, model, prompt_name, prompt_version, app_release, variant, latency_ms, cost_usd, metadata.
    ``feedback``: the state of each standing feedback item on it (kind, name, score, label, explanation, correction, reasons,
    annotator_kind, author_role, occurred_at), oldest first, but what reviewers said of it elsewhere: that queue may be
    a blind one; ``why``: the reasons it is here, each with ``rule`` and its figures; ``control``: drawn for the control
    sample. In a blind queue: (), () and None.
    """

    lease: Lease
    queue: Queue
    interaction: Mapping[str, Any]
    feedback: tuple[Mapping[str, Any], ...]
    why: tuple[Mapping[str, Any], ...]
    control: bool | None


class LostLease(LookupError):
    """The lease has expired, was given up, or somebody else has the slot; claim again (a draft can be kept)."""


@dataclass(frozen=True)
class Item:
    """An item as it is, nothing hidden; ``elsewhere`` tells in ``feedback`` what reviewers said without this item.

    ``read_at`` is the database's time of the transaction that read it.
    """

    item_id: UUID
    queue: Queue
    state: str
    interaction: Mapping[str, Any]
    feedback: tuple[Mapping[str, Any], ...]
    why: tuple[Mapping[str, Any], ...]
    control: bool
    read_at: datetime

    @property
    def disliked(self) -> bool:
        """Whether a person's vote against the output stands."""
        return any(
            said["annotator_kind"] == "HUMAN"
            and said["kind"] in ("thumb", "rating")
            and said["score"] is not None
            and said["score"] < 0.5
            for said in self.feedback
        )


async def claim(pool: log.Pool, queue_id: UUID, reviewer: Reviewer) -> Assignment | None:
    """The reviewer's unexpired lease if there is one, else a lease on the next item for them; None: nothing to do.

    Raises NoSuchQueue, also for a queue of another app.
    """
    queue = await get_queue(pool, queue_id)
    if queue.app != reviewer.app:
        raise NoSuchQueue(f"there is no queue {queue_id} of app {reviewer.app}")
    async with transaction(pool) as connection:
        # Two windows of one reviewer take turns, so that the second one finds the lease of the first.
        await connection.execute(
            "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"claim {queue_id} {reviewer.name}"
        )
        row = await connection.fetchrow(_MINE, queue_id, reviewer.name)
        if row is None and queue.closed_at is None:
            row = await connection.fetchrow(_CLAIM, queue_id, reviewer.name, queue.lease_seconds)
        if row is None:
            return None
        return _assigned(await read_item(connection, row["item_id"]), Lease(*row))


async def assignment(pool: log.Pool, reviewer: Reviewer, lease: Lease) -> Assignment:
    """The item of a lease that still holds, to validate or preview answers. Raises LostLease."""
    async with transaction(pool) as connection:
        row = await connection.fetchrow(_HELD, *held(reviewer, lease))
        if row is None:
            raise lost()
        return _assigned(await read_item(connection, lease.item_id), Lease(*row))


async def extend(pool: log.Pool, reviewer: Reviewer, lease: Lease) -> Lease:
    """The same lease for another full term from now. Raises LostLease."""
    async with transaction(pool) as connection:
        queue = await hold(connection, reviewer, lease)
        row = await connection.fetchrow(
            "UPDATE feedback.review_slot SET leased_until = clock_timestamp() + make_interval(secs => $3)"
            " WHERE item_id = $1 AND slot = $2 RETURNING item_id, slot, fence, leased_until",
            lease.item_id,
            lease.slot,
            queue.lease_seconds,
        )
        await note(connection, reviewer, lease, "extended")
    return Lease(*row)


async def release(pool: log.Pool, reviewer: Reviewer, lease: Lease) -> None:
    """Give the slot back, untouched. Raises LostLease."""
    async with transaction(pool) as connection:
        await hold(connection, reviewer, lease)
        await free(connection, lease)
        await note(connection, reviewer, lease, "released")


async def hold(connection: Connection, reviewer: Reviewer, lease: Lease) -> Queue:
    """Lock a lease's slot until the transaction ends, so that it can neither expire into other hands nor be used twice.

    Its item is locked too: of two who finish an item's last slots at once, the second sees the first.
    Returns the item's queue. Raises LostLease.
    """
    row = await connection.fetchrow(f"{_HELD} FOR NO KEY UPDATE OF i, s", *held(reviewer, lease))
    if row is None:
        raise lost()
    row = await connection.fetchrow(
        "SELECT q.* FROM feedback.review_queue AS q JOIN feedback.review_item AS i ON i.queue_id = q.queue_id"
        " WHERE i.item_id = $1",
        lease.item_id,
    )
    return queue_of(row)


def held(reviewer: Reviewer, lease: Lease) -> tuple[Any, ...]:
    """What tells a lease that holds: item, slot, fence, reviewer's name and app. Raises LostLease."""
    if not (0 < lease.slot <= MAX_OVERLAP and 0 < lease.fence < 2**63):
        raise lost()
    return lease.item_id, lease.slot, lease.fence, reviewer.name, reviewer.app


async def free(connection: Connection, lease: Lease) -> None:
    """Nobody has this slot any more; its fence stays."""
    await connection.execute(
        "UPDATE feedback.review_slot SET reviewer = NULL, leased_until = NULL WHERE item_id = $1 AND slot = $2",
        lease.item_id,
        lease.slot,
    )


async def note(
    connection: Connection,
    reviewer: Reviewer,
    lease: Lease,
    act: str,
    mode: str | None = None,
    reason: str | None = None,
) -> None:
    """Add a line to the history of an item."""
    await connection.execute(
        "INSERT INTO feedback.review_event (item_id, act, slot, fence, reviewer, mode, reason)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7)",
        lease.item_id,
        act,
        lease.slot,
        lease.fence,
        reviewer.name,
        mode,
        reason,
    )


async def read_item(connection: Connection, item_id: UUID) -> Item:
    """An item with its interaction and what was said about it. Raises LostLease if it is not (any more) there."""
    row = await connection.fetchrow(_ITEM, item_id)
    if row is None:
        raise lost()
    said = await connection.fetch(_FEEDBACK, row["interaction_id"], str(item_id))
    return Item(
        item_id=item_id,
        queue=queue_of(row),
        state=row["state"],
        interaction={
            name: _decoded(row[name]) if name in _JSON else row[name] for name in (*_SHOWN, *_IDENTIFYING)
        },
        feedback=tuple(dict(event) for event in said),
        why=tuple(_decoded(row["why"])),
        control=row["control"],
        read_at=row["read_at"],
    )


def lost() -> LostLease:
    return LostLease("The lease has expired or was given up: claim again, your draft can be kept")


def _assigned(item: Item, lease: Lease) -> Assignment:
    if not item.queue.blind:
        said = tuple(event for event in item.feedback if not event["elsewhere"])
        return Assignment(lease, item.queue, item.interaction, said, item.why, item.control)
    shown = {name: item.interaction[name] for name in _SHOWN}
    return Assignment(lease, item.queue, shown, (), (), None)


def _decoded(text: str | None) -> Any:
    try:
        return None if text is None else msgspec.json.decode(text)
    except (RecursionError, msgspec.DecodeError):
        # Postgres keeps what is beyond this reader; one such interaction must not stop a queue.
        return UNREADABLE


UNREADABLE = "too deeply nested or out of range to be shown"
"""Stands for stored JSON that cannot be read."""

_SHOWN = ("interaction_id", "session_id", "occurred_at", "messages", "output", "retrieved", "train_ok")
_IDENTIFYING = (
    "provider",
    "model",
    "prompt_name",
    "prompt_version",
    "app_release",
    "variant",
    "latency_ms",
    "cost_usd",
    "metadata",
)
_JSON = ("messages", "retrieved", "metadata")

_ITEM = f"""
    SELECT now() AS read_at, q.*, i.state, i.why, i.control, {", ".join(f"x.{name}" for name in (*_SHOWN, *_IDENTIFYING))}
    FROM feedback.review_item AS i
    JOIN feedback.review_queue AS q ON q.queue_id = i.queue_id
    JOIN feedback.interaction AS x ON x.interaction_id = i.interaction_id
    WHERE i.item_id = $1
"""

_FEEDBACK = """
    SELECT kind, name, score, label, explanation, correction, reasons, annotator_kind, author_role, occurred_at,
        author_role IN ('reviewer', 'adjudicator') AND metadata ->> 'item_id' IS DISTINCT FROM $2 AS elsewhere
    FROM feedback.current(
        ARRAY(SELECT DISTINCT feedback_id FROM feedback.feedback_event WHERE interaction_id = $1)
    )
    WHERE op <> 'retract' AND interaction_id = $1
    ORDER BY occurred_at, event_id
"""

_MINE = """
    SELECT s.item_id, s.slot, s.fence, s.leased_until
    FROM feedback.review_slot AS s JOIN feedback.review_item AS i ON i.item_id = s.item_id
    WHERE i.queue_id = $1 AND s.reviewer = $2 AND s.done_at IS NULL AND s.leased_until > clock_timestamp()
    LIMIT 1
"""

_HELD = """
    SELECT s.item_id, s.slot, s.fence, s.leased_until
    FROM feedback.review_slot AS s
    JOIN feedback.review_item AS i ON i.item_id = s.item_id
    JOIN feedback.review_queue AS q ON q.queue_id = i.queue_id
    WHERE s.item_id = $1 AND s.slot = $2 AND s.fence = $3 AND s.reviewer = $4 AND q.app = $5
        AND s.done_at IS NULL AND s.leased_until > clock_timestamp()
"""

# What the reviewer put off comes last, longest put off first. An index gives the line in order; a reviewer who
# passes over many items they have judged already only costs a look at each.
_FREE = """
    SELECT s.item_id, s.slot, s.fence, s.reviewer
    FROM feedback.review_item AS i
    JOIN feedback.review_slot AS s ON s.item_id = i.item_id
    LEFT JOIN LATERAL (
        SELECT max(e.at) AS at, bool_or(e.mode = 'others') AS for_good
        FROM feedback.review_event AS e
        WHERE e.item_id = i.item_id AND e.act = 'skipped' AND e.reviewer = $2
    ) AS skipped ON true
    WHERE i.queue_id = $1 AND i.state = 'open' AND s.done_at IS NULL
        AND (s.leased_until IS NULL OR s.leased_until <= clock_timestamp())
        AND NOT EXISTS (
            SELECT FROM feedback.review_slot AS mine
            WHERE mine.item_id = i.item_id AND mine.reviewer = $2 AND mine.slot <> s.slot
        )
        AND {skipped}
    ORDER BY {order}
    LIMIT 1
    FOR NO KEY UPDATE OF s SKIP LOCKED
"""

_CLAIM = f"""
    WITH next AS ({_FREE.format(skipped="skipped.at IS NULL", order="i.priority DESC, i.queued_at, i.item_id, s.slot")}),
    again AS ({_FREE.format(skipped="skipped.at IS NOT NULL AND NOT skipped.for_good", order="skipped.at, s.slot")}),
    chosen AS (SELECT * FROM next UNION ALL SELECT * FROM again WHERE NOT EXISTS (SELECT FROM next)),
    taken AS (
        UPDATE feedback.review_slot AS s
        SET reviewer = $2, fence = s.fence + 1, leased_until = clock_timestamp() + make_interval(secs => $3)
        FROM chosen
        WHERE s.item_id = chosen.item_id AND s.slot = chosen.slot
        RETURNING s.item_id, s.slot, s.fence, s.leased_until
    ),
    history AS (
        INSERT INTO feedback.review_event (item_id, act, slot, fence, reviewer)
        SELECT item_id, 'lost', slot, fence, reviewer FROM chosen WHERE reviewer IS NOT NULL
        UNION ALL
        SELECT item_id, 'claimed', slot, fence, $2 FROM taken
    )
    SELECT item_id, slot, fence, leased_until FROM taken
"""

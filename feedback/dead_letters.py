"""Dead letters: rows that passed validation and that Postgres refused, kept whole until they are replayed.

Belongs here: keeping them, listing them, and appending them again once the cause is gone.
Does not belong here: who may ask for it (``feedback.admin``), or items that validation refuses (their sender knows).
"""

from collections.abc import Sequence
from datetime import datetime
from hashlib import sha256
from typing import Any
from uuid import UUID

import msgspec

from feedback import log
from feedback.log import EVENTS, INTERACTIONS, Log, Outcome, Pool, Row, Unavailable

_LOGS = {kind.name: kind for kind in (INTERACTIONS, EVENTS)}

_KEEP = (
    "INSERT INTO feedback.dead_letter (dead_letter_id, log, key, row, reason, api_key_id)"
    " VALUES ($1::uuid, $2, $3, $4, $5, $6::uuid) ON CONFLICT DO NOTHING"
)
_LIST = (
    "SELECT dead_letter_id, log, key, reason, api_key_id, received_at, replayed_at, outcome"
    " FROM feedback.dead_letter WHERE $1 OR replayed_at IS NULL ORDER BY received_at, dead_letter_id LIMIT $2"
)
_REPLAYED = (
    "WITH acting AS MATERIALIZED (SELECT set_config('datamoat.actor', $1, true))"
    " UPDATE feedback.dead_letter SET outcome = $3, replayed_at = CASE WHEN $4 THEN now() END"
    " FROM acting WHERE dead_letter_id = $2"
)


class DeadLetter(msgspec.Struct, frozen=True):
    """One dead letter without its row, which holds what people wrote; ``outcome`` is that of the last replay."""

    dead_letter_id: UUID
    log: str
    key: str
    reason: str
    api_key_id: UUID
    received_at: datetime
    replayed_at: datetime | None
    outcome: str | None


async def keep(pool: Pool, kind: Log, rows: Sequence[Row], outcomes: list[Outcome]) -> list[Outcome]:
    """Store each row that is ``invalid`` as a dead letter. One that cannot be stored becomes ``unknown``.

    The same row sent again adds none.
    """
    kept = list(outcomes)
    for index, (row, outcome) in enumerate(zip(rows, outcomes, strict=True)):
        if outcome.status != "invalid":
            continue
        key, body = row[kind.key], row["body_sha256"]
        name = UUID(bytes=sha256(f"{kind.name} {key} {body}".encode()).digest()[:16])
        try:
            await log.fetch(
                pool,
                _KEEP,
                str(name),
                kind.name,
                key,
                msgspec.json.encode(row),
                outcome.reason,
                row["api_key_id"],
            )
        except Unavailable as error:
            kept[index] = Outcome("unknown", f"refused ({outcome.reason}), and not kept: {error}")
    return kept


async def list_dead_letters(pool: Pool, *, limit: int = 100, replayed: bool = False) -> list[DeadLetter]:
    """Dead letters, oldest first; those that were replayed too, if asked for. Raises Unavailable."""
    return [DeadLetter(**row) for row in await log.fetch(pool, _LIST, replayed, limit)]


async def replay(pool: Pool, dead_letter_id: UUID, actor: str) -> Outcome | None:
    """Append a dead letter's row again, in the name of ``actor``. Returns its outcome, or None if there is none such.

    It counts as replayed unless Postgres refuses it again. Doing it twice is harmless: the second is a duplicate.
    ``pool`` acts as datamoat_admin. Raises Unavailable.
    """
    found = await log.fetch(
        pool, "SELECT log, row FROM feedback.dead_letter WHERE dead_letter_id = $1", dead_letter_id
    )
    if not found:
        return None
    row: dict[str, Any] = msgspec.json.decode(found[0]["row"])
    (outcome,) = await log.append(pool, _LOGS[found[0]["log"]], [row])
    text = outcome.status if outcome.reason is None else f"{outcome.status}: {outcome.reason}"
    await log.fetch(
        pool, _REPLAYED, actor, dead_letter_id, text, outcome.status not in ("invalid", "unknown")
    )
    return outcome

"""A desk for the tests of review: a migrated database, a pool per role, and short words for what happens there.

Belongs here: arranging and reading. Does not belong here: any assertion.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from feedback import log
from feedback.access import Caller
from feedback.capture import prepare_event, prepare_interaction
from feedback.ids import uuid7
from feedback.review import Reviewer
from feedback.review.database import fetch
from feedback.review.leases import Assignment, Lease, claim
from feedback.review.queues import Queue, create_queue
from feedback.review.rubric import Question
from feedback.review.submissions import submit
from feedback.service import ADMIN_ROLE, INGEST_ROLE, REVIEW_ROLE
from storage.database import Database

APP = "support"
KEY = b"k" * 32
CALLER = Caller(str(uuid7()), APP, ("ingest",))

VERDICT = Question("verdict", "choice", "Is it right?", ("right", "wrong"), required=True)
QUALITY = Question("quality", "score", "How good is it?", ("1", "2", "3", "4", "5"))
REMARK = Question("remark", "text", "Anything else?")
FIX = Question("fix", "correction", "What should it say?")
GOLD = Question("gold", "golden", "Make it a golden case?")
RUBRIC = (VERDICT, QUALITY, REMARK, FIX, GOLD)


def reviewer(name: str = "ada", app: str = APP) -> Reviewer:
    return Reviewer(str(uuid7()), app, name)


@dataclass
class Desk:
    database: Database
    ingest: log.Pool
    review: log.Pool
    admin: log.Pool

    async def queue(self, **changes: Any) -> Queue:
        options: dict[str, Any] = {
            "name": "q",
            "app": APP,
            "rubric": RUBRIC,
            "control_rate": 0.0,
            "actor": "boss",
        } | changes
        return await create_queue(self.admin, **options)

    async def interactions(self, *ids: str, **fields: Any) -> None:
        await self.send_interactions([{"interaction_id": name} | fields for name in ids])

    async def send_interactions(self, items: Sequence[dict[str, Any]]) -> None:
        common = {"messages": [{"role": "user", "content": "How?"}], "output": "So and so."}
        await self._append(log.INTERACTIONS, prepare_interaction, [common | item for item in items])

    async def feedback(self, interaction_id: str, kind: str, **fields: Any) -> str:
        """Send one event; its feedback_id."""
        event = {"event_id": str(uuid7()), "interaction_id": interaction_id, "kind": kind} | fields
        await self._append(log.EVENTS, prepare_event, [event])
        return str(event.get("feedback_id") or event["event_id"])

    async def _append(self, to: log.Log, prepare: Any, items: Sequence[dict[str, Any]]) -> None:
        rows = [prepare(json.dumps(item).encode(), CALLER, KEY, datetime.now(UTC)).row for item in items]
        outcomes = await log.append(self.ingest, to, rows)
        assert {outcome.status for outcome in outcomes} <= {"created"}, outcomes

    async def claim(self, queue: Queue, name: str = "ada") -> Assignment:
        found = await claim(self.review, queue.queue_id, reviewer(name))
        assert found is not None
        return found

    async def submit(self, lease: Lease, name: str = "ada", **answers: Any) -> list[Any]:
        return await submit(self.review, KEY, reviewer(name), lease, answers)

    async def rows(self, query: str, *args: Any) -> list[dict[str, Any]]:
        return [dict(row) for row in await fetch(self.review, query, *args)]

    async def column(self, query: str, *args: Any) -> list[Any]:
        return [row[0] for row in await fetch(self.review, query, *args)]


@asynccontextmanager
async def open_desk(database: Database, size: int = 8) -> AsyncIterator[Desk]:
    async with AsyncExitStack() as stack:
        pools = {}
        for name, role in (("ingest", INGEST_ROLE), ("review", REVIEW_ROLE), ("admin", ADMIN_ROLE)):
            pools[name] = await log.connect(database.url, role, size)
            stack.push_async_callback(log.close, pools[name])
        yield Desk(database, **pools)


def at_desk(test: Callable[[Desk], Awaitable[None]]) -> Callable[[Database], None]:
    """Run an async test at a desk over a database of its own."""

    def run(database: Database) -> None:
        async def with_desk() -> None:
            async with open_desk(database) as desk:
                await test(desk)

        asyncio.run(with_desk())

    return run

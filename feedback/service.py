"""What a running service holds, and hands to each of its rooms.

Belongs here: pools, secrets, settings, their life span.
Does not belong here: routes; which rooms there are (``feedback.app``).
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from starlette.applications import Starlette

from feedback import log
from feedback.access import Access
from feedback.writer import Observe, Writer

INGEST_ROLE = "datamoat_ingest"
REVIEW_ROLE = "datamoat_review"
ADMIN_ROLE = "datamoat_admin"
# A database that hangs, not even saying no, must not keep whoever sends for longer.
FLUSH_SECONDS = 8.0


@dataclass
class Service:
    """A running service. Rooms take what they need from it; the pools exist within ``lifespan`` only.

    Each pool acts as a role that can do its room's work and no more: ``ingest`` only adds to the log, ``review``
    reads the log and keeps the queues, ``admin`` keeps keys, rules and dead letters.
    """

    database_url: str
    pseudonym_key: bytes
    search: str | None = None
    observe: Observe | None = None
    ingest: log.Pool = field(init=False)
    review: log.Pool = field(init=False)
    admin: log.Pool = field(init=False)
    access: Access = field(init=False)
    writers: dict[log.Log, Writer] = field(init=False)

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for name, role, size, seconds in (
                ("ingest", INGEST_ROLE, 8, FLUSH_SECONDS),
                ("review", REVIEW_ROLE, 8, log.COMMAND_SECONDS),
                ("admin", ADMIN_ROLE, 2, log.COMMAND_SECONDS),
            ):
                pool = await log.connect(self.database_url, role, size, seconds)
                stack.push_async_callback(log.close, pool)
                setattr(self, name, pool)
            self.access = Access(self.ingest)
            self.writers = {
                kind: Writer(self.ingest, kind, self.observe) for kind in (log.INTERACTIONS, log.EVENTS)
            }
            for writer in self.writers.values():
                stack.push_async_callback(writer.close)
            yield

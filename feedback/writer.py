"""Group commit: whatever waits while a flush is in flight goes into the next one.

Belongs here: who waits, for how much room, and which rows share a commit. Does not belong here: the statement that
writes them (``feedback.log``), what a row is, or HTTP.

There is no timer: an idle writer flushes a lone row at once, and a busy one makes larger groups by itself.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from feedback import dead_letters, log
from feedback.log import Log, Outcome, Overloaded, Pool, Row

# Small groups cost most: a second flush begins beside the first only when so many rows wait that it is well filled.
SECOND_FLUSH_ROWS = 100
GROUP_ROWS = 1000
GROUP_BYTES = 4 * 1024 * 1024
MAX_WAITING_ROWS = 20_000


# Told of each commit: the log's name, rows in it, rows that wait meanwhile, seconds it took.
Observe: TypeAlias = Callable[[str, int, int, float], None]


class _Batch(NamedTuple):
    rows: Sequence[Row]
    size: int
    outcomes: "asyncio.Future[list[Outcome]]"


class Writer:
    """Appends to one log of one database. Calls that come together share a statement and its commit."""

    def __init__(self, pool: Pool, log: Log, observe: Observe | None = None) -> None:
        self._pool = pool
        self._log = log
        self._observe = observe
        self._waiting: deque[_Batch] = deque()
        self._flushing = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.waiting_rows = 0

    async def append(self, rows: Sequence[Row], size: int) -> list[Outcome]:
        """As ``log.append``, guarded; ``size`` is about how many bytes the rows have.

        A row that Postgres refuses is kept as a dead letter. A caller that is cancelled no longer hears what
        became of its rows; they are written all the same. Raises Unavailable; Overloaded, at once, when too much
        waits.
        """
        if not rows:
            return []
        if self._waiting and self.waiting_rows + len(rows) > MAX_WAITING_ROWS:
            raise Overloaded(f"{self.waiting_rows} rows wait for {self._log.name}")
        outcomes: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Batch(rows, size, outcomes))
        self.waiting_rows += len(rows)
        if self._flushing == 0 or (self._flushing == 1 and self.waiting_rows >= SECOND_FLUSH_ROWS):
            # It starts after what is ready now has joined the queue.
            self._flushing += 1
            task = asyncio.create_task(self._flush())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await outcomes

    async def close(self) -> None:
        """Wait until all that was taken is written."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _flush(self) -> None:
        try:
            while self._waiting:
                await self._write(self._take())
        finally:
            # In the same step as finding nobody waiting: whoever comes next starts a flush again.
            self._flushing -= 1

    async def _write(self, group: list[_Batch]) -> None:
        rows = [row for batch in group for row in batch.rows]
        began = time.perf_counter()
        try:
            outcomes = await log.append(self._pool, self._log, rows, guarded=True)
            outcomes = await dead_letters.keep(self._pool, self._log, rows, outcomes)
        except Exception as error:
            # What waits behind a failure would only fail later: it is answered now, and may come again.
            while self._waiting:
                group += self._take()
            for batch in group:
                if not batch.outcomes.done():
                    batch.outcomes.set_exception(error)
            return
        if self._observe is not None:
            self._observe(self._log.name, len(rows), self.waiting_rows, time.perf_counter() - began)
        start = 0
        for batch in group:
            end = start + len(batch.rows)
            if not batch.outcomes.done():  # else its caller was cancelled
                batch.outcomes.set_result(outcomes[start:end])
            start = end

    def _take(self) -> list[_Batch]:
        """The batches of the next group, oldest first: at least one, and as many as its limits allow."""
        group: list[_Batch] = []
        rows = size = 0
        while self._waiting:
            batch = self._waiting[0]
            rows += len(batch.rows)
            size += batch.size
            if group and (rows > GROUP_ROWS or size > GROUP_BYTES):
                break
            group.append(self._waiting.popleft())
            self.waiting_rows -= len(batch.rows)
        return group

"""One transaction on a pool of the service, and its faults in the words of ``feedback.log``.

Belongs here: acquiring, committing, telling an unreachable database from a fault of ours. Does not belong here: SQL.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import asyncpg

from feedback import log

Connection: TypeAlias = asyncpg.Connection

# The database is away, shuts down, is read-only, chose this transaction to end a deadlock, or somebody else holds a
# lock for too long: later it may work.
_PASSING = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.exceptions.InsufficientResourcesError,
    asyncpg.exceptions.LockNotAvailableError,
    asyncpg.exceptions.OperatorInterventionError,
    asyncpg.exceptions.ReadOnlySQLTransactionError,
    asyncpg.exceptions.TransactionRollbackError,
)


@asynccontextmanager
async def transaction(pool: log.Pool, actor: str | None = None) -> AsyncIterator[Connection]:
    """A transaction, committed at the end; ``actor`` is who the audit names. Raises Unavailable."""
    try:
        async with pool.acquire(timeout=log.ACQUIRE_SECONDS) as connection:
            try:
                async with connection.transaction():
                    if actor is not None:
                        await connection.execute("SELECT set_config('datamoat.actor', $1, true)", actor)
                    yield connection
            except (*_PASSING, asyncio.CancelledError):
                # Whatever the server still does for this connection, nobody waits for it any more.
                connection.terminate()
                raise
    except _PASSING as error:
        raise log.Unavailable(f"{type(error).__name__}: {error}") from error


async def fetch(pool: log.Pool, query: str, *args: Any) -> list[Any]:
    """Run one statement in a transaction of its own. Raises Unavailable."""
    async with transaction(pool) as connection:
        return list(await connection.fetch(query, *args))

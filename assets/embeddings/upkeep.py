"""Upkeep of release tables: graphs that lost rows are rebuilt, then dead rows are vacuumed.

A vacuum repairs a graph around every dead row, which costs 7 ms a row; over a graph that was just rebuilt it costs
nothing, so autovacuum is kept off these tables (see index) and this comes in its place, once a week. Belongs here: that.
Does not belong here: dropping releases (registry).
"""

from __future__ import annotations

from dataclasses import dataclass

from psycopg import sql

from assets.embeddings.index import Connection, graph_of, graph_resources
from assets.embeddings.registry import LOAD_LOCK, release_table, releases

# Dead rows, as a share of the live ones, from which a table is worth the work.
CHURN = 0.01


@dataclass(frozen=True)
class UpkeepReport:
    """What one turn did to one release's table."""

    release: str
    dead: int
    rebuilt: bool


def keep_up(connection: Connection, churn: float = CHURN) -> list[UpkeepReport]:
    """Rebuild the graph of every release that churned, without stopping readers or writers, then vacuum the table.

    A load of the release waits meanwhile, and one under way is waited for.

    Args:
        connection: In autocommit mode: neither statement may run in a transaction.
        churn: Dead rows, as a share of live ones, from which a table is taken up.
    """
    reports = []
    for release in releases(connection):
        table = release_table(release.name)
        connection.execute(f"select pg_advisory_lock({LOAD_LOCK})".encode(), [release.name])
        try:
            dead = _dead(connection, table)
            if dead == 0 or dead < churn * release.vectors:
                continue
            graph = graph_of(connection, table)
            if graph is not None:
                _drop_leftovers(connection, table)
                _rebuild(connection, graph, graph_resources(connection, release.vectors, release.dimensions))
            connection.execute(sql.SQL("vacuum (analyze) {}").format(table))
            reports.append(UpkeepReport(release.name, dead, graph is not None))
        finally:
            connection.execute(f"select pg_advisory_unlock({LOAD_LOCK})".encode(), [release.name])
    return reports


def _dead(connection: Connection, table: sql.Identifier) -> int:
    # The server's estimate; a crash of it starts the count anew.
    row = connection.execute(
        "select coalesce(n_dead_tup, 0) from pg_stat_all_tables where relid = %s::regclass",
        [table.as_string(connection)],
    ).fetchone()
    return int(row[0]) if row else 0


def _rebuild(connection: Connection, graph: str, resources: tuple[int, int] | None) -> None:
    if resources is not None:
        memory, workers = resources
        connection.execute(
            "select set_config('maintenance_work_mem', %s, false),"
            " set_config('max_parallel_maintenance_workers', %s, false)",
            [f"{memory >> 10}kB", str(workers)],
        )
    connection.execute(f"reindex index concurrently {graph}".encode())  # quoted by Postgres


def _drop_leftovers(connection: Connection, table: sql.Identifier) -> None:
    """Drop what a rebuild that was killed left behind: indexes that are written to and never read."""
    left = connection.execute(
        "select indexrelid::regclass::text from pg_index where indrelid = %s::regclass and not indisvalid",
        [table.as_string(connection)],
    ).fetchall()
    for (name,) in left:
        connection.execute(f"drop index concurrently if exists {name}".encode())

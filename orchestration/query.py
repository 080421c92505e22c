"""``moat sql``: one read-only question to the marts.

Belongs here: running it as an analyst and drawing rows. Does not belong here: Dagster, whose import would cost more
than the query.
"""

from __future__ import annotations

import psycopg
from rich.table import Table

from orchestration.deployment import open_warehouse
from orchestration.screen import Screen
from orchestration.settings import Settings

ANALYST = "datamoat_analyst"


def show_query(settings: Settings, screen: Screen, query: str) -> bool:
    """Print the rows of ``query``, run as the analyst role in a read-only transaction; whether it worked."""
    database = open_warehouse(settings).database
    with database.connect(role=ANALYST, application_name="moat sql") as connection:
        connection.read_only = True
        try:
            cursor = connection.execute(query.encode())
        except psycopg.Error as error:
            screen.line("error", str(error).strip(), style="red")
            return False
        if cursor.description is None:
            return True
        table = Table(*(column.name for column in cursor.description), box=None, pad_edge=False)
        for row in cursor:
            table.add_row(*("" if value is None else str(value) for value in row))
        screen.console.print(table)
    return True

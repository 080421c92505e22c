"""``moat status`` and ``moat sql``: looking at a deployment without changing it.

Belongs here: read-only views for the terminal. Does not belong here: starting a server that is not there.
"""

from __future__ import annotations

import psycopg
from rich.table import Table

from orchestration.console import Screen
from orchestration.report import show
from orchestration.resources import open_warehouse
from orchestration.run import read_json
from orchestration.settings import Settings
from storage import embedded

ANALYST = "datamoat_analyst"


def show_status(settings: Settings, screen: Screen) -> None:
    """Print whether the database runs and the report of the last run."""
    screen.title(f"Datamoat · {settings.example}")
    if settings.database_url is None:
        state = embedded.status(settings.home)
        screen.line("embedded Postgres", str(state))
    else:
        screen.line("database", open_warehouse(settings).database.place)
    report = read_json(settings.report)
    if report is None:
        screen.line("last run", "none yet: make run")
        return
    screen.line("last run", f"{report['created_at']}, example {report['example']}")
    show(screen, report)


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

"""``moat sql``: one read-only question to the marts.

Belongs here: running it as an analyst and drawing rows. Does not belong here: Dagster, whose import would cost more
than the query.
"""

from __future__ import annotations

import psycopg
from psycopg.conninfo import conninfo_to_dict
from rich.table import Table

from feedback.secret import read_secret
from orchestration.deployment import analyst_login, open_warehouse, require_prepared
from orchestration.screen import Screen
from orchestration.settings import Settings


def show_query(settings: Settings, screen: Screen, query: str) -> bool:
    """Print the rows of ``query``, run by the analyst's own login; whether it worked.

    A login of its own, not ``set role``: what a statement could set, it could also set back.
    """
    require_prepared(settings)
    database = open_warehouse(settings).database
    if not settings.analyst_key_file.exists():
        screen.line("error", "the analyst has no login yet: 'moat prepare' makes it", style="red")
        return False
    login: dict[str, object] = {
        **conninfo_to_dict(database.url),
        "user": analyst_login(database),
        "password": read_secret(settings.analyst_key_file).decode(),
        "application_name": "moat sql",
    }
    try:
        with psycopg.connect(**login) as connection:  # type: ignore[arg-type]  # libpq's own parameters
            connection.read_only = True
            cursor = connection.execute(query.encode())
            if cursor.description is None:
                return True
            table = Table(*(column.name for column in cursor.description), box=None, pad_edge=False)
            for row in cursor:
                table.add_row(*("" if value is None else str(value) for value in row))
            screen.console.print(table)
    except psycopg.Error as error:
        screen.line("error", str(error).strip(), style="red")
        return False
    return True

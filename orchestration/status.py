"""``moat status``: looking at a deployment without changing it.

Belongs here: read-only views for the terminal. Does not belong here: starting a server that is not there.
"""

from __future__ import annotations

import json

from orchestration.deployment import open_warehouse
from orchestration.report import SCHEMA_VERSION, show
from orchestration.screen import Screen
from orchestration.settings import Settings
from sensors.feedback_days import read_ledger
from storage import embedded
from storage.warehouse import Warehouse


def show_status(settings: Settings, screen: Screen) -> None:
    """Print whether the database runs and the report of the last run."""
    screen.title(f"Datamoat · {settings.example}")
    running = True
    if settings.database_url is None:
        state = embedded.status(settings.home)
        running = state.running
        where = f"on port {state.port}, {state.connections} connections" if state.running else state.phase
        screen.line("embedded Postgres", f"{where}; its log is {state.log}")
    else:
        screen.line("database", open_warehouse(settings).database.place)
    if running and (settings.dagster_home / "dagster.yaml").exists():
        show_open_days(open_warehouse(settings), screen)
    if not settings.report.exists():
        screen.line("last run", "none yet: make run")
        return
    report = json.loads(settings.report.read_text("utf-8"))
    if report["schema_version"] != SCHEMA_VERSION:
        screen.line("last run", "its report is of another version of Datamoat: make run")
        return
    if report["example"] != settings.example:
        screen.line(
            "last run", f"was of example {report['example']}: EXAMPLE={report['example']} moat status"
        )
        return
    screen.line("last run", f"{report['created_at']}, example {report['example']}")
    show(screen, report)


def show_open_days(warehouse: Warehouse, screen: Screen) -> None:
    """Print how many days of feedback wait to be folded, and which of them were given up."""
    with warehouse.connect("status") as connection:
        ledger = read_ledger(connection)
    given_up = ledger.given_up()
    waiting = len(ledger.days) - len(given_up)
    screen.line("days of feedback", f"{waiting:,} wait to be folded, {len(given_up):,} were given up")
    if given_up:
        screen.line(
            "given up",
            f"folding them failed too often or was cancelled, see the runs of feedback_day: {', '.join(given_up)}",
            style="bold red",
        )

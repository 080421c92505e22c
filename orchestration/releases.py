"""``moat release``: looking at embedding releases, checking, promoting, rolling back and dropping them.

Belongs here: what the commands print and whom they name. Does not belong here: what they do (assets.embeddings.registry
and checks).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from assets.sources.contract import Contract, load_contracts
from orchestration.deployment import open_warehouse, person, require_prepared
from orchestration.screen import Screen
from orchestration.settings import Settings

if TYPE_CHECKING:
    from assets.embeddings.checks import Compare
    from assets.embeddings.registry import Connection, LiveRelease
    from assets.evaluation.compare import Difference


def comparison(contracts: Sequence[Contract]) -> Compare:
    """Two releases measured on the golden sets of ``contracts``."""

    def compare(connection: Connection, candidate: str, live: LiveRelease) -> Iterable[Difference]:
        from assets.evaluation.compare import compare_releases

        return compare_releases(connection, contracts, candidate, live.name)

    return compare


def show_releases(settings: Settings, screen: Screen) -> None:
    """Print every release: its state, size, what it lacks, and whether it may be promoted."""
    from assets.embeddings.registry import releases

    with _connect(settings) as connection:
        found = releases(connection)
        moves = connection.execute(
            "select at, action, release, who, why, forced from registry.promotion order by id desc limit 5"
        ).fetchall()
    if not found:
        screen.line("releases", "none yet: 'make run' builds the first")
        return
    table = Table(
        "release",
        "state",
        "vectors",
        "missing",
        "dimensions",
        "built",
        "model",
        "chunks",
        "promotion",
        box=None,
        pad_edge=False,
    )
    for release in found:
        objections = release.objections()
        may = "live" if release.state == "live" else "; ".join(objections) or "may be promoted"
        table.add_row(
            release.name,
            release.state,
            f"{release.vectors:,}",
            f"{release.missing:,}",
            f"{release.dimensions:,}",
            f"{release.created_at:%Y-%m-%d %H:%M}",
            str(release.model or "installed"),
            str(release.chunking),
            may,
        )
    screen.console.print(table)
    screen.title("Promotions")
    for at, action, name, who, why, forced in moves:
        screen.line(f"{at:%Y-%m-%d %H:%M} {action}", f"{name} by {who}{', forced' if forced else ''}: {why}")


def check_release(settings: Settings, screen: Screen, name: str) -> bool:
    """Run a release's checks, record and print them; whether those that are needed passed."""
    from assets.embeddings.checks import check_candidate, embed_questions, recent_questions

    contracts, _ = load_contracts(settings.contract_folders, settings.contract_variables)
    with _connect(settings) as connection:
        questions = recent_questions(connection, contracts)
        outcomes = check_candidate(connection, name, comparison(contracts), questions, embed_questions)
    for check, outcome in outcomes.items():
        verdict = "passed" if outcome.passed else "did not pass"
        figures = ", ".join(f"{label} {_shown(value)}" for label, value in outcome.figures.items())
        style = "" if outcome.passed else "bold red" if outcome.needed else "yellow"
        screen.line(check, f"{verdict}: {figures}" if figures else verdict, style)
    return all(outcome.passed for outcome in outcomes.values() if outcome.needed)


def promote_release(settings: Settings, screen: Screen, name: str, why: str, force: bool) -> None:
    """Make a release the one that is searched, in the name of the person at this machine."""
    from assets.embeddings.registry import promote

    with _connect(settings) as connection:
        started = time.perf_counter()
        objections = promote(connection, name, person(), why, force).objections()
        _moved(screen, name, started)
    if objections:
        screen.line("forced", "; ".join(objections), "yellow")


def roll_back(settings: Settings, screen: Screen, why: str) -> None:
    """Go back to the release that was live before."""
    from assets.embeddings.registry import find_release, rollback

    with _connect(settings) as connection:
        started = time.perf_counter()
        name = rollback(connection, person(), why)
        _moved(screen, name, started)
        missing = find_release(connection, name).missing
    if missing:
        screen.line(
            "missing",
            f"{missing:,} texts came after it and are found by words only: 'make run' embeds them",
            "yellow",
        )


def drop_releases(settings: Settings, screen: Screen, name: str | None, retired_days: float | None) -> None:
    """Drop one release, or all that have been retired for so many days."""
    from assets.embeddings.registry import drop, retired_longer_than

    with _connect(settings) as connection:
        names = [name] if name is not None else retired_longer_than(connection, retired_days or 0)
        for one in names:
            drop(connection, one)
            screen.line(one, "dropped; its vectors stay in the lake")
    if not names:
        screen.line("releases", f"none has been retired for {retired_days:g} days")


def _connect(settings: Settings) -> Any:
    require_prepared(settings)
    return open_warehouse(settings).connect("release", autocommit=True)


def _moved(screen: Screen, name: str, started: float) -> None:
    screen.line(name, f"is live, after {(time.perf_counter() - started) * 1000:,.0f} ms")


def _shown(value: Any) -> str:
    return (
        f"{value:,.4g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )

"""``moat evaluate``: how well releases find what golden sets say is right, as a table or JSON.

Belongs here: choosing golden sets, printing. Does not belong here: measuring (assets.evaluation).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from assets.sources.contract import load_contracts
from orchestration.deployment import open_warehouse, require_prepared
from orchestration.screen import Screen
from orchestration.settings import Settings, SettingsError

if TYPE_CHECKING:
    from assets.evaluation.compare import Difference, Evaluation
    from assets.evaluation.runs import Mode


def evaluate_retrieval(
    settings: Settings,
    screen: Screen,
    golden: str | None,
    modes: Sequence[Mode],
    release: str | None,
    against: str | None,
    as_json: bool,
) -> None:
    """Measure a release on one golden set, or on all that are landed; record and print its figures.

    Args:
        release: Its name; None takes the live one.
        against: Another release, to print what the first gains over it.

    Raises:
        SettingsError: There is no such golden set.
        ReleaseError: There is no such release, or its model is gone.
    """
    from assets.evaluation.compare import (
        differences,
        evaluate_golden,
        golden_contracts,
        record_evaluation,
    )

    require_prepared(settings)
    contracts, _ = load_contracts(settings.contract_folders, settings.contract_variables)
    found: list[Evaluation] = []
    gained: list[Difference] = []
    with open_warehouse(settings).connect("evaluate") as connection:
        landed = {contract.name: contract for contract in golden_contracts(connection, contracts)}
        if not landed or (golden is not None and golden not in landed):
            raise SettingsError(
                f"golden set {golden or ''} is not landed: "
                + (
                    f"take one of {', '.join(landed)}"
                    if landed
                    else "give one a contract, and run 'moat run'"
                )
            )
        for name in [golden] if golden else landed:
            new = evaluate_golden(connection, landed[name], contracts, release, modes)
            if against is not None:
                old = evaluate_golden(connection, landed[name], contracts, against, modes)
                gained += differences(new, old)
            for one in new:
                record_evaluation(connection, one)
            found += new
    if as_json:
        screen.console.print(
            json.dumps({"evaluations": [*map(_plain, found)], "differences": [*map(_difference, gained)]})
        )
        return
    _show(screen, found)
    if gained:
        _show_differences(screen, gained, found[0].release, against or "")


def _show(screen: Screen, found: Sequence[Evaluation]) -> None:
    metrics = [measure.metric for measure in found[0].measures]
    table = Table("golden set", "mode", "questions", *metrics, "95 % of the first", box=None, pad_edge=False)
    for one in found:
        first = one.measures[0]
        table.add_row(
            one.name,
            one.mode,
            f"{first.n:,}",
            *("-" if measure.value is None else f"{measure.value:.4f}" for measure in one.measures),
            _interval(first.low, first.high) if first.status == "ok" else first.status,
        )
    screen.title(f"Release {found[0].release}")
    screen.console.print(table)
    for one in {one.name: one for one in found}.values():
        reasons = [row.reason for row in one.unscored]
        for reason in dict.fromkeys(reasons):
            screen.line(one.name, f"{reasons.count(reason):,} rows not scored: {reason}", "yellow")


def _show_differences(screen: Screen, gained: Sequence[Difference], release: str, against: str) -> None:
    table = Table("golden set", "mode", "questions", "metric", "gained", "95 %", "", box=None, pad_edge=False)
    for one in gained:
        if one.value is not None and one.low is not None and one.high is not None:
            verdict = "worse" if one.high < 0 else "better" if one.low > 0 else ""
            table.add_row(
                one.name,
                one.mode,
                f"{one.n:,}",
                one.metric,
                f"{one.value:+.4f}",
                _interval(one.low, one.high),
                verdict,
            )
    screen.title(f"{release} against {against}, question by question")
    screen.console.print(table)


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.4f} to {high:.4f}"


def _plain(found: Evaluation) -> dict[str, Any]:
    return {
        "golden": found.name,
        "release": found.release,
        "mode": found.mode,
        "inputs_sha256": found.inputs_sha256,
        "unscored": len(found.unscored),
        "measures": {
            measure.metric: {
                "value": measure.value,
                "low": measure.low,
                "high": measure.high,
                "n": measure.n,
                "status": measure.status,
            }
            for measure in found.measures
        },
    }


def _difference(gained: Difference) -> dict[str, Any]:
    return {
        "golden": gained.name,
        "mode": gained.mode,
        "metric": gained.metric,
        "gained": gained.value,
        "low": gained.low,
        "high": gained.high,
        "n": gained.n,
    }

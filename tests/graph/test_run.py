"""The order of a turn's runs: which days become one range, and what runs before, with and after the days."""

from collections.abc import Callable
from typing import Any

import dagster as dg
import pytest

from orchestration.run import Span, fold_days, ranges

KEYS = ("redaction", "figure", "facts", "current", "signals")
REDACTION, FIGURE, FACTS, CURRENT, SIGNALS = (dg.AssetKey(name) for name in KEYS)
SPANS = [("2025-01-03", "2025-01-03"), ("2026-03-01", "2026-03-02"), ("2026-06-01", "2026-06-01")]


@pytest.mark.parametrize(
    ("days", "expected"),
    [
        ([], []),
        (["2026-03-02", "2026-03-01"], [("2026-03-01", "2026-03-02")]),
        # A short gap is walked, a long one is not.
        (["2026-03-01", "2026-03-08"], [("2026-03-01", "2026-03-08")]),
        (["2025-01-03", "2026-03-01"], [("2025-01-03", "2025-01-03"), ("2026-03-01", "2026-03-01")]),
    ],
)
def test_one_late_event_does_not_fold_every_day_since(days: list[str], expected: list[Span]) -> None:
    assert ranges(days, bridged=7) == expected


def graph() -> Any:
    """``redaction`` -> daily ``facts`` -> daily ``current`` -> ``signals``; ``figure`` stands alone."""
    days = dg.DailyPartitionsDefinition("2025-01-01")

    def asset(name: str, *deps: str, daily: bool = False) -> dg.AssetsDefinition:
        @dg.asset(name=name, deps=list(deps), partitions_def=days if daily else None)
        def made() -> None: ...

        return made

    return dg.Definitions(
        assets=[
            asset("redaction"),
            asset("figure"),
            asset("facts", "redaction", daily=True),
            asset("current", "facts", daily=True),
            asset("signals", "current"),
        ]
    ).resolve_asset_graph()


class Runs:
    """Stands for Dagster: remembers what was to run, and lets some of it fail."""

    def __init__(self, fails: Callable[[dg.AssetKey, Span | None], bool] = lambda *_: False) -> None:
        self.fails = fails
        self.done: list[tuple[set[str], Span | None]] = []
        self.folded: list[Span] = []

    def __call__(self, selection: Any, span: Span | None) -> set[dg.AssetKey]:
        self.done.append(({key.to_user_string() for key in selection}, span))
        return {key for key in selection if self.fails(key, span)}

    def fold(self, selection: set[dg.AssetKey], spans: list[Span]) -> set[dg.AssetKey]:
        return fold_days(graph(), selection, spans, self, lambda *span: self.folded.append(span))


def test_one_range_of_days_is_one_run() -> None:
    runs = Runs()
    assert runs.fold({*map(dg.AssetKey, KEYS)}, SPANS[:1]) == set()
    assert runs.done == [(set(KEYS), SPANS[0])]
    assert runs.folded == SPANS[:1]


def test_several_ranges_share_what_comes_before_and_after() -> None:
    runs = Runs()
    assert runs.fold({*map(dg.AssetKey, KEYS)}, SPANS) == set()
    assert runs.done == [
        ({"redaction", "figure", "facts", "current"}, SPANS[0]),
        ({"facts", "current"}, SPANS[1]),
        ({"facts", "current", "signals"}, SPANS[2]),
    ]
    assert runs.folded == SPANS


def test_without_days_the_rest_runs() -> None:
    runs = Runs()
    assert runs.fold({*map(dg.AssetKey, KEYS)}, []) == set()
    assert runs.done == [({"redaction", "figure", "signals"}, None)]


def test_a_range_that_fails_is_not_folded_and_the_others_are() -> None:
    runs = Runs(lambda key, span: key == CURRENT and span == SPANS[1])
    assert runs.fold({*map(dg.AssetKey, KEYS)}, SPANS) == {CURRENT}
    assert runs.folded == [SPANS[0], SPANS[2]]


def test_a_failure_that_the_days_do_not_need_leaves_them_folded() -> None:
    runs = Runs(lambda key, _: key in (FIGURE, SIGNALS))
    assert runs.fold({*map(dg.AssetKey, KEYS)}, SPANS) == {FIGURE, SIGNALS}
    assert runs.folded == SPANS


def test_no_day_is_folded_without_what_it_needs() -> None:
    runs = Runs(lambda key, span: key == REDACTION or (span == SPANS[0] and key in (FACTS, CURRENT)))
    assert runs.fold({*map(dg.AssetKey, KEYS)}, SPANS) == {REDACTION, FACTS, CURRENT, SIGNALS}
    assert runs.folded == []
    assert len(runs.done) == 1


def test_days_are_not_folded_while_a_daily_model_is_held_back() -> None:
    """It stands behind a gate, and is to be folded when that opens."""
    runs = Runs()
    assert runs.fold({REDACTION, FACTS}, SPANS[:1]) == set()
    assert runs.folded == []

"""Wake the daily models when feedback or interactions arrive, and again when a run of them failed.

Belongs here: when to fold which open day. Does not belong here: which days are open (see feedback_days), and the
models themselves.
"""

from datetime import date
from typing import Any

import dagster as dg

from assets.sources.feedback_log import FEEDBACK_EVENT
from sensors.attempts import PAUSES, TAGS, Attempts
from sensors.feedback_days import Ledger, changed_days, clock, ledger_for_update, read_ledger
from storage.warehouse import Warehouse

DAYS_PER_TICK = 20


def new_feedback_sensor(target: Any, days: dg.DailyPartitionsDefinition) -> dg.SensorDefinition:
    """The sensor: one run of ``target`` for each day that is due, at most 20 a tick, the rest on the next ticks."""

    @dg.sensor(
        name="new_feedback",
        job=target,
        minimum_interval_seconds=5,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=(
            "Requests the daily models for each day touched by new interactions or feedback, and again after a"
            " failure. What is folded is kept in registry.checkpoint; the cursor shows how far the log was read."
            " Resetting it forgets failures, so that every open day is requested at once."
        ),
    )
    def new_feedback(
        context: dg.SensorEvaluationContext, warehouse: dg.ResourceParam[Warehouse]
    ) -> dg.SensorResult:
        with (
            warehouse.connect("sensor new_feedback") as connection,
            ledger_for_update(connection) as ledger,
        ):
            now, changes = clock(connection), changed_days(connection, ledger.position)
            given_up = ledger.given_up()
            if not context.cursor:
                for entry in ledger.days.values():
                    entry.due, entry.attempts = now, Attempts()
            first, last = days.get_first_partition_key(), days.get_last_partition_key()
            assert first is not None and last is not None
            for day in ledger.take_in(changes, first):
                context.log.warning(
                    f"{day}: events carry a day before the first partition ({first}). They are kept in the"
                    " log; set DATAMOAT_START_DATE to an earlier day and run 'moat run', which then folds every day"
                    " again."
                )
            _settle(ledger, context, now)
            # Newest first, here and in the queue of runs: a backlog of old days must not keep today waiting.
            due = sorted(
                (day for day, entry in ledger.days.items() if entry.is_due(now) and day <= last), reverse=True
            )
            requests = [
                dg.RunRequest(
                    run_key=ledger.days[day].attempts.ask(f"feedback:{day}", changes.horizon, now),
                    partition_key=day,
                    tags={
                        **TAGS,
                        "dagster/priority": f"{(date.fromisoformat(day) - date.fromisoformat(last)).days}",
                    },
                )
                for day in due[:DAYS_PER_TICK]
            ]
            news = [evaluate(ledger)] if given_up != ledger.given_up() else []
            state = f"{len(ledger.days)} open days, {len(ledger.given_up())} of them given up"
        return dg.SensorResult(
            run_requests=requests,
            skip_reason=None if requests else f"nothing is due below transaction {changes.horizon}: {state}",
            cursor=str(changes.horizon),
            asset_events=news,
        )

    return new_feedback


@dg.asset_check(
    # A check of the log, which no run writes: so no fold of one day reports the failures of another.
    asset=FEEDBACK_EVENT,
    description=(
        f"No day waits whose fold failed {len(PAUSES)} times in a row or was cancelled. The sensor reports changes"
        " by itself."
    ),
)
def every_day_is_folded(warehouse: dg.ResourceParam[Warehouse]) -> dg.AssetCheckResult:
    """For people who want to know now; see ``evaluate``."""
    with warehouse.connect("every_day_is_folded") as connection:
        found = evaluate(read_ledger(connection))
    return dg.AssetCheckResult(passed=found.passed, metadata=found.metadata)


def evaluate(ledger: Ledger) -> dg.AssetCheckEvaluation:
    """What the check says of ``ledger``: it passes unless a day was given up."""
    days = ledger.given_up()
    return dg.AssetCheckEvaluation(
        asset_key=FEEDBACK_EVENT,
        check_name="every_day_is_folded",
        passed=not days,
        metadata={"given_up": days, "open": sorted(ledger.days)},
    )


def _settle(ledger: Ledger, context: dg.SensorEvaluationContext, now: float) -> None:
    """Close the days whose runs succeeded, and put off those whose runs failed."""
    for day, entry in list(ledger.days.items()):
        state = entry.attempts.settle(context.instance, now)
        if state == "succeeded":
            ledger.folded(day, entry.attempts.upto)
        elif state == "failed":
            context.log.warning(f"{day}: folding it failed {entry.attempts.failures} times in a row")
            if entry.attempts.exhausted and entry.changed <= entry.attempts.upto:
                entry.due = None

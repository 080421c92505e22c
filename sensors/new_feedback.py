"""Wake the daily models when feedback or interactions arrive.

The log is read by transaction id up to the oldest transaction still running, never by sequence or time: a row
that commits late has an id at or above that horizon and is seen by a later tick.

Belongs here: which days have changed since a position in the log. Does not belong here: the models themselves.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from typing import Any

import dagster as dg
import psycopg

from storage.warehouse import Warehouse

CHECKPOINT = "feedback_days"
DAYS_PER_TICK = 20

# An event changes its own day; a revision also changes the day its feedback began, where it is counted.
_CHANGED_DAYS = """
with new_event as (
  select feedback_id, (least(occurred_at, received_at) at time zone 'UTC')::date as day
  from feedback.feedback_event
  where xact_id >= %(after)s::text::xid8 and xact_id < %(horizon)s::text::xid8
)
select day from new_event
union
select min((least(e.occurred_at, e.received_at) at time zone 'UTC')::date)
from feedback.feedback_event as e
where e.feedback_id in (select feedback_id from new_event)
group by e.feedback_id
union
select (least(occurred_at, received_at) at time zone 'UTC')::date
from feedback.interaction
where xact_id >= %(after)s::text::xid8 and xact_id < %(horizon)s::text::xid8
order by 1
"""


@dataclass(frozen=True)
class ChangedDays:
    """Days touched by transactions in [after, horizon), and the horizon to go on from."""

    days: list[date]
    horizon: int


def changed_days(connection: psycopg.Connection[Any], after: int) -> ChangedDays:
    """Days (UTC) whose facts changed in transactions from ``after`` up to the oldest one still running."""
    row = connection.execute("select pg_snapshot_xmin(pg_current_snapshot())::text").fetchone()
    assert row is not None
    horizon = int(row[0])
    rows = connection.execute(_CHANGED_DAYS, {"after": str(after), "horizon": str(horizon)}).fetchall()
    return ChangedDays([day for (day,) in rows], horizon)


def read_checkpoint(connection: psycopg.Connection[Any]) -> int:
    """Where ``moat run`` has processed the log up to; 0 before its first run."""
    row = connection.execute(
        "select (value ->> 'xid')::bigint from registry.checkpoint where name = %s", [CHECKPOINT]
    ).fetchone()
    return int(row[0]) if row else 0


def write_checkpoint(connection: psycopg.Connection[Any], horizon: int) -> None:
    """Record that every transaction below ``horizon`` has been processed; never moves backwards."""
    connection.execute(
        "insert into registry.checkpoint (name, value) values (%s, jsonb_build_object('xid', %s::bigint))"
        " on conflict (name) do update set value = excluded.value, updated_at = now()"
        " where (checkpoint.value ->> 'xid')::bigint < (excluded.value ->> 'xid')::bigint",
        [CHECKPOINT, horizon],
    )


def new_feedback_sensor(target: Any, days: dg.DailyPartitionsDefinition) -> dg.SensorDefinition:
    """The sensor: one run of ``target`` for each changed day, at most 20 a tick, the rest on the next ticks."""

    @dg.sensor(
        name="new_feedback",
        job=target,
        minimum_interval_seconds=5,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=(
            "Requests the daily models for each day touched by new interactions or feedback. The cursor is a"
            " position in the log; the run key holds it too, so the same day can be requested again later."
        ),
    )
    def new_feedback(
        context: dg.SensorEvaluationContext, warehouse: dg.ResourceParam[Warehouse]
    ) -> dg.SensorResult | dg.SkipReason:
        with warehouse.connect("sensor new_feedback") as connection:
            if context.cursor:
                cursor = json.loads(context.cursor)
            else:
                cursor = {"xid": read_checkpoint(connection), "waiting": []}
            changed = changed_days(connection, cursor["xid"])
        known = set(days.get_partition_keys())
        waiting = sorted({*cursor["waiting"], *_keys(changed.days)})
        for day in (day for day in waiting if day not in known):
            context.log.warning(
                f"{day}: events carry a day before the first partition ({min(known)}). They are kept in the log;"
                " set DATAMOAT_START_DATE to an earlier day and run 'moat run', which then folds every day again."
            )
        waiting = [day for day in waiting if day in known]
        now, later = waiting[:DAYS_PER_TICK], waiting[DAYS_PER_TICK:]
        position = json.dumps({"xid": changed.horizon, "waiting": later})
        if not now:
            return dg.SensorResult(
                skip_reason=f"no new feedback or interactions below transaction {changed.horizon}",
                cursor=position,
            )
        return dg.SensorResult(
            run_requests=[
                dg.RunRequest(run_key=f"feedback:{day}:{changed.horizon}", partition_key=day) for day in now
            ],
            cursor=position,
        )

    return new_feedback


def _keys(days: Iterable[date]) -> list[str]:
    return [day.isoformat() for day in days]

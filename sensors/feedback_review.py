"""Wake what is made from feedback as a whole: once enough of it waits, or some of it has waited long enough.

Belongs here: when to ask for it. Does not belong here: what is made, and the daily fold (see new_feedback).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import dagster as dg
import psycopg

from sensors import checkpoint
from sensors.attempts import TAGS, Attempts
from sensors.feedback_days import clock, read_ledger
from storage.warehouse import Warehouse

CHECKPOINT = "feedback_review"

# Counting stops at the batch that is asked for.
_WAITING = """
select
  count(*),
  coalesce(extract(epoch from clock_timestamp() - min(received_at)), 0)::float8,
  exists (
    select from feedback.feedback_event
    where xact_id >= greatest(%(after)s::text::xid8, %(tried)s::text::xid8) and xact_id < %(folded)s::text::xid8
  )
from (
  select received_at
  from feedback.feedback_event
  where xact_id >= %(after)s::text::xid8 and xact_id < %(folded)s::text::xid8
  order by xact_id
  limit %(batch)s
) as waiting
"""


def feedback_review_sensor(
    target: Any,
    choose: Callable[[dg.SensorEvaluationContext], Sequence[dg.AssetKey]],
    min_events: int,
    max_age: timedelta,
) -> dg.SensorDefinition:
    """The sensor: one run of ``target`` for a batch of folded feedback events.

    Args:
        choose: The assets of ``target`` that may run now; none while a gate is closed.
        min_events: This many waiting events start a run;
        max_age: so does one event that arrived this long ago.
    """

    @dg.sensor(
        name="feedback_review",
        job=target,
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=(
            f"Requests training sets once {min_events:,} feedback events wait or one has waited for {max_age}, and"
            " again after a failure. What they were made from is kept in registry.checkpoint."
        ),
    )
    def feedback_review(
        context: dg.SensorEvaluationContext, warehouse: dg.ResourceParam[Warehouse]
    ) -> dg.SensorResult:
        with warehouse.connect("sensor feedback_review") as connection:
            checkpoint.lock(connection, CHECKPOINT)
            stored = checkpoint.read(connection, CHECKPOINT)
            done: int = stored.get("xid", 0)
            attempts = Attempts(**stored.get("attempts", {})) if context.cursor else Attempts()
            now, ledger = clock(connection), read_ledger(connection)
            if done > ledger.position:
                # The log is being read anew, or the database was restored on another server.
                done = 0
            folded = ledger.folded_upto
            state = attempts.settle(context.instance, now)
            if state == "succeeded":
                done = attempts.upto
            events, age, new = _waiting(connection, done, folded, attempts.upto, min_events)
            chosen: Sequence[dg.AssetKey] = []
            if state == "under way":
                reason = "a run is under way"
            elif events == 0 or (events < min_events and age < max_age.total_seconds()):
                reason = f"{events:,} of {min_events:,} events wait, the oldest for {timedelta(seconds=int(age))} of {max_age}"
            elif attempts.exhausted and not new:
                reason = f"it failed {attempts.failures} times and waits for new feedback"
            elif now < attempts.not_before:
                reason = f"it failed and is tried again in {attempts.not_before - now:.0f} s"
            elif not (chosen := choose(context)):
                reason = "all of it stands behind a gate that is closed"
            run_key = attempts.ask("feedback_review", folded, now) if chosen else None
            if (value := {"xid": done, "attempts": asdict(attempts)}) != stored:
                checkpoint.write(connection, CHECKPOINT, value)
        if not chosen:
            return dg.SensorResult(skip_reason=reason, cursor=str(folded))
        request = dg.RunRequest(run_key=run_key, asset_selection=list(chosen), tags=TAGS)
        return dg.SensorResult(run_requests=[request], cursor=str(folded))

    return feedback_review


def _waiting(
    connection: psycopg.Connection[Any], done: int, folded: int, tried: int, batch: int
) -> tuple[int, float, bool]:
    """Events between two positions (at most ``batch``), the age of the oldest in seconds, and whether any is newer than ``tried``."""
    row = connection.execute(
        _WAITING,
        {"after": str(done), "folded": str(folded), "tried": str(tried), "batch": batch},
    ).fetchone()
    assert row is not None
    return row[0], row[1], row[2]


def mark_reviewed(connection: psycopg.Connection[Any], upto: int) -> None:
    """Record that training sets were made from all feedback below ``upto``."""
    checkpoint.lock(connection, CHECKPOINT)
    if checkpoint.read(connection, CHECKPOINT).get("xid", 0) < upto:
        checkpoint.write(connection, CHECKPOINT, {"xid": upto})

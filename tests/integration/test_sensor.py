"""The feedback sensor as a state machine: each committed event is seen once, whatever the order of commits."""

import uuid
from datetime import date
from typing import Any

import dagster as dg
import psycopg
import pytest

from sensors.new_feedback import (
    DAYS_PER_TICK,
    changed_days,
    new_feedback_sensor,
    read_checkpoint,
    write_checkpoint,
)
from storage.warehouse import Warehouse

EVENT = """
insert into feedback.feedback_event
  (event_id, feedback_id, op, revision, kind, name, score, annotator_kind, interaction_id, occurred_at, api_key_id,
   body_sha256)
values (%s, %s, %s, %s, 'thumb', 'thumb', 1, 'HUMAN', 'i-1', %s, gen_random_uuid(), '')
"""


def add_event(
    connection: psycopg.Connection[Any], at: str, feedback_id: uuid.UUID | None = None, revision: int = 1
) -> uuid.UUID:
    feedback_id = feedback_id or uuid.uuid4()
    op = "create" if revision == 1 else "revise"
    connection.execute(EVENT, [uuid.uuid4(), feedback_id, op, revision, at])
    return feedback_id


class Ticks:
    """The sensor with its cursor carried from tick to tick, as the daemon does."""

    def __init__(self, warehouse: Warehouse) -> None:
        @dg.asset(partitions_def=dg.DailyPartitionsDefinition("2026-01-01", end_offset=1))
        def facts() -> None: ...

        assert isinstance(facts.partitions_def, dg.DailyPartitionsDefinition)
        job = dg.define_asset_job("feedback_day", [facts])
        self.sensor = new_feedback_sensor(job, facts.partitions_def)
        self.defs = dg.Definitions(assets=[facts], jobs=[job], sensors=[self.sensor])
        self.warehouse = warehouse
        self.cursor: str | None = None
        self.run_keys: set[str | None] = set()

    def tick(self) -> list[str]:
        """Days requested; a request whose run key was used before is dropped, as Dagster does."""
        context = dg.build_sensor_context(
            cursor=self.cursor, definitions=self.defs, resources={"warehouse": self.warehouse}
        )
        result = self.sensor.evaluate_tick(context)
        self.cursor = result.cursor
        fresh = [request for request in result.run_requests or [] if request.run_key not in self.run_keys]
        self.run_keys |= {request.run_key for request in fresh}
        return [str(request.partition_key) for request in fresh]


@pytest.fixture
def ticks(warehouse: Warehouse) -> Ticks:
    return Ticks(warehouse)


def test_nothing_then_something_then_nothing(ticks: Ticks, conn: psycopg.Connection[Any]) -> None:
    assert ticks.tick() == []
    add_event(conn, "2026-03-01T10:00:00Z")
    add_event(conn, "2026-03-03T23:59:59+02:00")
    conn.commit()
    assert ticks.tick() == ["2026-03-01", "2026-03-03"]
    assert ticks.tick() == []


def test_the_same_day_can_be_requested_again(ticks: Ticks, conn: psycopg.Connection[Any]) -> None:
    for _ in range(3):
        add_event(conn, "2026-03-01T10:00:00Z")
        conn.commit()
        assert ticks.tick() == ["2026-03-01"]


def test_a_row_that_commits_late_is_seen(
    ticks: Ticks, warehouse: Warehouse, conn: psycopg.Connection[Any]
) -> None:
    add_event(conn, "2026-03-01T10:00:00Z")
    with warehouse.database.connect() as other:
        add_event(other, "2026-03-02T10:00:00Z")
        other.commit()
        # The older transaction is still open, so nothing at or above it is read yet.
        assert ticks.tick() == []
    conn.commit()
    assert ticks.tick() == ["2026-03-01", "2026-03-02"]


def test_a_rolled_back_row_is_not(ticks: Ticks, conn: psycopg.Connection[Any]) -> None:
    add_event(conn, "2026-03-01T10:00:00Z")
    conn.rollback()
    assert ticks.tick() == []


def test_a_revision_reopens_the_day_its_feedback_began(ticks: Ticks, conn: psycopg.Connection[Any]) -> None:
    feedback_id = add_event(conn, "2026-03-01T10:00:00Z")
    conn.commit()
    ticks.tick()
    add_event(conn, "2026-03-05T10:00:00Z", feedback_id, revision=2)
    conn.commit()
    assert ticks.tick() == ["2026-03-01", "2026-03-05"]


def test_many_days_are_spread_over_ticks_and_none_is_lost(
    ticks: Ticks, conn: psycopg.Connection[Any]
) -> None:
    for day in range(1, 32):
        add_event(conn, f"2026-01-{day:02}T10:00:00Z")
    for day in range(1, 20):
        add_event(conn, f"2026-02-{day:02}T10:00:00Z")
    conn.commit()
    first = ticks.tick()
    assert len(first) == DAYS_PER_TICK
    add_event(conn, "2026-02-20T10:00:00Z")
    conn.commit()
    second, third = ticks.tick(), ticks.tick()
    assert first + second + third == [
        *(f"2026-01-{day:02}" for day in range(1, 32)),
        *(f"2026-02-{day:02}" for day in range(1, 21)),
    ]
    assert ticks.tick() == []


def test_a_clock_ahead_of_ours_counts_for_the_day_of_receipt(
    ticks: Ticks, conn: psycopg.Connection[Any]
) -> None:
    add_event(conn, "2099-01-01T00:00:00Z")
    conn.commit()
    today = conn.execute("select (now() at time zone 'UTC')::date::text").fetchone()
    assert today is not None
    assert ticks.tick() == [today[0]]


def test_days_before_the_first_partition_are_not_requested(
    ticks: Ticks, conn: psycopg.Connection[Any]
) -> None:
    add_event(conn, "2019-05-01T00:00:00Z")
    add_event(conn, "2026-03-01T00:00:00Z")
    conn.commit()
    assert ticks.tick() == ["2026-03-01"]
    assert ticks.tick() == []


def test_it_goes_on_from_where_a_run_has_processed_the_log(
    ticks: Ticks, conn: psycopg.Connection[Any]
) -> None:
    add_event(conn, "2026-03-01T10:00:00Z")
    conn.commit()
    changed = changed_days(conn, read_checkpoint(conn))
    assert changed.days == [date(2026, 3, 1)]
    write_checkpoint(conn, changed.horizon)
    conn.commit()
    assert ticks.tick() == []
    add_event(conn, "2026-03-02T10:00:00Z")
    conn.commit()
    assert ticks.tick() == ["2026-03-02"]


def test_a_checkpoint_never_moves_backwards(conn: psycopg.Connection[Any]) -> None:
    write_checkpoint(conn, 500)
    write_checkpoint(conn, 400)
    assert read_checkpoint(conn) == 500

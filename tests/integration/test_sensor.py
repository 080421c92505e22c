"""The feedback sensors as state machines: each committed event is seen once, whatever becomes of transactions and runs."""

import random
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from itertools import pairwise
from typing import Any

import dagster as dg
import psycopg
import pytest

from sensors import checkpoint
from sensors.attempts import PAUSES
from sensors.feedback_days import (
    CHECKPOINT,
    SETTLE_FEEDBACK,
    SETTLE_INTERACTIONS,
    Changes,
    changed_days,
    ledger_for_update,
    read_ledger,
)
from sensors.feedback_review import CHECKPOINT as REVIEW
from sensors.feedback_review import feedback_review_sensor, mark_reviewed
from sensors.new_feedback import DAYS_PER_TICK, every_day_is_folded, new_feedback_sensor
from storage.warehouse import Warehouse

# Changes are read below the oldest transaction of a whole server, whosever it is.
pytestmark = pytest.mark.alone

EVENT = """
insert into feedback.feedback_event
  (event_id, feedback_id, op, revision, kind, name, score, annotator_kind, interaction_id, occurred_at, received_at,
   api_key_id, body_sha256)
values (%s, %s, %s, %s, 'thumb', 'thumb', 1, 'HUMAN', 'i-1', %s, now() - %s, gen_random_uuid(), '')
"""
INTERACTION = """
insert into feedback.interaction (interaction_id, app, occurred_at, received_at, messages, api_key_id, body_sha256)
values (%s, 'support', %s, now() - %s, '[]', gen_random_uuid(), '')
"""
HOUR = timedelta(hours=1)
NOW = timedelta()


def add_event(
    connection: psycopg.Connection[Any],
    at: str,
    feedback_id: uuid.UUID | None = None,
    revision: int = 1,
    ago: timedelta = HOUR,
) -> uuid.UUID:
    """An event that occurred ``at`` and was received some time ``ago``."""
    feedback_id = feedback_id or uuid.uuid4()
    op = "create" if revision == 1 else "revise"
    connection.execute(EVENT, [uuid.uuid4(), feedback_id, op, revision, at, ago])
    return feedback_id


class Ticks:
    """The sensors with their cursors carried from tick to tick, and requests turned into runs, as the daemon does."""

    def __init__(self, warehouse: Warehouse, instance: dg.DagsterInstance) -> None:
        @dg.asset(partitions_def=dg.DailyPartitionsDefinition("2026-01-01", end_offset=1))
        def facts() -> None: ...

        @dg.asset
        def dataset() -> None: ...

        assert isinstance(facts.partitions_def, dg.DailyPartitionsDefinition)
        folding = dg.define_asset_job("feedback_day", [facts])
        review = dg.define_asset_job("feedback_review", [dataset])
        self.gate_is_open = True
        self.sensors = {
            "days": new_feedback_sensor(folding, facts.partitions_def),
            "review": feedback_review_sensor(
                review, lambda _: [dataset.key] if self.gate_is_open else [], 10, timedelta(hours=6)
            ),
        }
        self.defs = dg.Definitions(
            assets=[facts, dataset], jobs=[folding, review], sensors=list(self.sensors.values())
        )
        self.warehouse, self.instance = warehouse, instance
        self.cursors: dict[str, str | None] = {}
        self.under_way: dict[str, dg.DagsterRun] = {}
        self.news: list[Any] = []

    def tick(self, which: str = "days", launch: bool = True) -> list[str]:
        """The days requested, or ``review``; a request whose run key is known is dropped, as Dagster does."""
        sensor = self.sensors[which]
        result = sensor.evaluate_tick(
            dg.build_sensor_context(
                instance=self.instance,
                cursor=self.cursors.get(which),
                definitions=self.defs,
                resources={"warehouse": self.warehouse},
            )
        )
        self.cursors[which] = result.cursor
        self.news = list(result.asset_events)
        requested = []
        for request in result.run_requests or []:
            tags = {"dagster/run_key": str(request.run_key)}
            if not launch or self.instance.get_runs(dg.RunsFilter(tags=tags)):
                continue
            name = request.partition_key or which
            self.under_way[name] = self.instance.create_run_for_job(
                self.defs.resolve_job_def(str(sensor.job_name)),
                tags={**request.tags, **tags},
            )
            requested.append(name)
        return requested

    def end(
        self, *names: str, how: dg.DagsterEventType = dg.DagsterEventType.RUN_SUCCESS, which: str = "days"
    ) -> list[str]:
        """The runs of these days (all that are under way, without names) end; what the next tick requests."""
        for name in names or list(self.under_way):
            self.finish(name, how)
        return self.tick(which)

    def finish(self, name: str, how: dg.DagsterEventType) -> None:
        """A run under way ends."""
        run = self.under_way.pop(name)
        self.instance.report_dagster_event(dg.DagsterEvent(how.value, run.job_name), run.run_id)

    def fail(self, *names: str, which: str = "days") -> list[str]:
        """As ``end``, and the runs failed."""
        return self.end(*names, how=dg.DagsterEventType.RUN_FAILURE, which=which)

    def later(self, seconds: float) -> None:
        """Let ``seconds`` pass: everything that waits for a time comes that much nearer."""
        with self.warehouse.database.connect() as connection:
            for name in (CHECKPOINT, REVIEW):
                value = checkpoint.read(connection, name)
                for entry in [*value.get("open", {}).values(), value]:
                    if "attempts" in entry:
                        entry["attempts"]["not_before"] -= seconds
                    if entry.get("due") is not None:
                        entry["due"] -= seconds
                checkpoint.write(connection, name, value)
            connection.execute(
                "update feedback.feedback_event set received_at = received_at - make_interval(secs => %s)",
                [seconds],
            )

    def open_days(self) -> set[str]:
        with self.warehouse.connect() as connection:
            return set(read_ledger(connection).days)


@pytest.fixture
def ticks(warehouse: Warehouse) -> Iterator[Ticks]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Ticks(warehouse, instance)


def test_nothing_then_something_then_nothing(ticks: Ticks, conn: psycopg.Connection[Any]) -> None:
    assert ticks.tick() == []
    add_event(conn, "2026-03-01T10:00:00Z")
    add_event(conn, "2026-03-03T23:59:59+02:00")
    conn.commit()
    assert ticks.tick() == ["2026-03-03", "2026-03-01"]
    assert ticks.tick() == []
    assert ticks.end() == []
    assert ticks.open_days() == set()


def test_the_same_day_can_be_requested_again(ticks: Ticks, conn: psycopg.Connection[Any]) -> None:
    for _ in range(3):
        add_event(conn, "2026-03-01T10:00:00Z")
        conn.commit()
        assert ticks.tick() == ["2026-03-01"]
        assert ticks.end() == []


def test_many_events_in_a_few_seconds_are_one_run(ticks: Ticks, conn: psycopg.Connection[Any]) -> None:
    for _ in range(3):
        add_event(conn, "2026-03-01T10:00:00Z", ago=NOW)
        conn.commit()
        assert ticks.tick() == []
    ticks.later(SETTLE_FEEDBACK)
    assert ticks.tick() == ["2026-03-01"]
    # What arrives while the run is under way waits for its end, and is one run again.
    for _ in range(3):
        add_event(conn, "2026-03-01T10:00:00Z")
        conn.commit()
        assert ticks.tick() == []
    assert ticks.end() == ["2026-03-01"]
    assert ticks.end() == []
    assert ticks.open_days() == set()


def test_interactions_that_nobody_judged_wait_longer(ticks: Ticks, conn: psycopg.Connection[Any]) -> None:
    for day in ("2026-03-01", "2026-03-02"):
        conn.execute(INTERACTION, [f"i-{day}", f"{day}T10:00:00Z", NOW])
    add_event(conn, "2026-03-02T10:00:00Z", ago=NOW)
    conn.commit()
    assert ticks.tick() == []
    ticks.later(SETTLE_FEEDBACK)
    assert ticks.tick() == ["2026-03-02"]
    ticks.later(SETTLE_INTERACTIONS)
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
    assert ticks.tick() == ["2026-03-02", "2026-03-01"]


def test_a_rolled_back_row_is_not(ticks: Ticks, conn: psycopg.Connection[Any]) -> None:
    add_event(conn, "2026-03-01T10:00:00Z")
    conn.rollback()
    assert ticks.tick() == []


def test_a_late_event_reopens_its_day_and_no_other(ticks: Ticks, conn: psycopg.Connection[Any]) -> None:
    for day in ("2026-03-01", "2026-03-08", "2026-03-09"):
        add_event(conn, f"{day}T10:00:00Z")
    conn.commit()
    ticks.tick()
    ticks.end()
    add_event(conn, "2026-03-04T10:00:00Z")
    conn.commit()
    assert ticks.tick() == ["2026-03-04"]


def test_a_duplicate_wakes_nothing(ticks: Ticks, conn: psycopg.Connection[Any]) -> None:
    event = [uuid.uuid4(), uuid.uuid4(), "create", 1, "2026-03-01T10:00:00Z", HOUR]
    conn.execute(EVENT, event)
    conn.commit()
    ticks.tick()
    ticks.end()
    conn.execute(EVENT + "on conflict do nothing", event)
    conn.commit()
    assert ticks.tick() == []


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_a_revision_reopens_the_day_its_feedback_began(
    ticks: Ticks, conn: psycopg.Connection[Any], order: tuple[int, int]
) -> None:
    """In whatever order they arrive."""
    feedback_id = uuid.uuid4()
    at = {1: "2026-03-01T10:00:00Z", 2: "2026-03-05T10:00:00Z"}
    for revision in order:
        add_event(conn, at[revision], feedback_id, revision)
        conn.commit()
        requested = ticks.tick()
        ticks.end()
    assert requested == (["2026-03-05", "2026-03-01"] if order == (1, 2) else ["2026-03-01"])


def test_many_days_are_spread_over_ticks_newest_first_and_none_is_lost(
    ticks: Ticks, conn: psycopg.Connection[Any]
) -> None:
    days = [f"2026-{month:02}-{day:02}" for month in (1, 2) for day in range(1, 26)]
    for day in days:
        add_event(conn, f"{day}T10:00:00Z")
    conn.commit()
    first = ticks.tick()
    assert first == days[: -DAYS_PER_TICK - 1 : -1]
    # What arrives now does not wait for the backlog, neither here nor in the queue of runs.
    add_event(conn, "2026-03-01T10:00:00Z")
    conn.commit()
    second, third = ticks.tick(), ticks.tick()
    assert second[0] == "2026-03-01"
    assert sorted(first + second + third) == [*days, "2026-03-01"]
    assert ticks.tick() == []
    priority = {day: int(run.tags["dagster/priority"]) for day, run in ticks.under_way.items()}
    assert sorted(priority, key=lambda day: priority[day]) == [*days, "2026-03-01"]
    assert max(priority.values()) <= 0


def test_a_clock_ahead_of_ours_counts_for_the_day_of_receipt(
    ticks: Ticks, conn: psycopg.Connection[Any]
) -> None:
    add_event(conn, "2099-01-01T00:00:00Z")
    conn.commit()
    received = conn.execute(
        "select (received_at at time zone 'UTC')::date::text from feedback.feedback_event"
    ).fetchone()
    assert received is not None
    assert ticks.tick() == [received[0]]


def test_days_before_the_first_partition_are_not_requested(
    ticks: Ticks, conn: psycopg.Connection[Any]
) -> None:
    add_event(conn, "2019-05-01T00:00:00Z")
    add_event(conn, "2026-03-01T00:00:00Z")
    conn.commit()
    assert ticks.tick() == ["2026-03-01"]
    assert ticks.end() == []
    assert ticks.open_days() == set()


def test_a_failed_fold_is_tried_again_after_a_pause_and_its_day_stays_open(
    ticks: Ticks, conn: psycopg.Connection[Any]
) -> None:
    add_event(conn, "2026-03-01T10:00:00Z")
    add_event(conn, "2026-03-02T10:00:00Z")
    conn.commit()
    ticks.tick()
    assert ticks.end("2026-03-02") == []
    assert ticks.fail("2026-03-01") == []
    assert ticks.open_days() == {"2026-03-01"}
    ticks.later(PAUSES[0])
    assert ticks.tick() == ["2026-03-01"]
    assert ticks.end() == []
    assert ticks.open_days() == set()


def test_a_fold_that_keeps_failing_is_reported_and_waits_for_the_next_event(
    ticks: Ticks, conn: psycopg.Connection[Any], warehouse: Warehouse
) -> None:
    add_event(conn, "2026-03-01T10:00:00Z")
    conn.commit()
    for pause in PAUSES:
        assert ticks.tick() == ["2026-03-01"]
        assert ticks.news == []
        assert ticks.fail() == []
        last_news = ticks.news
        ticks.later(pause)
    (reported,) = last_news
    assert (reported.check_name, reported.passed) == ("every_day_is_folded", False)
    assert reported.metadata["given_up"].value == ["2026-03-01"]
    assert reported.asset_check_key in every_day_is_folded.check_keys
    asked = every_day_is_folded(warehouse=warehouse)
    assert isinstance(asked, dg.AssetCheckResult) and not asked.passed
    # Nothing marks it processed, and time alone does not bring it back.
    ticks.later(86400)
    assert ticks.tick() == []
    assert ticks.open_days() == {"2026-03-01"}
    add_event(conn, "2026-03-01T11:00:00Z")
    conn.commit()
    assert ticks.tick() == ["2026-03-01"]
    assert ticks.end() == []
    (reported,) = ticks.news
    assert reported.passed
    assert ticks.open_days() == set()


def test_a_reset_cursor_brings_back_what_was_given_up(ticks: Ticks, conn: psycopg.Connection[Any]) -> None:
    add_event(conn, "2026-03-01T10:00:00Z")
    conn.commit()
    ticks.tick()
    # A cancelled run is not started again behind the person's back.
    assert ticks.end(how=dg.DagsterEventType.RUN_CANCELED) == []
    ticks.later(86400)
    assert ticks.tick() == []
    ticks.cursors.clear()
    assert ticks.tick() == ["2026-03-01"]
    (reported,) = ticks.news
    assert reported.passed


def test_without_its_checkpoint_every_day_is_folded_again(
    ticks: Ticks, conn: psycopg.Connection[Any]
) -> None:
    """The recipe of the runbook."""
    for day in ("2026-03-01", "2026-03-02"):
        add_event(conn, f"{day}T10:00:00Z")
    conn.commit()
    ticks.tick()
    ticks.end()
    conn.execute("delete from registry.checkpoint where name = 'feedback_days'")
    conn.commit()
    assert ticks.tick() == ["2026-03-02", "2026-03-01"]


def test_a_request_that_never_became_a_run_is_made_again(ticks: Ticks, conn: psycopg.Connection[Any]) -> None:
    add_event(conn, "2026-03-01T10:00:00Z")
    conn.commit()
    assert ticks.tick(launch=False) == []
    assert ticks.tick() == ["2026-03-01"]


def test_a_database_restored_on_another_server_is_read_again(
    ticks: Ticks, conn: psycopg.Connection[Any]
) -> None:
    """There transaction ids begin anew, below those in the restored rows."""
    add_event(conn, "2026-03-01T10:00:00Z")
    conn.execute("update feedback.feedback_event set xact_id = '900000000000'")
    checkpoint.write(conn, CHECKPOINT, {"xid": 900000000001, "open": {}})
    conn.commit()
    assert ticks.tick() == ["2026-03-01"]
    assert ticks.end() == []
    assert ticks.tick() == []


def test_what_moat_run_folds_is_not_requested_again(ticks: Ticks, conn: psycopg.Connection[Any]) -> None:
    add_event(conn, "2026-03-01T10:00:00Z")
    conn.commit()
    with ledger_for_update(conn) as ledger:
        changes = changed_days(conn, ledger.position)
        assert ledger.take_in(changes, "2026-01-01") == []
    conn.commit()
    add_event(conn, "2026-03-02T10:00:00Z")
    conn.commit()
    with ledger_for_update(conn) as ledger:
        ledger.folded("2026-03-01", changes.horizon)
    conn.commit()
    assert ticks.tick() == ["2026-03-02"]


def test_a_change_during_the_fold_keeps_the_day_open(conn: psycopg.Connection[Any]) -> None:
    with ledger_for_update(conn) as ledger:
        add_event(conn, "2026-03-01T10:00:00Z")
        conn.commit()
        begun = changed_days(conn, ledger.position)
        ledger.take_in(begun, "2026-01-01")
        add_event(conn, "2026-03-01T11:00:00Z")
        conn.commit()
        ledger.take_in(changed_days(conn, ledger.position), "2026-01-01")
        ledger.folded("2026-03-01", begun.horizon)
    assert set(ledger.days) == {"2026-03-01"}
    assert ledger.folded_upto == begun.horizon


def test_every_event_of_many_writers_is_covered_exactly_once(
    ticks: Ticks, warehouse: Warehouse, conn: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """10,000 events, in transactions that overlap, dawdle before they commit or roll back, while the sensor ticks."""
    windows: list[tuple[int, int, dict[str, float], list[tuple[uuid.UUID, str]]]] = []

    def recording(connection: psycopg.Connection[Any], after: int) -> Changes:
        changes = changed_days(connection, after)
        rows = connection.execute(
            "select event_id, (occurred_at at time zone 'UTC')::date::text from feedback.feedback_event"
            " where xact_id >= %s::text::xid8 and xact_id < %s::text::xid8",
            [str(after), str(changes.horizon)],
        ).fetchall()
        if rows:
            windows.append((after, changes.horizon, changes.days, rows))
        return changes

    monkeypatch.setattr("sensors.new_feedback.changed_days", recording)
    committed: dict[uuid.UUID, str] = {}
    lock = threading.Lock()

    def write(seed: int) -> None:
        chance = random.Random(seed)
        with warehouse.database.connect() as connection:
            while len(committed) < 10_000:
                batch = {}
                for _ in range(chance.randint(1, 60)):
                    event_id, day = uuid.uuid4(), f"2026-03-{chance.randint(1, 31):02}"
                    batch[event_id] = day
                    connection.execute(EVENT, [event_id, uuid.uuid4(), "create", 1, f"{day}T10:00:00Z", HOUR])
                    if chance.random() < 0.02:
                        time.sleep(chance.random() / 50)
                time.sleep(chance.random() ** 4 / 5)
                if chance.random() < 0.15:
                    connection.rollback()
                    continue
                connection.commit()
                with lock:
                    committed.update(batch)

    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(8)]
    for writer in writers:
        writer.start()
    requested: dict[str, int] = {}
    while any(writer.is_alive() for writer in writers) or ticks.open_days():
        for day in ticks.tick():
            requested[day] = int(ticks.under_way[day].tags["dagster/run_key"].split(":")[2])
        for day in list(ticks.under_way):
            if random.random() < 0.5:
                ticks.finish(day, dg.DagsterEventType.RUN_SUCCESS)
    for writer in writers:
        writer.join()

    seen = [event for *_, rows in windows for event in rows]
    assert len(seen) == len(committed) >= 10_000
    assert dict(seen) == committed
    assert all(first[1] <= second[0] for first, second in pairwise(windows))
    for _, horizon, days, rows in windows:
        assert {day for _, day in rows} == set(days)
        assert all(requested[day] >= horizon for day in days)


def fold_everything(ticks: Ticks) -> None:
    while ticks.tick() or ticks.end():
        pass


def test_a_thumb_starts_no_training_set_and_a_batch_does(ticks: Ticks, conn: psycopg.Connection[Any]) -> None:
    assert ticks.tick("review") == []
    add_event(conn, "2026-03-01T10:00:00Z")
    conn.commit()
    fold_everything(ticks)
    assert ticks.tick("review") == []
    for _ in range(9):
        add_event(conn, "2026-03-01T10:00:00Z")
    conn.commit()
    # Not before they are folded.
    assert ticks.tick("review") == []
    fold_everything(ticks)
    assert ticks.tick("review") == ["review"]
    # Neither while it runs nor afterwards is the same feedback a reason.
    assert ticks.tick("review") == []
    assert ticks.end(which="review") == []


def test_a_thumb_that_has_waited_long_enough_starts_one(ticks: Ticks, conn: psycopg.Connection[Any]) -> None:
    add_event(conn, "2026-03-01T10:00:00Z", ago=6 * HOUR)
    conn.commit()
    fold_everything(ticks)
    assert ticks.tick("review") == ["review"]


def test_training_sets_that_fail_are_tried_again_and_then_wait_for_feedback(
    ticks: Ticks, conn: psycopg.Connection[Any]
) -> None:
    add_event(conn, "2026-03-01T10:00:00Z", ago=6 * HOUR)
    conn.commit()
    fold_everything(ticks)
    for pause in PAUSES:
        assert ticks.tick("review") == ["review"]
        assert ticks.fail(which="review") == []
        ticks.later(pause)
    assert ticks.tick("review") == []
    add_event(conn, "2026-03-01T11:00:00Z")
    conn.commit()
    fold_everything(ticks)
    assert ticks.tick("review") == ["review"]
    assert ticks.end(which="review") == []
    ticks.later(5 * 3600)
    assert ticks.tick("review") == []


def test_behind_a_closed_gate_feedback_goes_on_waiting(ticks: Ticks, conn: psycopg.Connection[Any]) -> None:
    add_event(conn, "2026-03-01T10:00:00Z", ago=6 * HOUR)
    conn.commit()
    fold_everything(ticks)
    ticks.gate_is_open = False
    assert ticks.tick("review") == []
    ticks.gate_is_open = True
    assert ticks.tick("review") == ["review"]


def test_what_moat_run_published_is_not_published_again(ticks: Ticks, conn: psycopg.Connection[Any]) -> None:
    add_event(conn, "2026-03-01T10:00:00Z", ago=6 * HOUR)
    conn.commit()
    fold_everything(ticks)
    mark_reviewed(conn, read_ledger(conn).folded_upto)
    conn.commit()
    assert ticks.tick("review") == []


def test_a_day_given_up_does_not_hold_back_the_training_sets(
    ticks: Ticks, conn: psycopg.Connection[Any]
) -> None:
    for day in ("2026-03-01", "2026-03-02"):
        add_event(conn, f"{day}T10:00:00Z", ago=6 * HOUR)
    conn.commit()
    ticks.tick()
    ticks.end("2026-03-02")
    assert ticks.tick("review") == []
    ticks.end("2026-03-01", how=dg.DagsterEventType.RUN_CANCELED)
    assert ticks.tick("review") == ["review"]

"""The dbt project on a real Postgres: it parses anywhere, it builds, and days may be run late, twice and after erasures."""

import hashlib
import json
import os
import random
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from feedback.migrations import upgrade as upgrade_feedback
from storage.database import Database
from storage.migrations import upgrade as upgrade_warehouse
from tests.integration.conftest import Cluster

PROJECT = Path(__file__).resolve().parents[2] / "dbt_project"
POLICY = "policy-of-the-test"
START = datetime(2025, 3, 1, tzinfo=UTC)
DAYS = 4
SECRET = "ada@example.org"
RAW_TABLES = """
create table raw.tickets (
  ticket_id text, opened_at timestamptz, closed_at timestamptz, customer text, product_sku text, channel text,
  priority text, status text, subject text, body text, _source text, _row bigint, _loaded_at timestamptz, _content_hash text
);
create table raw.products (
  sku text, name text, category text, price_gbp double precision, warranty_months bigint, launched_on date, status text,
  _source text, _row bigint, _loaded_at timestamptz, _content_hash text
);
insert into raw.products (sku, name, category) values ('WREN-TH', 'Wren TH', 'logger');
insert into raw.tickets (ticket_id, opened_at, closed_at, product_sku, priority, status) values
  ('T-0001', '2025-03-01 10:00+00', '2025-03-01 12:00+00', 'WREN-TH', 'P1', 'closed'),
  ('T-0002', '2025-03-01 11:00+00', null, 'WREN-TH', 'P4', 'open');
"""


@dataclass(frozen=True)
class Event:
    """A feedback event as the log keeps it."""

    event_id: uuid.UUID
    feedback_id: uuid.UUID
    op: str
    revision: int
    score: float | None
    interaction_id: str
    occurred_at: datetime
    received_at: datetime
    kind: str = "thumb"
    correction: str | None = None
    trace_id: str | None = None
    span_id: str | None = None

    @property
    def effective_at(self) -> datetime:
        return min(self.occurred_at, self.received_at)


@dataclass
class Warehouse:
    """A migrated database and dbt pointed at it."""

    url: str
    folder: Path

    def dbt(self, *arguments: str) -> str:
        address = conninfo_to_dict(self.url)
        environment = {
            "DATAMOAT_PG_HOST": str(address["host"]),
            "DATAMOAT_PG_PORT": str(address["port"]),
            "DATAMOAT_PG_USER": str(address["user"]),
            "DATAMOAT_PG_PASSWORD": str(address.get("password", "")),
            "DATAMOAT_PG_DATABASE": str(address["dbname"]),
        }
        return run_dbt(self.folder, environment, {"redaction_policy": POLICY}, *arguments)

    def run_days(self, command: str, first: int, last: int, *arguments: str) -> str:
        """Build the days from START + first to START + last, exclusive."""
        window = [(START + timedelta(days=n)).date().isoformat() for n in (first, last)]
        return self.dbt(command, "--event-time-start", window[0], "--event-time-end", window[1], *arguments)

    def run_day(self, day: int) -> str:
        """What the daily job does after new feedback, and the signals that follow from it."""
        return self.run_days("run", day, day + 1, "--select", "tag:daily", "training_signals")

    def rows(self, query: str, *parameters: Any) -> list[Any]:
        with psycopg.connect(self.url) as conn:
            return conn.execute(query, parameters).fetchall()

    def execute(self, query: str, *parameters: Any) -> None:
        with psycopg.connect(self.url) as conn:
            conn.execute(query, parameters)


def run_dbt(folder: Path, environment: dict[str, str], variables: dict[str, str], *arguments: str) -> str:
    command = [str(Path(sys.executable).parent / "dbt"), "--no-use-colors", *arguments]
    command += [
        "--project-dir",
        str(PROJECT),
        "--profiles-dir",
        str(PROJECT),
        "--vars",
        json.dumps(variables),
    ]
    result = subprocess.run(
        command,
        env={
            "PATH": os.environ["PATH"],
            "DBT_TARGET_PATH": str(folder / "target"),
            "DBT_LOG_PATH": str(folder / "logs"),
            **environment,
        },
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return result.stdout


def add_interaction(
    conn: psycopg.Connection[Any], name: str, at: datetime, *, redact: bool = True, **values: Any
) -> None:
    """An interaction whose question and answer hold a secret, with redactions of both unless told otherwise."""
    texts = [f"{SECRET} asks {name}", f"{SECRET} is told {name}"]
    row = {
        "interaction_id": name,
        "app": "shop",
        "occurred_at": at,
        "messages": json.dumps([{"role": "user", "content": texts[0]}]),
        "output": texts[1],
        "retrieved": json.dumps([{"document_id": "handbook/a.md", "source": "handbook", "text": SECRET}]),
        "model": "m1",
        "api_key_id": uuid.UUID(int=0),
        "body_sha256": "",
        **values,
    }
    columns = ", ".join(row)
    conn.execute(
        f"insert into feedback.interaction ({columns}) values ({', '.join(['%s'] * len(row))})",
        list(row.values()),
    )
    if redact:
        for text in texts:
            add_redaction(conn, text)


def add_redaction(conn: psycopg.Connection[Any], text: str) -> None:
    conn.execute(
        "insert into corpus.redaction values (%s, %s, %s, '{}') on conflict do nothing",
        (hashlib.sha256(text.encode()).hexdigest(), POLICY, text.replace(SECRET, "<EMAIL_ADDRESS>")),
    )


def add_event(conn: psycopg.Connection[Any], event: Event) -> None:
    conn.execute(
        """
        insert into feedback.feedback_event (event_id, feedback_id, op, revision, kind, name, score, explanation, correction,
          annotator_kind, app, interaction_id, trace_id, span_id, occurred_at, received_at, api_key_id, body_sha256)
        values (%s, %s, %s, %s, %s, %s, %s, %s, %s, 'HUMAN', 'shop', %s, %s, %s, %s, %s, %s, '')
        """,
        (
            *(
                event.event_id,
                event.feedback_id,
                event.op,
                event.revision,
                event.kind,
                event.kind,
                event.score,
            ),
            *(
                f"{SECRET} says why",
                event.correction,
                event.interaction_id,
                event.trace_id,
                event.span_id,
                event.occurred_at,
                event.received_at,
            ),
            uuid.UUID(int=0),
        ),
    )


def random_log(generator: random.Random, feedback_id: uuid.UUID, interactions: list[str]) -> list[Event]:
    """Events of one item in no order; few revisions and hours to choose from, so that ties are common."""
    interaction = generator.choice(interactions)
    log = []
    for _ in range(generator.randint(1, 6)):
        occurred_at = START + timedelta(hours=8 * generator.randrange(3 * DAYS))
        # Some clocks run ahead: what then counts is when the event was received.
        received_at = (
            occurred_at + timedelta(hours=8 * generator.choice([-1, 0, 1, 1]))
            if generator.random() < 0.3
            else None
        )
        if received_at is None or received_at < START:
            received_at = occurred_at + timedelta(seconds=1)
        log.append(
            Event(
                uuid.UUID(int=generator.getrandbits(128)),
                feedback_id,
                generator.choice(["create", "revise", "retract"]),
                generator.randint(1, 3),
                generator.choice([0.0, 1.0]),
                interaction,
                occurred_at,
                received_at,
            )
        )
    return log


def fold(log: list[Event]) -> tuple[Any, ...]:
    """The state that follows from a log: the reference that feedback_current is held against."""
    ordered = sorted(log, key=lambda event: (event.revision, event.effective_at, event.event_id))
    last = ordered[-1]
    first_at = min(event.effective_at for event in log)
    return (
        last.feedback_id,
        last.event_id,
        [event.event_id for event in ordered],
        last.op == "retract",
        last.score,
        first_at,
        first_at.astimezone(UTC).date(),
        sorted({event.effective_at.astimezone(UTC).date() for event in log}),
        last.interaction_id.startswith("unseen"),
    )


FOLDED = """
select
  feedback_id, last_event_id, event_ids, is_retracted, score, first_event_at, created_day, event_days, is_orphan
from marts.feedback_current
order by feedback_id
"""


@pytest.fixture(scope="module")
def logs() -> list[list[Event]]:
    generator = random.Random(20250301)
    interactions = [f"i{number}" for number in range(40)] + ["unseen-1", "unseen-2"]
    return [
        random_log(generator, uuid.UUID(int=generator.getrandbits(128)), interactions) for _ in range(200)
    ]


@pytest.fixture(scope="module")
def built(
    cluster: Cluster, logs: list[list[Event]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Warehouse]:
    """Two hundred logs in random order, and everything built from them, with all dbt tests."""
    warehouse = Warehouse(cluster.new_database(), tmp_path_factory.mktemp("dbt"))
    upgrade_warehouse(Database.from_url(warehouse.url))
    upgrade_feedback(warehouse.url)
    generator = random.Random(1)
    with psycopg.connect(warehouse.url) as conn:
        conn.execute(RAW_TABLES)
        conn.execute("grant select on all tables in schema raw to datamoat_writer")
        conn.execute(
            """
            insert into registry.source values
              ('handbook', '1.0.0', 'support', 'd', 'proprietary', true, '{rag,finetune}', 'documents', 'l', 's', 30)
            """
        )
        for number in range(40):
            # Some texts are not redacted yet.
            add_interaction(conn, f"i{number}", START + timedelta(hours=number), redact=number % 8 != 0)
        add_redaction(conn, f"{SECRET} says why")
        events = [event for log in logs for event in log]
        generator.shuffle(events)
        for event in events:
            add_event(conn, event)
    warehouse.run_days("build", 0, DAYS)
    yield warehouse


@pytest.fixture
def event() -> Event:
    """A thumb up on the second day about an interaction of the first."""
    at = START + timedelta(days=1, hours=5)
    return Event(uuid.uuid4(), uuid.uuid4(), "create", 1, 1.0, "i1", at, at)


def test_the_project_parses_without_a_database_or_settings(tmp_path: Path) -> None:
    output = run_dbt(tmp_path, {}, {}, "parse", "--show-all-deprecations")
    assert "WARNING" not in output and "Deprecat" not in output, output
    manifest = json.loads((tmp_path / "target" / "manifest.json").read_text(encoding="utf-8"))
    models = [node for node in manifest["nodes"].values() if node["resource_type"] == "model"]
    assert {model["schema"] for model in models} == {"staging", "intermediate", "marts"}
    assert [model["name"] for model in models if not model["description"]] == []
    assert {model["name"] for model in models if "daily" in model["tags"]} == {
        "fct_interactions",
        "fct_feedback",
        "feedback_current",
        "model_quality_daily",
    }
    keys = {
        f"{source['source_name']}.{source['name']}": "/".join(source["meta"]["dagster"]["asset_key"])
        for source in manifest["sources"].values()
    }
    # The asset that redacts the texts of interactions and feedback is what fills corpus.redaction.
    assert keys.pop("corpus.redaction") == "feedback/redaction"
    assert keys == {name: name.replace(".", "/") for name in keys}


def test_another_example_has_no_models_of_support(tmp_path: Path) -> None:
    run_dbt(tmp_path, {}, {"example": "feedbackqa"}, "parse")
    manifest = json.loads((tmp_path / "target" / "manifest.json").read_text(encoding="utf-8"))
    nodes = [node for node in manifest["nodes"].values() if node["config"]["enabled"]]
    assert not [node["name"] for node in (*nodes, *manifest["sources"].values()) if "support" in node["path"]]
    assert "model.datamoat.training_signals" in manifest["nodes"]


def test_the_fold_equals_the_reference(built: Warehouse, logs: list[list[Event]]) -> None:
    expected = sorted(map(fold, logs), key=lambda state: state[0])
    assert built.rows(FOLDED) == expected


def test_the_mart_and_the_service_fold_alike(built: Warehouse) -> None:
    service = """
        select feedback_id, event_id, op, revision, score, label, interaction_id
        from feedback.current(array(select feedback_id from feedback.feedback_event)) order by feedback_id
    """
    mart = """
        select feedback_id, last_event_id, last_op, revision, score, label, interaction_id
        from marts.feedback_current order by feedback_id
    """
    assert built.rows(service) == built.rows(mart) != []


def test_every_day_and_every_event_is_counted_once(built: Warehouse, logs: list[list[Event]]) -> None:
    (facts,) = built.rows("select count(*), sum(event_count) from marts.feedback_current")
    assert facts == (len(logs), sum(map(len, logs)))
    (metrics,) = built.rows(
        "select sum(interactions), sum(n_rated), sum(thumbs_up) from marts.model_quality_daily"
    )
    states = [fold(log) for log in logs]
    standing = [state for state in states if not state[3]]
    assert metrics == (40, len(standing), sum(state[4] == 1.0 for state in standing))
    rates = built.rows(
        "select n_rated, status, approval_rate is null, approval_low is null from marts.model_quality_daily"
    )
    assert {row for row in rates if row[0] < 30} and all(
        (status, no_rate, no_interval)
        == (("not enough data", True, True) if n < 30 else ("ok", False, False))
        for n, status, no_rate, no_interval in rates
    )


def test_signals_have_the_agreed_columns_and_reasons(built: Warehouse) -> None:
    columns = built.rows(
        """
        select attname, format_type(atttypid, atttypmod) from pg_attribute
        where attrelid = 'marts.training_signals'::regclass and attnum > 0
        """
    )
    assert dict(columns) == {
        **dict.fromkeys(
            ["signal_id", "interaction_id", "kind", "app", "session_id", "user_ref", "author_ref"], "text"
        ),
        **dict.fromkeys(
            ["prompt_sha256", "completion", "completion_sha256", "correction", "label", "model"], "text"
        ),
        **dict.fromkeys(["prompt_version", "exclusion_reason"], "text"),
        **dict.fromkeys(["event_ids", "reasons", "sources"], "text[]"),
        **dict.fromkeys(["prompt", "retrieved"], "jsonb"),
        "occurred_at": "timestamp with time zone",
        "day": "date",
        "is_positive": "boolean",
        "score": "double precision",
    }
    reasons = {
        reason for (reason,) in built.rows("select distinct exclusion_reason from marts.training_signals")
    }
    assert reasons == {None, "not_redacted", "no_interaction"}


def test_analysts_read_the_marts_and_find_no_unredacted_text(built: Warehouse) -> None:
    with psycopg.connect(built.url) as conn:
        conn.execute("set role datamoat_analyst")
        tables = conn.execute(
            "select relname from pg_class where relnamespace = 'marts'::regnamespace and relkind = 'r'"
        )
        for (table,) in tables.fetchall():
            text = str(conn.execute(f"select * from marts.{table}").fetchall())
            assert SECRET not in text, table
        assert "<EMAIL_ADDRESS>" in str(conn.execute("select prompt from marts.fct_interactions").fetchall())
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            conn.execute("select * from staging.stg_feedback__interactions")


def test_a_day_again_changes_nothing(built: Warehouse) -> None:
    tables = (
        "fct_interactions",
        "fct_feedback",
        "feedback_current",
        "model_quality_daily",
        "training_signals",
    )
    contents = {table: built.rows(f"select * from marts.{table} as t order by t::text") for table in tables}
    output = built.run_day(1)
    assert "2025-03-02" in output and "2025-03-01" not in output
    for table in tables:
        assert built.rows(f"select * from marts.{table} as t order by t::text") == contents[table]


def test_a_late_revision_and_an_erasure_change_what_their_day_says(built: Warehouse, event: Event) -> None:
    state = "select event_ids, score, created_day, is_retracted from marts.feedback_current where feedback_id = %s"
    signal = "select is_positive, event_ids from marts.training_signals where signal_id = %s::text"
    before = built.rows(FOLDED)
    with psycopg.connect(built.url) as conn:
        add_event(conn, event)
    built.run_day(1)
    assert built.rows(state, event.feedback_id) == [([event.event_id], 1.0, date(2025, 3, 2), False)]

    # Two days on: only the day of the revision is run, and it folds the event of the earlier day as well.
    late = event.occurred_at + timedelta(days=2)
    revision = Event(uuid.uuid4(), event.feedback_id, "revise", 2, 0.0, "i1", late, late)
    with psycopg.connect(built.url) as conn:
        add_event(conn, revision)
    built.run_day(3)
    both = [event.event_id, revision.event_id]
    assert built.rows(state, event.feedback_id) == [(both, 0.0, date(2025, 3, 2), False)]
    assert built.rows(signal, event.feedback_id) == [(False, [str(name) for name in both])]

    # The revision is erased and its day run again.
    built.execute("delete from feedback.feedback_event where event_id = %s", revision.event_id)
    built.run_day(3)
    assert built.rows(state, event.feedback_id) == [([event.event_id], 1.0, date(2025, 3, 2), False)]
    assert built.rows("select 1 from marts.fct_feedback where event_id = %s", revision.event_id) == []

    built.execute("delete from feedback.feedback_event where event_id = %s", event.event_id)
    built.run_day(1)
    assert built.rows(FOLDED) == before
    assert built.rows(signal, event.feedback_id) == []


def test_an_interaction_after_its_feedback_ends_the_orphanhood(built: Warehouse, event: Event) -> None:
    """Feedback may name it by its id, by the span that it is or by the response, and the app must be the same."""
    trace, span = event.event_id.hex, event.event_id.hex[:16]
    late, desk = f"late-{span}", f"desk-{span}"
    names = {late: late, f"{trace}:{span}": late, f"chatcmpl-{span}": late, f"resp-{span}": None}
    sent = [
        replace(event, event_id=uuid.uuid4(), feedback_id=uuid.uuid4(), interaction_id=name) for name in names
    ]
    sent[1] = replace(sent[1], trace_id=trace, span_id=span)
    with psycopg.connect(built.url) as conn:
        for one in sent:
            add_event(conn, one)
    built.run_day(1)
    state = "select feedback_id, interaction_id, is_orphan from marts.feedback_current where feedback_id = any(%s)"
    signal = "select signal_id::uuid, interaction_id, exclusion_reason from marts.training_signals where signal_id = any(%s)"
    ids = [one.feedback_id for one in sent]
    before = built.rows(state, ids), built.rows(signal, list(map(str, ids)))
    assert set(before[0]) == {(one.feedback_id, one.interaction_id, True) for one in sent}
    assert set(before[1]) == {(one.feedback_id, one.interaction_id, "no_interaction") for one in sent}

    other_names = {"trace_id": trace, "span_id": span, "response_id": f"chatcmpl-{span}"}
    with psycopg.connect(built.url) as conn:
        add_interaction(conn, late, START + timedelta(days=2), metadata=json.dumps(other_names))
        others = json.dumps({"response_id": f"resp-{span}"})
        add_interaction(conn, desk, START + timedelta(days=2), app="desk", metadata=others)
    built.run_day(2)
    found = {(one.feedback_id, names[one.interaction_id] or one.interaction_id) for one in sent}
    assert {row[:2] for row in built.rows(state, ids)} == found
    assert {row[0] for row in built.rows(state, ids) if row[2]} == {sent[3].feedback_id}
    signals = built.rows(signal, list(map(str, ids)))
    assert {row[:2] for row in signals} == found
    assert {row[0] for row in signals if row[2] is not None} == {sent[3].feedback_id}
    # The log itself says what was said.
    logged = built.rows("select interaction_id from marts.fct_feedback where feedback_id = any(%s)", ids)
    assert {name for (name,) in logged} == set(names)


def test_a_staging_view_can_be_run_alone(built: Warehouse) -> None:
    built.dbt("run", "--select", "stg_feedback__events")
    assert built.rows("select count(*) > 0 from intermediate.int_feedback_redacted") == [(True,)]

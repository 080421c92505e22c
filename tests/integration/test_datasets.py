"""Dataset versions and evaluations against a real Postgres: published once, whatever happens in between."""

import os
import signal as signals_of_unix
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from assets.datasets.builders import KINDS, build
from assets.datasets.canonical import digest
from assets.datasets.signals import read_signals
from assets.datasets.versions import publish, set_alias, verify

Connection = psycopg.Connection[Any]

MART = """
    create schema if not exists marts;
    create table marts.training_signals (
      signal_id text, interaction_id text, event_ids text[], kind text, occurred_at timestamptz, day date,
      app text, session_id text, user_ref text, author_ref text, prompt jsonb, prompt_sha256 text,
      completion text, completion_sha256 text, correction text, is_positive boolean, score double precision,
      label text, reasons text[], model text, prompt_version text, retrieved jsonb, sources text[],
      exclusion_reason text
    )
"""


def add_signal(conn: Connection, signal_id: str, **changes: Any) -> None:
    prompt = [{"role": "user", "content": f"question {changes.pop('question', signal_id)}"}]
    row = {
        "signal_id": signal_id,
        "interaction_id": f"i-{signal_id}",
        "event_ids": [f"e-{signal_id}"],
        "kind": "thumb",
        "occurred_at": "2026-03-01 12:00+00",
        "session_id": f"chat-{signal_id}",
        "author_ref": f"author-{signal_id}",
        "prompt": Jsonb(prompt),
        "prompt_sha256": digest(prompt),
        "completion": f"answer {signal_id}",
        "is_positive": True,
        "retrieved": Jsonb([{"chunk_id": "c1", "source": "handbook", "rank": 1}]),
        "sources": ["handbook"],
    } | changes
    columns, marks = ", ".join(row), ", ".join(["%s"] * len(row))
    conn.execute(
        f"insert into marts.training_signals ({columns}) values ({marks})",
        list(row.values()),
    )


@pytest.fixture
def mart(conn: Connection) -> Iterator[Connection]:
    """The signals mart with a few rows, committed so that other processes see it."""
    conn.rollback()
    conn.execute("drop table if exists marts.training_signals cascade")
    conn.execute(MART)
    for number in range(12):
        add_signal(conn, f"up{number}")
        add_signal(
            conn, f"down{number}", question=f"up{number}", is_positive=False, completion=f"bad {number}"
        )
    add_signal(conn, "fix", kind="correction", is_positive=None, correction="the right answer")
    add_signal(conn, "out", exclusion_reason="source_not_allowed")
    conn.commit()
    yield conn
    conn.rollback()
    conn.execute("drop table marts.training_signals")
    conn.execute("delete from registry.dataset_alias where dataset = 'answers'")
    conn.execute("delete from registry.dataset_version where dataset = 'answers'")
    conn.commit()


def registered(conn: Connection) -> tuple[list[Any], list[Any]]:
    versions = conn.execute(
        "select version, rows, uri, run_id from registry.dataset_version where dataset = 'answers' order by created_at"
    ).fetchall()
    aliases = conn.execute(
        "select alias, version, moved_at, moved_by from registry.dataset_alias where dataset = 'answers'"
    ).fetchall()
    return versions, aliases


def test_signals_come_back_typed(mart: Connection) -> None:
    signals = {signal.signal_id: signal for signal in read_signals(mart)}
    assert len(signals) == 26
    fix = signals["fix"]
    assert fix.correction == "the right answer"
    assert fix.prompt == ({"role": "user", "content": "question fix"},)
    assert fix.context == ("c1",)
    assert fix.event_ids == ("e-fix",)
    assert signals["out"].exclusion_reason == "source_not_allowed"


@pytest.mark.parametrize("kind", KINDS)
def test_publishing_twice_changes_nothing(mart: Connection, tmp_path: Path, kind: Any) -> None:
    first = publish(mart, tmp_path, "answers", build(kind, read_signals(mart)), run_id="run 1")
    mart.commit()
    before, files = registered(mart), sorted(tmp_path.rglob("*"))
    again = publish(mart, tmp_path, "answers", build(kind, read_signals(mart)), run_id="run 2")
    mart.commit()
    assert first.created and not again.created
    assert (again.version, again.rows, again.uri) == (first.version, first.rows, first.uri)
    assert registered(mart) == before
    assert sorted(tmp_path.rglob("*")) == files
    assert Path(first.uri.removeprefix("file://")).joinpath("train.parquet").exists()
    stored = mart.execute(
        "select manifest from registry.dataset_version where dataset = 'answers'"
    ).fetchone()
    assert stored is not None and digest(stored[0]) == first.version
    assert verify(tmp_path, "answers", first.version) == []


def test_new_feedback_is_a_new_version_and_the_old_one_stays(mart: Connection, tmp_path: Path) -> None:
    old = publish(mart, tmp_path, "answers", build("sft", read_signals(mart)))
    add_signal(mart, "late")
    new = publish(mart, tmp_path, "answers", build("sft", read_signals(mart)))
    assert new.version != old.version
    assert new.rows == old.rows + 1
    versions, aliases = registered(mart)
    assert {version for version, *_ in versions} == {old.version, new.version}
    assert [(alias, version) for alias, version, *_ in aliases] == [("latest", new.version)]
    assert verify(tmp_path, "answers", old.version) == []


def test_rolling_back_moves_the_pointer_only(mart: Connection, tmp_path: Path) -> None:
    old = publish(mart, tmp_path, "answers", build("sft", read_signals(mart)))
    add_signal(mart, "late")
    new = publish(mart, tmp_path, "answers", build("sft", read_signals(mart)))
    assert set_alias(mart, "answers", "production", new.version, "ann")
    assert set_alias(mart, "answers", "production", old.version, "bob")
    assert not set_alias(mart, "answers", "production", old.version, "cem")
    _, aliases = registered(mart)
    assert ("production", old.version, "bob") in [(a, v, by) for a, v, _, by in aliases]
    with pytest.raises(LookupError, match="no version 0000 of answers"):
        set_alias(mart, "answers", "production", "0000", "ann")


def test_a_failed_transaction_leaves_no_pointer_and_a_rerun_ends_the_same(
    mart: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from assets.datasets import versions

    def fail(*args: object) -> bool:
        raise ConnectionError("the server went away")

    built = build("kto", read_signals(mart))
    mart.commit()
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(versions, "set_alias", fail)
        publish(mart, tmp_path, "answers", built)
    assert registered(mart) == ([], [])
    mart.commit()
    assert publish(mart, tmp_path, "answers", built).created


KILLED = """
import os, signal, sys
from pathlib import Path
import psycopg
from assets.datasets import versions
from assets.datasets.builders import build
from assets.datasets.signals import read_signals

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

setattr(versions, sys.argv[3], die)
with psycopg.connect(sys.argv[1]) as conn:
    versions.publish(conn, Path(sys.argv[2]), "answers", build("preference", read_signals(conn)))
"""


@pytest.mark.parametrize("step", ["_register", "set_alias"])
def test_killed_before_the_commit_and_run_again_gives_the_same_version(
    mart: Connection, tmp_path: Path, step: str
) -> None:
    url = mart.info.dsn + (f" password={mart.info.password}" if mart.info.password else "")
    command = [sys.executable, "-c", KILLED, url, str(tmp_path), step]
    root = Path(__file__).parents[2]
    killed = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, timeout=120)
    assert killed.returncode == -signals_of_unix.SIGKILL
    left = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert left
    assert registered(mart) == ([], [])

    published = publish(mart, tmp_path, "answers", build("preference", read_signals(mart)))
    assert published.created
    assert (tmp_path / "datasets" / "answers" / published.version / "manifest.json") in left
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == left
    assert verify(tmp_path, "answers", published.version) == []

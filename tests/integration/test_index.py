"""From shards to the index: what is loaded, what leaves, and what readers notice of it."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow.parquet as pq
import pytest

from assets.embeddings import dataset, index, registry
from assets.embeddings.checks import index_checks
from assets.embeddings.index import graph_of, refresh_passages
from assets.embeddings.registry import live_release, release_table
from assets.embeddings.upkeep import keep_up
from embedder import failures
from storage.database import Database
from storage.migrations import upgrade
from tests.integration.conftest import Cluster, database_of
from tests.integration.releases import add, content, load, release, vector_of, write_shard

Connection = psycopg.Connection[Any]

A = release("a")


def texts(first: int, end: int) -> list[str]:
    return [f"text {number}" for number in range(first, end)]


@pytest.fixture
def small_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "ROWS_FOR_A_GRAPH", 100)


@pytest.fixture
def writer(database: Database) -> Iterator[Connection]:
    """As the assets work: the pipeline's role, each step committed."""
    with database.connect("datamoat_writer", autocommit=True) as connection:
        yield connection


def test_chunks_are_exported_by_the_row_group(
    writer: Connection, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "ROW_GROUP", 2)
    add(writer, "notes", texts(0, 5))
    add(writer, "orders", texts(0, 3))
    exported = dataset.export_chunks(writer, "notes", tmp_path)
    with database.connect("datamoat_writer") as in_a_transaction:
        in_a_transaction.execute("select 1")
        assert dataset.export_chunks(in_a_transaction, "notes", tmp_path) == exported
    assert dataset.current_dataset("notes", tmp_path) == exported.path
    file = pq.ParquetFile(exported.path)
    assert exported.rows == 5 and file.num_row_groups == 3
    assert file.read().to_pylist()[4] == {
        "chunk_id": "notes/text 4",
        "content_hash": "text 4",
        "text": "text 4",
    }
    nothing = dataset.export_chunks(writer, "nobody", tmp_path)
    assert nothing.rows == 0 and pq.read_table(nothing.path).num_rows == 0
    assert not list(tmp_path.rglob(".export.*"))


def test_what_a_killed_export_has_left_goes_and_what_another_one_writes_stays(
    writer: Connection, tmp_path: Path
) -> None:
    scratch = tmp_path / "embeddings" / "datasets" / "notes"
    for name, age in ((".export.killed", 2 * 86_400), (".export.running", 60)):
        folder = scratch / name
        folder.mkdir(parents=True)
        (folder / "chunks.parquet").write_bytes(b"half")
        then = time.time() - age
        os.utime(folder, (then, then))
    dataset.export_chunks(writer, "notes", tmp_path)
    assert [path.name for path in scratch.glob(".export.*")] == [".export.running"]


def test_only_what_has_no_vector_is_loaded(conn: Connection, tmp_path: Path) -> None:
    add(conn, "notes", texts(0, 5))
    write_shard(tmp_path, texts(0, 5))
    assert (first := load(conn, "notes", A, tmp_path)).loaded == first.vectors == first.wanted == 5
    (stamp,) = conn.execute("select loaded_at from registry.embedding_release").fetchall()[0]
    conn.execute("update corpus.document set title = 'another', updated_at = now()")
    conn.execute("update corpus.piece set heading = 'another'")
    conn.execute("update corpus.piece set chunk_id = 'renamed' where content_hash = 'text 1'")
    again = load(conn, "notes", A, tmp_path)
    assert (again.loaded, again.missing, again.vectors) == (0, 0, 5)
    assert conn.execute("select loaded_at from registry.embedding_release").fetchall() == [(stamp,)]
    add(conn, "notes", texts(5, 6))
    write_shard(tmp_path, texts(5, 6))
    assert load(conn, "notes", A, tmp_path).loaded == 1
    assert np.allclose(content(conn, "a")["text 5"], vector_of("text 5"), atol=1e-3)


def test_a_text_is_kept_once_and_as_long_as_a_chunk_has_it(conn: Connection, tmp_path: Path) -> None:
    add(conn, "notes", texts(0, 3))
    add(conn, "orders", texts(2, 4))
    # A shard that another run wrote as well changes nothing.
    write_shard(tmp_path, texts(0, 3))
    write_shard(tmp_path, texts(1, 4))
    assert load(conn, "notes", A, tmp_path).loaded == 3
    assert load(conn, "orders", A, tmp_path).loaded == 1
    load(conn, "notes", b := release("b"), tmp_path, follow=False)
    conn.execute("delete from corpus.document where document_id in ('notes/text 0', 'notes/text 2')")
    assert refresh_passages(conn).removed == 1
    assert content(conn, "a").keys() == {"text 1", "text 2", "text 3"}
    assert content(conn, "b").keys() == {"text 1", "text 2"}
    assert load(conn, "notes", b, tmp_path, follow=False).loaded == 0


def test_long_vectors_lie_within_their_rows(conn: Connection, tmp_path: Path) -> None:
    add(conn, "notes", texts(0, 3))
    write_shard(tmp_path, texts(0, 3), dimensions=4000)
    assert load(conn, "notes", release("long", 4000), tmp_path).loaded == 3
    out_of_line = conn.execute(
        "select pg_relation_size(reltoastrelid) from pg_class where oid = 'retrieval.release_long'::regclass"
        " and reltoastrelid <> 0"
    ).fetchone()
    assert out_of_line in (None, (0,))


def test_vectors_of_texts_that_changed_meanwhile_are_not_wanted(conn: Connection, tmp_path: Path) -> None:
    add(conn, "notes", texts(0, 4))
    write_shard(tmp_path, texts(0, 4))
    conn.execute("update corpus.piece set content_hash = 'new', text = 'new' where content_hash = 'text 1'")
    conn.execute("delete from corpus.document where document_id = 'notes/text 2'")
    report = load(conn, "notes", A, tmp_path)
    assert (report.loaded, report.missing) == (2, 1)
    assert content(conn, "a").keys() == {"text 0", "text 3"}


def test_what_was_refused_is_noted_until_it_has_a_vector(conn: Connection, tmp_path: Path) -> None:
    add(conn, "notes", texts(0, 3))
    add(conn, "orders", texts(3, 4))
    write_shard(tmp_path, texts(0, 2))
    due = datetime(2030, 1, 1, tzinfo=UTC)
    refused = {text: failures.Failure("too odd", 2, due) for text in ("text 2", "text 3", "gone")}
    failures.write(tmp_path, {}, refused)
    report = load(conn, "notes", A, tmp_path)
    assert (report.missing, report.failed) == (1, 1)
    rows = conn.execute(
        "select content_hash, error, attempts, next_attempt_at from retrieval.embedding_failure"
    )
    assert sorted(rows) == [("text 2", "too odd", 2, due), ("text 3", "too odd", 2, due)]
    figures = index_checks(conn, "notes")
    assert {name for name, outcome in figures.items() if not outcome.passed} == {"coverage", "failures"}
    assert figures["coverage"].figures == {"coverage": 2 / 3, "texts": 3, "vectors": 2}
    failures.write(tmp_path, {}, {})
    write_shard(tmp_path, ["text 2"])
    assert load(conn, "notes", A, tmp_path).failed == 0
    # Of other sources nothing was learnt.
    assert conn.execute("select content_hash from retrieval.embedding_failure").fetchall() == [("text 3",)]
    conn.execute("delete from corpus.document where source = 'orders'")
    refresh_passages(conn)
    assert conn.execute("select from retrieval.embedding_failure").fetchall() == []


def test_the_checks_say_how_far_the_index_is_behind(conn: Connection, tmp_path: Path) -> None:
    assert not any(outcome.passed for outcome in index_checks(conn, "notes").values())
    add(conn, "notes", texts(0, 4))
    write_shard(tmp_path, texts(0, 4))
    load(conn, "notes", A, tmp_path)
    assert all(outcome.passed for outcome in index_checks(conn, "notes").values())
    add(conn, "notes", ["new"])
    conn.execute("update corpus.document set updated_at = now() - interval '2 days' where path = 'new'")
    conn.execute("delete from corpus.document where path = 'text 0'")
    found = index_checks(conn, "notes")
    assert found["backlog"].figures == {"backlog": 1}
    assert found["lag"].figures["lag_seconds"] == pytest.approx(2 * 86_400, abs=1)
    assert found["orphans"].figures == {"orphans": 1}
    assert {name for name, outcome in found.items() if outcome.passed} == {"failures"}


def test_adding_and_building_anew_give_the_same_index(
    conn: Connection, tmp_path: Path, small_graphs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grow(made: Any, share: float) -> list[bool]:
        monkeypatch.setattr(index, "CHANGED_IN_PLACE", share)
        return [
            load(conn, source, made, tmp_path, follow=made == A).rebuilt for source in ("notes", "orders")
        ]

    write_shard(tmp_path, texts(0, 130))
    add(conn, "notes", texts(0, 110))
    add(conn, "orders", texts(100, 130))
    # The first load passes the mark for a graph; where much is missing yet, the last one builds it.
    assert grow(A, 0.5) == [True, False]
    assert grow(release("b"), 0.0) == [True, True]
    assert content(conn, "a") == content(conn, "b")
    add(conn, "notes", ["more"])
    write_shard(tmp_path, ["more"])
    assert grow(A, 0.0) == [True, False]
    assert grow(release("b"), 0.5) == [False, False]
    assert content(conn, "a") == content(conn, "b")
    for name in "ab":
        assert graph_of(conn, release_table(name)) is not None
        keys = conn.execute(
            "select contype::text from pg_constraint where conrelid = %s::regclass and contype in ('p', 'f')",
            [f"retrieval.release_{name}"],
        )
        assert sorted(keys.fetchall()) == [("f",), ("p",)]
    # Far below the mark the graph goes.
    conn.execute("delete from corpus.document where path > 'text 2'")
    assert load(conn, "notes", A, tmp_path).rebuilt
    assert graph_of(conn, release_table("a")) is None


def test_many_sources_cost_one_graph(
    conn: Connection, tmp_path: Path, small_graphs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    create = index._create_graph

    def count(conn: Connection, table: Any, resources: Any) -> None:
        built.append(table)
        create(conn, table, resources)

    monkeypatch.setattr(index, "_create_graph", count)
    sources = {
        name: texts(start, start + 110) for name, start in (("notes", 0), ("orders", 110), ("mail", 220))
    }
    for source, wanted in sources.items():
        add(conn, source, wanted)
    add(conn, "secret", texts(500, 600), uses="{finetune}")  # nobody will ever embed it
    write_shard(tmp_path, texts(0, 330))
    assert [load(conn, source, A, tmp_path).graph for source in sources] == [False, False, True]
    assert len(built) == 1
    # What never comes does not hold the graph back for ever.
    add(conn, "broken", texts(600, 700))
    assert [load(conn, "notes", b := release("b"), tmp_path, follow=False).graph for _ in range(2)] == [
        False,
        True,
    ]
    assert not load(conn, "broken", b, tmp_path, follow=False).rebuilt


def test_readers_do_not_wait_for_what_follows_a_swap(
    writer: Connection, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load ends its transaction before it drops the old table, which waits for readers of passages."""
    monkeypatch.setattr(registry, "LOCK_ATTEMPTS", 2)
    monkeypatch.setattr(registry, "LOCK_PAUSE_SECONDS", 0)
    monkeypatch.setattr(index, "CHANGED_IN_PLACE", 0.0)
    monkeypatch.setattr(index, "ROWS_FOR_A_GRAPH", 2)
    write_shard(tmp_path, texts(0, 4))
    add(writer, "notes", texts(0, 3))
    load(writer, "notes", A, tmp_path)
    add(writer, "notes", texts(3, 4))
    with database.connect("datamoat_writer") as mine, database.connect() as reader:
        refresh_passages(mine)
        reader.execute("select from retrieval.passage")
        assert load(mine, "notes", A, tmp_path).rebuilt
        reader.execute("set lock_timeout = '1s'")
        assert reader.execute("select count(*) from retrieval.live").fetchone() == (4,)
    old = "select count(*) from pg_tables where tablename ~ 'release_a_old'"
    assert writer.execute(old).fetchone() == (1,)
    load(writer, "notes", A, tmp_path)
    assert writer.execute(old).fetchone() == (0,)


def test_a_long_load_of_a_candidate_does_not_hold_the_view(
    writer: Connection,
    database: Database,
    tmp_path: Path,
    small_graphs: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add(writer, "notes", texts(0, 120))
    write_shard(tmp_path, texts(0, 120))
    load(writer, "notes", A, tmp_path)
    held: list[str] = []

    def look(conn: Connection, table: Any, resources: Any) -> None:
        relations = conn.execute(
            "select relation::regclass::text from pg_locks where locktype = 'relation' and pid = pg_backend_pid()"
        )
        held.extend(name for (name,) in relations)

    monkeypatch.setattr(index, "_create_graph", look)
    load(writer, "notes", release("b"), tmp_path, follow=False)
    assert "retrieval.passage" in held and not {"retrieval.live", "retrieval.release_a"} & {*held}


def test_no_read_fails_while_the_index_is_swapped(
    writer: Connection,
    database: Database,
    tmp_path: Path,
    small_graphs: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(index, "CHANGED_IN_PLACE", 0.0)
    with database.connect() as conn:
        add(conn, "notes", texts(0, 150))
    write_shard(tmp_path, texts(0, 170))
    load(writer, "notes", A, tmp_path)
    stop = threading.Event()
    reads: list[int] = []
    errors: list[Exception] = []

    def read(prepare: bool) -> None:
        with database.connect("datamoat_writer", autocommit=True) as mine:
            while not stop.is_set():
                try:
                    rows = mine.execute(
                        "select content_hash from retrieval.live order by embedding <=> %s::halfvec limit 20",
                        [str(vector_of("text 7").tolist())],
                        prepare=prepare,
                    ).fetchall()
                    assert rows[0] == ("text 7",)
                    reads.append(len(rows))
                except Exception as error:
                    errors.append(error)
                    return

    threads = [threading.Thread(target=read, args=(prepare,)) for prepare in (True, False)]
    for thread in threads:
        thread.start()
    for number in range(150, 162):
        with database.connect() as conn:
            add(conn, "notes", texts(number, number + 1))
        assert load(writer, "notes", A, tmp_path).rebuilt
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(reads) > 12 and set(reads) == {20}


def test_a_load_that_is_killed_leaves_the_index_as_it_was(
    writer: Connection, database: Database, tmp_path: Path, small_graphs: None
) -> None:
    with database.connect() as conn:
        add(conn, "notes", texts(0, 120))
    write_shard(tmp_path, texts(0, 150))
    load(writer, "notes", A, tmp_path)
    with database.connect() as conn:
        add(conn, "notes", texts(120, 150))
    before = content(writer, "a")
    # Killed when everything is built and nothing is swapped yet.
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from assets.embeddings import index\n"
        "from storage.database import Database\n"
        "from tests.integration.releases import load, release\n"
        "index.ROWS_FOR_A_GRAPH = 100\n"
        "index._swap = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with Database.from_url(sys.argv[1]).connect('datamoat_writer', autocommit=True) as conn:\n"
        "    load(conn, 'notes', release('a'), Path(sys.argv[2]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, database.url, str(tmp_path)])
    assert done.returncode == -9
    assert content(writer, "a") == before
    assert live_release(writer).name == "a"
    tables = "select relname from pg_class where relnamespace = 'retrieval'::regnamespace and relname like 'release%'"
    # A kill after the swap leaves the table that was swapped out.
    writer.execute("create table retrieval.release_a_old7 (n int)")
    # The server ends the transaction when it notices that the client is gone; the next load waits for its lock.
    assert load(writer, "notes", A, tmp_path).loaded == 30
    assert {name for (name,) in writer.execute(tables) if "_pkey" not in name and "_idx" not in name} == {
        "release_a"
    }


def test_loads_and_deletions_side_by_side_do_not_stop_each_other(
    writer: Connection,
    database: Database,
    tmp_path: Path,
    small_graphs: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two releases are loaded, one of them live, while texts come and go."""
    monkeypatch.setattr(index, "CHANGED_IN_PLACE", 0.05)
    sources = {"notes": texts(0, 120), "orders": texts(100, 240)}
    for source, wanted in sources.items():
        add(writer, source, wanted[:60])
    write_shard(tmp_path, texts(0, 240))
    load(writer, "notes", A, tmp_path)
    errors: list[Exception] = []

    def work(source: str, made: Any) -> None:
        try:
            with database.connect("datamoat_writer", autocommit=True) as mine:
                for step in range(4):
                    if made == A:
                        add(mine, source, sources[source][60 + 15 * step : 75 + 15 * step])
                        gone = sources[source][2 * step]
                        mine.execute(
                            "delete from corpus.document where source = %s and path = %s", [source, gone]
                        )
                    load(mine, source, made, tmp_path, follow=made == A)
        except Exception as error:
            errors.append(error)

    candidate = release("b")
    jobs = [("notes", A), ("orders", A), ("notes", candidate), ("orders", candidate)]
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for source in sources:
        assert load(writer, source, A, tmp_path).missing == 0
        load(writer, source, candidate, tmp_path, follow=False)
        assert all(outcome.passed for outcome in index_checks(writer, source).values())
    assert content(writer, "a") == content(writer, "b")


def test_upkeep_takes_up_what_churned(
    writer: Connection, database: Database, tmp_path: Path, small_graphs: None
) -> None:
    with database.connect() as conn:
        add(conn, "notes", texts(0, 150))
    write_shard(tmp_path, texts(0, 150))
    load(writer, "notes", A, tmp_path)
    assert keep_up(writer) == []
    with database.connect() as conn:
        conn.execute("delete from corpus.document where path < 'text 11'")
    removed = refresh_passages(writer).removed
    # What a rebuild that was killed leaves behind.
    graph = graph_of(writer, release_table("a"))
    writer.execute("create index left_ccnew on retrieval.release_a using hnsw (embedding halfvec_cosine_ops)")
    with database.connect() as conn:
        conn.execute(
            "update pg_index set indisvalid = false where indexrelid = 'retrieval.left_ccnew'::regclass"
        )
    writer.execute("select pg_stat_force_next_flush()")
    (report,) = keep_up(writer)
    assert (report.release, report.dead, report.rebuilt) == ("a", removed, True)
    assert graph_of(writer, release_table("a")) == graph
    assert writer.execute("select to_regclass('retrieval.left_ccnew')").fetchone() == (None,)
    assert content(writer, "a").keys() == {text for text in texts(0, 150) if text >= "text 11"}
    writer.execute("select pg_stat_force_next_flush()")
    assert keep_up(writer) == []


def test_a_graph_is_built_without_workers_where_shared_memory_is_short(
    conn: Connection, tmp_path: Path, small_graphs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert index.graph_resources(conn, 1_000_000, 384)[0] > index.graph_resources(conn, 100_000, 384)[0]  # type: ignore[index]
    monkeypatch.setattr(index, "_free_shared_memory", lambda: 0)
    assert index.graph_resources(conn, 100_000, 384) == (int(100_000 * (768 + 400) * 1.1), 0)
    monkeypatch.setattr(index, "_machine_memory", lambda: 200 << 20)
    assert index.graph_resources(conn, 100_000, 384) == (50 << 20, 0)
    asked = []

    def create(conn: Connection, table: Any, resources: Any) -> None:
        asked.append(resources)
        if resources[1]:
            raise psycopg.errors.DiskFull("could not resize shared memory segment")

    monkeypatch.setattr(index, "_create_graph", create)
    monkeypatch.setattr(index, "graph_resources", lambda *_: (1 << 26, 2))
    add(conn, "notes", texts(0, 110))
    write_shard(tmp_path, texts(0, 110))
    load(conn, "notes", A, tmp_path)
    assert asked == [(1 << 26, 2), (1 << 26, 0)]


def test_releases_of_the_first_layout_are_dropped_and_built_again(cluster: Cluster, tmp_path: Path) -> None:
    database = database_of(cluster, "0001")
    with database.connect("datamoat_writer") as conn:
        conn.execute("create table retrieval.release_a (content_hash text primary key, embedding halfvec(8))")
        conn.execute("create view retrieval.live as select * from retrieval.release_a")
        # As dbt makes it.
        conn.execute("create view staging.stg_corpus__chunks as select * from corpus.chunk")
        conn.execute("create view staging.more as select text from staging.stg_corpus__chunks")
        conn.execute(
            "insert into registry.embedding_release (release, fingerprint, dimensions, live) values ('a', '{}', 8, true)"
        )
    assert upgrade(database)[0] == "0002"
    write_shard(tmp_path, texts(0, 2))
    with database.connect() as conn:
        add(conn, "notes", texts(0, 2))
        conn.execute("set role datamoat_writer")
        assert load(conn, "notes", A, tmp_path).live
        assert conn.execute("select count(*) from retrieval.live").fetchone() == (2,)
        conn.execute("reset role")
        conn.execute("set role datamoat_analyst")
        assert conn.execute("select who, why from registry.promotion").fetchall() == [
            ("datamoat", "the first release")
        ]
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            conn.execute("select from retrieval.passage")
    cluster.drop_database(database.url)


def test_vectors_of_two_models_in_one_folder_are_refused(conn: Connection, tmp_path: Path) -> None:
    from embedder.protocol import EmbedderError

    add(conn, "notes", texts(0, 2))
    write_shard(tmp_path, texts(0, 1))
    (shard,) = tmp_path.glob("*.parquet")
    table = pq.read_table(shard)
    other = {**table.schema.metadata, b"embedder.release": b"another"}
    pq.write_table(table.replace_schema_metadata(other), tmp_path / f"{7:032x}.parquet")
    with pytest.raises(EmbedderError, match="several releases"):
        load(conn, "notes", A, tmp_path)

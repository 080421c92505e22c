"""Another way of cutting documents: built beside the live one, promoted and rolled back under readers, dropped."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psycopg
import pyarrow.parquet as pq
import pytest

from assets.documents import corpus
from assets.documents.chunk import DEFAULT_CHUNKING, Chunking
from assets.documents.chunkings import chunkings_beside, forget_unused_chunkings, live_chunking
from assets.documents.corpus import refresh_chunks
from assets.embeddings import registry
from assets.embeddings.index import load_vectors, refresh_passages
from assets.embeddings.postings import refresh_postings
from assets.embeddings.registry import (
    ReleaseError,
    built_release,
    drop,
    find_release,
    live_release,
    promote,
    register,
    releases,
    rollback,
)
from assets.embeddings.release import Release, Setting
from assets.evaluation.compare import evaluate_golden
from assets.sources.contract import GoldenMapping, load_contracts
from orchestration.settings import ROOT
from storage.database import Database
from storage.migrations import upgrade
from storage.warehouse import Warehouse
from tests.integration.conftest import Cluster, database_of
from tests.integration.releases import content, release, vector_of, write_shard
from tests.integration.test_evaluation import contract

Connection = psycopg.Connection[Any]

SMALL = Chunking.parse("50-120/40")
A, B = release("a"), release("b", chunking=SMALL)
SEEDS = {"a": 1, "b": 2}
SOURCES = {"notes": "en", "anleitung": "de"}


def document(number: int) -> str:
    sentences = (f"Sentence {n} of document {number} is about topic{number * n % 7}." for n in range(30))
    return f"# Document {number}\n\n" + " ".join(sentences)


def add_source(conn: Connection, source: str, language: str, texts: dict[str, str]) -> None:
    conn.execute(
        "insert into registry.source (source, version, owner, description, provenance, pii, allowed_uses, kind,"
        " location, contract_sha256, language) values (%s, '1', 'us', '', 'proprietary', false, '{rag}', 'documents',"
        " '', '', %s) on conflict do nothing",
        [source, language],
    )
    for path, text in texts.items():
        change(conn, source, path, text)


def change(conn: Connection, source: str, path: str, text: str) -> None:
    """As parsing writes a document that is new, or whose text is."""
    row = corpus._Document(f"{source}/{path}", source, path, path, "text/plain", "", text, text, "", "", "{}")
    corpus._write(conn, [row], {path: corpus._Current("", "", "", "")})


def pieces(conn: Connection, chunking: Chunking, source: str = "%") -> dict[str, str]:
    """Hash of what is embedded -> text, of every chunk of a chunking."""
    rows = conn.execute(
        "select content_hash, text from corpus.piece where chunking = %s and source like %s",
        [str(chunking), source],
    )
    return dict(rows.fetchall())


def shown(conn: Connection) -> dict[str, str]:
    return dict(conn.execute("select content_hash, text from corpus.chunk").fetchall())


def embed(conn: Connection, made: Release, folder: Path) -> None:
    """Give the chunks of every source their vectors in the release, as the index assets do."""
    refresh_passages(conn)
    refresh_postings(conn, chunking=str(made.chunking))
    write_shard(folder / made.name, pieces(conn, made.chunking), seed=SEEDS[made.name])
    for source in SOURCES:
        load_vectors(conn, source, made, folder / made.name, follow=made == A)


@pytest.fixture
def writer(database: Database) -> Iterator[Connection]:
    """Eight documents in two sources, with A live."""
    with database.connect("datamoat_writer", autocommit=True) as conn:
        for source, language in SOURCES.items():
            add_source(conn, source, language, {f"{n}.md": document(n) for n in range(4)})
        yield conn


@pytest.fixture
def live(writer: Connection, tmp_path: Path) -> Connection:
    for source in SOURCES:
        refresh_chunks(writer, source)
    embed(writer, A, tmp_path)
    assert live_release(writer).chunking == DEFAULT_CHUNKING
    return writer


@pytest.fixture
def both(live: Connection, tmp_path: Path) -> Connection:
    """A live, B built beside it."""
    register(live, B)
    for source in SOURCES:
        refresh_chunks(live, source, SMALL)
    embed(live, B, tmp_path)
    return live


def test_a_candidate_is_cut_beside_what_is_searched(
    live: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "BATCH_DOCUMENTS", 2)
    before, vectors = shown(live), content(live, "a")
    register(live, B)

    def die(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refresh_chunks(live, "notes", SMALL, progress=die)
    assert pieces(live, SMALL)
    done = refresh_chunks(live, "notes", SMALL)
    assert (done.documents, done.rechunked) == (4, 2)
    assert refresh_chunks(live, "notes", SMALL).rechunked == 0
    assert done.chunks == len(pieces(live, SMALL)) > 2 * len(pieces(live, DEFAULT_CHUNKING, "notes"))
    with pytest.raises(ReleaseError, match="no vectors yet"):
        promote(live, "b", "me", "too early", force=True)
    embed(live, B, tmp_path)
    # The other source was not cut yet.
    assert (find_release(live, "b").missing, find_release(live, "b").uncut) == (0, 4)
    with pytest.raises(ReleaseError, match="4 documents are not cut"):
        live.execute(
            "update registry.embedding_release set checked_at = clock_timestamp(), checks = '{}' where release = 'b'"
        )
        promote(live, "b", "me", "too early")
    # What is live did not notice.
    assert (shown(live), content(live, "a")) == (before, vectors)
    assert refresh_chunks(live, "notes").rechunked == refresh_chunks(live, "anleitung").rechunked == 0
    refresh_chunks(live, "anleitung", SMALL)
    embed(live, B, tmp_path)
    state = find_release(live, "b")
    assert (state.missing, state.uncut, state.chunking) == (0, 0, SMALL)
    assert content(live, "b").keys() == pieces(live, SMALL).keys()
    # What an earlier text of a document says is not what it says.
    change(live, "notes", "0.md", document(100))
    refresh_chunks(live, "notes")
    assert find_release(live, "b").uncut == 1


def test_a_release_has_vectors_of_its_own_chunks_and_of_no_others(live: Connection, tmp_path: Path) -> None:
    add_source(live, "notes", "en", {"short.md": "The same, however it is cut."})
    refresh_chunks(live, "notes")
    embed(live, A, tmp_path)
    same = replace(release("a2", model="a"), chunking=SMALL)
    register(live, same)
    refresh_chunks(live, "notes", SMALL)
    refresh_passages(live)
    report = load_vectors(live, "notes", same, tmp_path / "a", follow=False)
    # What both have was embedded for the other already.
    common = pieces(live, SMALL).keys() & pieces(live, DEFAULT_CHUNKING).keys()
    assert (report.loaded, report.vectors) == (len(common), len(common)) and common
    assert content(live, "a2").keys() == common
    # A text goes from one release though the other still needs it.
    live.execute("delete from corpus.piece where source = 'notes' and chunking = %s", [str(SMALL)])
    refresh_chunks(live, "anleitung", SMALL)
    refresh_passages(live)
    assert not content(live, "a2") and common <= content(live, "a").keys()


def test_no_search_sees_chunks_of_one_release_and_vectors_of_another(
    both: Connection, database: Database
) -> None:
    question = vector_of("question")
    of = {"a": pieces(both, DEFAULT_CHUNKING), "b": pieces(both, SMALL)}
    near = {
        name: {text: 1 - float(vector_of(digest, SEEDS[name]) @ question) for digest, text in found.items()}
        for name, found in of.items()
    }
    stop = threading.Event()
    seen: list[str] = []
    errors: list[BaseException] = []

    def read(mode: str, filter: str | None) -> None:
        try:
            with database.connect("datamoat_writer", autocommit=True) as mine:
                while not stop.is_set():
                    rows = mine.execute(
                        "select body, distance from retrieval.search('topic3', %s::halfvec, 5, %s, %s)",
                        [str(question.tolist()), mode, filter],
                        prepare=True,
                    ).fetchall()
                    assert len(rows) == 5
                    (name,) = {"a" if body in near["a"] else "b" for body, _ in rows}
                    for body, distance in rows:
                        assert distance == pytest.approx(near[name][body], abs=1e-2)
                    seen.append(name)
        except BaseException as error:
            errors.append(error)

    asked = [("vector", None), ("hybrid", None), ("hybrid", '{"source": "notes"}')]
    threads = [threading.Thread(target=read, args=one) for one in asked]
    for thread in threads:
        thread.start()
    for _ in range(6):
        for move in (
            lambda: promote(both, "b", "me", "forth", force=True),
            lambda: rollback(both, "me", "back"),
        ):
            move()
            moved = len(seen)
            while len(seen) < moved + 3 and not errors:
                stop.wait(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert {*seen} == {"a", "b"}


def test_a_promotion_that_ends_half_way_moves_neither(
    both: Connection, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "LOCK_ATTEMPTS", 2)
    monkeypatch.setattr(registry, "LOCK_PAUSE_SECONDS", 0)
    with database.connect("datamoat_writer") as reader:
        reader.execute("select count(*) from retrieval.live")
        with pytest.raises(ReleaseError, match="being read all the time"):
            promote(both, "b", "me", "better", force=True)
    assert shown(both) == pieces(both, DEFAULT_CHUNKING)
    # Killed when the chunks are moved and the vectors are not.
    program = (
        "import os, signal, sys\n"
        "from assets.embeddings import registry\n"
        "from storage.database import Database\n"
        "registry.point_view = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with Database.from_url(sys.argv[1]).connect('datamoat_writer', autocommit=True) as conn:\n"
        "    registry.promote(conn, 'b', 'me', 'better', force=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, database.url])
    assert done.returncode == -9
    assert shown(both) == pieces(both, DEFAULT_CHUNKING) and live_release(both).name == "a"
    promote(both, "b", "me", "better", force=True)
    assert shown(both) == pieces(both, SMALL)


def test_one_can_go_back_to_what_documents_say_today(both: Connection, tmp_path: Path) -> None:
    promote(both, "b", "me", "better", force=True)
    assert shown(both) == pieces(both, SMALL)
    assert live_chunking(both, DEFAULT_CHUNKING) == SMALL
    change(both, "notes", "0.md", "Persons are forgotten.")
    # As the asset does: the live one, then those beside it.
    refresh_chunks(both, "notes", SMALL)
    (other,) = chunkings_beside(both, "notes", SMALL)
    assert other == DEFAULT_CHUNKING and refresh_chunks(both, "notes", other).rechunked == 1
    refresh_passages(both)
    assert not content(both, "a").keys() - pieces(both, DEFAULT_CHUNKING).keys()
    rollback(both, "me", "worse")
    assert "Persons are forgotten." in shown(both).values()
    assert not any("of document 0 " in text for text in pieces(both, DEFAULT_CHUNKING, "notes").values())
    assert find_release(both, "a").missing == 1
    both.execute("delete from corpus.document where source = 'anleitung'")
    assert not pieces(both, DEFAULT_CHUNKING, "anleitung") and not pieces(both, SMALL, "anleitung")


def test_chunks_go_with_the_last_release_that_needs_them(both: Connection, tmp_path: Path) -> None:
    indexed = "select count(*) from retrieval.passage_text where chunking = %s"
    assert both.execute(indexed, [str(SMALL)]).fetchone() == (len(pieces(both, SMALL)),)
    other = replace(B, name="c")
    register(both, other)
    drop(both, "b")
    assert pieces(both, SMALL)
    # It has no vectors, and can be dropped all the same.
    assert {one.name: one.vectors for one in releases(both)} == {
        "a": len(pieces(both, DEFAULT_CHUNKING)),
        "c": 0,
    }
    gone = pieces(both, SMALL).keys()
    drop(both, "c")
    assert not pieces(both, SMALL) and shown(both)
    assert both.execute(indexed, [str(SMALL)]).fetchone() == (0,)
    before = content(both, "a")
    assert refresh_passages(both).removed == len(gone - shown(both).keys())
    assert content(both, "a") == before
    # What a kill left is taken up later.
    refresh_chunks(both, "notes", SMALL)
    assert forget_unused_chunkings(both) == [str(SMALL)] and forget_unused_chunkings(both) == []


def test_while_nothing_is_live_the_setting_is_followed(writer: Connection) -> None:
    refresh_chunks(writer, "notes")
    assert live_chunking(writer, DEFAULT_CHUNKING) == DEFAULT_CHUNKING
    assert live_chunking(writer, SMALL) == SMALL
    assert not pieces(writer, DEFAULT_CHUNKING) and not shown(writer)
    refresh_chunks(writer, "notes", SMALL)
    assert shown(writer) == pieces(writer, SMALL) != {}


def test_a_document_is_cut_anew_when_its_language_is_another(writer: Connection) -> None:
    for source in SOURCES:
        change(writer, source, "0.md", "Temperaturaufzeichnungen bleiben erhalten und " * 20)
    counts = {source: refresh_chunks(writer, source).chunks for source in SOURCES}
    # Of the same text; German words are more tokens.
    assert counts["anleitung"] > counts["notes"]
    writer.execute("update registry.source set language = 'de' where source = 'notes'")
    anew = refresh_chunks(writer, "notes")
    assert (anew.rechunked, anew.chunks) == (4, counts["anleitung"])
    # Counted as German is.
    writer.execute("update registry.source set language = 'fr' where source = 'notes'")
    assert refresh_chunks(writer, "notes").rechunked == 0


def test_a_release_is_measured_by_its_own_chunks(both: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer lies in one chunk of either chunking; each release finds its own by its own vectors."""
    quiz = contract("quiz", GoldenMapping("question", "path", "notes", answer="answers"))
    both.execute("create table raw.quiz (question text, path text, answers jsonb)")
    answers = [f"Sentence {n} of document {number}" for number in range(4) for n in (2, 29)]
    for answer in answers:
        both.execute(
            "insert into raw.quiz values (%s, %s, jsonb_build_array(%s::text))",
            [answer, f"{answer[-1]}.md", answer],
        )

    def vectors(made: Any, questions: list[str]) -> Any:
        found = pieces(both, made.chunking, "notes").items()
        hashes = [next(digest for digest, text in found if f"{question} " in text) for question in questions]
        return np.array([vector_of(digest, SEEDS[made.name]) for digest in hashes])

    monkeypatch.setattr("assets.evaluation.compare.question_vectors", vectors)
    for _ in range(2):
        for name in "ab":
            found = {one.mode: one.measures for one in evaluate_golden(both, quiz, [quiz], name)}
            assert [measure.value for measure in found["vector"]] == [1, 1, 1, 1]
            assert all((measure.value or 0) > 0.1 for measure in found["text"])
            assert found["vector"][0].n == len(answers)
        if live_release(both).name == "a":
            promote(both, "b", "me", "better", force=True)


def test_a_candidate_chunking_is_built_by_source_in_dagster(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dagster as dg

    from assets.documents.assets import document_assets
    from assets.embeddings import assets

    contracts, _ = load_contracts(
        [ROOT / "examples" / "support" / "contracts"], {"DATAMOAT_DATA_DIR": "/", "SITE_PACKAGES": "/"}
    )
    monkeypatch.setattr(
        assets,
        "embed_questions",
        lambda _, texts: np.array([vector_of(text, dimensions=384) for text in texts]),
    )
    monkeypatch.setattr(assets, "recent_questions", lambda *_: ["How long?", "Why?"])

    class Launcher:
        def run(self, _: Any, request: Any) -> dg.MaterializeResult[None]:
            hashes = {*pq.read_table(request.input).column("content_hash").to_pylist()}
            write_shard(request.output, sorted(hashes), dimensions=384)
            return dg.MaterializeResult(
                check_results=[dg.AssetCheckResult(passed=True, check_name="vectors_are_sound")]
            )

    with warehouse.connect() as conn:
        add_source(conn, "handbook", "en", {f"{n}.md": document(n) for n in range(5)})
        add_source(conn, "tickets", "en", {"1": document(9)})
    setting = Setting()
    chain = [*document_assets(contracts), *assets.embedding_assets(contracts, setting)]
    candidate = assets.candidate_assets(contracts, Setting(None, SMALL), lambda *_: [], setting)
    resources = {"warehouse": warehouse, "launcher": Launcher()}

    def chain_of(source: str) -> list[dg.AssetKey]:
        return [dg.AssetKey([stage, source]) for stage in ("chunks", "embedding_dataset", "vectors", "index")]

    with dg.instance_for_test() as instance:

        def run(definitions: Any, keys: list[dg.AssetKey], partition: str | None = None) -> Any:
            return dg.materialize(
                definitions,
                resources=resources,
                instance=instance,
                selection=keys,
                partition_key=partition,
                raise_on_error=False,
            )

        stages = [asset.key for asset in candidate]
        assert run(chain, chain_of("handbook")).success
        with warehouse.connect(autocommit=True) as conn:
            refresh_chunks(conn, "tickets")
        assert run(candidate, stages[:3], "handbook").success
        early = run(candidate, stages[3:])
        failed = {found.check_name for found in early.get_asset_check_evaluations() if not found.passed}
        assert "coverage" in failed
        assert run(candidate, stages[:3], "tickets").success
        assert run(candidate, stages[3:]).success
        with warehouse.connect() as conn:
            (name,) = (one.name for one in releases(conn) if one.state == "candidate")
            promote(conn, name, "me", "shorter")
            assert built_release(conn).chunking == SMALL
            change(conn, "handbook", "0.md", document(100))
        # The live chunking is what was promoted; the setting does not flip it back.
        assert run(chain, chain_of("handbook")).success
    with warehouse.connect() as conn:
        assert shown(conn) == pieces(conn, SMALL)
        assert any("of document 100 " in text for text in shown(conn).values())
        # The one before follows its documents, for a rollback.
        assert any("of document 100 " in text for text in pieces(conn, DEFAULT_CHUNKING).values())
        assert find_release(conn, name).missing == 0


def test_chunks_of_before_become_the_live_chunking(cluster: Cluster) -> None:
    from assets.documents.chunk import chunk

    database = database_of(cluster, "0004")
    with database.connect("datamoat_writer") as conn:
        documents = SimpleNamespace(notes="en", anleitung="de")
        for source, language in vars(documents).items():
            conn.execute(
                "insert into registry.source (source, version, owner, description, provenance, pii, allowed_uses,"
                " kind, location, contract_sha256, language)"
                " values (%s, '1', 'us', '', 'proprietary', false, '{rag}', 'documents', '', '', %s)",
                [source, language],
            )
            conn.execute(
                "insert into corpus.document (document_id, source, path, title, media_type, raw_sha256, text,"
                " text_sha256, parser, policy, findings) values (%s, %s, '', '', '', '', %s, '', '', '', '{}')",
                [source, source, document(1)],
            )
            for piece in chunk(document(1)):
                conn.execute(
                    "insert into corpus.chunk (chunk_id, document_id, source, ordinal, start_char, end_char, text,"
                    " content_hash, heading, chunker) values (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
                    [
                        piece.chunk_id(source),
                        source,
                        source,
                        piece.ordinal,
                        piece.start_char,
                        piece.end_char,
                        piece.text,
                        piece.content_hash,
                        piece.heading,
                        DEFAULT_CHUNKING.name,
                    ],
                )
        conn.execute(
            "insert into retrieval.passage (content_hash) select distinct content_hash from corpus.chunk"
        )
        conn.execute(
            "insert into registry.embedding_release (release, fingerprint, dimensions, state)"
            " values ('a', '{}', 8, 'live')"
        )
        conn.execute(
            "create table retrieval.release_a as select passage_no, '[1,1,1,1,1,1,1,1]'::halfvec(8) as embedding"
            " from retrieval.passage"
        )
        conn.execute(
            "create view retrieval.live as select v.passage_no, p.content_hash, v.embedding"
            " from retrieval.release_a v join retrieval.passage p using (passage_no)"
        )
        conn.execute("create view staging.stg_corpus__chunks as select chunk_id, text from corpus.chunk")
        before = conn.execute("select chunk_id, text, chunker from corpus.chunk order by 1").fetchall()
    assert upgrade(database)[0] == "0005"
    with database.connect("datamoat_writer", autocommit=True) as conn:
        assert (
            conn.execute("select chunk_id, text, chunker from corpus.chunk order by 1").fetchall() == before
        )
        numbered = (
            "select count(*) from corpus.chunk c join retrieval.live l using (passage_no, content_hash)"
        )
        assert conn.execute(numbered).fetchone() == (len(before),)
        assert live_release(conn).chunking == DEFAULT_CHUNKING
        assert find_release(conn, "a").missing == 0
        # English stays as it was, German is counted as what it is from now on.
        assert refresh_chunks(conn, "notes").rechunked == 0
        assert refresh_chunks(conn, "anleitung").rechunked == 1
    cluster.drop_database(database.url)

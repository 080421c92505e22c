"""Golden sets are read as people meant them, any release can be measured, and the index costs nothing of an exact search."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from psycopg.types.json import Jsonb

from assets.documents.chunk import DEFAULT_CHUNKING, embedded_text
from assets.documents.corpus import refresh_chunks, refresh_documents
from assets.documents.parse import Parser
from assets.documents.redact import Redactor
from assets.embeddings.index import load_vectors, refresh_passages
from assets.embeddings.postings import refresh_postings
from assets.embeddings.registry import ReleaseError, built_release, drop
from assets.embeddings.release import current_release
from assets.evaluation import compare as comparing
from assets.evaluation.compare import compare_releases, evaluate_golden, record_evaluation
from assets.evaluation.golden import Unscored, golden_questions, read_golden
from assets.evaluation.retrieval import METRICS, evaluate
from assets.evaluation.runs import index_of, search_run
from assets.sources.contract import Column, Contract, CorpusMapping, GoldenMapping
from embedder import protocol
from tests.integration.releases import add, load, release, vector_of, write_shard

Connection = psycopg.Connection[Any]

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("DATAMOAT_DATA_DIR") or ROOT.parent / "shared" / "data") / "xquad_en_de_es"

TEXTS = [f"text {n}" for n in range(40)]


def contract(
    name: str, golden: GoldenMapping | None = None, key: str = "id", corpus: CorpusMapping | None = None
) -> Contract:
    return Contract(
        name=name,
        version="1",
        owner="us",
        description="",
        grain="",
        provenance="proprietary",
        pii=False,
        allowed_uses=("rag",),
        freshness_days=None,
        kind="golden" if golden else "table",
        format="jsonl",
        folder=Path("/"),
        glob="*",
        file=Path("/x"),
        sha256="",
        columns=(Column(key, "string", primary_key=True),),
        corpus=corpus,
        golden=golden,
    )


@pytest.fixture
def handbook(conn: Connection) -> Connection:
    """Rows as documents, one of them redacted, and a golden set with answers."""
    conn.execute("create table raw.rows (id text, title text, body text)")
    conn.execute(
        "insert into raw.rows values ('refunds', 'Refunds', '\ufeffA refund takes ten days. Ask anna.meier@example.com for ten'),"
        " ('login', 'Login', 'Reset the password by mail.')"
    )
    conn.execute(
        "create table raw.exam (question text, row_id text, answers jsonb, answer text, start float)"
    )
    conn.commit()
    with Parser() as parser:
        mapping = CorpusMapping(id="id", title="title", text="body")
        refresh_documents(conn, "rows", Redactor(b"k" * 32), parser, mapping=mapping)
    return conn


EXAM = contract("exam", GoldenMapping("question", "row_id", "rows", answer="answers"))


def ask(conn: Connection, question: str | None, row: str | None, answers: Any) -> None:
    conn.execute(
        "insert into raw.exam (question, row_id, answers) values (%s, %s, %s)",
        [question, row, None if answers is None else Jsonb(answers)],
    )


def spans(conn: Connection, asked: Contract = EXAM) -> dict[str, list[str]]:
    """Question -> the texts of its spans."""
    golden = read_golden(conn, asked)
    return {
        golden.queries[qid]: [
            conn.execute(
                "select substr(text, %s, %s) from corpus.document where document_id = %s",
                [target.start + 1, target.end - target.start, target.document_id],
            ).fetchall()[0][0]
            for target in targets
        ]
        for qid, targets in golden.targets.items()
    }


def test_an_answer_is_found_where_the_text_was_changed_before_it(handbook: Connection) -> None:
    ask(handbook, "How long?", "refunds", [{"text": "ten", "answer_start": 16}])
    ask(handbook, "For?", "refunds", [{"text": "ten", "answer_start": 60}])
    ask(
        handbook,
        "Days?",
        "refunds",
        [{"text": "ten days", "answer_start": 16}, {"text": "days", "answer_start": 20}],
    )
    ask(handbook, "Anywhere?", "refunds", ["ten"])
    assert spans(handbook) == {
        "How long?": ["ten"],
        "For?": ["ten"],
        "Days?": ["ten days"],
        "Anywhere?": ["ten", "ten"],
    }
    golden = read_golden(handbook, EXAM)
    first, second = (
        golden.targets[qid][0].start
        for text in ("How long?", "For?")
        for qid in golden.queries
        if golden.queries[qid] == text
    )
    assert first < second


def test_answers_that_cannot_be_scored_come_back_with_the_reason(handbook: Connection) -> None:
    for question, row, answers in (
        ("Gone?", "gone", ["x"]),
        ("None?", "login", None),
        ("Empty?", "login", []),
        ("Blank?", "login", [{"text": " ", "answer_start": 0}]),
        ("NaN?", "login", "NaN"),
        ("Start?", "login", [{"text": "mail", "answer_start": -1}]),
        ("Half?", "login", [{"text": "mail", "answer_start": 1.5}]),
        ("Redacted?", "refunds", [{"text": "anna.meier@example.com", "answer_start": 33}]),
        ("Far?", "login", [{"text": "mail", "answer_start": 9000}]),
        (None, "login", ["mail"]),
        ("Nowhere?", None, ["mail"]),
        ("Both?", "login", ["mail"]),
        ("Both?", "gone", ["mail"]),
    ):
        ask(handbook, question, row, answers)
    golden = read_golden(handbook, EXAM)
    assert golden.queries == {}
    assert {*golden.unscored} == {
        Unscored("Gone?", "rows/gone", "document_not_in_corpus"),
        Unscored("None?", "rows/login", "no_answer"),
        Unscored("Empty?", "rows/login", "no_answer"),
        Unscored("Blank?", "rows/login", "no_answer"),
        Unscored("NaN?", "rows/login", "no_answer"),
        Unscored("Start?", "rows/login", "bad_answer_start"),
        Unscored("Half?", "rows/login", "bad_answer_start"),
        Unscored("Redacted?", "rows/refunds", "answer_not_in_document"),
        Unscored("Far?", "rows/login", "answer_not_in_document"),
        Unscored("", "rows/login", "no_question"),
        Unscored("Nowhere?", "", "no_document"),
        Unscored("Both?", "rows/gone", "document_not_in_corpus"),
    }


def test_answers_may_be_columns_and_questions_a_table_of_their_own(handbook: Connection) -> None:
    handbook.execute(
        "insert into raw.exam values ('q1', 'login', null, 'mail', 22), ('q2', 'login', null, 'mail', 'NaN')"
    )
    handbook.execute("create table raw.asked (key text, words text)")
    handbook.execute("insert into raw.asked values ('q1', 'By what?'), ('q2', 'And?')")
    columns = contract("exam", GoldenMapping("question", "row_id", "rows", "answer", "start"))
    assert spans(handbook, columns) == {"q1": ["mail"]}
    elsewhere = contract(
        "exam",
        GoldenMapping("words", "row_id", "rows", question_source="asked", question_key="question"),
    )
    golden = read_golden(handbook, elsewhere, contract("asked", key="key"))
    assert [*golden.queries.values()] == ["And?", "By what?"]
    # They stay out of training sets as well.
    assert {"And?", "By what?"} <= {*golden_questions(handbook, elsewhere)}
    assert {*map(len, golden.targets.values())} == {1}


@pytest.fixture
def two_releases(conn: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connection]:
    """40 documents in a live release, and in one beside it in which half the vectors are those of other texts."""
    add(conn, "notes", TEXTS)
    write_shard(tmp_path / "good", TEXTS)
    write_shard(tmp_path / "bad", TEXTS[:20], seed=1)
    write_shard(tmp_path / "bad", TEXTS[20:], seed=2)
    load(conn, "notes", release("good"), tmp_path / "good")
    load(conn, "notes", release("bad"), tmp_path / "bad", follow=False)
    refresh_postings(conn, str(DEFAULT_CHUNKING))
    conn.execute("create table raw.quiz (question text, path text)")
    with conn.cursor() as cursor:
        cursor.executemany("insert into raw.quiz values (%s, %s)", [(text, text) for text in TEXTS])
    conn.commit()
    monkeypatch.setattr(
        comparing, "question_vectors", lambda _release, texts: np.array([vector_of(text) for text in texts])
    )
    yield conn
    conn.rollback()


QUIZ = contract("quiz", GoldenMapping("question", "path", "notes"))


def test_a_release_that_is_not_live_is_measured_beside_the_live_one(two_releases: Connection) -> None:
    conn = two_releases
    (live,) = evaluate_golden(conn, QUIZ, [QUIZ], modes=["vector"])
    assert [measure.value for measure in live.measures] == [1, 1, 1, 1]
    (other,) = evaluate_golden(conn, QUIZ, [QUIZ], "bad", ["vector"])
    assert other.release == "bad" and (other.measures[0].value or 1) < 0.8
    assert evaluate_golden(conn, QUIZ, [QUIZ], "bad", ["vector"]) == [other]
    # Nothing is left behind, in the connection or of locks.
    assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    assert conn.execute("select count(*) from pg_proc where proname = 'search'").fetchone() == (1,)
    conn.commit()
    found = {(one.mode, one.metric): one for one in compare_releases(conn, [QUIZ], "bad", "good")}
    assert {*found} == {("vector", "nDCG@10"), ("hybrid", "nDCG@10")}
    worse = found["vector", "nDCG@10"]
    assert worse.high is not None and worse.high < 0 and worse.n == 40
    with pytest.raises(ReleaseError, match="there is no release gone"):
        evaluate_golden(conn, QUIZ, [QUIZ], "gone")


def test_a_release_can_be_dropped_while_it_is_measured(two_releases: Connection, database: Any) -> None:
    bad = built_release(two_releases, "bad")
    with index_of(two_releases, bad), database.connect() as other:
        drop(other, "bad")


def test_an_evaluation_is_compared_to_the_last_that_found_something_else(two_releases: Connection) -> None:
    conn = two_releases
    (good,) = evaluate_golden(conn, QUIZ, [QUIZ], "good", ["vector"])
    (bad,) = evaluate_golden(conn, QUIZ, [QUIZ], "bad", ["vector"])
    assert record_evaluation(conn, good) is None
    assert record_evaluation(conn, good) is None
    for _ in range(2):
        gained = record_evaluation(conn, bad)
        assert gained is not None and gained.high is not None and gained.high < 0
    rows = conn.execute(
        "select release, metric, by_question from registry.evaluation where name = 'quiz' order by id"
    ).fetchall()
    assert [(name, metric) for name, metric, _ in rows] == [(r, m) for r in ("good", "bad") for m in METRICS]
    assert all(len(by_question) == 40 for *_, by_question in rows)


def lines(name: str) -> list[dict[str, Any]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_the_index_finds_what_an_exact_search_finds(conn: Connection, tmp_path: Path) -> None:
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is missing: set DATAMOAT_DATA_DIR to the folder that holds it")
    pytest.importorskip("sentence_transformers", reason="the reference is not installed")
    from benchmarks.retrieval import ALLOWED, exact_run, sentence_transformers_encoder
    from embedder.encode import Embedder

    conn.execute("create table raw.passages (_id text, text text)")
    conn.execute("create table raw.questions (text text, passage_id text, answers jsonb)")
    with conn.cursor() as cursor:
        passages = lines("en.passages.jsonl.gz")[:40]
        cursor.executemany("insert into raw.passages values (%(_id)s, %(text)s)", passages)
        kept = {row["_id"] for row in passages}
        questions = [row for row in lines("en.questions.jsonl.gz") if row["passage_id"] in kept]
        cursor.executemany(
            "insert into raw.questions values (%s, %s, %s)",
            [(row["text"], row["passage_id"], Jsonb(row["answers"])) for row in questions],
        )
    add(conn, "passages", [])
    conn.commit()
    with Parser() as parser:
        refresh_documents(conn, "passages", Redactor(b"k" * 32), parser, mapping=CorpusMapping("_id", "text"))
    refresh_chunks(conn, "passages")
    refresh_passages(conn)
    refresh_postings(conn, str(DEFAULT_CHUNKING))
    rows = dict(conn.execute("select content_hash, heading || '\n' || text from corpus.chunk").fetchall())
    embedder = Embedder.open(None)
    texts = [embedded_text(*text.split("\n", 1)) for text in rows.values()]
    made = current_release(None)
    write_vectors(tmp_path / made.vectors, list(rows), embedder.encode(texts, as_query=False))
    load_vectors(conn, "passages", made, tmp_path / made.vectors)
    conn.commit()

    golden = read_golden(
        conn, contract("questions", GoldenMapping("text", "passage_id", "passages", "answers"))
    )
    assert len(golden.queries) > 190 and not golden.unscored
    vectors = embedder.encode(list(golden.queries.values()))
    ndcg = {
        mode: evaluate(golden.qrels, search_run(conn, golden, vectors, mode, k=10))[0].value or 0.0
        for mode in comparing.MODES
    }
    exact = (
        evaluate(golden.qrels, exact_run(conn, golden, sentence_transformers_encoder(), 10))[0].value or 0.0
    )
    assert exact > 0.8
    assert ndcg["vector"] == pytest.approx(exact, abs=ALLOWED)
    assert ndcg["hybrid"] >= max(ndcg["vector"], ndcg["text"]) - ALLOWED


def write_vectors(folder: Path, hashes: list[str], vectors: Any) -> None:
    folder.mkdir()
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    schema = pa.schema(
        [(protocol.CONTENT_HASH, pa.string()), (protocol.VECTOR, column.type)],
        metadata={protocol.META_FINGERPRINT: b"{}", protocol.META_RELEASE: folder.name.encode()},
    )
    pq.write_table(
        pa.Table.from_arrays([pa.array(hashes), column], schema=schema), folder / f"{0:032x}.parquet"
    )

"""Searching: by words, by vectors and by both; what may be found, how right it is, and who may ask for it."""

import math
import re
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from psycopg.types.json import Jsonb

from feedback.keys import create_key
from orchestration import search as searching
from orchestration.settings import Settings
from storage.database import Database
from storage.warehouse import WRITER
from tests.integration.conftest import Cluster, FeedbackService
from tests.integration.searched import DIMENSIONS, WORDS, Connection, Corpus, Row, Text, ids, unit


@pytest.fixture
def corpus(conn: Connection) -> Corpus:
    corpus = Corpus(conn)
    corpus.source("notes")
    return corpus


# --- words ----------------------------------------------------------------------------------------------------------


def reference_bm25(texts: dict[str, list[str]], query: list[str]) -> dict[str, float]:
    """Robertson's BM25 with idf = ln(1 + (N - df + 0.5) / (df + 0.5)), k1 = 1.2, b = 0.75, written plainly."""
    average = sum(map(len, texts.values())) / len(texts)
    scores: dict[str, float] = {}
    for word in set(query):
        df = sum(word in text for text in texts.values())
        for name, text in texts.items():
            tf = Counter(text)[word]
            if tf:
                idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
                part = idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * len(text) / average))
                scores[name] = scores.get(name, 0) + part
    return scores


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    texts=st.lists(
        st.lists(st.sampled_from(WORDS), min_size=1, max_size=9), min_size=1, max_size=9, unique_by=tuple
    ),
    query=st.lists(st.sampled_from([*WORDS, "unheard"]), min_size=1, max_size=5),
)
def test_scores_are_those_of_bm25(corpus: Corpus, texts: list[list[str]], query: list[str]) -> None:
    corpus.conn.execute("delete from corpus.document")
    corpus.texts.clear()
    corpus.add(*(Text(" ".join(words)) for words in texts))
    wanted = reference_bm25(dict(zip(corpus.texts, texts, strict=True)), query)
    found = corpus.search(" ".join(query))
    assert {row["document_id"]: row["bm25"] for row in found} == pytest.approx(wanted)
    assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)
    for place, row in enumerate(found, start=1):
        assert row["text_rank"] == place
        assert sum(row["terms"].values()) == pytest.approx(row["bm25"], abs=0.01)


def test_titles_and_headings_count_and_languages_are_stemmed(corpus: Corpus) -> None:
    corpus.source("handbuch", language="de")
    corpus.source("suomi", language="xx")
    corpus.add(
        Text("It takes three days.", title="Refunds"),
        Text("It takes four days.", heading="Shipping > Abroad"),
        Text("Die Häuser sind verkauft.", source="handbuch"),
        Text("talot talossa", source="suomi"),
    )
    assert ids(corpus.search("a refund")) == ["notes/000000"]
    assert ids(corpus.search("shipped abroad")) == ["notes/000001"]
    assert ids(corpus.search("ein Haus")) == ["handbuch/000002"]
    assert ids(corpus.search("talo")) == []
    assert ids(corpus.search("talossa")) == ["suomi/000003"]


def test_a_common_word_costs_no_result_and_still_counts(corpus: Corpus) -> None:
    corpus.add(*(Text(f"pump number{n}") for n in range(15)), *(Text(f"hose number{n}") for n in range(25)))
    corpus.add(Text("valve"), Text("valve pump"))
    # The rare word finds both, and the common one, which is not sought, decides between them.
    first, second = corpus.search("valve pump", k=2)
    assert (set(first["terms"]), set(second["terms"])) == ({"valv", "pump"}, {"valv"})
    assert len(corpus.search("valve pump", k=42)) == 17
    assert len(corpus.search("pump", k=5)) == 5


@pytest.mark.parametrize(
    "query",
    [
        "",
        "the of and",
        "\x01\x7f '\" ); drop table corpus.chunk; -- & | ! <-> :* %s {}",
        "日本語 🙂",
        "😀" * 9_000,
    ],
)
def test_hostile_questions_find_nothing_by_words_and_everything_by_vectors(
    corpus: Corpus, query: str
) -> None:
    vectors = unit(np.random.default_rng(0), 3)
    corpus.add(*(Text(f"birch {n}", vector=vector) for n, vector in enumerate(vectors)))
    assert corpus.search(query) == []
    for mode in ("hybrid", "vector"):
        assert ids(corpus.search(query, mode=mode, vector=vectors[1]))[0] == "notes/000001"
        assert len(corpus.search(query, mode=mode, vector=vectors[1])) == 3


def test_a_question_of_100_kb_is_answered(corpus: Corpus) -> None:
    corpus.add(Text("birch"), Text("cedar"))
    long = " ".join(f"word{n}" for n in range(12_000))
    assert ids(corpus.search("birch " + long)) == ["notes/000000"]


# --- vectors and filters --------------------------------------------------------------------------------------------

MANY = 3_000
SHARES = {"half": 0.5, "tenth": 0.1, "hundredth": 0.01, "thousandth": 0.001}


@pytest.fixture(scope="module")
def graph(cluster: Cluster, template: str) -> Iterator[Corpus]:
    """3,000 passages with vectors and a graph over them, in sources of many sizes."""
    url = cluster.new_database(template)
    with Database.from_url(url).connect(autocommit=True) as conn:
        random = np.random.default_rng(7)
        corpus = Corpus(conn)
        corpus.source("notes")
        centres = unit(random, 20)
        points = centres[random.integers(0, 20, MANY)] + 0.5 * unit(random, MANY)
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        shares = [name for name, share in SHARES.items() for _ in range(int(share * MANY))]
        shares += ["rest"] * (MANY - len(shares))
        corpus.add(
            *(
                Text(
                    f"{WORDS[n % 7]} number{n}",
                    path=f"{shares[n]}/{n}.md",
                    title=f"On {shares[n]} things",
                    media_type="text/markdown" if n % 2 else "text/plain",
                    vector=point,
                )
                for n, point in enumerate(points)
            )
        )
        conn.execute(
            "create index on retrieval.release_a using hnsw (embedding halfvec_cosine_ops) with (m = 16, ef_construction = 64)"
        )
        conn.execute("analyze")
        # So few rows are scanned faster than the graph is walked; it is the walk that is tested.
        conn.execute("set enable_seqscan = off")
        yield corpus
    cluster.drop_database(url)


def exact(corpus: Corpus, question: NDArray[np.float32], survives: Any, k: int) -> list[str]:
    """The k nearest by brute force over what is stored."""

    def half(vector: NDArray[np.float32]) -> NDArray[np.float64]:
        stored = vector.astype(np.float16).astype(np.float64)
        return stored / float(np.linalg.norm(stored))

    asked = half(question)
    distances = {
        name: 1 - float(half(text.vector) @ asked)
        for name, text in corpus.texts.items()
        if text.vector is not None and survives(text)
    }
    return sorted(distances, key=lambda name: distances[name])[:k]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("exact_up_to", [None, 0])
def test_filters_are_right_at_any_selectivity(graph: Corpus, share: str, exact_up_to: int | None) -> None:
    """Survivors one by one, and (with 0) through the graph, whose recall is below 1 but which never returns less."""
    questions = unit(np.random.default_rng(3), 12)
    surviving = int(SHARES[share] * MANY)
    found_right = 0
    for question in questions:
        wanted = exact(graph, question, lambda text: text.path.startswith(f"{share}/"), 10)
        rows = graph.conn.execute(
            "select document_id, distance, vector_rank from retrieval.search('', %s::halfvec, 10, 'vector', %s, %s)",
            [str(question.tolist()), Jsonb({"path": f"{share}/"}), exact_up_to],
        ).fetchall()
        assert len(rows) == min(10, surviving)
        assert [row[2] for row in rows] == list(range(1, len(rows) + 1))
        assert [row[1] for row in rows] == sorted(row[1] for row in rows)
        found_right += len({row[0] for row in rows} & set(wanted))
    recall = found_right / (len(questions) * min(10, surviving))
    assert recall == 1 if exact_up_to is None else recall > 0.9


def test_the_graph_is_walked_whatever_was_prepared_and_its_settings_end_with_the_search(
    graph: Corpus,
) -> None:
    conn = graph.conn
    question = str(unit(np.random.default_rng(4), 1)[0].tolist())
    walks = "select pg_stat_get_xact_numscans('retrieval.release_a_embedding_idx'::regclass)"
    with conn.transaction():
        conn.execute("set local plan_cache_mode = force_generic_plan")
        conn.execute("prepare ask as select count(*) from retrieval.search('', $1, $2, 'vector', $3, $4)")
        before = 0
        for _ in range(3):
            rows = conn.execute(f"execute ask ('{question}', 10, '{{\"path\": \"half/\"}}', 0)")
            assert rows.fetchone() == (10,)
            walked = conn.execute(walks).fetchone()
            assert walked is not None and walked[0] > before
            before = walked[0]
        for setting, value in (("hnsw.iterative_scan", "off"), ("hnsw.ef_search", "40"), ("jit", "on")):
            assert conn.execute("select current_setting(%s)", [setting]).fetchone() == (value,)
        conn.execute("deallocate ask")


@pytest.mark.parametrize("mode", ["hybrid", "vector", "text"])
def test_every_field_filters_in_every_mode(graph: Corpus, mode: str) -> None:
    question = unit(np.random.default_rng(5), 1)[0]

    def found(filter: Any) -> list[Row]:
        return graph.search("amber delta", k=50, mode=mode, filter=filter, vector=question)

    assert {row["source"] for row in found({"source": ["notes", "other"]})} == {"notes"}
    assert found({"source": "other"}) == found({"path": []}) == []
    assert {row["document_id"] for row in found({"document": ["notes/000007", "notes/000014"]})} == {
        "notes/000007",
        "notes/000014",
    }
    assert {row["title"] for row in found({"title": "A TENTH"[2:], "media_type": "text/plain"})} == {
        "On tenth things"
    }
    assert found({"title": "100%"}) == found({"heading": "x"}) == []
    assert len(found({})) == len(found(None)) == 50


@pytest.mark.parametrize(
    "value",
    ["", "%", "_", "\\", "{}", "a,b", '"', "' or true --", "$1", "null", "日本 🙂", "É", "x" * 100_000],
)
def test_values_of_a_filter_are_texts_and_nothing_else(corpus: Corpus, value: str) -> None:
    corpus.source(value)
    corpus.add(
        Text(
            "amber", source=value, path=f"{value}/a.md", title=value.upper(), heading=value, media_type=value
        ),
        Text("amber birch", path="none", title="none", heading="none"),
    )
    wanted = dict.fromkeys(("source", "path", "media_type", "title", "heading"), value)
    wanted |= {"document": f"{value}/000000", "path": f"{value}/"}
    for name, one in wanted.items():
        many = 10_000 if name in ("source", "document") else 10
        for filter in (one, [*(f"? {n}" for n in range(many)), one]):
            found = ids(corpus.search("amber", filter={name: filter}))
            # Whatever there is contains the empty text.
            assert len(found) == (2 if not value and name in ("title", "heading") else 1)
            assert wanted["document"] in found


def test_what_a_filter_cannot_be_is_said(corpus: Corpus) -> None:
    for filter, message in (
        ({"colour": "red"}, "filter.colour: there is no such field; filter by some of source, document"),
        ({"source": 1}, "filter.source: give a text, or an array of texts"),
        ({"source": ["a", None]}, "filter.source: give a text, or an array of texts"),
        ({"path": {"a": "b"}}, "filter.path: give a text, or an array of texts"),
        ({"title": [["a"]]}, "filter.title: give a text, or an array of texts"),
        ({"heading": None}, "filter.heading: give a text, or an array of texts"),
        (["source"], "filter must be an object"),
    ):
        with (
            pytest.raises(psycopg.errors.InvalidParameterValue, match=re.escape(message)),
            corpus.conn.transaction(),
        ):
            corpus.search("amber", filter=filter)
    for arguments, message in (
        ({"mode": "magic"}, "mode must be hybrid, vector or text"),
        ({"k": 0}, "k must be from 1 to 1000"),
        ({"mode": "vector"}, "query_embedding must be given"),
    ):
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=message), corpus.conn.transaction():
            corpus.search("amber", **arguments)


# --- both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["hybrid", "vector", "text"])
def test_only_what_may_be_retrieved_and_is_still_there_is_found(corpus: Corpus, mode: str) -> None:
    vectors = unit(np.random.default_rng(1), 3)
    corpus.source("secret", uses="{finetune, eval}")
    corpus.add(
        Text("amber one", vector=vectors[0]),
        Text("amber two", source="secret", vector=vectors[1]),
        # The same text in both: found, and never as the secret one.
        Text("amber three", title="Open", vector=vectors[2]),
        Text("amber three", source="secret", title="Closed", vector=vectors[2]),
        Text("amber three", title="Open too", vector=vectors[2]),
    )

    def found(filter: Any = None) -> dict[str, list[str]]:
        rows = corpus.search("amber closed", mode=mode, vector=vectors[1], filter=filter)
        return {row["document_id"]: row["also_in"] for row in rows}

    assert found() == {"notes/000000": [], "notes/000002": ["notes/000004"]}
    assert found({"source": "secret"}) == {}
    assert found({"document": "notes/000004"}) == {"notes/000004": []}
    corpus.conn.execute("delete from corpus.document where document_id in ('notes/000000', 'notes/000002')")
    assert found() == {"notes/000004": []}
    corpus.conn.execute("update registry.source set allowed_uses = '{}'")
    assert found() == {}


@pytest.mark.parametrize("mode", ["hybrid", "vector", "text"])
def test_texts_that_the_index_does_not_know_to_be_gone_hide_no_others(corpus: Corpus, mode: str) -> None:
    near, far = np.eye(DIMENSIONS, dtype=np.float32)[:2]
    corpus.add(*(Text(f"amber {n}", vector=near) for n in range(210)))
    corpus.add(*(Text(f"amber and other words {n}", vector=far) for n in range(5)))
    # Enough of them to make amber a rare word.
    corpus.add(*(Text(f"birch {n}", vector=-near) for n in range(900)))
    corpus.conn.execute("delete from corpus.document where document_id < 'notes/000210'")
    found = corpus.search("amber", k=5, mode=mode, vector=near)
    assert sorted(ids(found)) == [f"notes/{n:06}" for n in range(210, 215)]


def test_the_two_legs_are_added_and_explained(corpus: Corpus) -> None:
    vectors = unit(np.random.default_rng(2), 40)
    corpus.add(*(Text(f"birch {n}", vector=vectors[n]) for n in range(40)), Text("a birch without a vector"))
    question = vectors[8]
    found = corpus.search("birch 7", k=41, mode="hybrid", vector=question)
    assert len(found) == 41
    assert {found[0]["document_id"], found[1]["document_id"]} == {"notes/000007", "notes/000008"}
    distances = [1 - float(vector @ question) for vector in vectors]
    # A hundred passages taken evenly: of 41, nearly the same as all.
    row = next(row for row in found if row["document_id"] == "notes/000007")
    weight = (row["score"] - row["bm25"]) / (1 - row["distance"])
    assert weight == pytest.approx(1.5 / np.std(distances), rel=0.1)
    assert row["distance"] == pytest.approx(distances[7], abs=1e-3)
    assert row["vector_rank"] == sorted(distances).index(distances[7]) + 1
    assert row["text_rank"] == 1
    for row in found:
        similarity = 1 - (max(distances) if row["distance"] is None else row["distance"])
        assert row["score"] == pytest.approx(row["bm25"] + weight * similarity, abs=0.05)


# --- with the model -------------------------------------------------------------------------------------------------


@pytest.fixture
def deployment(database: Database, tmp_path: Path) -> Settings:
    return Settings.from_environment(
        {"EXAMPLE": "none", "DATABASE_URL": database.url, "DATAMOAT_HOME": str(tmp_path)}
    )


def test_questions_are_embedded_by_the_live_releases_model(database: Database, deployment: Settings) -> None:
    from assets.embeddings.registry import NotLive
    from assets.embeddings.release import current_release

    release = current_release(None)
    with database.connect(autocommit=True) as conn:
        corpus = Corpus(conn)
        corpus.source("notes")
        corpus.add(Text("The pump is guaranteed for two years."), Text("Cats sleep all day."))
        assert ids(searching.search(deployment, "cats\0sleeping", 5, "text")) == ["notes/000001"]
        with pytest.raises(NotLive, match="make run"):
            searching.search(deployment, "how long is the warranty?", 5)
        conn.execute("drop view retrieval.live; alter table retrieval.release_a alter embedding type halfvec")
        conn.execute(
            "create view retrieval.live as select v.passage_no, p.content_hash, v.embedding"
            " from retrieval.release_a v join retrieval.passage p using (passage_no)"
        )
        conn.execute("grant select on retrieval.release_a, retrieval.live to datamoat_writer")
        vectors = searching._embedder(None).encode(
            [text.body for text in corpus.texts.values()], as_query=False
        )
        for text, vector in zip(corpus.texts.values(), vectors, strict=True):
            conn.execute(
                "insert into retrieval.release_a select passage_no, %s from retrieval.passage where content_hash = %s",
                [str(vector.tolist()), f"hash of {text.body}"],
            )
        conn.execute(
            "insert into registry.embedding_release (release, fingerprint, dimensions, state, chunking)"
            " values ('a', %s, 384, 'live', %s)",
            [Jsonb(dict(release.fingerprint)), corpus.chunking],
        )
        for mode in ("hybrid", "vector"):
            found = searching.search(deployment, "how long is the warranty?", 5, mode, {"source": ["notes"]})
            assert ids(found) == ["notes/000000", "notes/000001"]
            assert "cosine" in searching.explanation(found[0])
        # A connection that went away while it was idle is replaced.
        conn.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'search'"
        )
        assert len(searching.search(deployment, "pump", 5, "hybrid", {"document": ["notes/000000"]})) == 1
        conn.execute(
            'update registry.embedding_release set fingerprint = fingerprint || \'{"model": "other"}\''
        )
        with pytest.raises(NotLive, match="is not the model"):
            searching.search(deployment, "pump", 5)
        searching._close()


def test_a_release_of_another_dimension_that_goes_live_meanwhile_is_asked_anew(
    database: Database, deployment: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from assets.embeddings.registry import find_live, promote, rollback
    from assets.embeddings.release import current_release

    with database.connect(autocommit=True) as conn:
        corpus = Corpus(conn)
        corpus.source("notes")
        axes = np.eye(DIMENSIONS, dtype=np.float32)
        corpus.add(Text("birch", vector=axes[0]), Text("cedar", vector=axes[1]))
        # In the other release it is the other text that is nearest.
        conn.execute(
            "create table retrieval.release_b as select p.passage_no, (case c.text when 'cedar' then '[1,0]'"
            " else '[0,1]' end)::halfvec(2) as embedding from retrieval.passage p join corpus.chunk c using (content_hash)"
        )
        for kind, name in (("table", "release_a"), ("table", "release_b"), ("view", "live")):
            conn.execute(f"alter {kind} retrieval.{name} owner to datamoat_writer")
        for name, dimensions, state in (("a", DIMENSIONS, "live"), ("b", 2, "candidate")):
            conn.execute(
                "insert into registry.embedding_release (release, fingerprint, dimensions, state, chunking)"
                " values (%s, %s, %s, %s, %s)",
                [name, Jsonb(dict(current_release(None).fingerprint)), dimensions, state, corpus.chunking],
            )
    moves: list[str] = []
    with database.connect(role=WRITER, autocommit=True) as conn:

        def embedded(*_: Any) -> list[float]:
            live = find_live(conn)
            assert live is not None
            if moves:
                if moves.pop() == "promote":
                    promote(conn, "b", "us", "a test", force=True)
                else:
                    rollback(conn, "us", "a test")
            return [1.0] + [0.0] * (live.dimensions - 1)

        monkeypatch.setattr(searching, "_embedded", embedded)
        for mode in ("vector", "hybrid"):
            assert ids(searching.search(deployment, "?", 2, mode)) == ["notes/000000", "notes/000001"]
            moves.append("promote")
            assert ids(searching.search(deployment, "?", 2, mode)) == ["notes/000001", "notes/000000"]
            moves.append("rollback")
            assert ids(searching.search(deployment, "?", 2, mode)) == ["notes/000000", "notes/000001"]
        moves += ["promote", "rollback", "promote"]
        with pytest.raises(psycopg.errors.DataException, match="dimensions"):
            searching.search(deployment, "?", 2)
        assert moves == []
    searching._close()


def test_twenty_ask_at_once(database: Database, deployment: Settings) -> None:
    with database.connect(autocommit=True) as conn:
        corpus = Corpus(conn)
        corpus.source("notes")
        corpus.add(*(Text(f"amber number{n}") for n in range(20)))
    filter = {"document": [f"notes/{n:06}" for n in range(20)] + ["a\0b", "\ud800"]}

    class Raced(deque[Any]):
        """Seems to hold a connection, which another thread has taken by then."""

        def __len__(self) -> int:
            return 1

    searching._idle[deployment] = Raced()
    assert ids(searching.search(deployment, "number1", 3, "text", filter)) == ["notes/000001"]
    for connection in searching._idle.pop(deployment):
        connection.close()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(20) as threads:
            asked = {
                n: threads.submit(searching.search, deployment, f"number{n % 20}", 3, "text", filter)
                for n in range(400)
            }
        assert {n: ids(one.result()) for n, one in asked.items()} == {
            n: [f"notes/{n % 20:06}"] for n in asked
        }
    finally:
        sys.setswitchinterval(before)
    assert 0 < len(searching._idle[deployment]) <= 20
    searching._close()


def test_the_best_are_put_in_order_by_a_cross_encoder(
    database: Database, deployment: Settings, tmp_path: Path
) -> None:
    from embedder.rerank import Reranker
    from tests.unit.model_folders import write_folder

    folder = write_folder(tmp_path / "cross", "bert", head=True)
    with database.connect(autocommit=True) as conn:
        corpus = Corpus(conn)
        corpus.source("notes")
        corpus.add(*(Text(f"amber {' '.join(WORDS[:n])}") for n in range(1, 8)))
    scores = Reranker.open(folder).scores("amber", [text.body for text in corpus.texts.values()])
    wanted = sorted(zip(corpus.texts, scores.tolist(), strict=True), key=lambda one: -one[1])[:3]
    found = searching.search(deployment, "amber", 3, "text", rerank=folder)
    assert ids(found) == [name for name, _ in wanted]
    assert [row["rerank"] for row in found] == pytest.approx([score for _, score in wanted], abs=1e-3)
    searching._close()


def test_the_command_explains_and_refuses_what_it_cannot_filter_by(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from orchestration.cli import app

    row = {"title": "Returns", "document_id": "a", "score": 7.5, "body": "Thirty days.", "distance": 0.25}
    row |= {
        "vector_rank": 2,
        "text_rank": None,
        "bm25": 3.0,
        "terms": {"day": 1.0, "thirti": 2.0},
        "also_in": ["b"],
    }
    asked: list[Any] = []

    def search(_: Any, *given: Any) -> list[Row]:
        asked.append(given)
        return [row]

    monkeypatch.setattr(searching, "search", search)
    monkeypatch.setattr(searching, "require_prepared", lambda settings: None)
    monkeypatch.setenv("RERANK_MODEL", str(tmp_path))

    def command(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["search", "how long?", *arguments])

    done = command("--filter", "source=a", "--filter", "path=x=y", "--filter", "source=b", "--explain")
    assert done.exit_code == 0
    assert asked == [("how long?", 5, "hybrid", {"source": ["a", "b"], "path": ["x=y"]}, tmp_path)]
    said = " ".join(done.output.split())
    assert "cosine 0.750 (no. 2); words 3.000: thirti 2.00, day 1.00; also in b" in said
    for wrong in ("colour=red", "source", "=x"):
        refused = command("--filter", wrong)
        assert refused.exit_code == 2
        assert "FIELD=VALUE" in refused.output


# --- over HTTP ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeedbackService]:
    service = FeedbackService(
        cluster.new_database(),
        tmp_path_factory.mktemp("search") / "pseudonym.key",
        environment={"DATAMOAT_SEARCH": "tests.integration.pages.search:passages"},
    )
    service.start()
    yield service
    service.stop()


def ask(service: FeedbackService, body: Any, scope: str = "read") -> httpx.Response:
    with psycopg.connect(service.database_url) as conn:
        key = create_key(conn, "support", (scope,))[1]
    return httpx.post(
        f"{service.base_url}/v1/search",
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        content=body if isinstance(body, bytes) else None,
        json=None if isinstance(body, bytes) else body,
        timeout=30,
    )


def test_passages_are_answered_over_http(service: FeedbackService) -> None:
    answer = ask(service, {"query": "How long?", "k": 1})
    assert answer.status_code == 200
    (passage,) = answer.json()["results"]
    assert (passage["chunk_id"], passage["score"]) == ("x200#12", 0.912)
    assert "explanation" not in passage
    asked = {"query": "How long?", "filter": {"source": ["other"]}, "explain": True}
    assert ask(service, asked).json() == {"results": []}
    (passage, _) = ask(service, asked | {"filter": {"source": "manuals"}}).json()["results"]
    assert passage["explanation"]["bm25"] is None


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({}, 422, "query"),
        ({"query": "  "}, 422, "query"),
        ({"query": "x" * 2001}, 422, "query"),
        ({"query": "a\0b"}, 422, "query"),
        ({"query": "a", "k": 0}, 422, "k"),
        ({"query": "a", "mode": "magic"}, 422, "mode"),
        ({"query": "a", "filter": {"colour": "red"}}, 422, "filter.colour"),
        ({"query": "a", "filter": {"source": 1}}, 422, "filter.source"),
        ({"query": "a", "explain": "yes"}, 422, "explain"),
        ({"query": "no index"}, 503, None),
        ({"query": "fault"}, 503, None),
        (b"{", 400, None),
    ],
)
def test_what_cannot_be_answered_is_explained(
    service: FeedbackService, body: Any, status: int, field: str | None
) -> None:
    answer = ask(service, body)
    error = answer.json()["error"]
    assert (answer.status_code, error.get("field")) == (status, field), error
    assert error["message"] and "secret detail" not in answer.text
    if body == {"query": "no index"}:
        assert "moat run" in error["message"]
        assert answer.headers["Retry-After"]


def test_searching_needs_a_key_that_may_read_and_a_search(
    service: FeedbackService, feedback_service: FeedbackService
) -> None:
    assert ask(service, {"query": "a"}, scope="ingest").status_code == 403
    assert httpx.post(f"{service.base_url}/v1/search", json={"query": "a"}, timeout=30).status_code == 401
    answer = ask(feedback_service, {"query": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_search")
    assert "--search" in answer.json()["error"]["remedy"]

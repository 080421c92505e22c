"""Postings: what words are found by is kept right, whatever changes, and searching it finds the very best by BM25."""

import math
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import count, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assets.embeddings.index import refresh_passages
from assets.embeddings.postings import PostingsReport, refresh_postings
from storage.database import Database
from storage.migrations import upgrade
from tests.integration.conftest import Cluster, database_of
from tests.integration.searched import WORDS, Connection, Corpus, Text, ids


@pytest.fixture
def corpus(conn: Connection) -> Corpus:
    corpus = Corpus(conn)
    corpus.source("notes")
    return corpus


# --- the best by BM25, whatever is not read ---------------------------------------------------------------------------

MANY = 1_500
# From everywhere to almost nowhere.
ZIPF = [f"w{n}" for n in range(120)]


@pytest.fixture(scope="module")
def many(cluster: Cluster, template: str) -> Iterator[Corpus]:
    """1,500 texts of two languages, written and changed bit by bit, so that they lie in several segments."""
    url = cluster.new_database(template)
    with Database.from_url(url).connect(autocommit=True) as conn:
        random = np.random.default_rng(11)
        corpus = Corpus(conn)
        corpus.source("notes")
        corpus.source("notizen", language="de")
        weights = 1 / np.arange(1, len(ZIPF) + 1)
        numbers = count()

        def text() -> Text:
            words = random.choice(ZIPF, size=random.integers(1, 30), p=weights / weights.sum())
            number = next(numbers)
            # Words of one text are joined in its only sentence; the number makes it distinct.
            return Text(
                " ".join([*words, f"n{number}"]),
                source="notizen" if number % 4 == 3 else "notes",
                path=f"{'half' if number % 2 else 'rest'}/{number}",
            )

        for size in (MANY - 150, 100, 30, 20):
            corpus.add(*(text() for _ in range(size)))
            conn.execute(
                "update corpus.document set title = %s where document_id in ("
                " select document_id from corpus.document order by md5(document_id || %s) limit 20)",
                [f"w{size % 7} changed", str(size)],
            )
            conn.execute("delete from corpus.document where document_id like %s", [f"%{size % 97:02}"])
            refresh_passages(conn)
            corpus.refresh()
        yield corpus
    cluster.drop_database(url)


def brute_force(corpus: Corpus, words: list[str], paths: str) -> list[tuple[float, int]]:
    """(score, passage) of all that have any of the words, best first, ties by passage; written plainly.

    Each language has its own statistics: idf = ln(1 + (N - df + 0.5) / (df + 0.5)), k1 = 1.2, b = 0.75.
    """
    rows = corpus.conn.execute(
        "select c.passage_no, c.source, d.title || ' ' || c.text, d.path from corpus.chunk c"
        " join corpus.document d using (document_id)"
    ).fetchall()
    found = []
    for source in ("notes", "notizen"):
        texts = {number: text.split() for number, of, text, _ in rows if of == source}
        inside = {number for number, _, _, path in rows if path.startswith(paths)}
        average = sum(map(len, texts.values())) / len(texts)
        counts = {number: Counter(text) for number, text in texts.items()}
        idf = {}
        for word in set(words):
            df = sum(word in one for one in counts.values())
            idf[word] = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
        for number, text in texts.items():
            score = sum(
                idf[word] * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * len(text) / average))
                for word in idf
                if (tf := counts[number][word])
            )
            if score and number in inside:
                found.append((score, number))
    return sorted(found, key=lambda one: (-one[0], one[1]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    words=st.lists(
        st.one_of(st.sampled_from(ZIPF[:6]), st.sampled_from(ZIPF), st.sampled_from(["changed", "unheard"])),
        min_size=1,
        max_size=9,
    ),
    depth=st.sampled_from([1, 2, 3, 7, 100]),
    kind=st.sampled_from(["all", "survivors", "few survivors", "wanted"]),
)
def test_exactly_the_best_are_found(many: Corpus, words: list[str], depth: int, kind: str) -> None:
    # Few are scored one by one; of many, the postings are read.
    paths = {"all": "", "few survivors": "half/14"}.get(kind, "half/")
    wanted = brute_force(many, words, paths)
    ((found,),) = many.conn.execute(
        "select retrieval.matching_passages(%(chunking)s, retrieval.sought_terms(%(query)s, %(chunking)s),"
        " case when %(kind)s like '%%survivors' then array("
        "  select passage_no from corpus.chunk join corpus.document using (document_id) where path ^@ %(paths)s) end,"
        " case when %(kind)s = 'wanted' then retrieval.read_filter('{\"path\": \"half/\"}') end, %(depth)s)",
        {"chunking": many.chunking, "query": " ".join(words), "kind": kind, "paths": paths, "depth": depth},
    ).fetchall()
    assert len(found) == len(set(found)) == min(depth, len(wanted))
    scores = {number: score for score, number in wanted}
    assert [scores[number] for number in found] == pytest.approx([score for score, _ in wanted[:depth]])
    assert not [one for one, other in pairwise(found) if scores[one] == scores[other] and one > other]


def test_of_equals_those_that_came_first_are_found(corpus: Corpus) -> None:
    corpus.add(*(Text(f"amber number{n}") for n in range(700)))
    # Indexed anew, and no later than the others for that.
    corpus.conn.execute("update corpus.document set title = 'x' where document_id < 'notes/000300'")
    corpus.refresh()
    corpus.conn.execute("update corpus.document set title = ''")
    corpus.refresh()
    first = corpus.conn.execute(
        "select document_id from corpus.chunk order by passage_no limit 50"
    ).fetchall()
    assert ids(corpus.search("amber", k=50)) == [document for (document,) in first]


def test_a_frequent_word_is_not_read_where_it_cannot_matter(corpus: Corpus) -> None:
    corpus.add(*(Text(f"delta number{n} {'amber ember' if n < 8 else ''}") for n in range(500)))

    def found(depth: int) -> list[int]:
        ((passages,),) = corpus.conn.execute(
            "select retrieval.matching_passages(%(chunking)s, retrieval.sought_terms('amber ember delta', %(chunking)s),"
            " null, null, %(depth)s)",
            {"chunking": corpus.chunking, "depth": depth},
        ).fetchall()
        return list(passages)

    one, all_of_them = found(1), found(500)
    assert (len(one), len(all_of_them)) == (1, 500)
    corpus.conn.execute(
        "update retrieval.posting set texts = '{}', impacts = '{}' from retrieval.term t"
        " where t.term_no = posting.term_no and t.lexeme = 'delta'"
    )
    assert found(1) == one
    # Where it matters it is read.
    assert found(500) == all_of_them[:8]


# --- they are kept right ----------------------------------------------------------------------------------------------


def test_changes_leave_what_a_rebuild_would_make(corpus: Corpus) -> None:
    conn = corpus.conn
    corpus.source("secret", uses="{finetune}")
    corpus.add(*(Text(f"{WORDS[n % 7]} {WORDS[n % 3]} number{n}", title="First") for n in range(30)))
    assert corpus.refresh() == PostingsReport(0, 0, 30, 38)
    corpus.add(Text("amber amber number5 fresh", heading="New"), Text("hidden words", source="secret"))
    conn.execute("update corpus.document set title = 'Second' where document_id <= 'notes/000004'")
    conn.execute("delete from corpus.document where document_id in ('notes/000010', 'notes/000011')")
    refresh_passages(conn)
    assert (corpus.refresh().added, corpus.refresh().added) == (5, 0)
    after = corpus.postings()
    assert not [row for row in after if row[2] in ("hidden", "number10")]
    assert after == corpus.rebuilt()

    # Forgetting a permission takes its words away, giving it brings them.
    conn.execute("update registry.source set allowed_uses = '{}' where source = 'notes'")
    conn.execute("update registry.source set allowed_uses = '{rag}', language = 'de' where source = 'secret'")
    corpus.refresh()
    after = corpus.postings()
    assert {row[2] for row in after if row[1] == "german" and len(row) == 7} == {"hidd", "word"}
    assert after == corpus.rebuilt()
    conn.execute("delete from corpus.document")
    refresh_passages(conn)
    assert corpus.postings() == []


def test_two_refreshes_at_once_and_a_deletion_count_right(database: Database) -> None:
    with database.connect(autocommit=True) as conn:
        corpus = Corpus(conn)
        corpus.source("notes")
        corpus.add(*(Text(f"amber number{n}") for n in range(20)))
        failures: list[BaseException] = []

        def refresh() -> None:
            try:
                with database.connect(autocommit=True) as mine:
                    refresh_postings(mine, corpus.chunking)
            except BaseException as error:
                failures.append(error)

        def replace() -> None:
            try:
                with database.connect(autocommit=True) as mine:
                    mine.execute("delete from corpus.document where document_id < 'notes/000010'")
                    refresh_passages(mine)
            except BaseException as error:
                failures.append(error)

        conn.execute("update corpus.document set title = 'Changed'")
        threads = [threading.Thread(target=one) for one in (refresh, replace, refresh)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        corpus.refresh()
        after = corpus.postings()
        assert next(row[3] for row in after if row[2] == "amber") == 10
        assert after == corpus.rebuilt()


def test_many_small_changes_leave_few_segments_and_little_that_is_gone(corpus: Corpus) -> None:
    corpus.add(*(Text(f"amber number{n}") for n in range(200)))
    for n in range(40):
        corpus.conn.execute(
            "update corpus.document set title = %s where document_id = any(%s)",
            [f"Title {n}", [f"notes/{(7 * n + place) % 200:06}" for place in range(10)]],
        )
        corpus.refresh()
    segments = corpus.conn.execute("select count(*), sum(texts) from retrieval.segment").fetchone()
    assert segments is not None and segments[0] <= 9 and segments[1] <= 2 * 200
    assert corpus.postings() == corpus.rebuilt()


def test_chunkings_are_counted_apart_and_one_is_forgotten_whole(corpus: Corpus) -> None:
    conn = corpus.conn
    corpus.add(*(Text(f"amber number{n}") for n in range(20)))
    alone = corpus.postings()
    # Another chunking that halves every document, and shares the first halves of some.
    conn.execute(
        "insert into corpus.piece (chunking, chunk_id, document_id, source, ordinal, start_char, end_char, text,"
        " content_hash, heading, chunker) select 'other', chunk_id || n, document_id, source, n, 0, 0,"
        " case n when 0 then 'amber' else text end, case n when 0 then 'amber' else content_hash end, '', '1'"
        " from corpus.piece, generate_series(0, 1) n"
    )
    refresh_passages(conn)
    assert refresh_postings(conn, "other") == PostingsReport(21, 0, 21, 21)
    assert corpus.refresh().added == 0
    assert [row for row in corpus.postings() if "other" not in row] == alone
    assert len(corpus.search("amber", k=50)) == 20
    conn.execute("create or replace view corpus.live_chunking as select 'other'::text as chunking")
    assert len(corpus.search("amber", k=50)) == 21

    conn.execute("delete from corpus.document where document_id < 'notes/000010'")
    refresh_passages(conn)
    for chunking in ("other", corpus.chunking):
        refresh_postings(conn, chunking)
    assert {
        row[0]: row[2]
        for row in corpus.postings()
        if len(row) == 4 and row[1] == "english" and row[2] in (10, 11)
    } == {
        "other": 11,
        corpus.chunking: 10,
    }
    conn.execute("select retrieval.forget_chunking(%s)", [corpus.chunking])
    after = corpus.postings()
    assert after and not [row for row in after if corpus.chunking in row]
    assert len(corpus.search("amber", k=50)) == 11
    assert conn.execute("select distinct chunking from retrieval.segment").fetchall() == [("other",)]


def test_readers_see_the_whole_of_it_or_none(database: Database) -> None:
    with database.connect(autocommit=True) as conn:
        corpus = Corpus(conn)
        corpus.source("notes")
        corpus.add(*(Text(f"amber number{n}", title="first") for n in range(60)))
        seen: list[tuple[int, int]] = []
        stop = threading.Event()

        def read() -> None:
            with database.connect(autocommit=True) as mine:
                reader = Corpus(mine)
                while not stop.is_set():
                    found = reader.search("amber first second", k=100)
                    titles = Counter(next(iter({"first", "second"} & set(row["terms"])), "") for row in found)
                    seen.append((len(found), max(titles.values())))

        thread = threading.Thread(target=read)
        thread.start()
        try:
            for title in ("second", "first", "second", "first"):
                conn.execute("update corpus.document set title = %s", [title])
                corpus.refresh()
        finally:
            stop.set()
            thread.join()
        assert set(seen) == {(60, 60)}


def test_postings_of_before_are_packed_and_need_no_refresh(cluster: Cluster) -> None:
    """A database of revision 0004, which had a row for each posting."""
    database = database_of(cluster, "0004")
    with database.connect(autocommit=True) as conn:
        corpus = Corpus(conn)
        corpus.source("notes")
        for n, text in enumerate(["amber amber birch", "amber cedar", "birch"]):
            conn.execute(
                "insert into corpus.document (document_id, source, path, title, media_type, raw_sha256, text,"
                " text_sha256, parser, policy, findings) values (%(n)s, 'notes', '', '', '', '', '', '', '', '', '{}')",
                {"n": f"notes/{n}"},
            )
            conn.execute(
                "insert into corpus.chunk (chunk_id, document_id, source, ordinal, start_char, end_char, text,"
                " content_hash, chunker) values (%(n)s, %(n)s, 'notes', 0, 0, 0, %(text)s, %(text)s, '1')",
                {"n": f"notes/{n}", "text": text},
            )
            conn.execute("insert into retrieval.passage (content_hash) values (%s)", [text])
        conn.execute(
            "with v as (select p.passage_no, l.lexeme, cardinality(l.positions) as tf, count(*) over w as lexemes,"
            "  sum(cardinality(l.positions)) over (partition by p.passage_no) as length from retrieval.passage p"
            "  cross join unnest(to_tsvector('english', p.content_hash)) l window w as (partition by p.passage_no)),"
            " t as (insert into retrieval.term (configuration, lexeme, df)"
            "  select 'english', lexeme, count(*) from v group by lexeme returning term_no, lexeme),"
            " p as (insert into retrieval.posting select t.term_no, v.passage_no, v.tf, v.length from v"
            "  join t using (lexeme) returning term_no, passage_no, length),"
            " x as (insert into retrieval.passage_text select passage_no, 'english',"
            "  md5(concat_ws(E'\\n', 'english', '', '')), max(length), array_agg(term_no) from p group by 1"
            "  returning length)"
            " insert into retrieval.text_corpus select 'english', count(*), sum(length) from x"
        )
    upgrade(database)
    with database.connect(autocommit=True) as conn:
        corpus = Corpus(conn)
        assert [ids(corpus.search(word)) for word in ("amber", "birch", "cedar")] == [
            ["notes/0", "notes/1"],
            ["notes/2", "notes/0"],
            ["notes/1"],
        ]
        after = corpus.postings()
        assert corpus.refresh() == PostingsReport(0, 0, 3, 3)
        assert after == corpus.rebuilt()
    cluster.drop_database(database.url)

"""The corpus follows what was landed: only what changed is read, cut or removed, and nothing is lost on the way."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql

from assets.documents import corpus, redact
from assets.documents.chunk import DEFAULT_CHUNKING, embedded_text
from assets.documents.corpus import DocumentCounts, feedback_texts, refresh_chunks, refresh_documents
from assets.documents.parse import Parsed, ParseError, Parser
from assets.documents.redact import Redactor, redact_texts
from assets.sources.contract import CorpusMapping

Connection = psycopg.Connection[Any]

REDACTOR = Redactor(b"k" * 32)
HANDBOOK = {
    "a.md": b"# Refunds\n\nA refund takes ten days. Ask anna@example.com.",
    "sub/shipping-times.md": b"Parcels leave within two days.",
    "broken.md": b"# caf\xe9",
    "picture.png": b"\x89PNG",
}


class CountingParser(Parser):
    """Remembers which files it was asked to read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []

    def parse_many(self, files: Iterable[tuple[str, bytes]]) -> Iterator[Parsed | ParseError]:
        for path, content in files:
            self.read.append(path)
            yield from super().parse_many([(path, content)])


@pytest.fixture
def source(conn: Connection) -> Iterator[str]:
    """The name of a new, empty source of files; all of it is gone after the test."""
    conn.rollback()
    name = f"handbook_{uuid.uuid4().hex[:8]}"
    table = sql.Identifier("raw", name)
    conn.execute(
        sql.SQL(
            "create table {} (path text primary key, sha256 text, size bigint, media_type text, content bytea)"
        ).format(table)
    )
    conn.commit()
    yield name
    conn.rollback()
    conn.execute(sql.SQL("drop table {}").format(table))
    for place in ("corpus.document", "quarantine.file"):
        conn.execute(sql.SQL("delete from {} where source = %s").format(sql.SQL(place)), [name])
    conn.commit()


def land(conn: Connection, source: str, files: dict[str, bytes]) -> None:
    table = sql.Identifier("raw", source)
    conn.execute(sql.SQL("delete from {}").format(table))
    for path, content in files.items():
        conn.execute(
            sql.SQL("insert into {} values (%s, %s, %s, '', %s)").format(table),
            [path, hashlib.sha256(content).hexdigest(), len(content), content],
        )
    conn.commit()


def refresh(conn: Connection, source: str, **given: Any) -> tuple[DocumentCounts, list[str]]:
    with CountingParser() as parser:
        counts = refresh_documents(conn, source, given.pop("redactor", REDACTOR), parser, **given)
    assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    assert counts.seen == counts.parsed + counts.reused + counts.unchanged + counts.refused
    return counts, parser.read


def documents(conn: Connection, source: str) -> dict[str, dict[str, Any]]:
    with conn.transaction(), conn.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        cursor.execute("select * from corpus.document where source = %s", [source])
        return {row["path"]: row for row in cursor.fetchall()}


def quarantined(conn: Connection, source: str) -> dict[tuple[str, str], bool]:
    """{(file, rule): is resolved}"""
    with conn.transaction():
        rows = conn.execute(
            "select file, rule, resolved_at is not null, reason, remedy from quarantine.file where source = %s",
            [source],
        ).fetchall()
    assert all(reason and remedy for *_, reason, remedy in rows)
    return {(file, rule): resolved for file, rule, resolved, *_ in rows}


def chunks(conn: Connection, source: str) -> list[tuple[Any, ...]]:
    with conn.transaction():
        return conn.execute(
            "select chunk_id, document_id, ordinal, start_char, end_char, c.text, content_hash, heading, chunker,"
            " substr(d.text, start_char + 1, end_char - start_char) = c.text"
            " from corpus.chunk c join corpus.document d using (document_id) where c.source = %s"
            " order by document_id, ordinal",
            [source],
        ).fetchall()


def test_files_become_documents_and_bad_ones_are_quarantined(conn: Connection, source: str) -> None:
    land(conn, source, HANDBOOK)
    seen: list[tuple[str, int, int]] = []
    counts, _ = refresh(conn, source, run_id="r1", progress=lambda *step: seen.append(step))
    assert counts == DocumentCounts(seen=4, parsed=2, reused=0, unchanged=0, refused=2, deleted=0)
    assert seen[-1] == ("documents", 3, 3)
    found = documents(conn, source)
    assert sorted(found) == ["a.md", "sub/shipping-times.md"]
    refunds = found["a.md"]
    assert refunds["document_id"] == f"{source}/a.md"
    assert refunds["title"] == "Refunds"
    assert "anna@" not in refunds["text"]
    assert "<EMAIL_" in refunds["text"]
    assert refunds["findings"] == {"EMAIL_ADDRESS": 1}
    assert refunds["text_sha256"] == hashlib.sha256(refunds["text"].encode()).hexdigest()
    assert refunds["policy"] == REDACTOR.policy
    assert found["sub/shipping-times.md"]["title"] == "shipping times"
    assert quarantined(conn, source) == {
        ("broken.md", "wrong_encoding"): False,
        ("picture.png", "unsupported_type"): False,
    }


def test_a_second_run_reads_nothing_but_the_refused(conn: Connection, source: str) -> None:
    land(conn, source, HANDBOOK)
    refresh(conn, source)
    before = documents(conn, source)
    counts, read = refresh(conn, source)
    assert counts == DocumentCounts(seen=4, parsed=0, reused=0, unchanged=2, refused=2, deleted=0)
    assert read == ["broken.md"]
    assert documents(conn, source) == before


def test_only_the_changed_file_is_read(conn: Connection, source: str) -> None:
    land(conn, source, HANDBOOK)
    refresh(conn, source)
    land(
        conn,
        source,
        HANDBOOK | {"a.md": b"# Refunds\n\nA refund takes five days.", "broken.md": b"# caf\xc3\xa9"},
    )
    counts, read = refresh(conn, source)
    assert sorted(read) == ["a.md", "broken.md"]
    assert (counts.parsed, counts.unchanged, counts.refused) == (2, 1, 1)
    assert quarantined(conn, source)["broken.md", "wrong_encoding"] is True


def test_a_deleted_file_leaves_with_its_chunks(conn: Connection, source: str) -> None:
    land(conn, source, HANDBOOK)
    refresh(conn, source)
    refresh_chunks(conn, source)
    land(conn, source, {"a.md": HANDBOOK["a.md"]})
    counts, read = refresh(conn, source)
    assert (counts.deleted, read) == (1, [])
    assert {row[1] for row in chunks(conn, source)} == {f"{source}/a.md"}
    assert all(quarantined(conn, source).values())


def test_a_file_whose_new_version_is_refused_leaves_and_comes_back(conn: Connection, source: str) -> None:
    land(conn, source, HANDBOOK)
    refresh(conn, source)
    land(conn, source, HANDBOOK | {"a.md": b"\xff\xfe\xff"})
    counts, _ = refresh(conn, source)
    assert (counts.deleted, counts.refused) == (1, 3)
    land(conn, source, HANDBOOK)
    refresh(conn, source)
    assert "a.md" in documents(conn, source)
    assert quarantined(conn, source)["a.md", "wrong_encoding"] is True


def test_a_renamed_file_is_not_read_again(conn: Connection, source: str) -> None:
    land(conn, source, HANDBOOK)
    refresh(conn, source)
    moved = {"new/refunds.md": HANDBOOK["a.md"], "how-fast.md": HANDBOOK["sub/shipping-times.md"]}
    land(conn, source, moved)
    counts, read = refresh(conn, source)
    assert read == []
    assert (counts.reused, counts.deleted) == (2, 2)
    found = documents(conn, source)
    assert found["new/refunds.md"]["title"] == "Refunds"
    assert found["new/refunds.md"]["findings"] == {"EMAIL_ADDRESS": 1}
    assert found["how-fast.md"]["title"] == "how fast"


def test_two_files_that_swap_names_swap_texts(
    conn: Connection, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "BATCH_FILES", 1)
    land(conn, source, {"a.md": b"first", "b.md": b"second"})
    refresh(conn, source)
    land(conn, source, {"a.md": b"second", "b.md": b"first"})
    refresh(conn, source)
    assert {path: row["text"] for path, row in documents(conn, source).items()} == {
        "a.md": "second",
        "b.md": "first",
    }


def test_equal_files_are_read_once_and_a_bad_one_is_refused_under_each_name(
    conn: Connection, source: str
) -> None:
    land(conn, source, {"a.md": b"same", "b.md": b"same", "c.md": b"\xff", "d.md": b"\xff"})
    counts, read = refresh(conn, source)
    assert sorted(read) == ["a.md", "c.md"]
    assert counts == DocumentCounts(seen=4, parsed=1, reused=1, unchanged=0, refused=2, deleted=0)
    assert {path: row["title"] for path, row in documents(conn, source).items()} == {"a.md": "a", "b.md": "b"}
    assert sorted(quarantined(conn, source)) == [("c.md", "wrong_encoding"), ("d.md", "wrong_encoding")]


def test_another_policy_redacts_all_anew(conn: Connection, source: str) -> None:
    land(conn, source, HANDBOOK)
    refresh(conn, source)
    counts, _ = refresh(conn, source, redactor=Redactor())
    assert counts.parsed == 2
    assert "Ask <EMAIL>." in documents(conn, source)["a.md"]["text"]


def test_a_killed_run_is_finished_by_the_next(
    conn: Connection, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "BATCH_FILES", 2)
    files = {f"{number}.md": f"# Title {number}\n\nText {number}.".encode() for number in range(6)}
    land(conn, source, files)

    def die(what: str, done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refresh(conn, source, progress=die)
    assert len(documents(conn, source)) == 4
    counts, read = refresh(conn, source)
    assert (counts.parsed, counts.unchanged, len(read)) == (2, 4, 2)
    with pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(corpus, "BATCH_DOCUMENTS", 2)
        refresh_chunks(conn, source, progress=die)
    assert len(chunks(conn, source)) == 4
    assert refresh_chunks(conn, source).rechunked == 2
    assert len(chunks(conn, source)) == 6


def test_landing_keeps_its_own_quarantine(conn: Connection, source: str) -> None:
    conn.execute(
        "insert into quarantine.file (source, file, rule, reason, remedy, sha256, lake_uri)"
        " values (%s, 'huge.md', 'too_large', 'r', 'r', 'x', 'file:///lake/huge.md')",
        [source],
    )
    land(conn, source, HANDBOOK)
    refresh(conn, source)
    assert quarantined(conn, source)["huge.md", "too_large"] is False


def test_rows_become_documents(conn: Connection, source: str) -> None:
    table = sql.Identifier("raw", source)
    conn.execute(sql.SQL("alter table {} add subject text").format(table))
    land(conn, source, {})

    def insert(key: str, subject: str | None, body: str | None) -> None:
        conn.execute(
            sql.SQL("insert into {} (path, subject, media_type) values (%s, %s, %s)").format(table),
            [key, subject, body],
        )

    insert("T-1", "Call +49 30 901820", "It beeps\nall day.")
    insert("T-2", None, "No subject\r\nhere.")
    insert("T-3", None, None)
    conn.commit()
    mapping = CorpusMapping(id="path", text="media_type", title="subject")
    counts, _ = refresh(conn, source, mapping=mapping)
    assert counts == DocumentCounts(seen=3, parsed=2, reused=0, unchanged=0, refused=1, deleted=0)
    found = documents(conn, source)
    assert found["T-1"]["title"].startswith("Call <PHONE_")
    assert found["T-1"]["text"].endswith(">\n\nIt beeps\nall day.")
    assert (found["T-2"]["title"], found["T-2"]["text"]) == ("No subject", "No subject\nhere.")
    assert quarantined(conn, source) == {("T-3", "no_text"): False}

    conn.execute(sql.SQL("update {} set media_type = 'It works.' where path <> 'T-1'").format(table))
    conn.commit()
    counts, _ = refresh(conn, source, mapping=mapping)
    assert counts == DocumentCounts(seen=3, parsed=1, reused=1, unchanged=1, refused=0, deleted=0)
    assert quarantined(conn, source) == {("T-3", "no_text"): True}


def test_a_long_title_is_cut_after_it_is_redacted(conn: Connection, source: str) -> None:
    title = "x" * (corpus.MAX_TITLE - 10) + " anna.anderson@example.com"
    land(conn, source, {"a.md": f"# {title}".encode()})
    refresh(conn, source)
    stored = documents(conn, source)["a.md"]["title"]
    assert len(stored) == corpus.MAX_TITLE
    assert "anna" not in stored


def test_rows_without_a_key_of_their_own_are_an_error(conn: Connection, source: str) -> None:
    land(conn, source, {"a": b"1", "b": b"2"})
    conn.execute(sql.SQL("update {} set media_type = 'same'").format(sql.Identifier("raw", source)))
    conn.commit()
    with pytest.raises(ValueError, match=r"two rows have id 'same'.*required and unique"):
        refresh(conn, source, mapping=CorpusMapping(id="media_type", text="path"))


def test_sections_of_a_row_stand_above_its_text(conn: Connection, source: str) -> None:
    conn.execute(
        sql.SQL(
            'alter table {} add column headers jsonb default \'["Visits", "At\\n night", "", null]\''
        ).format(sql.Identifier("raw", source))
    )
    land(conn, source, {"a": b"1"})
    conn.execute(sql.SQL("update {} set media_type = 'Come.'").format(sql.Identifier("raw", source)))
    conn.commit()
    plain = CorpusMapping(id="path", text="media_type", title="sha256")
    refresh(conn, source, mapping=plain)
    before = documents(conn, source)["a"]
    mapping = CorpusMapping(id="path", text="media_type", title="sha256", sections="headers")
    assert refresh(conn, source, mapping=mapping)[0].parsed == 1
    after = documents(conn, source)["a"]
    assert after["text"] == before["text"].replace("\n\nCome.", "\n\n## Visits\n\n### At night\n\nCome.")
    assert after["title"] == before["title"]
    assert refresh(conn, source, mapping=mapping)[0].unchanged == 1


def test_chunks_are_pieces_of_their_documents(conn: Connection, source: str) -> None:
    long = "# Guide\n\n" + "\n\n".join(
        f"## Step {n}\n\n" + "Wörter \N{GRINNING FACE} und so. " * 30 for n in range(4)
    )
    land(conn, source, HANDBOOK | {"guide.md": long.encode()})
    refresh(conn, source)
    counts = refresh_chunks(conn, source)
    found = chunks(conn, source)
    assert (counts.documents, counts.rechunked, counts.chunks, counts.deleted) == (3, 3, len(found), 0)
    assert all(row[-1] for row in found)
    assert {row[8] for row in found} == {DEFAULT_CHUNKING.name}
    read = [embedded_text(row[7], row[5]) for row in found]
    assert any(text != row[5] for text, row in zip(read, found, strict=True))
    assert [hashlib.sha256(text.encode()).hexdigest() for text in read] == [row[6] for row in found]
    assert any(row[7] == "Guide > Step 3" for row in found)


def test_only_changed_documents_are_cut_anew(conn: Connection, source: str) -> None:
    land(conn, source, HANDBOOK)
    refresh(conn, source)
    refresh_chunks(conn, source)
    before = chunks(conn, source)
    assert refresh_chunks(conn, source).rechunked == 0
    land(conn, source, HANDBOOK | {"a.md": HANDBOOK["a.md"] + b"\n\nOr five."})
    refresh(conn, source)
    # Until they are replaced, the old chunks can be found.
    assert [row[0] for row in chunks(conn, source)] == [row[0] for row in before]
    counts = refresh_chunks(conn, source)
    assert (counts.rechunked, counts.deleted, counts.chunks) == (1, 1, 2)
    after = chunks(conn, source)
    assert all(row[-1] for row in after)
    assert after[1] == before[1]


def test_another_chunker_cuts_all_anew(
    conn: Connection, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    land(conn, source, HANDBOOK)
    refresh(conn, source)
    refresh_chunks(conn, source)
    monkeypatch.setattr("assets.documents.chunk._VERSION", "new")
    assert refresh_chunks(conn, source).rechunked == 2
    assert {row[8] for row in chunks(conn, source)} == {
        "markdown-400-1000-240-40-new+semantic-text-splitter/0.33.1"
    }


def test_texts_are_redacted_once_per_policy(conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    conn.rollback()
    monkeypatch.setattr(redact, "BATCH_TEXTS", 2)
    redactor = Redactor(uuid.uuid4().bytes)
    texts = ["Ich bin bob@example.com", "nothing here", "", "nothing here", "Grüße"]
    assert redact_texts(conn, texts, redactor) == 4
    assert redact_texts(conn, texts, redactor) == 0
    assert redact_texts(conn, [*texts, "more"], redactor) == 1
    with conn.transaction():
        row = conn.execute(
            "select redacted, findings from corpus.redaction where policy = %s"
            " and text_sha256 = encode(sha256(convert_to('Ich bin bob@example.com', 'UTF8')), 'hex')",
            [redactor.policy],
        ).fetchone()
        total = conn.execute(
            "select count(*) from corpus.redaction where policy = %s", [redactor.policy]
        ).fetchone()
    assert row is not None
    assert row[0].startswith("Ich bin <EMAIL_")
    assert row[1] == {"EMAIL_ADDRESS": 1}
    assert total == (5,)
    conn.execute("delete from corpus.redaction where policy = %s", [redactor.policy])
    conn.commit()


def test_feedback_texts_are_those_not_redacted_yet(conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "FEEDBACK_TEXTS", 2)
    monkeypatch.setattr(redact, "BATCH_TEXTS", 1)
    redactor = Redactor(uuid.uuid4().bytes)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Call 030 12345678"}]
    interaction = (
        "insert into feedback.interaction (interaction_id, app, messages, output, occurred_at, api_key_id,"
        " body_sha256) values (%s, 'app', %s, %s, now(), gen_random_uuid(), '')"
    )
    conn.execute(interaction, ["i-1", json.dumps(messages), "Sure."])
    conn.execute(interaction, ["i-2", json.dumps(messages), None])
    event = (
        "insert into feedback.feedback_event (event_id, feedback_id, op, revision, kind, name, explanation, correction,"
        " annotator_kind, occurred_at, api_key_id, body_sha256) values (gen_random_uuid(), gen_random_uuid(), 'create',"
        " 1, 'correction', 'correction', %s, %s, 'HUMAN', now(), gen_random_uuid(), '')"
    )
    conn.execute(event, ["why", "better"])
    conn.execute(event, [None, None])
    conn.commit()
    assert sorted(feedback_texts(conn, redactor.policy)) == [
        "Be kind.",
        "Call 030 12345678",
        "Sure.",
        "better",
        "why",
    ]
    assert redact_texts(conn, feedback_texts(conn, redactor.policy), redactor) == 5
    assert list(feedback_texts(conn, redactor.policy)) == []
    assert len(list(feedback_texts(conn, "another policy"))) == 5
    conn.execute("delete from corpus.redaction where policy = %s", [redactor.policy])
    conn.commit()


def test_a_source_without_a_contract_leaves_the_corpus(conn: Connection, source: str) -> None:
    land(conn, source, HANDBOOK)
    refresh(conn, source)
    refresh_chunks(conn, source)
    assert corpus.retire_sources(conn, [source]) == 0
    assert corpus.retire_sources(conn, ["another"]) == 2
    assert conn.execute("select count(*) from corpus.chunk where source = %s", [source]).fetchone() == (0,)

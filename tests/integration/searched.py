"""A corpus of texts that are written down in the test, indexed and searched.

Belongs here: what tests of searching and of its postings share. Does not belong here: any assertion.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg.types.json import Jsonb

from assets.documents.chunk import DEFAULT_CHUNKING
from assets.embeddings.index import refresh_passages
from assets.embeddings.postings import PostingsReport, refresh_postings

Connection = psycopg.Connection[Any]
Row = dict[str, Any]

DIMENSIONS = 8
WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove"]


@dataclass
class Text:
    """A document of one chunk."""

    body: str
    source: str = "notes"
    title: str = ""
    heading: str = ""
    path: str = ""
    media_type: str = "text/plain"
    vector: NDArray[np.float32] | None = None


@dataclass
class Corpus:
    """Texts in the database, indexed by words and, where they have one, by vectors."""

    conn: Connection
    texts: dict[str, Text] = field(default_factory=dict)
    chunking: str = str(DEFAULT_CHUNKING)

    def source(self, name: str, uses: str = "{rag}", language: str = "en") -> None:
        self.conn.execute(
            "insert into registry.source (source, version, owner, description, provenance, pii, allowed_uses, kind,"
            " location, contract_sha256, language)"
            " values (%s, '1', 'us', '', 'proprietary', false, %s, 'documents', '', '', %s)",
            [name, uses, language],
        )

    def add(self, *texts: Text) -> None:
        documents, chunks, vectors = [], [], []
        for text in texts:
            name = f"{text.source}/{len(self.texts):06}"
            self.texts[name] = text
            documents.append((name, text.source, text.path or name, text.title, text.media_type))
            chunks.append(
                (self.chunking, name, name, text.source, text.body, f"hash of {text.body}", text.heading)
            )
            if text.vector is not None:
                vectors.append((f"hash of {text.body}", str(text.vector.tolist())))
        with self.conn.cursor() as cursor:
            cursor.executemany(
                "insert into corpus.document (document_id, source, path, title, media_type, raw_sha256, text,"
                " text_sha256, parser, policy, findings) values (%s, %s, %s, %s, %s, '', '', '', '', '', '{}')",
                documents,
            )
            cursor.executemany(
                "insert into corpus.piece (chunking, chunk_id, document_id, source, ordinal, start_char, end_char,"
                " text, content_hash, heading, chunker) values (%s, %s, %s, %s, 0, 0, 0, %s, %s, %s, '1')",
                chunks,
            )
            refresh_passages(self.conn)
            cursor.execute(
                "create table if not exists retrieval.release_a (passage_no int primary key references"
                " retrieval.passage on delete cascade, embedding halfvec(8) not null)"
            )
            cursor.execute(
                "create or replace view retrieval.live as select v.passage_no, p.content_hash, v.embedding"
                " from retrieval.release_a v join retrieval.passage p using (passage_no)"
            )
            cursor.executemany(
                "insert into retrieval.release_a select passage_no, %s from retrieval.passage where content_hash = %s"
                " on conflict do nothing",
                [(vector, name) for name, vector in vectors],
            )
        self.refresh()

    def refresh(self) -> PostingsReport:
        return refresh_postings(self.conn, self.chunking)

    def search(
        self,
        query: str,
        k: int = 10,
        mode: str = "text",
        filter: Any = None,
        vector: NDArray[np.float32] | None = None,
    ) -> list[Row]:
        with self.conn.cursor(row_factory=psycopg.rows.dict_row) as cursor:
            return cursor.execute(
                "select * from retrieval.search(%s, %s::halfvec, %s, %s, %s)",
                [query, None if vector is None else str(vector.tolist()), k, mode, Jsonb(filter)],
            ).fetchall()

    def postings(self) -> list[tuple[Any, ...]]:
        """Everything that words are found by, without the numbers that name it."""
        return [
            *self.conn.execute(
                "select t.chunking, t.configuration, t.lexeme, t.df, i.content_hash, i.tf, i.right"
                " from retrieval.term t left join ("
                "  select p.term_no, h.content_hash, y.tf,"
                "   abs(p.impact - y.tf / (y.tf + 0.3 + p.slope * x.length)) < 1e-6 as right"
                "  from (select term_no, slope, unnest(texts) as text_no, unnest(impacts) as impact"
                "   from retrieval.posting) p"
                # What is said of a text that was indexed anew since counts no more.
                "  join retrieval.passage_text x using (text_no)"
                "  join retrieval.passage h using (passage_no)"
                "  cross join lateral (select x.tfs[array_position(x.terms, p.term_no)] as tf) y"
                " ) i using (term_no) order by 1, 2, 3, 5"
            ).fetchall(),
            *self.conn.execute(
                "select chunking, configuration, lexeme, df from retrieval.term order by 1, 2, 3"
            ),
            *self.conn.execute(
                "select chunking, configuration, passages, lexemes from retrieval.text_corpus where passages > 0"
                " order by 1, 2"
            ).fetchall(),
            *self.conn.execute(
                "select h.content_hash, x.chunking, x.configuration, x.length, array_agg(array[t.lexeme, u.tf::text]"
                " order by t.lexeme) from retrieval.passage_text x join retrieval.passage h using (passage_no)"
                " left join lateral unnest(x.terms, x.tfs) u (term_no, tf) on true"
                " left join retrieval.term t using (term_no) group by 1, 2, 3, 4 order by 1, 2"
            ).fetchall(),
        ]

    def rebuilt(self) -> list[tuple[Any, ...]]:
        """The same, made anew from nothing."""
        self.conn.execute(
            "truncate retrieval.term, retrieval.posting, retrieval.passage_text, retrieval.text_corpus,"
            " retrieval.segment"
        )
        self.refresh()
        return self.postings()


def ids(rows: list[Row]) -> list[str]:
    return [row["document_id"] for row in rows]


def unit(random: np.random.Generator, n: int, dimensions: int = DIMENSIONS) -> NDArray[np.float32]:
    found = random.normal(size=(n, dimensions)).astype(np.float32)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found

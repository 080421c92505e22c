"""A corpus of any size from the real texts: overlapping cuts of the same words, in documents that filters can name.

The texts (`benchmarks.texts`) are joined and cut again and again, each time elsewhere, so that every chunk is distinct
and each passage of text occurs in some twenty chunks that overlap. Queries are the first words of texts that were left
out. Vectors of chunks that are not embedded are drawn so that they lie as embedded ones do: around the vector of the
embedded chunk that covers the same words, as far from each other as embedded neighbours are, in directions in which
embedded vectors differ. Uniform random vectors would have no neighbours, and a graph over them another recall.

Belongs here: chunks, queries, vectors, and the corpus in the database. Does not belong here: measuring.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
import pyarrow as pa

from assets.documents.chunk import DEFAULT_CHUNKING
from benchmarks.texts import MEDIAN_WORDS, SIGMA, texts
from storage.copy import copy_table

Floats = npt.NDArray[np.float32]

SOURCE = "bench"
OVERLAP = 20
PIECES, QUERIES = 4_600, 200
QUERY_WORDS = 12
DOCUMENTS = 1_000
PATHS = {0.5: "a/", 0.1: "a/b/", 0.01: "a/b/c/", 0.001: "a/b/c/d/"}
"""Share of the chunks -> prefix of the path of the documents that hold them."""


@dataclass(frozen=True)
class Corpus:
    """Chunks, the words they are cut from, and what is asked.

    Attributes:
        chunks: Distinct texts.
        middles: int64[n], the word in the middle of each chunk.
        documents: int64[n], the document of each chunk, 0 to 999: chunks are dealt out at random.
        queries: Beginnings of texts that are in no chunk.
    """

    chunks: list[str]
    middles: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]
    queries: list[str]

    def within(self, share: float) -> npt.NDArray[np.bool_]:
        """bool[n], which chunks the filter of this share lets through; 1 is no filter."""
        return self.documents < share * DOCUMENTS


def make(rows: int) -> Corpus:
    """A corpus of `rows` chunks, the same on every call."""
    pieces, asked = min(PIECES, -(-rows // OVERLAP)), min(QUERIES, max(10, rows // 50))
    found = texts(pieces + asked)
    left_out = set(np.linspace(0, len(found) - 1, asked).astype(int).tolist())
    words = " ".join(text for number, text in enumerate(found) if number not in left_out).split()
    cuts = _cuts(words)
    chunks: dict[str, int] = {}
    while len(chunks) < rows:
        start, end = next(cuts)
        chunks.setdefault(" ".join(words[start:end]), (start + end) // 2)
    order = np.random.default_rng(1).permutation(rows)
    return Corpus(
        list(chunks),
        np.array(list(chunks.values()), np.int64),
        order * DOCUMENTS // rows,
        [" ".join(found[number].split()[:QUERY_WORDS]) for number in sorted(left_out)],
    )


def drawn(corpus: Corpus, embedded: Floats) -> Floats:
    """float32[n - m, d], unit vectors of the chunks after the first m, of which `embedded` are the vectors."""
    generator = np.random.default_rng(2)
    known = len(embedded)
    order = np.argsort(corpus.middles[:known], kind="stable")
    here, there = embedded[order[:-1]], embedded[order[1:]]
    cosine = float(np.clip(np.einsum("ij,ij->i", here, there).mean(), 0.1, 0.999))
    places = np.searchsorted(corpus.middles[:known][order], corpus.middles[known:]).clip(0, known - 1)
    one, other = generator.integers(0, known, (2, len(places)))
    step = embedded[one] - embedded[other] + 1e-6 * generator.normal(size=(1, embedded.shape[1]))
    step /= np.linalg.norm(step, axis=1, keepdims=True)
    # Two that are drawn around one vector are then as near to each other as those neighbours.
    found = embedded[order[places]] + np.sqrt(1 / cosine - 1) * step
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), np.float32)


def fill(connection: psycopg.Connection[Any], corpus: Corpus) -> None:
    """Write the corpus as a source that may be retrieved."""
    connection.execute(
        "insert into registry.source (source, version, owner, description, provenance, pii, allowed_uses, kind,"
        " location, contract_sha256) values (%s, '1', 'us', '', 'proprietary', false, '{rag}', 'documents', '', '')",
        [SOURCE],
    )
    numbers = range(DOCUMENTS)
    texts_of = {"media_type": "text/plain", "raw_sha256": "", "text": "", "text_sha256": "", "parser": ""}
    copy_table(
        connection,
        "corpus.document",
        pa.table(
            {
                "document_id": [_document(number) for number in numbers],
                "source": [SOURCE] * DOCUMENTS,
                "path": [_path(number) for number in numbers],
                "title": [f"Document {number}" for number in numbers],
                **{name: [value] * DOCUMENTS for name, value in texts_of.items()},
                "policy": [""] * DOCUMENTS,
            }
        ).append_column("findings", pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{}"] * DOCUMENTS))),
    )
    rows = len(corpus.chunks)
    hashes = [content_hash(text) for text in corpus.chunks]
    # As whoever cuts documents does: rows are written with the numbers of their texts.
    numbered = dict(
        connection.execute(
            "insert into retrieval.passage (content_hash) select distinct unnest(%s::text[]) returning content_hash,"
            " passage_no",
            [hashes],
        ).fetchall()
    )
    copy_table(
        connection,
        "corpus.piece",
        pa.table(
            {
                "chunking": [str(DEFAULT_CHUNKING)] * rows,
                "chunk_id": [chunk_id(row) for row in range(rows)],
                "document_id": [_document(number) for number in corpus.documents.tolist()],
                "source": [SOURCE] * rows,
                "ordinal": pa.array(range(rows), pa.int32()),
                "start_char": pa.array([0] * rows, pa.int32()),
                "end_char": pa.array([len(text) for text in corpus.chunks], pa.int32()),
                "text": corpus.chunks,
                "content_hash": hashes,
                "chunker": ["1"] * rows,
                "passage_no": pa.array([numbered[one] for one in hashes], pa.int32()),
            }
        ),
    )


def revise(connection: psycopg.Connection[Any], share: float, turn: int) -> int:
    """Change the text of another `share` of the chunks each turn; how many they were."""
    return connection.execute(
        "update corpus.piece set text = r.text, passage_no = null,"
        " content_hash = encode(sha256(convert_to(r.text, 'UTF8')), 'hex')"
        " from (select chunk_id, format('Revision %%s. ', %(turn)s::int) || text as text from corpus.chunk"
        " where ordinal %% %(step)s = %(turn)s) as r where r.chunk_id = piece.chunk_id",
        {"turn": turn, "step": round(1 / share)},
    ).rowcount


def chunk_id(row: int) -> str:
    """The id of a chunk, which rises with its number."""
    return f"{row:032d}"


def content_hash(text: str) -> str:
    """The hash that a text is known by."""
    return hashlib.sha256(text.encode()).hexdigest()


def _document(number: int) -> str:
    return f"{SOURCE}/{number}"


def _path(number: int) -> str:
    folder = next((path for share, path in sorted(PATHS.items()) if number < share * DOCUMENTS), "z/")
    return f"{folder}{number}"


def _cuts(words: list[str]) -> Iterator[tuple[int, int]]:
    """(start, end) of pieces of the words; each pass over them cuts elsewhere."""
    for turn in count():
        generator = random.Random(turn)
        start = generator.randrange(MEDIAN_WORDS)
        while start + 3 < len(words):
            end = start + max(3, round(generator.lognormvariate(0, SIGMA) * MEDIAN_WORDS))
            yield start, min(end, len(words))
            start = end

"""A small corpus and embedder's shards, for tests of the index and its releases.

Belongs here: what several test files write. Does not belong here: any assertion.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from assets.documents.chunk import DEFAULT_CHUNKING, Chunking
from assets.embeddings.index import IndexReport, load_vectors, refresh_passages
from assets.embeddings.release import Release
from embedder import protocol

Connection = psycopg.Connection[Any]

DIMENSIONS = 8


def release(
    name: str,
    dimensions: int = DIMENSIONS,
    model: str | None = None,
    chunking: Chunking = DEFAULT_CHUNKING,
) -> Release:
    """A release of a model of its own, or of ``model``."""
    fingerprint = {"model": model or name, "chunker": name}
    return Release(name, fingerprint, dimensions, model or name, chunking=chunking)


def vector_of(text: str, seed: int = 1, dimensions: int = DIMENSIONS) -> NDArray[np.float32]:
    """The unit vector that model ``seed`` makes of ``text``."""
    random = np.random.default_rng([seed, *text.encode()])
    found = random.normal(size=dimensions)
    return (found / np.linalg.norm(found)).astype(np.float32)


def add(conn: Connection, source: str, texts: Iterable[str], uses: str = "{rag}") -> None:
    """One document and one chunk a text; the text is its own content hash."""
    conn.execute(
        "insert into registry.source (source, version, owner, description, provenance, pii, allowed_uses, kind,"
        " location, contract_sha256) values (%s, '1', 'us', '', 'proprietary', false, %s, 'documents', '', '')"
        " on conflict do nothing",
        [source, uses],
    )
    rows = [(f"{source}/{text}", source, text) for text in texts]
    with conn.cursor() as cursor:
        cursor.executemany(
            "insert into corpus.document (document_id, source, path, title, media_type, raw_sha256, text,"
            " text_sha256, parser, policy, findings)"
            " values (%s, %s, %s, 'title', 'text/plain', '', '', '', '', '', '{}')",
            rows,
        )
        cursor.executemany(
            "insert into corpus.piece (chunking, chunk_id, document_id, source, ordinal, start_char, end_char, text,"
            " content_hash, chunker) values (%s, %s, %s, %s, 0, 0, 4, %s, %s, '1')",
            [
                (str(DEFAULT_CHUNKING), document, document, source, text, text)
                for document, source, text in rows
            ],
        )


def write_shard(folder: Path, texts: Iterable[str], *, seed: int = 1, dimensions: int = DIMENSIONS) -> None:
    """A finished shard with the vectors of ``texts``."""
    texts = list(texts)
    folder.mkdir(parents=True, exist_ok=True)
    matrix = np.array([vector_of(text, seed, dimensions) for text in texts], np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), dimensions)
    metadata = {protocol.META_FINGERPRINT: b"{}", protocol.META_RELEASE: folder.name.encode()}
    schema = pa.schema(
        [(protocol.CONTENT_HASH, pa.string()), (protocol.VECTOR, column.type)], metadata=metadata
    )
    name = f"{len(protocol.shard_paths(folder)):032x}.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(texts), column], schema=schema), folder / name)


def load(
    conn: Connection,
    source: str,
    made: Release,
    folder: Path,
    *,
    follow: bool = True,
    after: str | None = None,
) -> IndexReport:
    """What the index asset does with the vectors of one source."""
    refresh_passages(conn)
    return load_vectors(conn, source, made, folder, follow=follow, after=after)


def content(conn: Connection, name: str) -> dict[str, list[float]]:
    """Text -> vector, as the release's table has them."""
    rows = conn.execute(
        f"select p.content_hash, v.embedding::real[]::text from retrieval.release_{name} v"
        " join retrieval.passage p using (passage_no)".encode()
    )
    return {text: json.loads(vector.replace("{", "[").replace("}", "]")) for text, vector in rows}

"""The embedding dataset: a source's chunks as one Parquet file, named by its content.

Belongs here: what the embedder reads. Does not belong here: Dagster.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq

from assets.documents.chunk import embedded_text
from embedder import protocol
from storage.lake import put, write_atomic

SCHEMA = pa.schema(
    [
        pa.field(name, pa.string(), nullable=False)
        for name in ("chunk_id", protocol.CONTENT_HASH, protocol.TEXT)
    ]
)


@dataclass(frozen=True)
class EmbeddingDataset:
    """One source's chunks on disk: the file and its number of rows."""

    path: Path
    rows: int


def export_chunks(connection: psycopg.Connection[Any], source: str, lake: Path) -> EmbeddingDataset:
    """Write the chunks of ``source`` to the lake; the same chunks give the same file, which is kept."""
    rows = connection.execute(
        "select chunk_id, content_hash, heading, text from corpus.chunk where source = %s order by chunk_id",
        [source],
    ).fetchall()
    texts = [(chunk_id, digest, embedded_text(heading, text)) for chunk_id, digest, heading, text in rows]
    columns = list(zip(*texts, strict=True)) if texts else [(), (), ()]
    table = pa.Table.from_arrays([pa.array(column, pa.string()) for column in columns], schema=SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    folder = lake / "embeddings" / "datasets" / source
    path = put(folder, sink.getvalue().to_pybytes(), ".parquet")
    pointer = folder / "current"
    name = str(path.relative_to(folder))
    if not pointer.exists() or pointer.read_text("utf-8") != name:
        write_atomic(pointer, name.encode())
    return EmbeddingDataset(path, table.num_rows)


def current_dataset(source: str, lake: Path) -> Path:
    """The file that the newest export of ``source`` published.

    Raises:
        FileNotFoundError: It was never exported.
    """
    pointer = lake / "embeddings" / "datasets" / source / "current"
    if not pointer.exists():
        raise FileNotFoundError(
            f"{pointer}: the chunks of {source} were never exported. Materialize embedding_dataset/{source} first."
        )
    return pointer.parent / pointer.read_text("utf-8")

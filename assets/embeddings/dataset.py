"""The embedding dataset: a source's chunks as one Parquet file, named by its content.

Belongs here: what the embedder reads. Does not belong here: Dagster.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq

from assets.documents.chunk import embedded_text
from embedder import protocol
from storage.lake import put_file, write_atomic

# A shard on a CPU: who embeds one reads one.
ROW_GROUP = 4096

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
    """Write the chunks of ``source`` to the lake; the same chunks give the same file, which is kept.

    Memory holds one row group at a time, and the server no more: a cursor hands the rows out.
    """
    folder = lake / "embeddings" / "datasets" / source
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export.") as scratch:
        file = Path(scratch) / "chunks.parquet"
        rows = 0
        with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
            for table in _row_groups(connection, source):
                writer.write_table(table)
                rows += table.num_rows
        path = put_file(folder, file, ".parquet")
    pointer = folder / "current"
    name = str(path.relative_to(folder))
    if not pointer.exists() or pointer.read_text("utf-8") != name:
        write_atomic(pointer, name.encode())
    return EmbeddingDataset(path, rows)


def _row_groups(connection: psycopg.Connection[Any], source: str) -> Iterator[pa.Table]:
    with connection.transaction(), connection.cursor("chunks") as cursor:
        cursor.execute(
            "select chunk_id, content_hash, heading, text from corpus.chunk where source = %s order by chunk_id",
            [source],
        )
        while rows := cursor.fetchmany(ROW_GROUP):
            columns = zip(
                *(
                    (chunk_id, digest, embedded_text(heading, text))
                    for chunk_id, digest, heading, text in rows
                ),
                strict=True,
            )
            yield pa.table([pa.array(column, pa.string()) for column in columns], schema=SCHEMA)


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

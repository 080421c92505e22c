"""The embedding dataset: a source's chunks as one Parquet file, named by its content.

Belongs here: what the embedder reads. Does not belong here: Dagster.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq

from assets.documents.chunk import DEFAULT_CHUNKING, Chunking, embedded_text
from assets.documents.chunkings import in_language
from embedder import protocol
from storage.lake import put_file, write_atomic

# A shard on a CPU: who embeds one reads one.
ROW_GROUP = 4096
_SCRATCH = ".export."
_SCRATCH_SECONDS = 86_400

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


def export_chunks(
    connection: psycopg.Connection[Any], source: str, lake: Path, chunking: Chunking = DEFAULT_CHUNKING
) -> EmbeddingDataset:
    """Write the chunks of ``source`` to the lake; the same chunks give the same file, which is kept.

    Memory holds one row group at a time, and the server no more: a cursor hands the rows out.
    """
    folder = lake / "embeddings" / "datasets" / source
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_SCRATCH}*"):
        # What a killed export has left. By age: another export may be under way.
        if time.time() - left.stat().st_mtime > _SCRATCH_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=_SCRATCH) as scratch:
        file = Path(scratch) / "chunks.parquet"
        rows = 0
        with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
            for table in _row_groups(connection, source, chunking):
                writer.write_table(table)
                rows += table.num_rows
        path = put_file(folder, file, ".parquet")
    pointer = _pointer(source, lake, chunking)
    name = str(path.relative_to(folder))
    if not pointer.exists() or pointer.read_text("utf-8") != name:
        write_atomic(pointer, name.encode())
    return EmbeddingDataset(path, rows)


def _row_groups(connection: psycopg.Connection[Any], source: str, chunking: Chunking) -> Iterator[pa.Table]:
    chunking = in_language(connection, source, chunking)
    with connection.transaction(), connection.cursor("chunks") as cursor:
        cursor.execute(
            "select chunk_id, content_hash, heading, text from corpus.piece"
            " where source = %s and chunking = %s order by chunk_id",
            [source, str(chunking)],
        )
        while rows := cursor.fetchmany(ROW_GROUP):
            columns = zip(
                *(
                    (chunk_id, digest, embedded_text(heading, text, chunking))
                    for chunk_id, digest, heading, text in rows
                ),
                strict=True,
            )
            yield pa.table([pa.array(column, pa.string()) for column in columns], schema=SCHEMA)


def current_dataset(source: str, lake: Path, chunking: Chunking = DEFAULT_CHUNKING) -> Path:
    """The file that the newest export of these chunks of ``source`` published.

    Raises:
        FileNotFoundError: They were never exported.
    """
    pointer = _pointer(source, lake, chunking)
    if not pointer.exists():
        raise FileNotFoundError(
            f"{pointer}: the chunks of {source} were never exported. Materialize embedding_dataset/{source}, or"
            f" candidate/chunks for a candidate, first."
        )
    return pointer.parent / pointer.read_text("utf-8")


def _pointer(source: str, lake: Path, chunking: Chunking) -> Path:
    name = str(chunking).replace("/", "-")
    return lake / "embeddings" / "datasets" / source / f"current-{name}"

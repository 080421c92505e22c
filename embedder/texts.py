"""The input file: the keys of all its rows, and the texts of some of them without holding the others.

Belongs here: opening the input, checking that it is what was promised, reading rows by their number.
Does not belong here: deciding which rows are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embedder import protocol
from embedder.protocol import EmbedderError

Rows = npt.NDArray[np.int64]

# A column of nothing but nulls may have been written without a type.
_TEXT_KINDS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)

_BATCH_ROWS = 8192
_BATCH_BYTES = 16 << 20


@dataclass(frozen=True)
class Texts:
    """Some rows of the input, in the order they were asked for."""

    keys: list[str]
    texts: list[Any]
    """A string, None, or bytes in place of a string that is not UTF-8."""
    chunk_ids: pa.Array | None
    """None when the input has no such column."""


def read_keys(input_file: Path) -> pa.ChunkedArray:
    """The content hashes of the input as large_string, one per row.

    Raises EmbedderError when the file is not as promised: the string columns content_hash, without nulls, and
    text; chunk_id, where there is one, a string too.
    """
    with _open(input_file) as file:
        try:
            keys = file.read(columns=[protocol.CONTENT_HASH])[protocol.CONTENT_HASH].cast(pa.large_string())
            keys.validate(full=True)
        except (pa.ArrowInvalid, OSError) as error:
            raise EmbedderError(
                f"{input_file}: column {protocol.CONTENT_HASH} cannot be read ({error}); write the input again"
            ) from error
    if keys.null_count:
        raise EmbedderError(
            f"{input_file}: {keys.null_count} rows have no {protocol.CONTENT_HASH}; every text needs its key"
        )
    return keys


def count_conflicts(input_file: Path, keys: pa.ChunkedArray) -> int:
    """How many distinct keys stand before more than one text; of those texts only the first is embedded.

    Reads the texts of keys that are there twice, and keeps none.
    """
    codes = keys.combine_chunks().dictionary_encode().indices.to_numpy()
    repeated = np.flatnonzero((np.bincount(codes) > 1)[codes])
    first: dict[int, int] = {}
    conflicts: set[int] = set()
    with TextReader(input_file) as reader:
        for start in range(0, len(repeated), _BATCH_ROWS):
            rows = repeated[start : start + _BATCH_ROWS]
            for code, text in zip(codes[rows].tolist(), reader.read(rows).texts, strict=True):
                digest = hash(text)
                if first.setdefault(code, digest) != digest:
                    conflicts.add(code)
    return len(conflicts)


class TextReader:
    """Reads rows by number. Cheap when the numbers rise from call to call: it goes forward through the file,
    past row groups that nobody asked for, and starts again only when asked for an earlier row.
    """

    def __init__(self, input_file: Path) -> None:
        self._path = input_file
        self._file = _open(input_file)
        names = (protocol.CHUNK_ID, protocol.CONTENT_HASH, protocol.TEXT)
        self._columns = [name for name in names if name in self._file.schema_arrow.names]
        metadata = self._file.metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        self._group_ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
        size = sum(group.total_byte_size for group in groups)
        self._batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * metadata.num_rows // max(1, size)))
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._batch: pa.RecordBatch | None = None
        self._start = self._stop = 0

    def __enter__(self) -> TextReader:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def read(self, rows: Rows) -> Texts:
        """The rows with these numbers, at least one, rising. Raises EmbedderError when the file has changed."""
        pieces: list[pa.RecordBatch] = []
        done = 0
        try:
            while done < len(rows):
                batch = self._batch_with(int(rows[done]))
                inside = rows[done : np.searchsorted(rows, self._stop)]
                pieces.append(batch.take(pa.array(inside - self._start)))
                done += len(inside)
        except (pa.ArrowInvalid, OSError, StopIteration) as error:
            raise changed(self._path) from error
        chunk_ids = None
        if protocol.CHUNK_ID in self._columns:
            chunk_ids = pa.concat_arrays([piece[protocol.CHUNK_ID].cast(pa.string()) for piece in pieces])
            try:
                chunk_ids.validate(full=True)
            except pa.ArrowInvalid as error:
                raise EmbedderError(
                    f"{self._path}: column {protocol.CHUNK_ID} cannot be read ({error}); write the input again"
                ) from error
        keys = [key for piece in pieces for key in _strings(piece[protocol.CONTENT_HASH])]
        texts = [text for piece in pieces for text in _strings(piece[protocol.TEXT])]
        return Texts(keys, texts, chunk_ids)

    def _batch_with(self, row: int) -> pa.RecordBatch:
        """Move to the batch that holds `row`. Raises StopIteration when the file has no such row."""
        wanted = int(np.searchsorted(self._group_ends, row, side="right"))
        here = int(np.searchsorted(self._group_ends, self._stop, side="right"))
        if self._batches is None or row < self._start or wanted > here:
            groups = range(wanted, len(self._group_ends))
            self._batches = self._file.iter_batches(self._batch_rows, groups, columns=self._columns)
            self._batch = None
            self._stop = int(self._group_ends[wanted - 1]) if wanted else 0
        while self._batch is None or row >= self._stop:
            # One type for all that follows; views of strings cannot even be picked from.
            batch = next(self._batches)
            columns = {name: batch[name].cast(pa.large_string()) for name in self._columns}
            self._batch = pa.RecordBatch.from_pydict(columns)
            self._start, self._stop = self._stop, self._stop + self._batch.num_rows
        return self._batch


def changed(input_file: Path) -> EmbedderError:
    """The error for an input that no longer holds what it held when the work was planned."""
    return EmbedderError(
        f"{input_file} has changed while it was being embedded; finished shards stay, run the same command again"
    )


def _open(input_file: Path) -> pq.ParquetFile:
    try:
        # Buffered, so that a column of a large row group is not held in memory as a whole.
        file = pq.ParquetFile(input_file, buffer_size=1 << 20)
    except FileNotFoundError as error:
        raise EmbedderError(
            f"input file {input_file} does not exist; name an existing Parquet file"
        ) from error
    except (pa.ArrowInvalid, OSError) as error:
        raise EmbedderError(
            f"{input_file} is not a readable Parquet file ({error}); write the input again"
        ) from error
    try:
        _check_columns(input_file, file.schema_arrow)
    except EmbedderError:
        file.close()
        raise
    return file


def _check_columns(input_file: Path, schema: pa.Schema) -> None:
    for name in (protocol.CONTENT_HASH, protocol.TEXT):
        if name not in schema.names:
            raise EmbedderError(
                f"{input_file} has no column {name}, only {', '.join(schema.names)}; the input needs "
                f"{protocol.CONTENT_HASH} and {protocol.TEXT}"
            )
    for name in (protocol.CHUNK_ID, protocol.CONTENT_HASH, protocol.TEXT):
        kinds = [field.type for field in schema if field.name == name]
        if len(kinds) > 1:
            raise EmbedderError(f"{input_file} has {len(kinds)} columns {name}; keep one of them")
        for kind in kinds:
            if not any(is_kind(kind) for is_kind in _TEXT_KINDS):
                raise EmbedderError(f"{input_file}: column {name} has type {kind}; write it as string")


def _strings(column: pa.Array) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:  # Parquet does not check that its strings are UTF-8
        found: list[Any] = []
        for value in column:
            try:
                found.append(value.as_py())
            except UnicodeDecodeError:
                found.append(b"")
        return found

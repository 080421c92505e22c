"""Reading source files: bytes in, batches of rows out, with everything that cannot be a row named.

Every row of a file comes out exactly once: in a batch, or refused whole with the rule it broke. Memory is
bounded by the longest row allowed, whatever the file holds. Belongs here: file formats, encodings and their
damage. Does not belong here: what a contract says about values (``rows``), Postgres.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from pathlib import Path, PurePath
from typing import Any, NoReturn

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from assets.sources.contract import Column, Contract

BLOCK_BYTES = 2 * 1024 * 1024
MAX_ROW_BYTES = 16 * 1024 * 1024
MAX_DOCUMENT_BYTES = 64 * 1024 * 1024
KEPT_OF_LONG_LINE = 64 * 1024
PARQUET_ROWS = 8_192
GZIP_MAGIC = b"\x1f\x8b"
# In JSON text: a NUL character, and not a backslash followed by the letters u0000.
NUL_ESCAPE = r"(?:^|[^\\])(?:\\\\)*\\u0000"

JSON = pa.json_(pa.string())
ARROW_TYPES = {
    "string": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us", tz="UTC"),
    "object": JSON,
    "array": JSON,
}
# The standard library reads the machine's own table of types, so its answers differ between machines.
MEDIA_TYPES = {
    ".csv": "text/csv",
    ".docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    ".eml": "message/rfc822",
    ".epub": "application/epub+zip",
    ".htm": "text/html",
    ".html": "text/html",
    ".json": "application/json",
    ".markdown": "text/markdown",
    ".md": "text/markdown",
    ".odt": "application/vnd.oasis.opendocument.text",
    ".pdf": "application/pdf",
    ".pptx": "application/vnd.openxmlformats-officedocument.presentationml.presentation",
    ".rst": "text/x-rst",
    ".rtf": "application/rtf",
    ".txt": "text/plain",
    ".xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    ".xml": "application/xml",
}


class FileRefused(Exception):
    """A file that cannot be read as its contract says; nothing of it is landed.

    Attributes:
        file: Its name, relative to the source's folder.
        rule: Short name of what was broken, e.g. ``wrong_encoding``.
        reason: What is wrong, in a sentence.
        remedy: What to do about it.
    """

    def __init__(self, file: str, rule: str, reason: str, remedy: str) -> None:
        super().__init__(f"{file}: {rule}: {reason}. {remedy}")
        self.file, self.rule, self.reason, self.remedy = file, rule, reason, remedy


@dataclass(frozen=True)
class SourceFile:
    """One file as it was when its bytes were hashed."""

    name: str
    path: Path
    size: int
    sha256: str
    changed_ns: int

    @property
    def media_type(self) -> str:
        """By the name's suffix; ``application/octet-stream`` where that says nothing."""
        return MEDIA_TYPES.get(PurePath(self.name).suffix.lower(), "application/octet-stream")


@dataclass(frozen=True)
class RefusedRow:
    """A row that is not landed: where it was, why, and all of it.

    ``number`` is as in ``Batch.numbers``; ``row`` holds JSON values: the columns of the row, or ``_raw``, its
    text, where it could not be taken apart.
    """

    number: int
    rule: str
    reason: str
    remedy: str
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of one file.

    Attributes:
        numbers: For text files the line on which each row starts (the first line is 1), for Parquet the row
            (the first is 1).
        columns: The contract's columns in its order: strings where the file holds text, else the file's type.
        original: Gives the n-th row of the batch as the file has it, as JSON values.
        refused: Rows between these that could not be read.
    """

    numbers: NDArray[np.int64]
    columns: Mapping[str, pa.Array]
    original: Callable[[int], Mapping[str, Any]]
    refused: list[RefusedRow] = field(default_factory=list)


def list_files(contract: Contract) -> list[Path]:
    """The files of a source, sorted by name; none where the folder is missing.

    Hidden files and folders are left out, so a writer may use them for what is not finished.
    """
    return [path for _, path in _matches(contract)]


def find_files(contract: Contract) -> list[tuple[str, Path]]:
    """Names (relative to the contract's folder, ``/`` between parts) and paths of a source's files, sorted.

    Raises:
        FileRefused: The folder is missing (``missing_folder``) or nothing matches (``no_file``).
    """
    if not contract.folder.is_dir():
        raise FileRefused(
            contract.glob,
            "missing_folder",
            f"there is no folder {contract.folder}",
            f"Create it, or correct the path in {contract.file.name}.",
        )
    found = _matches(contract)
    if not found:
        raise FileRefused(
            contract.glob,
            "no_file",
            f"no file matches {contract.pattern}",
            f"Deliver the files, or correct the path in {contract.file.name}.",
        )
    return found


def _matches(contract: Contract) -> list[tuple[str, Path]]:
    documents = contract.format == "documents"
    found = []
    for path in contract.folder.glob(contract.glob):
        name = path.relative_to(contract.folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if not hidden and not (documents and path.is_dir()):
            found.append((name.as_posix(), path))
    return sorted(found)


def fingerprint(contract: Contract, name: str, path: Path) -> SourceFile:
    """Hash one file.

    Raises:
        FileRefused: ``bad_file_name``, ``unreadable_file``, ``empty_file`` or ``too_large``.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(name).decode("utf-8", "backslashreplace")
        raise FileRefused(shown, "bad_file_name", "the name is not UTF-8", "Rename the file.") from None
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            what = "a directory" if stat.S_ISDIR(about.st_mode) else "no regular file"
            raise FileRefused(name, "unreadable_file", f"it is {what}", "Move it away, or deliver a file.")
        if about.st_size == 0:
            raise FileRefused(name, "empty_file", "it has 0 bytes", "Deliver it again, or remove it.")
        if contract.format == "documents" and about.st_size > MAX_DOCUMENT_BYTES:
            raise FileRefused(
                name,
                "too_large",
                f"it has {about.st_size:,} bytes; a document may have {MAX_DOCUMENT_BYTES:,}",
                "Split the document.",
            )
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        _unreadable(name, error)
    return SourceFile(name, path, about.st_size, digest, about.st_mtime_ns)


def read_rows(contract: Contract, file: SourceFile) -> Iterator[Batch]:
    """The rows of a tabular file, in order.

    Raises:
        FileRefused: At any point; what came before is then void too.
    """
    if contract.format == "parquet":
        yield from _parquet(contract, file)
    else:
        lines = _whole_lines(_decoded(file, contract.encoding))
        read = _csv if contract.format == "csv" else _jsonl
        yield from read(contract, file, lines)
    _check_same(file)


def read_document(file: SourceFile) -> bytes:
    """The bytes that ``file.sha256`` names.

    Raises:
        FileRefused: ``unreadable_file`` or ``file_changed``.
    """
    try:
        with file.path.open("rb") as stream:
            content = stream.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        _unreadable(file.name, error)
    if hashlib.sha256(content).hexdigest() != file.sha256:
        _changed(file)
    return content


def _unreadable(name: str, error: OSError) -> NoReturn:
    raise FileRefused(
        name,
        "unreadable_file",
        error.strerror or str(error),
        "Let the user who runs the pipeline read the file, or deliver it again.",
    ) from error


def _changed(file: SourceFile) -> NoReturn:
    raise FileRefused(
        file.name,
        "file_changed",
        "it changed while it was read",
        "Run again when it is complete; write to a hidden name and rename.",
    )


def _check_same(file: SourceFile) -> None:
    try:
        about = file.path.stat()
    except OSError as error:
        _unreadable(file.name, error)
    if (about.st_size, about.st_mtime_ns) != (file.size, file.changed_ns):
        _changed(file)


# --- Bytes to lines ------------------------------------------------------------------------------------


def _decompressed(file: SourceFile) -> Iterator[bytes]:
    compressed = file.name.endswith(".gz")
    left = file.size
    try:
        with file.path.open("rb") as plain:
            if compressed and plain.read(2) != GZIP_MAGIC:
                raise FileRefused(
                    file.name,
                    "unreadable_file",
                    "it is not gzip data",
                    "Compress it, or drop .gz from its name.",
                )
            plain.seek(0)
            with gzip.open(plain, "rb") if compressed else plain as stream:
                while block := stream.read(BLOCK_BYTES):
                    left -= len(block)
                    # A file that is being appended to must not be read for ever.
                    if left < 0 and not compressed:
                        _changed(file)
                    yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = "the gzip data ends early" if isinstance(error, EOFError) else f"damaged gzip data: {error}"
        raise FileRefused(file.name, "broken_file", reason, "Deliver the file again.") from error
    except OSError as error:
        _unreadable(file.name, error)


def _decoded(file: SourceFile, encoding: str) -> Iterator[bytes]:
    """The file's text as UTF-8 without byte order mark."""
    is_utf8 = codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")
    decoder = codecs.getincrementaldecoder(encoding)()
    offset = 0
    for block in _decompressed(file):
        text = _decode(file, encoding, decoder, block, offset, final=False)
        if not is_utf8:
            yield text.encode()
        elif offset == 0:
            yield block.removeprefix(codecs.BOM_UTF8)
        else:
            yield block
        offset += len(block)
    text = _decode(file, encoding, decoder, b"", offset, final=True)
    if not is_utf8:
        yield text.encode()


def _decode(
    file: SourceFile,
    encoding: str,
    decoder: codecs.IncrementalDecoder,
    block: bytes,
    offset: int,
    final: bool,
) -> str:
    try:
        return decoder.decode(block, final)
    except UnicodeError as error:
        where = offset
        if isinstance(error, UnicodeDecodeError):
            # The decoder still held what the last block left of a character.
            where += error.start - (len(error.object) - len(block))
        seen = " (it looks like UTF-16)" if block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""
        raise FileRefused(
            file.name,
            "wrong_encoding",
            f"the byte at offset {where} is not {encoding}{seen}",
            "Save it as UTF-8, or name its encoding in the contract's server.",
        ) from error


@dataclass(frozen=True)
class _Lines:
    """Whole lines: ``data`` ends with a newline; ``first`` is the number of its first line."""

    first: int
    data: bytes


@dataclass(frozen=True)
class _LongLine:
    """A line longer than a row may be, of which only the beginning was kept."""

    number: int
    start: bytes
    length: int

    def refused(self) -> RefusedRow:
        return RefusedRow(
            self.number,
            "line_too_long",
            f"line {self.number} has {self.length:,} bytes; a row may have {MAX_ROW_BYTES:,}",
            "Shorten the row, or move large contents to a documents source.",
            {"_raw": self.start.decode("utf-8", "ignore"), "_bytes": self.length, "_truncated": True},
        )


def _whole_lines(blocks: Iterable[bytes]) -> Iterator[_Lines | _LongLine]:
    """Cut blocks at newlines; the last line gets one if it has none."""
    pending: list[bytes] = []
    length = 0
    number = 1
    for block in blocks:
        end = block.find(b"\n") + 1
        while length + end > MAX_ROW_BYTES and end:
            yield _LongLine(number, b"".join([*pending, block])[:KEPT_OF_LONG_LINE], length + end - 1)
            number += 1
            pending, length, block = [], 0, block[end:]
            end = block.find(b"\n") + 1
        cut = block.rfind(b"\n") + 1
        if cut:
            data = b"".join([*pending, block[:cut]])
            yield _Lines(number, data)
            number += data.count(b"\n")
            pending, length, block = [], 0, block[cut:]
        length += len(block)
        # Of a line that is already too long, only the beginning and the length matter.
        if length <= MAX_ROW_BYTES or not pending:
            pending.append(block)
        else:
            pending = [b"".join(pending)[:KEPT_OF_LONG_LINE]]
    if length > MAX_ROW_BYTES:
        yield _LongLine(number, b"".join(pending)[:KEPT_OF_LONG_LINE], length)
    elif length:
        yield _Lines(number, b"".join([*pending, b"\n"]))


def _nothing_in(file: SourceFile) -> NoReturn:
    raise FileRefused(
        file.name, "empty_file", "it holds nothing but blank lines", "Deliver it again, or remove it."
    )


def _raw(text: bytes) -> dict[str, Any]:
    return {"_raw": text.decode("utf-8", "replace")}


def _check_names(contract: Contract, file: SourceFile, names: Sequence[str]) -> None:
    known = {column.name: column for column in contract.columns}
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise FileRefused(
            file.name, "duplicate_column", f"column {_short(twice[0])} is there twice", "Rename one of them."
        )
    unknown = [name for name in names if name not in known]
    if unknown:
        raise FileRefused(
            file.name,
            "unknown_column",
            f"the contract has no column {', '.join(_short(name) for name in unknown[:5])}",
            f"Add it to {contract.file.name} or drop it from the file; a CSV file needs a header line.",
        )
    missing = [name for name, column in known.items() if column.required and name not in names]
    if missing:
        raise FileRefused(
            file.name,
            "missing_column",
            f"there is no column {', '.join(missing[:5])}",
            f"Deliver it, or make it optional in {contract.file.name}.",
        )


def _short(value: str) -> str:
    return repr(value if len(value) <= 60 else f"{value[:57]}...")


# --- CSV -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Records:
    """CSV records in ``data``: half-open spans without line ends, and lines that are no record."""

    data: bytes
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    numbers: NDArray[np.int64]
    malformed: list[tuple[int, bytes]]


def _csv(contract: Contract, file: SourceFile, lines: Iterator[_Lines | _LongLine]) -> Iterator[Batch]:
    header: list[str] | None = None
    for item in _csv_records(lines, contract.delimiter.encode()):
        if header is None:
            header, item = _csv_header(contract, file, item)
            if header is None:
                continue
        if isinstance(item, _LongLine):
            yield _only_refused(contract, [item.refused()])
        else:
            yield _csv_batch(contract, header, item)
    if header is None:
        _nothing_in(file)


def _csv_header(
    contract: Contract, file: SourceFile, item: _Records | _LongLine
) -> tuple[list[str] | None, _Records | _LongLine]:
    """Take the column names off the first records; None where these hold blank lines only."""
    if isinstance(item, _LongLine):
        raise FileRefused(
            file.name,
            "line_too_long",
            f"the header, line {item.number}, has {item.length:,} bytes",
            "Deliver a CSV file with line ends and a header.",
        )
    if item.malformed and (not len(item.starts) or item.malformed[0][0] < item.numbers[0]):
        raise FileRefused(
            file.name,
            "broken_file",
            f"the header, line {item.malformed[0][0]}, is no CSV: {_short(item.malformed[0][1].decode())}",
            "Deliver a CSV file with a header; lines end with LF or CR LF, quotes are closed.",
        )
    if not len(item.starts):
        return None, item
    text = item.data[item.starts[0] : item.ends[0]].decode()
    if "\0" in text:
        raise FileRefused(
            file.name,
            "wrong_encoding",
            "the header holds NUL characters (it looks like UTF-16)",
            "Save it as UTF-8, or name its encoding in the contract's server.",
        )
    try:
        names = next(csv.reader(io.StringIO(text, newline=""), delimiter=contract.delimiter, strict=True))
    except csv.Error as error:
        raise FileRefused(
            file.name, "broken_file", f"the header is no CSV: {error}", "Deliver a CSV file with a header."
        ) from error
    _check_names(contract, file, names)
    rest = _Records(item.data, item.starts[1:], item.ends[1:], item.numbers[1:], item.malformed)
    return names, rest


def _csv_records(lines: Iterable[_Lines | _LongLine], delimiter: bytes) -> Iterator[_Records | _LongLine]:
    """Group lines into records: a quoted field may hold newlines, so a record may wait for later lines."""
    carry: _Lines | None = None
    for item in lines:
        if isinstance(item, _LongLine):
            if carry:
                yield _split(carry, delimiter, final=True)[0]
                carry = None
            yield item
            continue
        if carry:
            item = _Lines(carry.first, carry.data + item.data)
        records, carry = _split(item, delimiter, final=False)
        yield records
    if carry:
        yield _split(carry, delimiter, final=True)[0]


def _split(lines: _Lines, delimiter: bytes, final: bool) -> tuple[_Records, _Lines | None]:
    """Records of ``lines``, and the lines of a last record that is still open.

    Counting quotes finds the record ends of a whole block at once, as long as quotes stand only where RFC
    4180 has them. Where they do not, records are matched one by one; a line that cannot begin a record is
    then malformed by itself, so that one stray quote does not swallow what follows.
    """
    data = lines.data
    octets = np.frombuffer(data, np.uint8)
    newlines = np.flatnonzero(octets == 10)
    malformed_spans: list[tuple[int, int]] = []
    ends = _ends_by_parity(octets, newlines, delimiter[0])
    rest = int(ends[-1]) + 1 if ends is not None and len(ends) else 0
    if ends is not None and (rest == len(data) or not (final or len(data) - rest > MAX_ROW_BYTES)):
        starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64) if len(ends) else ends
        ends = ends - ((ends > starts) & (octets[np.maximum(ends - 1, 0)] == 13))
    else:
        starts, ends, malformed_spans, rest = _match_records(data, delimiter, final)
    filled = ends > starts
    starts, ends = starts[filled], ends[filled]
    numbers = lines.first + np.searchsorted(newlines, starts)
    malformed = [
        (lines.first + int(np.searchsorted(newlines, start)), data[start:end])
        for start, end in malformed_spans
    ]
    carry = None
    if rest < len(data):
        carry = _Lines(lines.first + int(np.searchsorted(newlines, rest)), data[rest:])
    return _Records(data, starts, ends, numbers, malformed), carry


def _ends_by_parity(
    octets: NDArray[np.uint8], newlines: NDArray[np.int64], delimiter: int
) -> NDArray[np.int64] | None:
    """Positions of the newlines that end a record; None where quotes or carriage returns are irregular."""
    quotes = np.flatnonzero(octets == 34)
    returns = np.flatnonzero(octets == 13)
    if len(returns):
        lone = returns[octets[returns + 1] != 10]  # the data ends with a newline
        if (np.searchsorted(quotes, lone) % 2 == 0).any():
            return None
    if not len(quotes):
        return newlines
    opening, closing = quotes[0::2], quotes[1::2]
    before = octets[np.maximum(opening - 1, 0)]
    opens = (opening == 0) | (before == delimiter) | (before == 10)
    opens[1:] |= opening[1:] - 1 == closing[: len(opening) - 1]  # a doubled quote closes and opens again
    after = octets[closing + 1]
    closes = (after == delimiter) | (after == 10) | (after == 13) | (after == 34)
    if not (opens.all() and closes.all()):
        return None
    outside: NDArray[np.int64] = newlines[np.searchsorted(quotes, newlines) % 2 == 0]
    return outside


def _match_records(
    data: bytes, delimiter: bytes, final: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[tuple[int, int]], int]:
    d = re.escape(delimiter)
    value = rb'(?>"[^"]*+(?:""[^"]*+)*+"|[^"' + d + rb"\r\n][^" + d + rb"\r\n]*+|)"
    values = value + rb"(?:" + d + value + rb")*+"
    record = re.compile(values + rb"(?=\r?\n)")
    beginning = re.compile(values)
    open_quote = re.compile(rb'"[^"]*+(?:""[^"]*+)*+\Z')
    starts: list[int] = []
    ends: list[int] = []
    malformed: list[tuple[int, int]] = []
    at = 0
    while at < len(data):
        found = record.match(data, at)
        if found:
            starts.append(at)
            ends.append(found.end())
            at = data.index(b"\n", found.end()) + 1
            continue
        if not final and len(data) - at <= MAX_ROW_BYTES:
            stopped = beginning.match(data, at)
            if stopped and open_quote.match(data, stopped.end()):
                break
        end = data.index(b"\n", at)
        malformed.append((at, end))
        at = end + 1
    return np.array(starts, np.int64), np.array(ends, np.int64), malformed, at


def _csv_batch(contract: Contract, header: list[str], records: _Records) -> Batch:
    data, starts, ends, numbers = records.data, records.starts, records.ends, records.numbers
    refused = [
        RefusedRow(
            number,
            "malformed_row",
            "a quote is not closed or not doubled, or a carriage return stands alone",
            "Quote fields that hold quotes or line ends, and double the quotes inside.",
            _raw(line),
        )
        for number, line in records.malformed
    ]
    keep = np.ones(len(starts), np.bool_)
    if b"\0" in data:
        zeros = np.flatnonzero(np.frombuffer(data, np.uint8) == 0)
        inside = np.searchsorted(starts, zeros, side="right") - 1
        for index in sorted(
            {int(n) for n, zero in zip(inside, zeros, strict=True) if n >= 0 and zero < ends[n]}
        ):
            keep[index] = False
            refused.append(_nul(int(numbers[index]), _raw(data[starts[index] : ends[index]])))
        starts, ends, numbers = starts[keep], ends[keep], numbers[keep]
    if not len(starts):
        return _only_refused(contract, refused)
    if keep.all() and not records.malformed:
        chunk = pa.py_buffer(data).slice(int(starts[0]), int(ends[-1] - starts[0]))
    else:
        chunk = pa.py_buffer(b"\n".join(data[s:e] for s, e in zip(starts, ends, strict=True)))
    table, wrong = _parse(chunk, header, contract.delimiter)
    for index, fields in wrong:
        refused.append(
            RefusedRow(
                int(numbers[index]),
                "wrong_field_count",
                f"the row has {fields} fields, the header {len(header)}",
                "Quote fields that hold the delimiter; give every row the header's number of fields.",
                _raw(data[starts[index] : ends[index]]),
            )
        )
    numbers = np.delete(numbers, [index for index, _ in wrong])
    if len(numbers) != table.num_rows:
        raise RuntimeError(f"{len(numbers)} CSV records became {table.num_rows} rows")
    columns = {
        column.name: table[column.name].combine_chunks()
        if column.name in header
        else pa.nulls(len(numbers), pa.string())
        for column in contract.columns
    }

    def original(index: int) -> dict[str, Any]:
        return {name: columns[name][index].as_py() for name in header}

    return Batch(numbers, columns, original, refused)


def _parse(chunk: pa.Buffer, header: list[str], delimiter: str) -> tuple[pa.Table, list[tuple[int, int]]]:
    """Take whole records apart; also the (position, number of fields) of those left out."""
    wrong: list[tuple[int, int]] = []

    def skip(row: Any) -> str:
        wrong.append((row.number - 1, row.actual_columns))
        return "skip"

    table = pa_csv.read_csv(
        pa.BufferReader(chunk),
        # One block and one thread: rows keep their numbers, and no record is cut.
        read_options=pa_csv.ReadOptions(
            use_threads=False, column_names=header, block_size=max(chunk.size + 1, 64)
        ),
        parse_options=pa_csv.ParseOptions(
            delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip
        ),
        # CSV has no null: a field without characters is one, quoted or not.
        convert_options=pa_csv.ConvertOptions(
            column_types={name: pa.string() for name in header},
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=True,
            check_utf8=False,
        ),
    )
    return table, wrong


def _nul(number: int, row: Mapping[str, Any]) -> RefusedRow:
    return RefusedRow(
        number,
        "nul_character",
        "the row holds a NUL character, which Postgres cannot store",
        "Remove it at the source.",
        row,
    )


def _only_refused(contract: Contract, refused: list[RefusedRow]) -> Batch:
    columns = {column.name: pa.nulls(0, pa.string()) for column in contract.columns}
    return Batch(np.zeros(0, np.int64), columns, lambda index: {}, refused)


# --- JSON Lines ------------------------------------------------------------------------------------------

JSON_KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "date": (str,),
    "timestamp": (str,),
    "object": (dict,),
    "array": (list,),
}
KEY = re.compile(rb'"\s*:')


def _jsonl(contract: Contract, file: SourceFile, lines: Iterable[_Lines | _LongLine]) -> Iterator[Batch]:
    known = {column.name for column in contract.columns}
    seen = False
    for item in lines:
        if isinstance(item, _LongLine):
            seen = True
            yield _only_refused(contract, [item.refused()])
            continue
        rows: list[dict[str, Any]] = []
        numbers: list[int] = []
        refused: list[RefusedRow] = []
        for number, line in enumerate(item.data.split(b"\n")[:-1], item.first):
            line = line.strip(b" \t\r")
            if not line:
                continue
            row = _json_row(number, line, known)
            if isinstance(row, RefusedRow):
                refused.append(row)
            else:
                rows.append(row)
                numbers.append(number)
        seen = seen or bool(rows) or bool(refused)
        yield _json_batch(contract, rows, numbers, refused)
    if not seen:
        _nothing_in(file)


def _json_row(number: int, line: bytes, known: set[str]) -> dict[str, Any] | RefusedRow:
    if b"\0" in line:
        return _nul(number, _raw(line))
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if _has_lone_surrogate(line):
            return RefusedRow(
                number,
                "lone_surrogate",
                "the row holds half of a surrogate pair, which is no character",
                "Escape characters beyond U+FFFF as two \\u escapes, or write them as UTF-8.",
                _raw(line),
            )
        remedy = "Write one JSON object (RFC 8259) on each line."
        return RefusedRow(number, "bad_json", _one_line(error), remedy, _raw(line))
    if not isinstance(row, dict):
        remedy = "Write one JSON object on each line."
        return RefusedRow(
            number, "not_an_object", f"the line is a JSON {type(row).__name__}", remedy, _raw(line)
        )
    # Every key is a quote before a colon; only where there are more of those may a key be there twice.
    if len(KEY.findall(line)) != _count_keys(row):
        twice = _duplicate_key(line)
        if twice is not None:
            return RefusedRow(
                number,
                "duplicate_json_key",
                f"key {_short(twice)} is there twice",
                "Give each key once: which of two values is meant cannot be told.",
                _raw(line),
            )
    if b"\\u0000" in line and _has_nul(row):
        return _nul(number, _raw(line))
    unknown = [key for key in row if key not in known]
    if unknown:
        return RefusedRow(
            number,
            "unknown_column",
            f"the contract has no column {_short(unknown[0])}",
            "Add it to the contract, or drop it from the row.",
            row,
        )
    return row


def _json_batch(
    contract: Contract, rows: list[dict[str, Any]], numbers: list[int], refused: list[RefusedRow]
) -> Batch:
    wrong: dict[int, tuple[Column, Any]] = {}
    values = {column.name: [row.get(column.name) for row in rows] for column in contract.columns}
    for column in contract.columns:
        for index in _wrong_kind(column, values[column.name]):
            wrong.setdefault(index, (column, values[column.name][index]))
    if wrong:
        for index, (column, value) in wrong.items():
            shown = "" if column.pii else f" {_short(str(value))}"
            refused.append(
                RefusedRow(
                    numbers[index],
                    "wrong_type",
                    f"column {column.name!r} is a JSON {type(value).__name__}{shown}, not {column.type}",
                    "Write the value as the contract's type, or correct the contract.",
                    rows[index],
                )
            )
        kept = [index for index in range(len(rows)) if index not in wrong]
        rows, numbers = [rows[index] for index in kept], [numbers[index] for index in kept]
        values = {name: [column[index] for index in kept] for name, column in values.items()}
    columns = {column.name: _json_array(column, values[column.name]) for column in contract.columns}
    return Batch(np.array(numbers, np.int64), columns, rows.__getitem__, refused)


def _wrong_kind(column: Column, values: list[Any]) -> list[int]:
    kinds = JSON_KINDS[column.type]
    if set(map(type, values)) <= {*kinds, type(None)} and column.type != "integer":
        return []
    return [
        index
        for index, value in enumerate(values)
        if value is not None
        and not (_is_integer(value) if column.type == "integer" else type(value) in kinds)
    ]


def _is_integer(value: Any) -> bool:
    if type(value) is int:
        return -(2**63) <= value < 2**63
    # 3.0 is an integer in JSON Schema; beyond 2**53 a float no longer says which one.
    return type(value) is float and value.is_integer() and abs(value) <= 2**53


def _json_array(column: Column, values: list[Any]) -> pa.Array:
    if column.type in ("object", "array"):
        return pa.ExtensionArray.from_storage(
            JSON, pa.array([_json_text(value) for value in values], pa.string())
        )
    if column.type == "number":
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    if column.type in ("date", "timestamp"):
        return pa.array(values, pa.string())
    return pa.array(values, ARROW_TYPES[column.type])


def _json_text(value: Any) -> str | None:
    """Canonical JSON: sorted keys, no spaces."""
    return None if value is None else orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()


def _has_lone_surrogate(line: bytes) -> bool:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _count_keys(value: Any) -> int:
    if isinstance(value, dict):
        return len(value) + sum(_count_keys(part) for part in value.values() if type(part) in (dict, list))
    return sum(_count_keys(part) for part in value if type(part) in (dict, list))


def _duplicate_key(line: bytes) -> str | None:
    twice: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                twice.append(key)
            seen.add(key)

    json.loads(line, object_pairs_hook=note)
    return twice[0] if twice else None


def _has_nul(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any("\0" in key or _has_nul(part) for key, part in value.items())
    return isinstance(value, list) and any(_has_nul(part) for part in value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# --- Parquet ---------------------------------------------------------------------------------------------


def _parquet(contract: Contract, file: SourceFile) -> Iterator[Batch]:
    try:
        # Without pre-buffering, a column is read as its rows are asked for, not a row group at once.
        with pq.ParquetFile(file.path, pre_buffer=False, buffer_size=1024 * 1024) as parquet:
            schema = parquet.schema_arrow
            _check_names(contract, file, schema.names)
            _check_types(contract, file, schema)
            number = 1
            for batch in parquet.iter_batches(batch_size=PARQUET_ROWS):
                yield _parquet_batch(contract, file, batch, number)
                number += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise FileRefused(
            file.name,
            "broken_file",
            f"it is no whole Parquet file: {_short(_one_line(error))}",
            "Deliver it again; write to a hidden name and rename when complete.",
        ) from error


def _check_types(contract: Contract, file: SourceFile, schema: pa.Schema) -> None:
    for column in contract.columns:
        if column.name in schema.names and not _castable(schema.field(column.name).type, column.type):
            raise FileRefused(
                file.name,
                "changed_type",
                f"column {column.name!r} is {schema.field(column.name).type}, the contract says {column.type}",
                f"Deliver the promised type, or correct {contract.file.name}.",
            )


def _castable(arrow: pa.DataType, logical: str) -> bool:
    """Whether values of ``arrow`` can be ``logical`` without changing what they mean."""
    if pa.types.is_dictionary(arrow):
        arrow = arrow.value_type
    if pa.types.is_null(arrow) or _is_text(arrow):
        return True
    allowed: dict[str, tuple[Callable[[pa.DataType], bool], ...]] = {
        "string": (),
        "integer": (pa.types.is_integer,),
        "number": (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal),
        "boolean": (pa.types.is_boolean,),
        "date": (pa.types.is_date,),
        "timestamp": (pa.types.is_timestamp,),
        "object": (pa.types.is_struct,),
        "array": (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list),
    }
    return any(test(arrow) for test in allowed[logical])


def _is_text(arrow: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(arrow) or pa.types.is_large_string(arrow) or pa.types.is_string_view(arrow)
    )


def _parquet_batch(contract: Contract, file: SourceFile, batch: pa.RecordBatch, first: int) -> Batch:
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        raise FileRefused(
            file.name,
            "wrong_encoding",
            f"from row {first} on: {_short(_one_line(error))}",
            "Write Parquet strings as UTF-8.",
        ) from error
    numbers = np.arange(first, first + batch.num_rows, dtype=np.int64)
    refused: list[RefusedRow] = []
    keep = np.ones(batch.num_rows, np.bool_)
    columns: dict[str, pa.Array] = {}
    names = set(batch.schema.names)

    def refuse(mask: Any, make: Callable[[int, Mapping[str, Any]], RefusedRow]) -> None:
        hit = pc.fill_null(mask, False).to_numpy(zero_copy_only=False) & keep
        keep[hit] = False
        refused.extend(
            make(int(numbers[index]), _parquet_row(batch, int(index))) for index in np.flatnonzero(hit)
        )

    for column in contract.columns:
        if column.name not in names:
            columns[column.name] = pa.nulls(batch.num_rows, pa.string())
            continue
        array = batch.column(column.name)
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if pa.types.is_nested(array.type):
            texts = pa.array([_json_text(_jsonable(value)) for value in array.to_pylist()], pa.string())
            refuse(pc.match_substring_regex(texts, NUL_ESCAPE), _nul)
            array = pa.ExtensionArray.from_storage(JSON, texts)
        elif _is_text(array.type) or pa.types.is_null(array.type):
            array = array.cast(pa.string())
            refuse(pc.match_substring(array, "\0"), _nul)
            refuse(pc.greater(pc.binary_length(array), MAX_ROW_BYTES), _value_too_long)
        columns[column.name] = array
    if keep.all():
        return Batch(numbers, columns, lambda index: _parquet_row(batch, index), refused)
    places = np.flatnonzero(keep)
    kept = {name: array.filter(pa.array(keep)) for name, array in columns.items()}
    return Batch(numbers[keep], kept, lambda index: _parquet_row(batch, int(places[index])), refused)


def _value_too_long(number: int, row: Mapping[str, Any]) -> RefusedRow:
    return RefusedRow(
        number,
        "line_too_long",
        f"a value has more than {MAX_ROW_BYTES:,} bytes",
        "Shorten the row, or move large contents to a documents source.",
        {name: value[:KEPT_OF_LONG_LINE] if isinstance(value, str) else value for name, value in row.items()},
    )


def _parquet_row(batch: pa.RecordBatch, index: int) -> dict[str, Any]:
    return {
        name: _jsonable(column[index].as_py())
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    }


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _jsonable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(part) for part in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    return value if isinstance(value, str | int | float | None) else str(value)

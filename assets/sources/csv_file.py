"""CSV (RFC 4180): records that may span lines, and damage that costs no more than the row it is in.

Belongs here: quotes, delimiters, the header. Does not belong here: bytes and encodings (``lines``), types.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from assets.sources.batch import (
    MAX_ROW_BYTES,
    Batch,
    FileRefused,
    RefusedRow,
    SourceFile,
    check_names,
    nul_refused,
    only_refused,
    raw_text,
    refuse_empty,
    short,
)
from assets.sources.contract import Contract
from assets.sources.lines import Lines, LongLine


def csv_batches(contract: Contract, file: SourceFile, lines: Iterator[Lines | LongLine]) -> Iterator[Batch]:
    """The rows of a CSV file with a header.

    Raises:
        FileRefused: The header is missing, broken, or not the contract's.
    """
    header: list[str] | None = None
    for item in _csv_records(lines, contract.delimiter.encode()):
        if header is None:
            header, item = _csv_header(contract, file, item)
            if header is None:
                continue
        if isinstance(item, LongLine):
            yield only_refused(contract, [item.refused()])
        else:
            yield _csv_batch(contract, header, item)
    if header is None:
        refuse_empty(file)


@dataclass(frozen=True)
class _Records:
    """CSV records in ``data``: half-open spans without line ends, and lines that are no record."""

    data: bytes
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    numbers: NDArray[np.int64]
    malformed: list[tuple[int, bytes]]


def _csv_header(
    contract: Contract, file: SourceFile, item: _Records | LongLine
) -> tuple[list[str] | None, _Records | LongLine]:
    """Take the column names off the first records; None where these hold blank lines only."""
    if isinstance(item, LongLine):
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
            f"the header, line {item.malformed[0][0]}, is no CSV: {short(item.malformed[0][1].decode())}",
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
    check_names(contract, file, names)
    rest = _Records(item.data, item.starts[1:], item.ends[1:], item.numbers[1:], item.malformed)
    return names, rest


def _csv_records(lines: Iterable[Lines | LongLine], delimiter: bytes) -> Iterator[_Records | LongLine]:
    """Group lines into records: a quoted field may hold newlines, so a record may wait for later lines."""
    carry: Lines | None = None
    for item in lines:
        if isinstance(item, LongLine):
            if carry:
                yield _split(carry, delimiter, final=True)[0]
                carry = None
            yield item
            continue
        if carry:
            item = Lines(carry.first, carry.data + item.data)
        records, carry = _split(item, delimiter, final=False)
        yield records
    if carry:
        yield _split(carry, delimiter, final=True)[0]


def _split(lines: Lines, delimiter: bytes, final: bool) -> tuple[_Records, Lines | None]:
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
        carry = Lines(lines.first + int(np.searchsorted(newlines, rest)), data[rest:])
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
            raw_text(line),
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
            refused.append(nul_refused(int(numbers[index]), raw_text(data[starts[index] : ends[index]])))
        starts, ends, numbers = starts[keep], ends[keep], numbers[keep]
    if not len(starts):
        return only_refused(contract, refused)
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
                raw_text(data[starts[index] : ends[index]]),
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

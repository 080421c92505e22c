"""JSON Lines (RFC 8259): one object a line; whatever cannot be one row of single-valued keys is refused.

Belongs here: JSON's own syntax and types. Does not belong here: bytes and encodings (``lines``), rules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from assets.sources.batch import (
    ARROW_TYPES,
    JSON,
    Batch,
    RefusedRow,
    SourceFile,
    nul_refused,
    one_line,
    only_refused,
    raw_text,
    refuse_empty,
    short,
)
from assets.sources.contract import Column, Contract
from assets.sources.lines import Lines, LongLine

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


def jsonl_batches(contract: Contract, file: SourceFile, lines: Iterable[Lines | LongLine]) -> Iterator[Batch]:
    """The rows of a JSON Lines file.

    Raises:
        FileRefused: It holds blank lines only.
    """
    known = {column.name for column in contract.columns}
    seen = False
    for item in lines:
        if isinstance(item, LongLine):
            seen = True
            yield only_refused(contract, [item.refused()])
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
        refuse_empty(file)


def _json_row(number: int, line: bytes, known: set[str]) -> dict[str, Any] | RefusedRow:
    if b"\0" in line:
        return nul_refused(number, raw_text(line))
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if _has_lone_surrogate(line):
            return RefusedRow(
                number,
                "lone_surrogate",
                "the row holds half of a surrogate pair, which is no character",
                "Escape characters beyond U+FFFF as two \\u escapes, or write them as UTF-8.",
                raw_text(line),
            )
        remedy = "Write one JSON object (RFC 8259) on each line."
        return RefusedRow(number, "bad_json", one_line(error), remedy, raw_text(line))
    if not isinstance(row, dict):
        remedy = "Write one JSON object on each line."
        return RefusedRow(
            number, "not_an_object", f"the line is a JSON {type(row).__name__}", remedy, raw_text(line)
        )
    if any(type(value) in (dict, list) for value in row.values()) and _too_deep(row):
        remedy = "Nest values at most 250 deep."
        return RefusedRow(number, "bad_json", "values are nested too deeply", remedy, raw_text(line))
    # Every key is a quote before a colon; only where there are more of those may a key be there twice.
    if len(KEY.findall(line)) != _count_keys(row):
        twice = _duplicate_key(line)
        if twice is not None:
            return RefusedRow(
                number,
                "duplicate_json_key",
                f"key {short(twice)} is there twice",
                "Give each key once: which of two values is meant cannot be told.",
                raw_text(line),
            )
    if b"\\u0000" in line and _has_nul(row):
        return nul_refused(number, raw_text(line))
    unknown = [key for key in row if key not in known]
    if unknown:
        return RefusedRow(
            number,
            "unknown_column",
            f"the contract has no column {short(unknown[0])}",
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
            shown = "" if column.pii else f" {short(str(value))}"
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
            JSON, pa.array([json_text(value) for value in values], pa.string())
        )
    if column.type == "number":
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    if column.type in ("date", "timestamp"):
        return pa.array(values, pa.string())
    return pa.array(values, ARROW_TYPES[column.type])


def json_text(value: Any) -> str | None:
    """Canonical JSON: sorted keys, no spaces."""
    return None if value is None else orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()


def _too_deep(value: Any) -> bool:
    """Whether the encoder, which stops earlier than the decoder, cannot write ``value``."""
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:
        return True
    return False


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

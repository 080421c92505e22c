"""Which rows of a batch keep their contract's promises, and as what typed values.

Columns are checked whole, by Arrow; Python looks only at rows that are refused. Belongs here: rules about one
row. Does not belong here: rules about several (duplicate keys, in ``land``) or about a table (gates).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from assets.sources.batch import ARROW_TYPES, JSON, NUL_ESCAPE, Batch, RefusedRow
from assets.sources.contract import Column, Contract
from assets.sources.jsonl import json_text

INTEGER = r"^[+-]?[0-9]+$"
NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
DATE = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"
TIMESTAMP = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(:[0-9]{2}([.,][0-9]+)?)?"
OFFSET = r"(Z|[+-][0-9]{2}(:?[0-9]{2})?)$"
TRUE, FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")
EXAMPLES = {
    "integer": "a whole number such as 42, below 2**63",
    "number": "a finite number such as 1.5 or 2e3, with a decimal point",
    "boolean": "true or false",
    "date": "an ISO 8601 date, 2026-01-31, in the years 1 to 9999",
    "timestamp": "an ISO 8601 time, 2026-01-31T12:00:00Z, in the years 1 to 9999",
    "object": "a JSON object",
    "array": "a JSON array",
    "string": "text",
}
UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
FIRST_MICROSECOND = (datetime(1, 1, 1, tzinfo=UTC) - UNIX_EPOCH).days * 86_400_000_000
LAST_MICROSECOND = (datetime(9999, 12, 31, tzinfo=UTC) - UNIX_EPOCH).days * 86_400_000_000 + 86_399_999_999
FIRST_DAY, LAST_DAY = FIRST_MICROSECOND // 86_400_000_000, LAST_MICROSECOND // 86_400_000_000
PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Checked:
    """The rows of a batch after their contract was held against them.

    Attributes:
        rows: Good rows: the contract's columns, typed, then ``_row`` (int64) and ``_content_hash`` (text).
        refused: All others, each with the first rule it breaks.
    """

    rows: pa.Table
    refused: list[RefusedRow]


@dataclass(frozen=True)
class _Rule:
    """A rule some rows broke, and how to say so to one of them."""

    column: Column
    name: str
    broken: Mask
    reason: str
    remedy: str


def check_rows(contract: Contract, batch: Batch) -> Checked:
    """Type and check the rows of ``batch``; every row is in ``rows`` or in ``refused``."""
    count = len(batch.numbers)
    refused = list(batch.refused)
    good = np.ones(count, np.bool_)
    typed: dict[str, pa.Array] = {}
    for column in contract.columns:
        raw = batch.columns[column.name]
        values = _typed(raw, column.type)
        typed[column.name] = values
        for rule in _rules(column, raw, values):
            hit = rule.broken & good
            good &= ~rule.broken
            refused.extend(_refused(batch, raw, rule, int(index)) for index in np.flatnonzero(hit))
    refused.sort(key=lambda row: row.number)
    table = pa.table(typed)
    if not good.all():
        table = table.filter(pa.array(good))
    numbers = pa.array(batch.numbers[good], pa.int64())
    hashes = pa.array(content_hashes(table), pa.string())
    return Checked(table.append_column("_row", numbers).append_column("_content_hash", hashes), refused)


def content_hashes(rows: pa.Table) -> list[str]:
    """SHA-256 of each row's canonical JSON: keys sorted, nulls left out, times in UTC to the microsecond.

    A new column that is null in a row therefore leaves that row's hash as it was.
    """
    names = sorted(rows.column_names)
    columns = [_canonical(rows[name].combine_chunks()) for name in names]
    sha256, dumps = hashlib.sha256, orjson.dumps
    return [
        sha256(
            dumps({name: value for name, value in zip(names, row, strict=True) if value is not None})
        ).hexdigest()
        for row in zip(*columns, strict=True)
    ]


def _canonical(column: pa.Array) -> list[Any]:
    if column.type == JSON:
        return [None if text is None else orjson.Fragment(text) for text in column.storage.to_pylist()]
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        column = column.cast(pa.string())
    values: list[Any] = column.to_pylist()
    return values


def _refused(batch: Batch, raw: pa.Array, rule: _Rule, index: int) -> RefusedRow:
    value = (raw.storage if raw.type == JSON else raw)[index].as_py()
    if value is None:
        shown = "is missing"
    elif rule.column.pii:
        shown = "(withheld: personal)"
    else:
        text = str(value)
        shown = repr(text if len(text) <= 60 else f"{text[:57]}...")
    return RefusedRow(
        int(batch.numbers[index]),
        rule.name,
        f"column {rule.column.name!r} {shown}{rule.reason}",
        rule.remedy,
        batch.original(index),
    )


def _rules(column: Column, raw: pa.Array, values: pa.Array) -> Iterator[_Rule]:
    """The rules that at least one row breaks, in the order in which they name a refusal."""
    there = _mask(values.is_valid())
    given = _mask(raw.is_valid())
    if column.type != "string" and raw.type == pa.string():
        given &= _mask(pc.not_equal(pc.utf8_trim_whitespace(raw), ""))
    checks: list[tuple[str, Callable[[], Mask], str, str]] = []
    if column.required:
        checks.append(
            ("required", lambda: ~given, "", "Fill it in at the source, or make the column optional.")
        )
    checks.append(
        (
            "wrong_type",
            lambda: given & ~there,
            f" is not {EXAMPLES[column.type]}",
            f"Write {EXAMPLES[column.type]}.",
        )
    )
    if column.pattern is not None:
        checks.append(
            (
                "pattern",
                lambda: there & ~_mask(pc.match_substring_regex(values, column.pattern)),
                f" does not match {column.pattern}",
                "Correct the value, or the pattern in the contract.",
            )
        )
    if column.min_length is not None:
        checks.append(
            (
                "min_length",
                lambda: _mask(pc.less(pc.utf8_length(values), column.min_length)),
                f" has fewer than {column.min_length} characters",
                "Correct the value, or minLength in the contract.",
            )
        )
    if column.max_length is not None:
        checks.append(
            (
                "max_length",
                lambda: _mask(pc.greater(pc.utf8_length(values), column.max_length)),
                f" has more than {column.max_length} characters",
                "Shorten the value, or correct maxLength in the contract.",
            )
        )
    if column.minimum is not None:
        checks.append(
            (
                "minimum",
                lambda: _mask(pc.less(values, pa.scalar(column.minimum, values.type))),
                f" is less than {column.minimum}",
                "Correct the value, or minimum in the contract.",
            )
        )
    if column.maximum is not None:
        checks.append(
            (
                "maximum",
                lambda: _mask(pc.greater(values, pa.scalar(column.maximum, values.type))),
                f" is more than {column.maximum}",
                "Correct the value, or maximum in the contract.",
            )
        )
    if column.valid_values is not None:
        known = pa.array(column.valid_values, values.type)
        checks.append(
            (
                "valid_values",
                lambda: there & ~_mask(pc.is_in(values, value_set=known)),
                " is not a valid value",
                f"Use one of: {', '.join(map(str, column.valid_values[:20]))}.",
            )
        )
    for name, broken, reason, remedy in checks:
        mask = broken()
        if mask.any():
            yield _Rule(column, name, mask, reason, remedy)


def _mask(array: pa.Array) -> Mask:
    """A writable numpy mask; null is false."""
    return np.array(pc.fill_null(array, False).to_numpy(zero_copy_only=False), np.bool_)


# --- Typing ----------------------------------------------------------------------------------------------


def _typed(raw: pa.Array, kind: str) -> pa.Array:
    """``raw`` as the Arrow type of ``kind``; null where it is no such value."""
    target = ARROW_TYPES[kind]
    if kind == "string" or raw.type == JSON:
        return raw
    if raw.type == pa.string():
        return _from_text(raw, kind)
    if pa.types.is_timestamp(raw.type):
        return _from_timestamp(raw)
    if pa.types.is_date(raw.type):
        days = raw.cast(pa.date32()).cast(pa.int32())
        return _where(days, pc.and_(pc.greater_equal(days, FIRST_DAY), pc.less_equal(days, LAST_DAY))).cast(
            target
        )
    if pa.types.is_uint64(raw.type) and kind == "integer":
        return _where(raw, pc.less_equal(raw, pa.scalar(2**63 - 1, pa.uint64()))).cast(target)
    values = raw.cast(target, safe=False)
    return _where(values, pc.is_finite(values)) if kind == "number" else values


def _where(values: pa.Array, condition: pa.Array) -> pa.Array:
    return pc.if_else(pc.fill_null(condition, False), values, pa.scalar(None, values.type))


def _from_timestamp(raw: pa.Array) -> pa.Array:
    """Times without a zone are taken as UTC; digits beyond the microsecond, which Postgres lacks, are cut."""
    scale = PER_SECOND[raw.type.unit]
    ticks = raw.cast(pa.int64())
    first = FIRST_MICROSECOND * scale // 1_000_000
    last = LAST_MICROSECOND * scale // 1_000_000
    inside = pc.and_(
        pc.greater_equal(ticks, max(first, -(2**63))), pc.less_equal(ticks, min(last, 2**63 - 1))
    )
    known = _where(ticks, inside).cast(pa.timestamp(raw.type.unit))
    return known.cast(pa.timestamp("us"), safe=False).cast(ARROW_TYPES["timestamp"])


def _from_text(raw: pa.Array, kind: str) -> pa.Array:
    target = ARROW_TYPES[kind]
    text = pc.utf8_trim_whitespace(raw)
    if kind == "integer":
        return _parse(text, INTEGER, _no_plus, _python_integer, target)
    if kind == "number":
        values = _parse(text, NUMBER, _no_plus, _python_number, target)
        return _where(values, pc.is_finite(values))
    if kind == "boolean":
        lower = pc.utf8_lower(text)
        yes, no = pa.array(TRUE), pa.array(FALSE)
        known = pc.or_(pc.is_in(lower, value_set=yes), pc.is_in(lower, value_set=no))
        return _where(pc.is_in(lower, value_set=yes), known)
    if kind == "date":
        return _where_years(_parse(text, DATE, _same, date.fromisoformat, target))
    if kind == "timestamp":
        naive = _parse(text, TIMESTAMP + "$", _same, _python_timestamp, pa.timestamp("us"))
        aware = _parse(text, TIMESTAMP + OFFSET, _same, _python_timestamp, target)
        return _where_years(pc.coalesce(aware, naive.cast(target)))
    return _json(raw, dict if kind == "object" else list)


def _parse(
    text: pa.Array,
    pattern: str,
    prepare: Callable[[pa.Array], pa.Array],
    python: Callable[[str], Any],
    target: pa.DataType,
) -> pa.Array:
    """Parse what matches ``pattern``: all at once by Arrow, or, if that stumbles, one by one by ``python``."""
    likely = _where(text, pc.match_substring_regex(text, pattern))
    try:
        return prepare(likely).cast(target)
    except pa.ArrowInvalid:
        return pa.array([_or_none(python, value) for value in likely.to_pylist()], target)


def _or_none(python: Callable[[str], Any], value: str | None) -> Any:
    if value is None:
        return None
    try:
        return python(value)
    except (ValueError, OverflowError, orjson.JSONEncodeError):
        return None


def _same(text: pa.Array) -> pa.Array:
    return text


def _no_plus(text: pa.Array) -> pa.Array:
    return pc.utf8_ltrim(text, characters="+")


def _python_integer(text: str) -> int | None:
    value = int(text)
    return value if -(2**63) <= value < 2**63 else None


def _python_number(text: str) -> float:
    return float(text)


def _python_timestamp(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment.astimezone(UTC) if moment.tzinfo else moment


def _where_years(values: pa.Array) -> pa.Array:
    """Only the years 1 to 9999, which every client can read back."""
    if pa.types.is_date(values.type):
        counts, first, last = values.cast(pa.int32()), FIRST_DAY, LAST_DAY
    else:
        counts, first, last = values.cast(pa.int64()), FIRST_MICROSECOND, LAST_MICROSECOND
    return _where(values, pc.and_(pc.greater_equal(counts, first), pc.less_equal(counts, last)))


def _json(raw: pa.Array, kind: type) -> pa.Array:
    def canonical(text: str) -> str | None:
        value = orjson.loads(text)
        found = json_text(value) if isinstance(value, kind) else None
        return None if found is None or re.search(NUL_ESCAPE, found) else found

    texts = [_or_none(canonical, text) for text in raw.to_pylist()]
    return pa.ExtensionArray.from_storage(JSON, pa.array(texts, pa.string()))


def quarantine_json(row: Mapping[str, Any]) -> str:
    """``row`` as text that jsonb takes; where it cannot, the exact bytes in base64 beside a readable form."""
    text = orjson.dumps(row, option=orjson.OPT_SORT_KEYS).decode()
    if not re.search(NUL_ESCAPE, text):
        return text
    return orjson.dumps(
        {
            "_raw": text.replace("\\u0000", "\N{SYMBOL FOR NULL}"),
            "_base64": base64.b64encode(text.encode()).decode(),
        }
    ).decode()

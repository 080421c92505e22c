"""Any JSON in any field of any format's records: translated or refused with a reason, never an error of ours."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.importing import FORMATS, format_named
from feedback.payloads import PayloadError, parse_event, parse_interaction
from tests.unit import test_chatlog, test_langfuse, test_otlp
from tests.unit.test_import_formats import NAMES, exported

RECORDS: dict[str, list[Any]] = {name: exported(name) for name in NAMES} | {
    "chatlog": [test_chatlog.LOGGED, test_chatlog.TRAINED],
    "langfuse": [
        *({**test_langfuse.SCORE, **fields} for fields in ({"value": 4}, {"value": "x"})),
        test_langfuse.TRACE_RECORD,
        test_langfuse.GENERATION,
    ],
    "otlp": [
        test_otlp.as_json(test_otlp.traces(test_otlp.retriever())),
        test_otlp.as_json(test_otlp.traces(test_otlp.span(test_otlp.CHAT | test_otlp.annotation(name="q")))),
        test_otlp.as_json(
            test_otlp.logs(test_otlp.record(test_otlp.evaluation(name="q", score_value=4, score_label="x")))
        ),
    ],
}
HOSTILE: list[Any] = [
    None,
    True,
    -1,
    0.5,
    10**20,
    10**400,
    -(10**400),
    1e300,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1e999",
    "nan",
    "NaN seconds",
    "0001-01-01T00:00:00+23:59",
    "9999-12-31T23:59:59-23:59",
    "\ud800",
    "[" * 5000,
    [],
    {},
    [[]],
    [None],
    [{}],
    {"text": 5},
    {"id": [1]},
]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(HOSTILE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a record, itself included."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def changed(record: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    whole = copy.copy(record)
    whole[path[0]] = changed(record[path[0]], path[1:], value)
    return whole


def read(name: str, record: Any) -> None:
    try:
        for item in format_named(name).to_items(record):
            (parse_interaction if item.kind == "interaction" else parse_event)(json.dumps(item.body).encode())
    except PayloadError as error:
        assert error.message


PLACES = [
    (name, number, path)
    for name, records in RECORDS.items()
    for number, record in enumerate(records)
    for path in places(record)
]


def test_every_format_is_tried() -> None:
    assert sorted(RECORDS) == sorted(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_known_to_hurt_hurts_nowhere(name: str) -> None:
    for number, path in ((number, path) for format, number, path in PLACES if format == name):
        for value in HOSTILE:
            read(name, changed(RECORDS[name][number], path, value))


@settings(deadline=None)
@given(st.sampled_from(PLACES), ANYTHING)
def test_nothing_hurts_anywhere(place: tuple[str, int, tuple[Any, ...]], value: Any) -> None:
    name, number, path = place
    read(name, changed(RECORDS[name][number], path, value))

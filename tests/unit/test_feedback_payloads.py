"""Validation of what clients send, cutting bodies into items, and the canonical hash."""

import json
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.payloads import (
    MAX_JSON_BYTES,
    PayloadError,
    body_sha256,
    item_id,
    parse_event,
    parse_interaction,
    split,
)

EVENT_ID = "01932f6e-4a00-7000-8000-0000000000b1"
INTERACTION: dict[str, Any] = {
    "interaction_id": "i-1",
    "messages": [{"role": "user", "content": "How?"}],
    "output": "So.",
    "user_id": "ana",
    "metadata": {"b": 1, "a": [1, 2, {"z": None}]},
}
THUMB: dict[str, Any] = {"event_id": EVENT_ID, "kind": "thumb", "score": 1, "interaction_id": "i-1"}


def encoded(item: Any) -> bytes:
    return json.dumps(item).encode()


def event_error(**changes: Any) -> PayloadError:
    with pytest.raises(PayloadError) as caught:
        parse_event(encoded({key: value for key, value in (THUMB | changes).items() if value is not ...}))
    return caught.value


def raw_interaction_error(raw: bytes) -> PayloadError:
    with pytest.raises(PayloadError) as caught:
        parse_interaction(raw)
    return caught.value


def interaction_error(**changes: Any) -> PayloadError:
    return raw_interaction_error(encoded(INTERACTION | changes))


def test_an_unknown_field_is_named_with_its_path() -> None:
    assert event_error(sentiment=1).field == "sentiment"
    error = interaction_error(messages=[{"role": "user", "content": "x", "name": "y"}])
    assert error.field == "messages[0].name"
    assert error.remedy == "Remove it, or put it into metadata"


@pytest.mark.parametrize("column", ["received_at", "xact_id", "api_key_id", "body_sha256", "user_ref"])
def test_what_the_server_adds_cannot_be_sent(column: str) -> None:
    assert interaction_error(**{column: "x"}).field == column


def test_a_missing_field_is_named() -> None:
    assert event_error(kind=...).field == "kind"
    assert raw_interaction_error(b'{"interaction_id": "i"}').field == "messages"


@pytest.mark.parametrize(
    ("field", "value", "choice"),
    [
        ("kind", "stars", "thumb"),
        ("op", "delete", "retract"),
        ("annotator_kind", "human", "HUMAN"),
        ("scope", "x", "span"),
    ],
)
def test_an_unknown_choice_is_answered_with_the_known_ones(field: str, value: str, choice: str) -> None:
    error = event_error(**{field: value})
    assert error.field == field
    assert choice in (error.remedy or "")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("interaction_id", ""),
        ("interaction_id", "x" * 201),
        ("messages", []),
        ("messages", [{"role": "user", "content": "x" * 1_000_001}]),
        ("input_tokens", -1),
        ("input_tokens", 2**31),
        ("input_tokens", "3"),
        ("cost_usd", -0.1),
        ("train_ok", 1),
        ("metadata", {"x": "y" * MAX_JSON_BYTES}),
        ("metadata", [1]),
        ("retrieved", [{"rank": 1}]),
        ("occurred_at", 1_700_000_000),
    ],
)
def test_values_out_of_bounds_are_refused(field: str, value: Any) -> None:
    error = interaction_error(**{field: value})
    assert error.field is not None
    assert error.field.startswith(field)


@pytest.mark.parametrize("time", ["2026-01-31T12:00:00", "2026-01-31 12:00:00"])
def test_a_naive_time_is_refused_with_the_remedy(time: str) -> None:
    error = event_error(occurred_at=time)
    assert error.field == "occurred_at"
    assert "offset" in error.message
    assert "2026-01-31T12:00:00Z" in (error.remedy or "")


@pytest.mark.parametrize(
    "time", ["yesterday", "2026-13-01T00:00:00Z", "1999-12-31T23:59:59Z", "0001-01-01T00:00:00+14:00"]
)
def test_a_time_that_cannot_be_is_refused(time: str) -> None:
    assert event_error(occurred_at=time).field == "occurred_at"


@pytest.mark.parametrize("text", ["a\0b", "\ud800", "b\udfff"])
@pytest.mark.parametrize("place", ["output", "metadata", "messages"])
def test_text_that_postgres_cannot_hold_is_refused_by_field(text: str, place: str) -> None:
    value = {
        "output": text,
        "metadata": {"deep": [{"key": text}]},
        "messages": [{"role": "user", "content": text}],
    }[place]
    error = interaction_error(**{place: value})
    expected = {"output": "output", "metadata": "metadata.deep[0].key", "messages": "messages[0].content"}[
        place
    ]
    assert error.field == expected
    assert error.remedy


def test_a_nul_in_a_key_is_refused() -> None:
    assert interaction_error(metadata={"a\0": 1}).field == "metadata"


def test_an_escaped_backslash_before_u0000_is_not_a_nul() -> None:
    assert parse_interaction(encoded(INTERACTION | {"output": "\\u0000"})).output == "\\u0000"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(number: str) -> None:
    raw = encoded(THUMB).replace(b'"score": 1', b'"score": ' + number.encode())
    with pytest.raises(PayloadError) as caught:
        parse_event(raw)
    assert caught.value.field == "score"


def test_bad_utf8_and_deep_nesting_are_refused() -> None:
    for raw in (
        encoded(INTERACTION).replace(b"So.", b"\xff"),
        encoded(INTERACTION).replace(
            b'"So."', b"null, " + b'"metadata": {"x": ' + b"[" * 5000 + b"]" * 5000 + b"}"
        ),
    ):
        assert raw_interaction_error(raw).message


def test_a_thumb_fills_what_was_not_sent() -> None:
    assert parse_event(encoded(THUMB)).label == "up"
    down = parse_event(encoded({"kind": "thumb", "label": "down", "interaction_id": "i"}))
    assert (down.score, down.label) == (0.0, "down")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"score": 0.5}, "score"),
        ({"score": ..., "label": ...}, "score"),
        ({"score": ..., "label": "good"}, "label"),
        ({"score": 1, "label": "down"}, "label"),
        ({"kind": "rating", "score": 1.01}, "score"),
        ({"kind": "rating", "score": ...}, "score"),
        ({"kind": "correction"}, "correction"),
        ({"correction": "better"}, "correction"),
        ({"kind": "comment"}, "explanation"),
        ({"kind": "flag"}, "label"),
        ({"kind": "category"}, "label"),
        ({"kind": "preference"}, "value"),
        ({"kind": "implicit"}, "label"),
        ({"kind": "implicit", "label": "seen"}, "label"),
        ({"op": "revise"}, "feedback_id"),
        ({"op": "retract"}, "feedback_id"),
        ({"interaction_id": ...}, "interaction_id"),
        ({"scope": "session"}, "session_id"),
        ({"scope": "span"}, "span_id"),
        ({"trace_id": "XYZ"}, "trace_id"),
        ({"event_id": "7"}, "event_id"),
        ({"reasons": ["x"] * 51}, "reasons"),
    ],
)
def test_rules_of_each_kind(changes: dict[str, Any], field: str) -> None:
    error = event_error(**changes)
    assert error.field == field
    assert error.remedy or error.message


@pytest.mark.parametrize("kind", ["thumb", "rating", "correction", "comment", "preference", "implicit"])
def test_a_retract_needs_no_content(kind: str) -> None:
    event = parse_event(encoded({"kind": kind, "op": "retract", "feedback_id": EVENT_ID}))
    assert event.feedback_id == UUID(EVENT_ID)


def shuffled(value: Any, randomly: Any) -> Any:
    if isinstance(value, dict):
        keys = list(value)
        randomly.shuffle(keys)
        return {key: shuffled(value[key], randomly) for key in keys}
    if isinstance(value, list):
        return [shuffled(member, randomly) for member in value]
    return value


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abcé", min_size=1), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(st.text("abcé", min_size=1), json_values, max_size=5),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_the_hash_ignores_key_order_spelling_and_white_space(
    metadata: Any, randomly: Any, ascii_only: bool
) -> None:
    item = INTERACTION | {"metadata": metadata}
    other = json.dumps(shuffled(item, randomly), indent=2, ensure_ascii=ascii_only).encode()
    assert body_sha256(parse_interaction(encoded(item)), "p") == body_sha256(parse_interaction(other), "p")


def test_the_hash_ignores_spelled_out_defaults_and_the_offset() -> None:
    short = parse_event(encoded(THUMB | {"occurred_at": "2026-01-31T12:00:00Z"}))
    long = parse_event(
        encoded(
            THUMB
            | {
                "op": "create",
                "annotator_kind": "HUMAN",
                "label": "up",
                "explanation": None,
                "scope": "interaction",
            }
            | {"occurred_at": "2026-01-31T14:00:00+02:00", "event_id": EVENT_ID.upper(), "score": 1.0}
        )
    )
    assert body_sha256(short, None) == body_sha256(long, None)


@given(st.sampled_from(["output", "session_id", "model", "variant"]), st.text("xyz", min_size=1, max_size=5))
def test_the_hash_sees_every_change(field: str, value: str) -> None:
    changed = INTERACTION | {field: f"other {value}"}
    assert body_sha256(parse_interaction(encoded(INTERACTION)), "p") != body_sha256(
        parse_interaction(encoded(changed)), "p"
    )


def test_the_hash_knows_the_person_by_pseudonym_only() -> None:
    ana = parse_interaction(encoded(INTERACTION))
    bo = parse_interaction(encoded(INTERACTION | {"user_id": "bo"}))
    assert body_sha256(ana, "same") == body_sha256(bo, "same")
    assert body_sha256(ana, "one") != body_sha256(ana, "two")


def test_split_tells_one_from_many() -> None:
    assert split(b' {"a": 1}') == ([b' {"a": 1}'], True)
    items, single = split(b'[{"a": 1}, 3, null]')
    assert (len(items), single) == (3, False)
    assert split(b"[]") == ([], False)


@pytest.mark.parametrize("poison", ['{"x": NaN}', '{"x": "\\ud800"}', '{"x": "a\\udc00b"}', '{"x": 1e999}'])
def test_split_keeps_the_neighbours_of_a_poisoned_item(poison: str) -> None:
    items, _ = split(f"[{encoded(THUMB).decode()}, {poison}, {encoded(THUMB).decode()}]".encode())
    assert parse_event(items[0]).event_id == parse_event(items[2]).event_id == UUID(EVENT_ID)
    with pytest.raises(PayloadError):
        parse_event(items[1])


@pytest.mark.parametrize(
    "body", [b"", b"3", b'{"a": 1', b'[{"a": 1},', b'{"a" 1}', b'{"a": 1} x', b"[" * 200_000, b'{"a": \xff}']
)
def test_a_body_that_cannot_be_cut_is_refused(body: bytes) -> None:
    with pytest.raises(PayloadError) as caught:
        split(body)
    assert caught.value.code == "malformed_json"


def test_malformed_json_is_answered_with_its_position() -> None:
    with pytest.raises(PayloadError, match=r"line 2, column 7"):
        split(b'{"a": 1,\n "b": x}')


def test_the_id_of_a_refused_item_is_found_if_it_can_be_read() -> None:
    assert item_id(b'{"event_id": "e", "score": NaN}', "event_id") == "e"
    for unreadable in (b'{"event_id": 3}', b'{"event_id": "\\ud800"}', b"[1]", b"{", b"\xff"):
        assert item_id(unreadable, "event_id") is None

"""Langfuse's records as items and back: every type of score, every target, traces and generations."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.formats import Item, langfuse
from feedback.payloads import PayloadError, parse_event, parse_interaction

TRACE, OBSERVATION = "ab" * 16, "cd" * 8
SCORE = {
    "id": "score-1",
    "traceId": TRACE,
    "observationId": OBSERVATION,
    "sessionId": None,
    "datasetRunId": None,
    "name": "helpful",
    "source": "API",
    "timestamp": "2026-01-31T12:00:00.000Z",
    "createdAt": "2026-01-31T12:00:00.100Z",
    "updatedAt": "2026-01-31T12:00:00.200Z",
    "authorUserId": None,
    "comment": "Because",
    "metadata": {"page": "/help"},
    "configId": None,
    "queueId": None,
    "environment": "production",
}


def score(**fields: Any) -> dict[str, Any]:
    return SCORE | fields


def translated(record: dict[str, Any]) -> dict[str, Any]:
    """The body of the one item of ``record``, which our own API would take."""
    (item,) = langfuse.to_items(record)
    parse = parse_interaction if item.kind == "interaction" else parse_event
    parse(json.dumps(item.body).encode())
    return item.body


SCORES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "numeric": (
        {"dataType": "NUMERIC", "value": 0.75},
        {"kind": "rating", "score": 0.75, "explanation": "Because"},
    ),
    "numeric on another scale": (
        {"dataType": "NUMERIC", "value": 4},
        {"kind": "category", "label": "4", "value": 4, "explanation": "Because"},
    ),
    "boolean": (
        {"dataType": "BOOLEAN", "value": 1, "stringValue": "True"},
        {"kind": "thumb", "score": 1.0, "label": "up", "explanation": "Because"},
    ),
    "boolean of version 3": (
        {"dataType": "BOOLEAN", "value": False},
        {"kind": "thumb", "score": 0.0, "label": "down", "explanation": "Because"},
    ),
    "boolean of a judge": (
        {"dataType": "BOOLEAN", "value": 1, "source": "EVAL"},
        {"kind": "rating", "score": 1.0, "label": "true", "explanation": "Because", "annotator_kind": "LLM"},
    ),
    "categorical": (
        {"dataType": "CATEGORICAL", "value": None, "stringValue": "partly"},
        {"kind": "category", "label": "partly", "explanation": "Because"},
    ),
    "categorical of a config": (
        {"dataType": "CATEGORICAL", "value": 2, "stringValue": "partly"},
        {"kind": "category", "label": "partly", "value": 2},
    ),
    "text": (
        {"dataType": "TEXT", "value": "Too long", "comment": "by QA"},
        {"kind": "comment", "explanation": "Too long"},
    ),
    "correction": (
        {"dataType": "CORRECTION", "name": "output", "value": "Thus.", "source": "ANNOTATION"},
        {"kind": "correction", "correction": "Thus.", "author_role": "reviewer", "explanation": "Because"},
    ),
    "no type, a number": ({"value": 0.5}, {"kind": "rating", "score": 0.5}),
    "no type, a text": ({"value": "good"}, {"kind": "category", "label": "good"}),
}


@pytest.mark.parametrize("name", SCORES)
def test_every_type_of_score_there_and_back(name: str) -> None:
    fields, expected = SCORES[name]
    record = {key: value for key, value in score(**fields).items() if key != "authorUserId"}
    body = translated(record)
    assert {key: body.get(key) for key in expected} == expected
    assert langfuse.from_items(list(langfuse.to_items(record))) == record


def test_a_score_of_version_3_with_its_subject() -> None:
    record = {
        "id": "s",
        "projectId": "p",
        "name": "helpful",
        "source": "API",
        "timestamp": "2026-01-31T12:00:00.000Z",
        "dataType": "NUMERIC",
        "value": 1,
        "subject": {"kind": "observation", "id": OBSERVATION, "traceId": TRACE},
    }
    body = translated(record)
    assert (body["interaction_id"], body["span_id"]) == (f"{TRACE}:{OBSERVATION}", OBSERVATION)
    assert langfuse.from_items(list(langfuse.to_items(record))) == record


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"traceId": TRACE, "observationId": OBSERVATION},
            {"interaction_id": f"{TRACE}:{OBSERVATION}", "trace_id": TRACE, "span_id": OBSERVATION},
        ),
        ({"traceId": TRACE}, {"interaction_id": TRACE, "trace_id": TRACE, "scope": "trace"}),
        ({"traceId": "answer-7"}, {"interaction_id": "answer-7"}),
        ({"traceId": "t", "observationId": "o"}, {"interaction_id": "t:o"}),
        ({"observationId": "o"}, {"interaction_id": "o"}),
        ({"traceId": "t", "sessionId": "s"}, {"interaction_id": "t", "session_id": "s"}),
        ({"sessionId": "s"}, {"scope": "session", "session_id": "s"}),
        ({"subject": {"kind": "session", "id": "s"}}, {"scope": "session", "session_id": "s"}),
        ({"subject": {"kind": "trace", "id": "t"}}, {"interaction_id": "t"}),
    ],
)
def test_what_a_score_is_about(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    record = {"id": "s", "name": "helpful", "value": 1} | fields
    body = translated(record)
    names = ("scope", "interaction_id", "trace_id", "span_id", "session_id")
    assert {name: body[name] for name in names if name in body} == expected
    assert langfuse.from_items(list(langfuse.to_items(record))) == record


def test_a_score_of_a_dataset_run_is_refused() -> None:
    with pytest.raises(PayloadError, match="about no trace"):
        translated({"id": "s", "name": "n", "value": 1, "datasetRunId": "r"})


def test_who_judged() -> None:
    def kind(**fields: Any) -> Any:
        return translated(score(value=1, **fields))["annotator_kind"]

    assert [kind(source=source) for source in ("API", "EVAL", "ANNOTATION")] == ["HUMAN", "LLM", "HUMAN"]
    assert kind(metadata={"annotator_kind": "code"}) == "CODE"


def test_people_are_named_only_where_they_become_pseudonyms() -> None:
    body = translated(score(value=1, authorUserId="person-ana", trace={"userId": "person-ana"}))
    assert body.pop("author_id") == "person-ana"
    assert "person-ana" not in json.dumps(body)


def test_an_unchanged_record_makes_the_same_event_and_an_edited_one_a_later_event() -> None:
    first, again = translated(score(value=1)), translated(score(value=1))
    edited = translated(score(value=0, updatedAt="2026-02-01T00:00:00.000Z"))
    assert first == again
    assert edited["feedback_id"] == first["feedback_id"]
    assert edited["event_id"] != first["event_id"]
    assert edited["occurred_at"] > first["occurred_at"]


def test_owners_are_kept_apart() -> None:
    ids = {
        item.body["feedback_id"] for owner in ("a", "b") for item in langfuse.to_items(score(value=1), owner)
    }
    assert len(ids) == 2


TRACE_RECORD = {
    "id": TRACE,
    "timestamp": "2026-01-31T12:00:00.000Z",
    "name": "ask",
    "input": "How?",
    "output": "So.",
    "sessionId": "s",
    "release": "1.2",
    "version": "3",
    "metadata": {"a": 1},
    "tags": ["x"],
    "public": False,
    "latency": 1.234,
    "totalCost": 0.001,
}
GENERATION = {
    "id": OBSERVATION,
    "traceId": TRACE,
    "type": "GENERATION",
    "name": "llm",
    "startTime": "2026-01-31T12:00:00.000Z",
    "endTime": "2026-01-31T12:00:01.500Z",
    "model": "m",
    "modelParameters": {"temperature": 0},
    "input": [{"role": "user", "content": "How?"}],
    "output": {"role": "assistant", "content": "So."},
    "usageDetails": {"input": 12, "output": 5, "total": 17},
    "costDetails": {"total": 0.001},
    "promptName": "answer",
    "promptVersion": 3,
    "level": "DEFAULT",
}


def test_a_trace() -> None:
    body = translated(TRACE_RECORD | {"userId": "person-ana"})
    assert body["messages"] == [{"role": "user", "content": "How?"}]
    assert (body["interaction_id"], body["output"], body["session_id"]) == (TRACE, "So.", "s")
    assert (body["latency_ms"], body["cost_usd"], body["app_release"]) == (1234, 0.001, "1.2")
    assert (body["user_id"], body["metadata"]["trace_id"]) == ("person-ana", TRACE)
    assert "person-ana" not in json.dumps(body["metadata"])


def test_a_generation() -> None:
    body = translated(GENERATION)
    assert body["interaction_id"] == f"{TRACE}:{OBSERVATION}"
    assert (body["messages"], body["output"]) == ([{"role": "user", "content": "How?"}], "So.")
    assert (body["input_tokens"], body["output_tokens"], body["latency_ms"]) == (12, 5, 1500)
    assert (body["model"], body["prompt_name"], body["prompt_version"]) == ("m", "answer", "3")


@pytest.mark.parametrize(
    "spoken",
    [
        {},
        {"input": {"question": "How?"}},
        {"input": {"messages": [{"role": "user", "content": [{"type": "text", "text": "How?"}]}], "top": 1}},
        {"input": [{"a": 1}, 2], "output": ["x", None]},
        {"input": 7, "output": {"answer": {"text": "So."}}},
        {"output": None},
        {"output": {"choices": [{"message": {"role": "assistant", "content": "So."}}]}},
    ],
)
@pytest.mark.parametrize("record", [TRACE_RECORD, GENERATION])
def test_interactions_there_and_back(record: dict[str, Any], spoken: dict[str, Any]) -> None:
    there = list(langfuse.to_items(record | spoken))
    translated(record | spoken)
    assert langfuse.from_items(there) == record | spoken


def test_what_is_richer_than_text_and_large_comes_back_as_text() -> None:
    part = {"type": "image", "data": "x" * 50_000}
    record = TRACE_RECORD | {"input": [{"role": "user", "content": [part]}]}
    body = translated(record)
    assert body["messages"][0]["content"] == json.dumps(part)


def test_other_observations_yield_nothing() -> None:
    assert list(langfuse.to_items(GENERATION | {"type": "SPAN"})) == []


@pytest.mark.parametrize(
    "record",
    [
        None,
        "x",
        {},
        {"name": "n"},
        {"value": 1},
        {"name": 5, "value": 1, "traceId": "t"},
        score(value=None),
        score(value="x", dataType="NUMERIC"),
        score(value=2, dataType="BOOLEAN"),
        score(value=1, dataType="TEXT"),
        score(value=True, dataType="NUMERIC"),
        score(value=[1], dataType="NUMERIC"),
        score(value=1, dataType="STARS"),
        {"id": "t", "timestamp": "2026-01-31T12:00:00Z", "input": None},
        {"id": "", "timestamp": "2026-01-31T12:00:00Z", "input": "x"},
        {"id": "o", "type": "GENERATION", "startTime": "2026-01-31T12:00:00Z", "input": "x"},
    ],
)
def test_what_is_no_record_is_refused_with_a_remedy(record: Any) -> None:
    with pytest.raises(PayloadError) as refused:
        translated(record)
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"value": 10**400}, "value"),
        ({"value": 10**400, "stringValue": "x", "dataType": "CATEGORICAL"}, "value"),
        ({"value": 1, "timestamp": 1e300}, "occurred_at"),
        ({"value": 1, "timestamp": 10**20}, "occurred_at"),
    ],
)
def test_a_number_beyond_all_bounds_is_refused_by_its_field(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(PayloadError) as refused:
        translated(score(**fields))
    assert refused.value.field == named
    assert refused.value.remedy


def test_from_items_takes_one_record() -> None:
    with pytest.raises(ValueError, match="unpack"):
        langfuse.from_items([Item("feedback", {}), Item("feedback", {})])


FIELDS = st.sampled_from(
    [*SCORE, *TRACE_RECORD, *GENERATION, "value", "stringValue", "dataType", "subject", "usage"]
)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANYTHING = st.recursive(
    PLAIN | st.sampled_from(["GENERATION", "BOOLEAN", "TEXT", "ANNOTATION", "2026-01-31T12:00:00Z"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "choices", "id", "kind"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@given(st.dictionaries(FIELDS, ANYTHING), st.sampled_from([{}, {"id": "i", "name": "n", "traceId": "t"}]))
def test_no_record_breaks_the_translation(record: dict[str, Any], more: dict[str, Any]) -> None:
    try:
        translated(record | more)
    except PayloadError as error:
        assert error.message
    except ValueError as error:
        assert "unpack" in str(error), "no item"

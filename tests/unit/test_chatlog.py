"""Lines of chat logs as interactions and back."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.formats import chatlog
from feedback.payloads import PayloadError, parse_interaction

LOGGED = {
    "timestamp": 1760000000,
    "workload_id": "answer",
    "client_id": "prod",
    "request": {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How?"}],
        "temperature": 0.2,
    },
    "response": {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "m-2026",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "So."}},
            {"index": 1, "finish_reason": "stop", "message": {"role": "assistant", "content": "Or so."}},
        ],
        "usage": {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17},
    },
}
TRAINED = {
    "messages": [
        {"role": "user", "content": "How?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Thus."},
    ]
}


def translated(record: Any) -> dict[str, Any]:
    (item,) = chatlog.to_items(record)
    parse_interaction(json.dumps(item.body).encode())
    return item.body


def test_a_logged_call() -> None:
    body = translated(LOGGED)
    metadata = body.pop("metadata")
    assert body == {
        "interaction_id": "chatcmpl-1",
        "messages": LOGGED["request"]["messages"],  # type: ignore[index]
        "output": "So.",
        "occurred_at": "2025-10-09T08:53:20+00:00",
        "prompt_name": "answer",
        "model": "m-2026",
        "input_tokens": 12,
        "output_tokens": 5,
    }
    assert metadata["chatlog"]["rest"] == {"timestamp": 1760000000, "client_id": "prod"}
    assert "So." not in json.dumps(metadata).replace("Or so.", ""), "the answer is not stored twice"


def test_a_training_line() -> None:
    body = translated(TRAINED)
    assert body["output"] == "Thus."
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert translated(TRAINED)["interaction_id"] == body["interaction_id"]
    assert translated({"messages": TRAINED["messages"][:2]})["interaction_id"] != body["interaction_id"]
    assert "output" not in translated({"messages": [{"role": "user", "content": "How?"}]})


def test_an_id_of_ours_is_of_one_app_and_an_id_of_theirs_stays() -> None:
    def ids(record: Any) -> list[str]:
        owners = ("", "a", "a", "b")
        return [item.body["interaction_id"] for owner in owners for item in chatlog.to_items(record, owner)]

    for record in (TRAINED, {"request": LOGGED["request"]}):
        none, first, again, second = ids(record)
        assert first == again
        assert len({none, first, second}) == 3
    assert set(ids(LOGGED)) == {"chatcmpl-1"}


CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "find"}}]}


@pytest.mark.parametrize(
    "record",
    [
        LOGGED,
        LOGGED | {"response": None},
        LOGGED | {"timestamp": "2026-01-31T12:00:00Z"},
        LOGGED | {"response": {"id": "r", "choices": [{"index": 0, "message": CALL}]}},
        LOGGED | {"request": {"messages": [{"role": "user", "content": [{"type": "text", "text": "How?"}]}]}},
        {"request": LOGGED["request"]},
        TRAINED,
        TRAINED | {"tools": [{"type": "function"}], "parallel_tool_calls": False},
        {"messages": [{"role": "user", "content": "How?"}, CALL]},
        {"messages": [{"role": "user", "content": "How?", "name": "a"}]},
        {
            "messages": [
                {"role": "user", "content": "How?"},
                {"role": "assistant", "content": "So.", "weight": 0},
            ]
        },
    ],
)
def test_there_and_back(record: dict[str, Any]) -> None:
    translated(record)
    assert chatlog.from_items(list(chatlog.to_items(record))) == record


def test_people_are_named_only_where_they_become_pseudonyms() -> None:
    record = json.loads(json.dumps(LOGGED))
    record["request"]["user"] = "person-ana"
    body = translated(record)
    assert body.pop("user_id") == "person-ana"
    assert "person-ana" not in json.dumps(body)
    nameless = [{"request": record["request"] | {"user": user}} for user in ("ana", "ben")]
    assert len({translated(one)["interaction_id"] for one in nameless}) == 1, "it could be guessed back"


@pytest.mark.parametrize("choices", [5, {}, "x", [None], [{}], [{"message": 5}], [[1]]])
def test_wrong_choices_are_read_as_far_as_they_go(choices: Any) -> None:
    record = LOGGED | {"response": {"id": "r", "choices": choices}}
    translated(record)
    assert chatlog.from_items(list(chatlog.to_items(record))) == record


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        {},
        {"request": 5},
        {"request": {}},
        {"request": {"messages": "x"}},
        {"request": {"messages": []}},
        {"messages": [5]},
        {"messages": []},
        LOGGED | {"response": 5},
        LOGGED | {"timestamp": 1e30},
        LOGGED | {"timestamp": 1760000000000},
        {"messages": [{"role": "narrator", "content": "x"}]},
    ],
)
def test_other_lines_are_refused_with_a_remedy(record: Any) -> None:
    with pytest.raises(PayloadError) as refused:
        translated(record)
    assert refused.value.remedy


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "messages",
                    "role",
                    "content",
                    "choices",
                    "message",
                    "id",
                    "usage",
                    "tool_calls",
                    "type",
                    "text",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*LOGGED, "messages", "user"]), ANYTHING), st.booleans())
def test_no_line_breaks_the_translation(record: dict[str, Any], asked: bool) -> None:
    question = {"request": {"messages": [{"role": "user", "content": "How?"}], **record}} if asked else {}
    try:
        translated(record | question)
    except PayloadError as error:
        assert error.message

"""Exports of other systems: what they become, that nothing is lost on the way, and what is no export is refused.

The exports in ``tests/exports`` were written for these tests after each system's documentation.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.formats import Item
from feedback.formats.records import from_messages, from_text, to_messages, to_text
from feedback.importing import ImportRefused, format_named, records
from feedback.payloads import PayloadError, parse_event, parse_interaction

EXPORTS = Path(__file__).parents[1] / "exports"
NAMES = sorted(path.stem for path in EXPORTS.glob("*.jsonl"))
PEOPLE = ("jo@example.com", "ana@example.com", "VXNlcjox", '"jo"')
# Who said something becomes a pseudonym; what MLflow's spans and usage say in other words is not asked back.
PERSONAL = {
    "user_id",
    "created_by",
    "last_updated_by",
    "completed_by",
    "updated_by",
    "user.id",
    "mlflow.trace.user",
}


def exported(name: str) -> list[Any]:
    return [record for _, record in records(EXPORTS / f"{name}.jsonl")]


def without_people(value: Any, *, human: bool = False) -> Any:
    if isinstance(value, list):
        return [without_people(one) for one in value]
    if isinstance(value, dict):
        drop = PERSONAL | ({"source_id"} if value.get("source_type") == "HUMAN" else set())
        return {k: without_people(v) for k, v in value.items() if k not in drop}
    return value


def items_of(name: str) -> list[list[Item]]:
    read = format_named(name)
    return [list(read.to_items(record)) for record in exported(name)]


@pytest.mark.parametrize("name", NAMES)
def test_the_export_can_be_made_again(name: str) -> None:
    read = format_named(name)
    for record, items in zip(exported(name), items_of(name), strict=True):
        assert json.dumps(read.from_items(items), sort_keys=True) == json.dumps(
            without_people(record), sort_keys=True
        )


@pytest.mark.parametrize("name", NAMES)
def test_every_item_is_accepted_and_names_nobody(name: str) -> None:
    for item in (item for items in items_of(name) for item in items):
        raw = json.dumps(item.body).encode()
        (parse_interaction if item.kind == "interaction" else parse_event)(raw)
        body = {k: v for k, v in item.body.items() if k not in ("user_id", "author_id")}
        assert not any(person in json.dumps(body) for person in PEOPLE)


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_the_last_import(name: str) -> None:
    assert items_of(name) == items_of(name)
    events = [i.body["event_id"] for items in items_of(name) for i in items if i.kind == "feedback"]
    assert len(events) == len(set(events))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("record", [None, 3, "x", [], {}, {"id": ""}, {"info": 3}, {"id": None, "key": 1}])
def test_what_is_no_export_is_refused_with_the_field(name: str, record: Any) -> None:
    with pytest.raises(PayloadError) as refused:
        list(format_named(name).to_items(record))
    assert refused.value.remedy


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(JSON)
def test_any_input_and_output_comes_back_as_it_was(value: Any) -> None:
    assert from_text(*to_text(value)) == value
    assert from_messages(*to_messages(value)) == value


def kinds(name: str, key: str) -> dict[str, Any]:
    """Events by ``key`` of their body."""
    return {i.body[key]: i.body for items in items_of(name) for i in items if i.kind == "feedback"}


def test_langsmith() -> None:
    run = items_of("langsmith")[0][0].body
    assert run["messages"][1] == {"role": "user", "content": "Wie lange hält die Batterie?"}
    assert (run["output"], run["session_id"], run["latency_ms"]) == ("Zwei Jahre.", "t-9", 1500.0)
    assert (run["model"], run["provider"], run["user_id"]) == ("in-house-7b", "vllm", "jo@example.com")
    thumb, rating, correction, stars = (item.body for item in items_of("langsmith")[0][1:])
    assert (thumb["kind"], thumb["score"], thumb["explanation"]) == ("thumb", 1.0, "👍 thanks")
    assert (rating["kind"], rating["score"], rating["annotator_kind"]) == ("rating", 0.25, "LLM")
    assert correction["correction"] == "Zwei Jahre, im Gefrierschrank eines."
    assert (stars["kind"], stars["value"]) == ("category", 4)


def test_mlflow_overrides_are_revisions_and_invalid_ones_withdrawn() -> None:
    first, second, judge, expected, listed = (item.body for item in items_of("mlflow")[0][1:])
    assert second["feedback_id"] == first["feedback_id"] and second["revision"] > first["revision"]
    assert (second["op"], second["score"]) == ("revise", 1.0)
    assert (judge["annotator_kind"], judge["identifier"], judge["score"]) == ("LLM", "judge-7b", 0.75)
    assert (expected["kind"], expected["correction"]) == ("correction", "Order a courier.")
    assert listed["value"] == {"value": ["a", "b"]}
    alone = exported("mlflow")[0]
    alone["info"]["assessments"] = [alone["info"]["assessments"][0]]
    (_, withdrawn) = format_named("mlflow").to_items(alone)
    assert withdrawn.body["op"] == "retract"


def test_phoenix_and_opik_judgements() -> None:
    phoenix = kinds("phoenix", "name")
    assert (phoenix["quality"]["score"], phoenix["quality"]["label"]) == (1.0, "good")
    assert phoenix["relevance"]["kind"] == "category"
    opik = kinds("opik", "name")
    assert (opik["hallucination"]["annotator_kind"], opik["hallucination"]["score"]) == ("LLM", 0.0)
    assert (opik["stars"]["kind"], opik["stars"]["value"]) == ("category", 4.0)


def test_label_studio_regions() -> None:
    task = items_of("label_studio")[0][0].body
    assert (task["output"], task["model"]) == ("Drop it at a shop.", "in-house-7b")
    found = kinds("label_studio", "name")
    assert found["answer"]["correction"] == "Order a courier."
    assert (found["verdict"]["label"], found["better"]["label"]) == ("wrong", "left")
    assert found["why"]["explanation"] == "Shops stopped\nin May."
    assert found["annotation"]["label"] == "skipped"


@pytest.mark.parametrize(
    ("text", "count"),
    [('{"a": 1}\n\n{"a": 2}\n', 2), ('[{"a": 1}, {"a": 2}, {"a": 3}]', 3), ('{\n "a": 1\n}\n', 1), ("[]", 0)],
)
def test_files_of_every_form(tmp_path: Path, text: str, count: int) -> None:
    path = tmp_path / "export.json"
    path.write_text("\ufeff" + text, encoding="utf-8")
    assert len(list(records(path))) == count


@pytest.mark.parametrize(
    "content", [b'{"a": 1}\nnot json\n', b"", b"\xff\xfe", b"[" * 100_000, b'{"a": 1}\n' + b"9" * 5000]
)
def test_files_that_are_no_export(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "export.jsonl"
    path.write_bytes(content)
    with pytest.raises(ImportRefused, match=r"export\.jsonl"):
        list(records(path))

"""The API description: it covers the routes, resolves, and its examples are accepted."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route

import feedback
from feedback import openapi
from feedback.admin import NewKey
from feedback.app import create_app
from feedback.compat.shared import encoded
from feedback.formats import Item, chatlog, langfuse, otlp
from feedback.front import Front
from feedback.payloads import parse_event, parse_interaction


@pytest.fixture(scope="module")
def app() -> Front:
    return create_app("postgresql://nowhere/none", pseudonym_key=b"k" * 32)


@pytest.fixture(scope="module")
def document(app: Front) -> dict[str, Any]:
    return app.openapi()


def test_every_route_of_the_api_is_described(app: Front, document: dict[str, Any]) -> None:
    served = {
        (re.sub(r":\w+}", "}", route.path), method.lower())
        for route in app.routes
        if isinstance(route, Route) and route.path.startswith("/v1/")
        for method in (route.methods or set()) - {"HEAD", "OPTIONS"}
    }
    described = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert {("/v1/interactions", "post"), ("/v1/feedback", "post")} <= served
    assert served <= described
    assert {("/healthz", "get"), ("/readyz", "get")} <= described


def test_the_answers_of_capture_are_described(document: dict[str, Any]) -> None:
    for path in ("/v1/interactions", "/v1/feedback"):
        statuses = set(document["paths"][path]["post"]["responses"])
        assert statuses >= {
            "200",
            "201",
            "207",
            "400",
            "401",
            "403",
            "408",
            "409",
            "413",
            "415",
            "422",
            "429",
            "503",
        }


def test_every_reference_resolves(document: dict[str, Any]) -> None:
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references
    assert references <= set(document["components"]["schemas"])


def test_schemas_come_from_the_payloads(document: dict[str, Any]) -> None:
    event = document["components"]["schemas"]["FeedbackEvent"]
    assert event["required"] == ["kind"]
    assert event["additionalProperties"] is False
    assert "thumb" in event["properties"]["kind"]["enum"]


def test_the_examples_are_valid() -> None:
    assert parse_interaction(json.dumps(openapi.INTERACTION).encode()).interaction_id
    for example in (openapi.THUMB, openapi.CORRECTION):
        assert (
            parse_event(json.dumps(example).encode()).interaction_id == openapi.INTERACTION["interaction_id"]
        )


def _scores(batch: Any) -> Iterator[Item]:
    for event in batch["batch"]:
        assert event["type"] == "score-create"
        yield from langfuse.to_items(event["body"])


@pytest.mark.parametrize(
    ("path", "to_items", "kind"),
    [
        ("/v1/traces", otlp.to_items, "interaction"),
        ("/api/public/otel/v1/traces", otlp.to_items, "interaction"),
        ("/v1/logs", otlp.to_items, "feedback"),
        ("/api/public/scores", langfuse.to_items, "feedback"),
        ("/api/public/ingestion", _scores, "feedback"),
        ("/v1/chatlogs", chatlog.to_items, "interaction"),
    ],
)
def test_the_examples_of_other_formats_can_be_stored(
    document: dict[str, Any], path: str, to_items: Callable[[Any], Iterator[Item]], kind: str
) -> None:
    examples = _examples(document, path)
    assert examples
    for example in examples:
        items = list(to_items(example))
        assert [item.kind for item in items] == [kind]
        for item in items:
            body = encoded(item.body)
            assert parse_interaction(body) if kind == "interaction" else parse_event(body)


def test_the_judgement_in_the_examples_is_about_their_span(document: dict[str, Any]) -> None:
    said, judged, scored = (
        next(to_items(_examples(document, path)[0])).body["interaction_id"]
        for path, to_items in (
            ("/v1/traces", otlp.to_items),
            ("/v1/logs", otlp.to_items),
            ("/api/public/scores", langfuse.to_items),
        )
    )
    assert said == judged == scored


def test_the_examples_of_new_keys_are_valid(document: dict[str, Any]) -> None:
    examples = _examples(document, "/v1/admin/keys")
    assert [NewKey.model_validate(example).scopes for example in examples] == [["ingest"], ["review"]]


def _examples(document: dict[str, Any], path: str) -> list[Any]:
    """The examples of what may be posted to ``path``, of all media types."""
    content = document["paths"][path]["post"]["requestBody"]["content"].values()
    return [example["value"] for media in content for example in media.get("examples", {}).values()]


def test_who_may_be_refused_as_unknown_has_to_say_who_they_are(document: dict[str, Any]) -> None:
    operations = [one for methods in document["paths"].values() for one in methods.values()]
    assert all(("401" in one["responses"]) == bool(one.get("security")) for one in operations)
    assert document["paths"]["/v1/admin/keys"]["get"]["security"]
    assert "security" not in document["paths"]["/healthz"]["get"]


def test_the_docs_page_loads_nothing_from_elsewhere() -> None:
    page = (Path(feedback.__file__).parent / "docs.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]+\.[a-z]+/|innerHTML", page)
    assert "prefers-color-scheme: dark" in page

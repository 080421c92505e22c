"""The API description: it covers the routes, resolves, and its examples are accepted."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route

import feedback
from feedback import openapi
from feedback.app import create_app
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


def test_the_docs_page_loads_nothing_from_elsewhere() -> None:
    page = (Path(feedback.__file__).parent / "docs.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]+\.[a-z]+/|innerHTML", page)
    assert "prefers-color-scheme: dark" in page

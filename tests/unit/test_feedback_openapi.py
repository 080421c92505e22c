"""The API description: it covers the routes, resolves, and its examples are accepted."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import feedback
from feedback import openapi
from feedback.app import create_app
from feedback.payloads import parse_event, parse_interaction


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app("postgresql://nowhere/none", pseudonym_key=b"k" * 32).openapi()


def test_every_route_is_described(document: dict[str, Any]) -> None:
    assert set(document["paths"]) == {"/v1/interactions", "/v1/feedback", "/healthz", "/readyz"}


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

"""Chat logs against the real service: one result a line, sent again without harm."""

import gzip
import json
from collections.abc import Iterator
from typing import Any

import httpx
import psycopg
import pytest

from feedback.ids import uuid7
from feedback.keys import create_key
from tests.integration.conftest import FeedbackService
from tests.unit.test_chatlog import LOGGED, TRAINED

LINES = {"Content-Type": "application/x-ndjson"}


@pytest.fixture
def http(feedback_service: FeedbackService) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {feedback_service.api_key}"} | LINES
    base_url = feedback_service.base_url
    with httpx.Client(base_url=base_url, headers=headers, trust_env=False, timeout=60) as client:
        yield client


def logged(**changes: Any) -> dict[str, Any]:
    response = LOGGED["response"] | {"id": str(uuid7())}  # type: ignore[operator]
    return LOGGED | {"response": response} | changes


def lines(*records: Any) -> bytes:
    return b"\n".join(json.dumps(record).encode() for record in records)


def test_lines_are_stored_once(feedback_service: FeedbackService, http: httpx.Client) -> None:
    record, trained = logged(), TRAINED | {"run": str(uuid7())}
    for status, headers in (("created", {}), ("duplicate", {"Content-Encoding": "gzip"})):
        content = lines(record, trained) + b"\n\n"
        answer = http.post(
            "/v1/chatlogs", content=gzip.compress(content) if headers else content, headers=headers
        )
        assert answer.status_code == 200
        assert [result["status"] for result in answer.json()["results"]] == [status, status]
    with psycopg.connect(feedback_service.database_url, row_factory=psycopg.rows.dict_row) as conn:
        row = conn.execute(
            "SELECT * FROM feedback.interaction WHERE interaction_id = %s", [record["response"]["id"]]
        ).fetchone()
    assert row is not None
    assert (row["output"], row["prompt_name"], row["model"]) == ("So.", "answer", "m-2026")


def test_two_apps_may_load_the_same_line(feedback_service: FeedbackService, http: httpx.Client) -> None:
    line = lines(TRAINED | {"run": str(uuid7())})
    with psycopg.connect(feedback_service.database_url) as conn:
        other = {"Authorization": f"Bearer {create_key(conn, 'another app')[1]}"}
    ids = set()
    for status in ("created", "duplicate"):
        for headers in ({}, other):
            answer = http.post("/v1/chatlogs", content=line, headers=headers)
            (result,) = answer.json()["results"]
            assert (answer.status_code, result["status"]) == (200, status)
            ids.add(result["id"])
    assert len(ids) == 2


def test_each_line_has_its_result(http: httpx.Client) -> None:
    good = logged()
    content = b"\n".join(
        [
            b"not json",
            lines(good),
            b"[]",
            b'{"messages": []}',
            lines(good | {"workload_id": "other"}),
            b'{"messages": ' + b"[" * 5000,
            b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
            b'{"messages": [{"role": "user", "content": "\xff"}]}',
            lines(logged()),
        ]
    )
    answer = http.post("/v1/chatlogs", content=content)
    assert answer.status_code == 207
    statuses = [result["status"] for result in answer.json()["results"]]
    assert statuses == ["invalid", "created", "invalid", "invalid", "conflict", *["invalid"] * 3, "created"]
    for result in answer.json()["results"]:
        assert result["status"] == "created" or result["error"]["remedy"]


def test_limits_and_types(http: httpx.Client) -> None:
    assert http.post("/v1/chatlogs", content=b"{}\n" * 1001).status_code == 413
    assert http.post("/v1/chatlogs", content=b"").json()["results"] == []
    assert http.post("/v1/chatlogs", content=b"{}", headers={"Content-Type": "text/csv"}).status_code == 415

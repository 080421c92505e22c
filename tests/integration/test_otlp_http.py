"""OTLP over HTTP against the real service: both encodings, partial success, retries, refusals."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceResponse,
)

from feedback.formats.otlp_wire import MAX_RECORDS
from feedback.ids import uuid7
from tests.integration.conftest import FeedbackService
from tests.unit.test_otlp import CHAT, annotation, as_json, evaluation, logs, record, span, traces

PROTOBUF = {"Content-Type": "application/x-protobuf"}
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def http(feedback_service: FeedbackService) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {feedback_service.api_key}"}
    base_url = feedback_service.base_url
    with httpx.Client(base_url=base_url, headers=headers, trust_env=False, timeout=60) as client:
        yield client


def rows(service: FeedbackService, table: str, interaction_id: str) -> list[dict[str, Any]]:
    with psycopg.connect(service.database_url, row_factory=psycopg.rows.dict_row) as conn:
        query = f"SELECT * FROM feedback.{table} WHERE interaction_id = %s ORDER BY name"
        return conn.execute(
            query.replace(" ORDER BY name", "") if table == "interaction" else query, [interaction_id]
        ).fetchall()


def chat(interaction_id: str, **more: Any) -> dict[str, Any]:
    return CHAT | {"datamoat.interaction.id": interaction_id} | more


@pytest.mark.parametrize("encoding", ["protobuf", "json"])
@pytest.mark.parametrize("packed", [False, True])
def test_spans_are_stored_once(
    feedback_service: FeedbackService, http: httpx.Client, encoding: str, packed: bool
) -> None:
    name = str(uuid7())
    request = traces(span(chat(name, **annotation(name="q", score=1))), span({"http.method": "GET"}))
    content = request.SerializeToString() if encoding == "protobuf" else json.dumps(as_json(request)).encode()
    headers = PROTOBUF if encoding == "protobuf" else JSON
    if packed:
        content, headers = gzip.compress(content), headers | {"Content-Encoding": "gzip"}
    for _ in range(2):
        answer = http.post("/v1/traces", content=content, headers=headers)
        assert answer.status_code == 200
        assert answer.headers["Content-Type"] == headers["Content-Type"]
        assert answer.content == (b"" if encoding == "protobuf" else b"{}")
    (interaction,) = rows(feedback_service, "interaction", name)
    (event,) = rows(feedback_service, "feedback_event", name)
    assert interaction["messages"] == [{"role": "user", "content": "How?"}]
    assert interaction["metadata"]["trace_id"] == event["trace_id"]
    assert (event["name"], event["score"], event["annotator_kind"]) == ("q", 1.0, "CODE")


def test_feedback_by_log_record(feedback_service: FeedbackService, http: httpx.Client) -> None:
    name = str(uuid7())
    said = evaluation(name="helpful", score_label="thumbs-up") | {"annotator_kind": "HUMAN", "user.id": "ana"}
    content = logs(record(said | {"datamoat.interaction.id": name})).SerializeToString()
    for _ in range(2):
        answer = http.post("/v1/logs", content=content, headers=PROTOBUF)
        assert (answer.status_code, answer.content) == (200, b"")
    (event,) = rows(feedback_service, "feedback_event", name)
    assert (event["kind"], event["label"], event["score"]) == ("thumb", "up", 1.0)
    assert len(event["author_ref"]) == 32


def test_rejected_records_are_counted_and_explained_and_the_others_kept(
    feedback_service: FeedbackService, http: httpx.Client
) -> None:
    name = str(uuid7())
    request = traces(
        span(chat("ana@example.org")),
        span(chat(name)),
        span(CHAT, trace_id=b""),
        span({"gen_ai.operation.name": "chat"}),
        span(chat(str(uuid7()), **annotation(name="q", score=float("nan")))),
        span({}),
    )
    answer = http.post("/v1/traces", content=request.SerializeToString(), headers=PROTOBUF)
    assert answer.status_code == 200
    partial = ExportTraceServiceResponse.FromString(answer.content).partial_success
    assert partial.rejected_spans == 4
    for said in ("span 0: interaction_id: ", "span 2: trace_id: ", "span 3: ", "and 1 more", "1 others are"):
        assert said in partial.error_message
    assert len(rows(feedback_service, "interaction", name)) == 1
    as_text = http.post("/v1/traces", json=as_json(request)).json()
    assert as_text["partialSuccess"]["rejectedSpans"] == "4"
    assert as_text["partialSuccess"]["errorMessage"] == partial.error_message


def test_rejected_log_records_have_names_of_their_own(http: httpx.Client) -> None:
    request = logs(record(evaluation(name="call +49 170 1234567", score_value=1)))
    answer = http.post("/v1/logs", content=request.SerializeToString(), headers=PROTOBUF)
    partial = ExportLogsServiceResponse.FromString(answer.content).partial_success
    assert partial.rejected_log_records == 1
    assert "log record 0: name" in partial.error_message
    assert http.post("/v1/logs", json=as_json(request)).json()["partialSuccess"]["rejectedLogRecords"] == "1"


def test_the_same_span_with_other_content_is_rejected(http: httpx.Client) -> None:
    name = str(uuid7())
    for output, rejected in (("So.", 0), ("So.", 0), ("Not so.", 1)):
        content = traces(span(chat(name, **{"output.value": output}))).SerializeToString()
        answer = http.post("/v1/traces", content=content, headers=PROTOBUF)
        assert (
            ExportTraceServiceResponse.FromString(answer.content).partial_success.rejected_spans == rejected
        )


def test_a_batch_larger_than_one_write_is_stored_whole(
    feedback_service: FeedbackService, http: httpx.Client
) -> None:
    names = [str(uuid7()) for _ in range(2500)]
    content = traces(*[span(chat(name)) for name in names]).SerializeToString()
    answer = http.post("/v1/traces", content=content, headers=PROTOBUF)
    assert (answer.status_code, answer.content) == (200, b"")
    with psycopg.connect(feedback_service.database_url) as conn:
        found = conn.execute(
            "SELECT count(*) FROM feedback.interaction WHERE interaction_id = ANY(%s)", [names]
        ).fetchone()
    assert found == (2500,)


def test_nothing_is_as_good_as_something(http: httpx.Client) -> None:
    for path in ("/v1/traces", "/v1/logs"):
        assert http.post(path, content=b"", headers=PROTOBUF).status_code == 200
        assert http.post(path, json={}).json() == {}


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"garbage in, garbage out", PROTOBUF, 400),
        (b"not gzip", PROTOBUF | {"Content-Encoding": "gzip"}, 400),
        (b"", JSON, 400),
        (b"[]", JSON, 400),
        (b'{"resourceSpans": [', JSON, 400),
        (b'{"resourceSpans": 5}', JSON, 400),
        (b'{"resourceSpans": [' + b"[" * 100_000, JSON, 400),
        (b'{"a":' * 500 + b"1" + b"}" * 500, JSON, 400),
        (b" " * (8 * 1_048_576 + 1), PROTOBUF, 413),
        (traces(*[span({})] * MAX_RECORDS).SerializeToString(), PROTOBUF, 413),
    ],
)
def test_what_cannot_be_read_is_refused_for_good(
    http: httpx.Client, content: bytes, headers: dict[str, str], status: int
) -> None:
    answer = http.post("/v1/traces", content=content, headers=headers)
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == headers["Content-Type"]
    if headers == JSON:
        message = answer.json()["message"]
    else:
        # google.rpc.Status has its message where this one has it.
        message = ExportTracePartialSuccess.FromString(answer.content).error_message
    assert message


def test_other_media_types_are_refused(http: httpx.Client) -> None:
    assert http.post("/v1/traces", content=b"x", headers={"Content-Type": "text/plain"}).status_code == 415


def test_without_a_key_nothing_is_taken(feedback_service: FeedbackService) -> None:
    for headers in ({}, {"Authorization": "Bearer nobody"}, {"Authorization": "Basic !"}):
        answer = httpx.post(
            feedback_service.base_url + "/v1/traces",
            content=b"",
            headers=PROTOBUF | headers,
            trust_env=False,
        )
        assert answer.status_code == 401
        assert ExportTracePartialSuccess.FromString(answer.content).error_message


@pytest.mark.parametrize("path", ["/v1/traces", "/v1/chatlogs"])
@pytest.mark.parametrize("credentials", ["é", "4pyT4", "/w==", "AA==", "AAAA:"])
def test_credentials_that_are_no_text_are_unknown(
    feedback_service: FeedbackService, path: str, credentials: str
) -> None:
    kind = PROTOBUF if path == "/v1/traces" else {"Content-Type": "application/x-ndjson"}
    headers = httpx.Headers(kind | {"Authorization": f"Basic {credentials}"}, encoding="latin-1")
    answer = httpx.post(feedback_service.base_url + path, content=b"", headers=headers, trust_env=False)
    assert answer.status_code == 401


def test_a_file_of_the_collector_is_imported_once(feedback_service: FeedbackService, tmp_path: Path) -> None:
    name, path = str(uuid7()), tmp_path / "traces.json"
    said = evaluation(name="helpful", score_value=0.5)
    lines = [
        as_json(traces(span(chat(name)), span({"http.method": "GET"}))),
        as_json(logs(record(said | {"datamoat.interaction.id": name}))),
        as_json(traces(span({"gen_ai.operation.name": "chat"}))),
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for status in ("created", "duplicate"):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "feedback",
                "import",
                "otlp",
                str(path),
                "--url",
                feedback_service.base_url,
            ],
            env={"PATH": os.environ["PATH"], "DATAMOAT_API_KEY": feedback_service.api_key},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 1, "a record was refused"
        assert status in done.stdout, done.stdout + done.stderr
        (refused,) = (tmp_path / "traces.json.refused.jsonl").read_text().splitlines()
        assert (json.loads(refused)["place"], json.loads(refused)["field"]) == (3, "gen_ai.input.messages")
    assert len(rows(feedback_service, "interaction", name)) == 1
    assert [row["score"] for row in rows(feedback_service, "feedback_event", name)] == [0.5]


def test_a_database_that_is_away_is_worth_a_retry(
    feedback_service: FeedbackService, http: httpx.Client
) -> None:
    content = traces(span(chat(str(uuid7())))).SerializeToString()
    with psycopg.connect(feedback_service.database_url, autocommit=True) as conn:
        conn.execute("ALTER TABLE feedback.interaction RENAME TO away")
        try:
            answer = http.post("/v1/traces", content=content, headers=PROTOBUF)
        finally:
            conn.execute("ALTER TABLE feedback.away RENAME TO interaction")
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert ExportTracePartialSuccess.FromString(answer.content).error_message
    assert http.post("/v1/traces", content=content, headers=PROTOBUF).status_code == 200


def test_the_routes_are_described(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    for path in ("/v1/traces", "/v1/logs", "/v1/chatlogs", "/api/public/scores", "/api/public/ingestion"):
        assert paths[path]["post"]["responses"]

"""Langfuse's routes against the real service, with what its SDKs send and expect."""

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psycopg
import pytest

from feedback.ids import uuid7
from feedback.keys import create_key
from tests.integration.conftest import FeedbackService
from tests.unit.test_otlp import CHAT, span, traces


@pytest.fixture
def http(feedback_service: FeedbackService) -> Iterator[httpx.Client]:
    """As ``@langfuse/browser``: the public key as a bearer."""
    headers = {"Authorization": f"Bearer {feedback_service.api_key}"}
    base_url = feedback_service.base_url
    with httpx.Client(base_url=base_url, headers=headers, trust_env=False, timeout=60) as client:
        yield client


def score(**changes: Any) -> dict[str, Any]:
    item = {
        "id": f"user-feedback-{uuid7()}",
        "traceId": str(uuid7()),
        "name": "user-feedback",
        "value": 1,
        "dataType": "BOOLEAN",
    }
    return item | changes


def created(body: Any, **changes: Any) -> dict[str, Any]:
    """An event as the SDKs wrap it."""
    envelope = {"id": str(uuid7()), "type": "score-create", "timestamp": "2026-01-31T12:00:00.000Z"}
    return envelope | {"body": body} | changes


def history(service: FeedbackService, trace_id: str) -> list[dict[str, Any]]:
    with psycopg.connect(service.database_url, row_factory=psycopg.rows.dict_row) as conn:
        return conn.execute(
            "SELECT * FROM feedback.feedback_event WHERE interaction_id = %s ORDER BY revision", [trace_id]
        ).fetchall()


def now_says(service: FeedbackService, trace_id: str) -> list[Any]:
    (feedback_id,) = {row["feedback_id"] for row in history(service, trace_id)}
    with psycopg.connect(service.database_url) as conn:
        row = conn.execute(
            "SELECT revision, score, explanation FROM feedback.current(ARRAY[%s]::uuid[])", [feedback_id]
        ).fetchone()
    assert row is not None
    return list(row)


def test_a_score_is_a_thumb(feedback_service: FeedbackService, http: httpx.Client) -> None:
    body = score(comment="Helpful answer", metadata={"page": "/help"}, environment="production")
    answer = http.post("/api/public/scores", json=body)
    assert (answer.status_code, answer.json()) == (200, {"id": body["id"]})
    (row,) = history(feedback_service, body["traceId"])
    assert (row["kind"], row["label"], row["explanation"]) == ("thumb", "up", "Helpful answer")
    assert (row["identifier"], row["annotator_kind"], row["op"]) == (body["id"], "HUMAN", "create")
    assert row["metadata"]["langfuse"]["rest"]["environment"] == "production"


def test_a_score_without_an_id_gets_one(feedback_service: FeedbackService, http: httpx.Client) -> None:
    body = score(id=None)
    ids = {http.post("/api/public/scores", json=body).json()["id"] for _ in range(2)}
    assert len(ids) == 2
    assert {row["identifier"] for row in history(feedback_service, body["traceId"])} == ids


def test_the_same_id_is_revised_and_the_last_word_counts(
    feedback_service: FeedbackService, http: httpx.Client
) -> None:
    up, down = score(), {"value": 0, "comment": "Wrong"}
    for body in (up, up, up | down, up | down, up, up):
        assert http.post("/api/public/scores", json=body).status_code == 200
    ops = [(row["op"], row["revision"], row["score"]) for row in history(feedback_service, up["traceId"])]
    assert ops == [("create", 1, 1.0), ("revise", 2, 0.0), ("revise", 3, 1.0)]
    assert now_says(feedback_service, up["traceId"]) == [3, 1.0, None]


def test_one_batch_may_say_it_all(feedback_service: FeedbackService, http: httpx.Client) -> None:
    body = score()
    batch = [created(body), created(body), created(body | {"value": 0}), created(body)]
    for _ in range(2):
        answer = http.post("/api/public/ingestion", json={"batch": batch})
        assert answer.status_code == 207
        assert [success["id"] for success in answer.json()["successes"]] == [event["id"] for event in batch]
    revisions = [row["score"] for row in history(feedback_service, body["traceId"])]
    assert revisions == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert now_says(feedback_service, body["traceId"])[1] == 1.0


def test_twenty_equal_posts_at_once_make_one_row(
    feedback_service: FeedbackService, http: httpx.Client
) -> None:
    body = score()
    for value in (1, 0, 1):
        with ThreadPoolExecutor(20) as pool:
            answers = pool.map(
                lambda _, v=value: http.post("/api/public/scores", json=body | {"value": v}), range(20)
            )
            assert {answer.status_code for answer in answers} == {200}
    rows = history(feedback_service, body["traceId"])
    assert [(row["revision"], row["score"]) for row in rows] == [(1, 1.0), (2, 0.0), (3, 1.0)]


def test_different_posts_at_once_are_all_kept_and_fold_to_one(
    feedback_service: FeedbackService, http: httpx.Client
) -> None:
    body = score(dataType="NUMERIC")
    with ThreadPoolExecutor(10) as pool:
        values = [place / 10 for place in range(10)]
        codes = pool.map(
            lambda v: http.post("/api/public/scores", json=body | {"value": v}).status_code, values
        )
        assert set(codes) == {200}
    assert {row["score"] for row in history(feedback_service, body["traceId"])} == set(values)
    assert now_says(feedback_service, body["traceId"])[1] in values


def test_a_retracted_score_may_be_given_again(feedback_service: FeedbackService, http: httpx.Client) -> None:
    body = score()
    http.post("/api/public/scores", json=body)
    (row,) = history(feedback_service, body["traceId"])
    retract = {"kind": "thumb", "op": "retract", "feedback_id": str(row["feedback_id"])}
    assert http.post("/v1/feedback", json=retract).status_code == 201
    assert http.post("/api/public/scores", json=body).status_code == 200
    assert now_says(feedback_service, body["traceId"])[:2] == [3, 1.0]


@pytest.mark.parametrize(
    ("wrong", "field"), [({"value": 10**400}, "value"), ({"timestamp": 1e300}, "occurred_at")]
)
def test_a_number_beyond_all_bounds_is_refused_alone(
    feedback_service: FeedbackService, http: httpx.Client, wrong: dict[str, Any], field: str
) -> None:
    bad, good = score(dataType="NUMERIC") | wrong, score()
    answer = http.post("/api/public/scores", json=bad)
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, field)
    envelope = {"timestamp": wrong.get("timestamp", "2026-01-31T12:00:00Z")}
    answer = http.post("/api/public/ingestion", json={"batch": [created(bad, **envelope), created(good)]})
    (error,) = answer.json()["errors"]
    assert (answer.status_code, error["error"]["field"]) == (207, field)
    assert len(history(feedback_service, good["traceId"])) == 1


def test_a_batch_answers_each_event_by_its_envelope(
    feedback_service: FeedbackService, http: httpx.Client
) -> None:
    good, log = created(score()), created({"log": "x"}, type="sdk-log")
    bad = [
        created(score(id="ana@example.org")),
        created(score(value=None)),
        created(score(dataType="STARS")),
        created({"name": "n", "value": 1}),
        created("x"),
        created({}, type="trace-create"),
        created(score(), timestamp="yesterday"),
    ]
    answer = http.post(
        "/api/public/ingestion", json={"batch": [*bad, good, log], "metadata": {"sdk_name": "x"}}
    )
    assert answer.status_code == 207
    content = answer.json()
    assert content["successes"] == [{"id": event["id"], "status": 201} for event in (good, log)]
    assert [error["id"] for error in content["errors"]] == [event["id"] for event in bad]
    assert all(error["status"] == 400 and error["message"] for error in content["errors"])
    assert "/v1/traces" in content["errors"][5]["message"]
    assert len(history(feedback_service, good["body"]["traceId"])) == 1


def test_wrong_events_do_not_stop_a_batch(http: httpx.Client) -> None:
    content = http.post("/api/public/ingestion", json={"batch": [5, None, [], {}, created(score())]}).json()
    assert (len(content["errors"]), len(content["successes"])) == (4, 1)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"value": 1},
        score(value=None),
        score(id=5),
        score(traceId=None),
        score(name="a@b"),
        score(metadata=5),
    ],
)
def test_a_wrong_score_is_refused_with_the_remedy(http: httpx.Client, body: dict[str, Any]) -> None:
    answer = http.post("/api/public/scores", json=body)
    if body.get("metadata") == 5:
        assert answer.status_code == 200, "metadata may be anything over there"
    else:
        assert answer.status_code == 400
        assert answer.json()["error"]["remedy"]


@pytest.mark.parametrize("content", [b"", b"[]", b"x", b'{"batch": 5}', b'{"a":' * 500 + b"1" + b"}" * 500])
def test_a_wrong_body_is_refused(http: httpx.Client, content: bytes) -> None:
    for path in ("/api/public/scores", "/api/public/ingestion"):
        answer = http.post(path, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
    too_many = http.post("/api/public/ingestion", json={"batch": [{}] * 1001})
    assert too_many.status_code == 413


def test_the_key_goes_where_either_of_langfuses_keys_goes(feedback_service: FeedbackService) -> None:
    def post(public: str, secret: str) -> int:
        credentials = base64.b64encode(f"{public}:{secret}".encode()).decode()
        headers = {"Authorization": f"Basic {credentials}"}
        url = feedback_service.base_url + "/api/public/scores"
        return httpx.post(url, json=score(), headers=headers, trust_env=False).status_code

    key = feedback_service.api_key
    with psycopg.connect(feedback_service.database_url) as conn:
        reader = create_key(conn, "support", ("read",))[1]
    assert [post("pk-lf-1", key), post(key, "sk-lf-1"), post(key, "")] == [200, 200, 200]
    assert [post("pk-lf-1", "sk-lf-1"), post("", ""), post("pk-lf-1", reader)] == [401, 401, 403]


def test_apps_do_not_share_ids(feedback_service: FeedbackService, http: httpx.Client) -> None:
    with psycopg.connect(feedback_service.database_url) as conn:
        other = create_key(conn, "sales")[1]
    body = score()
    http.post("/api/public/scores", json=body)
    http.post("/api/public/scores", json=body, headers={"Authorization": f"Bearer {other}"})
    rows = history(feedback_service, body["traceId"])
    assert len({row["feedback_id"] for row in rows}) == 2


def test_traces_go_where_langfuses_sdks_send_them(
    feedback_service: FeedbackService, http: httpx.Client
) -> None:
    name = str(uuid7())
    content = traces(span(CHAT | {"datamoat.interaction.id": name})).SerializeToString()
    credentials = base64.b64encode(f"pk-lf-1:{feedback_service.api_key}".encode()).decode()
    headers = {"Content-Type": "application/x-protobuf", "Authorization": f"Basic {credentials}"}
    assert http.post("/api/public/otel/v1/traces", content=content, headers=headers).status_code == 200
    with psycopg.connect(feedback_service.database_url) as conn:
        query = "SELECT count(*) FROM feedback.interaction WHERE interaction_id = %s"
        assert conn.execute(query, [name]).fetchone() == (1,)

"""The capture service over HTTP: a real Granian process on a real Postgres."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from feedback import tokens
from feedback.access import KEY_CACHE_SECONDS
from feedback.ids import uuid7
from feedback.keys import create_key, revoke_key
from feedback.secret import read_secret
from tests.integration.conftest import Cluster, FeedbackService

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def http(feedback_service: FeedbackService) -> Iterator[httpx.Client]:
    with client(feedback_service) as opened:
        yield opened


def client(service: FeedbackService) -> httpx.Client:
    return httpx.Client(
        base_url=service.base_url,
        headers={"Authorization": f"Bearer {service.api_key}"},
        trust_env=False,
        timeout=60,
    )


def thumb(**changes: Any) -> dict[str, Any]:
    return {"event_id": str(uuid7()), "kind": "thumb", "score": 1, "interaction_id": "i"} | changes


def interaction(**changes: Any) -> dict[str, Any]:
    item = {
        "interaction_id": str(uuid7()),
        "messages": [{"role": "user", "content": "How?"}],
        "output": "So.",
    }
    return item | changes


def stored(service: FeedbackService, event_id: str) -> dict[str, Any] | None:
    with psycopg.connect(service.database_url, row_factory=psycopg.rows.dict_row) as conn:
        return conn.execute(
            "SELECT * FROM feedback.feedback_event WHERE event_id = %s", [event_id]
        ).fetchone()


def test_the_service_says_when_it_is_ready(feedback_service: FeedbackService, http: httpx.Client) -> None:
    assert feedback_service.base_url in feedback_service.ready_line
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/readyz").json() == {"status": "ready"}


def test_a_created_event_is_committed_before_the_answer(
    feedback_service: FeedbackService, http: httpx.Client
) -> None:
    with psycopg.connect(feedback_service.database_url, autocommit=True) as conn:
        for _ in range(50):
            event = thumb()
            answer = http.post("/v1/feedback", json=event)
            found = conn.execute(
                "SELECT 1 FROM feedback.feedback_event WHERE event_id = %s", [event["event_id"]]
            ).fetchone()
            assert (answer.status_code, found) == (201, (1,))
    assert answer.json() == {"id": event["event_id"], "feedback_id": event["event_id"], "status": "created"}


def test_a_retry_is_a_duplicate_and_another_body_a_conflict(http: httpx.Client) -> None:
    for path, item, change in (
        ("/v1/feedback", thumb(), {"score": 0}),
        ("/v1/interactions", interaction(), {"output": "Not so."}),
    ):
        assert [http.post(path, json=item).status_code for _ in range(3)] == [201, 200, 200]
        conflict = http.post(path, json=item | change)
        assert conflict.status_code == 409
        assert conflict.json()["error"]["code"] == "conflict"


def test_defaults_are_filled_and_people_are_pseudonyms(
    feedback_service: FeedbackService, http: httpx.Client
) -> None:
    answer = http.post(
        "/v1/feedback",
        json={"kind": "thumb", "label": "down", "interaction_id": "i", "author_id": "person-ana@x"},
    )
    assert answer.status_code == 201
    row = stored(feedback_service, answer.json()["id"])
    assert row is not None
    assert (row["op"], row["revision"], row["name"], row["score"]) == ("create", 1, "thumb", 0.0)
    assert row["feedback_id"] == row["event_id"]
    assert row["event_id"].version == 7
    assert len(row["author_ref"]) == 32
    assert "person-ana" not in json.dumps(row, default=str)


def test_revisions_keep_the_feedback_id(feedback_service: FeedbackService, http: httpx.Client) -> None:
    created = http.post("/v1/feedback", json=thumb()).json()
    retract = {"kind": "thumb", "op": "retract", "feedback_id": created["feedback_id"]}
    answer = http.post("/v1/feedback", json=retract).json()
    assert answer["feedback_id"] == created["feedback_id"] != answer["id"]
    row = stored(feedback_service, answer["id"])
    assert row is not None
    assert row["revision"] == 2


def test_an_interaction_is_stored_whole(feedback_service: FeedbackService, http: httpx.Client) -> None:
    item = interaction(
        retrieved=[{"document_id": "handbook/a.md", "source": "handbook", "rank": 1, "score": 0.5}],
        user_id="person-ana@x",
        train_ok=False,
        cost_usd=0.001,
        metadata={"k": ["v"]},
        occurred_at="2026-01-31T14:00:00+02:00",
    )
    assert http.post("/v1/interactions", json=item).status_code == 201
    with psycopg.connect(feedback_service.database_url, row_factory=psycopg.rows.dict_row) as conn:
        row = conn.execute(
            "SELECT * FROM feedback.interaction WHERE interaction_id = %s", [item["interaction_id"]]
        ).fetchone()
    assert row is not None
    for name in ("messages", "output", "retrieved", "train_ok", "cost_usd", "metadata"):
        assert row[name] == item[name]
    assert row["app"] == "support"
    assert row["occurred_at"] == datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert "person-ana" not in json.dumps(row, default=str)


def test_twenty_posts_of_one_event_make_one_row(
    feedback_service: FeedbackService, http: httpx.Client
) -> None:
    for _ in range(5):
        event = thumb()
        with ThreadPoolExecutor(20) as pool:
            codes = sorted(
                answer.status_code
                for answer in pool.map(lambda _, e=event: http.post("/v1/feedback", json=e), range(20))
            )
        assert codes == [200] * 19 + [201]
        assert stored(feedback_service, event["event_id"]) is not None


def test_a_batch_answers_each_item(http: httpx.Client) -> None:
    first, second = thumb(), thumb()
    http.post("/v1/feedback", json=first)
    body = [
        first,
        second,
        second,
        second | {"score": 0},
        thumb(kind="stars"),
        thumb(occurred_at="2026-01-31T12:00:00"),
    ]
    answer = http.post("/v1/feedback", json=body)
    assert answer.status_code == 207
    content = answer.json()
    statuses = [result["status"] for result in content["results"]]
    assert statuses == ["duplicate", "created", "duplicate", "conflict", "invalid", "invalid"]
    assert [result["id"] for result in content["results"]] == [item["event_id"] for item in body]
    assert content["results"][5]["error"]["field"] == "occurred_at"
    assert {name: content[name] for name in ("created", "duplicate", "conflict", "invalid")} == {
        "created": 1,
        "duplicate": 2,
        "conflict": 1,
        "invalid": 2,
    }


def test_a_batch_without_refusals_is_200(http: httpx.Client) -> None:
    items = [thumb() for _ in range(1000)]
    assert http.post("/v1/feedback", json=items).json()["created"] == 1000
    again = http.post("/v1/feedback", json=items)
    assert (again.status_code, again.json()["duplicate"]) == (200, 1000)
    assert http.post("/v1/feedback", json=[]).json()["results"] == []


@pytest.mark.parametrize(
    "poison", [b'{"kind": NaN}', b'{"kind": "\\ud800"}', b'{"kind": "\\u0000"}', b"3", b'{"x": "\xff"}']
)
def test_a_poisoned_item_does_not_stop_its_batch(http: httpx.Client, poison: bytes) -> None:
    good = [json.dumps(thumb()).encode() for _ in range(4)]
    answer = http.post(
        "/v1/feedback", content=b"[" + b",".join([*good[:2], poison, *good[2:]]) + b"]", headers=JSON
    )
    assert answer.status_code == 207
    assert [result["status"] for result in answer.json()["results"]] == ["created"] * 2 + ["invalid"] + [
        "created"
    ] * 2


def test_what_only_the_database_refuses_is_answered_alone_and_kept(
    feedback_service: FeedbackService, http: httpx.Client
) -> None:
    good, poison = thumb(), thumb(name="poison")
    with psycopg.connect(feedback_service.database_url, autocommit=True) as conn:
        conn.execute("ALTER TABLE feedback.feedback_event ADD CONSTRAINT poison CHECK (name <> 'poison')")
        try:
            batch = http.post("/v1/feedback", json=[good, poison])
            single = http.post("/v1/feedback", json=poison)
        finally:
            conn.execute("ALTER TABLE feedback.feedback_event DROP CONSTRAINT poison")
        kept = conn.execute(
            "SELECT log, key, row, api_key_id FROM feedback.dead_letter WHERE key = %s", [poison["event_id"]]
        ).fetchall()
    assert batch.status_code == 207
    assert [result["status"] for result in batch.json()["results"]] == ["created", "invalid"]
    assert (single.status_code, single.json()["error"]["code"]) == (422, "invalid")
    assert len(kept) == 1
    row = json.loads(kept[0][2])
    assert (kept[0][0], row["name"], row["api_key_id"]) == ("feedback_event", "poison", str(kept[0][3]))


def test_a_token_speaks_for_its_author_alone(feedback_service: FeedbackService, http: httpx.Client) -> None:
    minted = http.post("/v1/tokens", json={"interaction_id": "i", "user_id": "person-ana@x"})
    assert minted.status_code == 201
    token = minted.json()["token"]
    claims = tokens.read(read_secret(feedback_service.pseudonym_key_file), token)
    own = str(uuid7())[:24] + claims.node
    with httpx.Client(
        base_url=feedback_service.base_url, headers={"Authorization": f"Bearer {token}"}, trust_env=False
    ) as page:
        answer = page.post("/v1/feedback", json={"event_id": own, "kind": "thumb", "score": 1})
        assert (answer.status_code, answer.json()["status"]) == (201, "created")
        foreign = page.post("/v1/feedback", json={"event_id": str(uuid7()), "kind": "thumb", "score": 1})
        assert foreign.status_code in (403, 422)
        assert page.post("/v1/interactions", json=interaction()).status_code == 401
    forged = httpx.post(
        feedback_service.base_url + "/v1/feedback",
        json=thumb(),
        headers={"Authorization": f"Bearer {token[:-4]}AAAA"},
        trust_env=False,
    )
    assert forged.status_code == 401
    row = stored(feedback_service, own)
    assert row is not None
    assert (row["interaction_id"], row["author_ref"]) == ("i", claims.author_ref)


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (b'{"kind": "thumb", "score": 1, "interaction_id": "i", "sentiment": 1}', "sentiment"),
        (b'{"kind": "comment", "explanation": "a\\u0000b", "interaction_id": "i"}', "explanation"),
        (b'{"kind": "comment", "explanation": "a\\ud800b", "interaction_id": "i"}', "explanation"),
        (b'{"kind": "rating", "score": NaN, "interaction_id": "i"}', "score"),
        (b'{"kind": "rating", "score": 1e999, "interaction_id": "i"}', "score"),
        (
            b'{"kind": "thumb", "score": 1, "interaction_id": "i", "occurred_at": "2026-01-31T12:00:00"}',
            "occurred_at",
        ),
        (b'{"kind": "correction", "interaction_id": "i"}', "correction"),
        (b'{"score": 1}', "kind"),
    ],
)
def test_an_invalid_event_names_the_field(http: httpx.Client, raw: bytes, field: str) -> None:
    answer = http.post("/v1/feedback", content=raw, headers=JSON)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["field"] == field
    assert error["remedy"]


def test_malformed_json_is_400_with_its_position(http: httpx.Client) -> None:
    answer = http.post("/v1/feedback", content=b'{"kind": "thumb",\n"score" 1}', headers=JSON)
    assert answer.status_code == 400
    assert "line 2" in answer.json()["error"]["message"]


def test_keys_are_checked(feedback_service: FeedbackService, http: httpx.Client) -> None:
    url = feedback_service.base_url + "/v1/feedback"
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic eDp5"},
        {"X-API-Key": "wrong"},
    ):
        answer = httpx.post(url, json=thumb(), headers=headers, trust_env=False)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    answer = httpx.post(url, json=thumb(), headers={"X-API-Key": feedback_service.api_key}, trust_env=False)
    assert answer.status_code == 201
    other_app = http.post("/v1/interactions", json=interaction(app="other"))
    assert (other_app.status_code, other_app.json()["error"]["field"]) == (403, "app")


def test_a_revoked_key_stops_working_within_seconds(feedback_service: FeedbackService) -> None:
    with psycopg.connect(feedback_service.database_url) as conn:
        record, key = create_key(conn, "support")
    url, headers = feedback_service.base_url + "/v1/feedback", {"X-API-Key": key}
    assert httpx.post(url, json=thumb(), headers=headers, trust_env=False).status_code == 201
    with psycopg.connect(feedback_service.database_url) as conn:
        revoke_key(conn, record.key_id)
    deadline = time.monotonic() + KEY_CACHE_SECONDS + 5
    while httpx.post(url, json=thumb(), headers=headers, trust_env=False).status_code != 401:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_limits(http: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(9):
            yield b" " * 1_048_576

    assert http.post("/v1/feedback", json=[thumb()] * 1001).status_code == 413
    assert http.post("/v1/feedback", content=b" " * (8 * 1_048_576 + 1), headers=JSON).status_code == 413
    assert http.post("/v1/feedback", content=chunks(), headers=JSON).status_code == 413
    large = interaction(output="x" * 1_000_000)
    assert http.post("/v1/interactions", json=large).status_code == 201


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/json; charset=latin-1"},
        {"Content-Type": "application/json", "Content-Encoding": "br"},
    ],
)
def test_other_media_types_are_refused(http: httpx.Client, headers: dict[str, str]) -> None:
    answer = http.post("/v1/feedback", content=b"{}", headers=headers)
    assert answer.status_code == 415
    assert answer.json()["error"]["remedy"]


def test_unknown_paths_are_answered_in_the_same_shape(http: httpx.Client) -> None:
    for answer, status in ((http.get("/nothing"), 404), (http.get("/v1/interactions"), 405)):
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


def test_docs_and_description_are_served_locally(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "/v1/feedback" in http.get("/openapi.json").json()["paths"]


def test_sigterm_answers_what_is_in_flight(cluster: Cluster, tmp_path: Path) -> None:
    service = FeedbackService(cluster.new_database(), tmp_path / "pseudonym.key")
    service.start(workers=2)
    event, codes = thumb(), []
    with client(service) as http, psycopg.connect(service.database_url) as conn:
        assert http.post("/v1/feedback", json=thumb()).status_code == 201
        conn.execute("LOCK TABLE feedback.feedback_event IN ACCESS EXCLUSIVE MODE")
        sender = threading.Thread(
            target=lambda: codes.append(http.post("/v1/feedback", json=event).status_code)
        )
        sender.start()
        time.sleep(0.5)
        ended = threading.Thread(target=lambda: codes.append(service.stop()))
        ended.start()
        time.sleep(0.5)
        conn.rollback()
        sender.join(30)
        ended.join(60)
    assert codes == [201, 0]
    assert stored(service, event["event_id"]) is not None


def test_a_killed_service_leaves_no_worker_behind(cluster: Cluster, tmp_path: Path) -> None:
    service = FeedbackService(cluster.new_database(), tmp_path / "pseudonym.key")
    service.start(workers=2)
    service.stop(signal.SIGKILL)
    deadline = time.monotonic() + 20
    with pytest.raises(httpx.TransportError):
        while time.monotonic() < deadline:
            httpx.get(service.base_url + "/healthz", trust_env=False)
            time.sleep(0.1)


def test_a_taken_port_is_refused_with_the_remedy(feedback_service: FeedbackService, tmp_path: Path) -> None:
    options = {
        "--port": feedback_service.port,
        "--database-url": feedback_service.database_url,
        "--pseudonym-key-file": tmp_path / "key",
    }
    second = subprocess.run(
        [
            sys.executable,
            "-m",
            "feedback",
            "serve",
            *(str(word) for pair in options.items() for word in pair),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert second.returncode == 1
    assert "choose another --port" in second.stderr


def test_keys_by_command_line(feedback_service: FeedbackService) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "feedback", *arguments],
            env={"DATABASE_URL": feedback_service.database_url},
            capture_output=True,
            text=True,
            timeout=60,
        )

    assert run("migrate").stdout == "nothing to do\n"
    key = run("key", "create", "--app", "support").stdout.strip()
    headers = {"X-API-Key": key}
    url = feedback_service.base_url + "/v1/feedback"
    assert httpx.post(url, json=thumb(), headers=headers, trust_env=False).status_code == 201
    listed = run("key", "list").stdout.splitlines()
    assert key not in "".join(listed)
    key_id = listed[-1].split()[0]
    assert run("key", "revoke", key_id).returncode == 0
    assert "revoked" in run("key", "list").stdout.splitlines()[-1]
    unknown = run("key", "revoke", str(uuid7()))
    assert (unknown.returncode, "key list" in unknown.stderr) == (1, True)


@pytest.fixture
def stranger(feedback_service: FeedbackService) -> Iterator[httpx.Client]:
    """A client with the key of another app."""
    with psycopg.connect(feedback_service.database_url) as conn:
        key = create_key(conn, "another")[1]
    with httpx.Client(
        base_url=feedback_service.base_url, headers={"Authorization": f"Bearer {key}"}, trust_env=False
    ) as opened:
        yield opened


def test_no_app_changes_what_another_one_sent(
    feedback_service: FeedbackService, http: httpx.Client, stranger: httpx.Client
) -> None:
    mine = thumb()
    feedback_id = http.post("/v1/feedback", json=mine).json()["feedback_id"]
    for op in ("retract", "revise", "create"):
        theirs = thumb(op=op, feedback_id=feedback_id, revision=2_147_483_647)
        refused = stranger.post("/v1/feedback", json=theirs)
        assert (refused.status_code, refused.json()["error"]["field"]) == (403, "feedback_id")
    batch = stranger.post(
        "/v1/feedback", json=[thumb(), thumb(op="revise", feedback_id=feedback_id, revision=9)]
    )
    assert [one["status"] for one in batch.json()["results"]] == ["created", "invalid"]
    # The same id and body from another app is no retry: nothing of theirs would be stored.
    assert stranger.post("/v1/feedback", json=mine).status_code == 409
    assert http.post("/v1/feedback", json=mine).status_code == 200
    revised = thumb(op="revise", feedback_id=feedback_id, score=0)
    assert http.post("/v1/feedback", json=revised).status_code == 201
    with psycopg.connect(feedback_service.database_url) as conn:
        states = conn.execute(
            "select app, score from feedback.current(array[%s]::uuid[])", (feedback_id,)
        ).fetchall()
    assert states == [("support", 0.0)]


@pytest.mark.parametrize("item", ["0", "NaN"])
def test_millions_of_items_are_refused_while_they_are_counted(http: httpx.Client, item: str) -> None:
    body = "[" + ",".join([item] * 1_000_000) + "]"
    answer = http.post("/v1/feedback", content=body, headers=JSON)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_many_items")


def test_what_is_nested_deeply_is_refused(http: httpx.Client) -> None:
    deep: Any = "x"
    for _ in range(100):
        deep = {"inner": deep}
    answer = http.post("/v1/feedback", json=thumb(metadata=deep))
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "metadata")


def test_who_has_no_key_holds_no_memory(feedback_service: FeedbackService) -> None:
    """The answer comes before the body: a sender without a key cannot make the service wait for it."""
    head = "POST {path} HTTP/1.1\r\nHost: x\r\nOrigin: http://x\r\nContent-Type: {type}\r\nContent-Length: 8000000\r\n\r\n{{"
    for path, media_type, status in (
        ("/v1/admin/keys", "application/json", b"401"),
        ("/v1/feedback", "application/json", b"401"),
        ("/v1/traces", "application/json", b"401"),
        ("/v1/tokens", "application/json", b"401"),
        ("/login", "application/x-www-form-urlencoded", b"413"),
    ):
        with socket.create_connection(("127.0.0.1", feedback_service.port), timeout=20) as connection:
            connection.sendall(head.format(path=path, type=media_type).encode())
            assert connection.recv(4096).split(b" ")[1] == status, path

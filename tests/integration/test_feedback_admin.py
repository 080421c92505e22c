"""Keys over HTTP and by command line, the audit that no path escapes, and the page for Prometheus."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import msgspec
import psycopg
import pytest

from feedback.access import Caller
from feedback.capture import prepare_event
from feedback.ids import uuid7
from feedback.keys import create_key
from tests.integration.conftest import FeedbackService


@pytest.fixture(scope="module")
def admin(feedback_service: FeedbackService) -> Iterator[httpx.Client]:
    """A client with the key of an admin called Ada."""
    with psycopg.connect(feedback_service.database_url) as conn:
        key = create_key(conn, "support", ["admin"], holder="Ada")[1]
    with client(feedback_service, key) as http:
        yield http


def client(service: FeedbackService, key: str) -> httpx.Client:
    return httpx.Client(
        base_url=service.base_url, headers={"Authorization": f"Bearer {key}"}, trust_env=False, timeout=30
    )


def thumb() -> dict[str, Any]:
    return {"event_id": str(uuid7()), "kind": "thumb", "score": 1, "interaction_id": "i-1"}


def test_a_key_lives_from_making_to_revocation(
    feedback_service: FeedbackService, admin: httpx.Client
) -> None:
    made = admin.post("/v1/admin/keys", json={"app": "shop", "holder": "checkout", "scopes": ["ingest"]})
    assert made.status_code == 201, made.text
    secret, key_id = made.json()["key"], made.json()["key_id"]
    with client(feedback_service, secret) as shop:
        assert shop.post("/v1/feedback", json=thumb()).status_code == 201
    listed = {key["key_id"]: key for key in admin.get("/v1/admin/keys").json()}
    assert listed[key_id]["holder"] == "checkout"
    assert secret not in str(listed)
    assert admin.delete(f"/v1/admin/keys/{key_id}").json()["revoked_at"]
    lines = [line for line in admin.get("/v1/admin/audit").json() if line["subject"] == "api_key"]
    about = [line for line in lines if (line["after"] or {}).get("key_id") == key_id]
    assert [line["act"] for line in about] == ["update", "insert"]
    assert all(line["actor"].startswith("Ada (key ") for line in about)
    assert "key_sha256" not in about[0]["after"]


def test_what_an_admin_gets_wrong_is_explained(admin: httpx.Client) -> None:
    assert admin.delete(f"/v1/admin/keys/{uuid7()}").status_code == 404
    unknown = admin.post("/v1/admin/keys", json={"app": "shop", "scopes": ["everything"]})
    assert (unknown.status_code, "unknown scopes" in unknown.text) == (422, True)
    missing = admin.post("/v1/admin/keys", json={})
    assert (missing.status_code, missing.json()["error"]["field"]) == (422, "app")
    nul = admin.post("/v1/admin/keys", json={"app": "a\0b"})
    assert nul.status_code == 422
    assert admin.delete("/v1/admin/keys/not-an-id").status_code == 422


@pytest.mark.parametrize("path", ["/v1/admin/keys", "/v1/admin/audit"])
def test_other_scopes_are_no_admins(feedback_service: FeedbackService, path: str) -> None:
    with client(feedback_service, feedback_service.api_key) as http:
        assert http.get(path).status_code == 403
    assert httpx.get(feedback_service.base_url + path, trust_env=False).status_code == 401


def test_a_key_that_sends_too_often_is_told_when_to_come_back(
    feedback_service: FeedbackService, admin: httpx.Client
) -> None:
    limited = {"app": "shop", "requests_per_second": 0.1, "burst": 2}
    with client(feedback_service, admin.post("/v1/admin/keys", json=limited).json()["key"]) as noisy:
        answers = [noisy.post("/v1/feedback", json=thumb()) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [201, 201, 429]
    assert 1 <= int(answers[2].headers["Retry-After"]) <= 10
    assert answers[2].json()["error"]["remedy"]
    with client(feedback_service, feedback_service.api_key) as other:
        assert other.post("/v1/feedback", json=thumb()).status_code == 201


def test_the_audit_sees_changes_made_behind_the_service(feedback_service: FeedbackService) -> None:
    with psycopg.connect(feedback_service.database_url) as conn:
        record, _ = create_key(conn, "support")
        conn.execute(
            "update feedback.api_key set scopes = '{admin}', key_sha256 = 'x' || key_id where key_id = %s",
            (record.key_id,),
        )
    shown = subprocess.run(
        [sys.executable, "-m", "feedback", "audit", "--limit", "1"],
        env={"PATH": os.environ["PATH"], "DATABASE_URL": feedback_service.database_url},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "update api_key" in shown and "scopes=['admin']" in shown
    with psycopg.connect(feedback_service.database_url) as conn, pytest.raises(psycopg.Error):
        conn.execute("set role datamoat_admin")
        conn.execute("delete from feedback.admin_audit")


def test_prometheus_reads_what_was_counted(feedback_service: FeedbackService) -> None:
    def created() -> float:
        text = httpx.get(feedback_service.base_url + "/metrics", trust_env=False).text
        found = re.search(
            r'^datamoat_items_total\{log="feedback_event",status="created"\} (\S+)$', text, re.M
        )
        return float(found[1]) if found else 0.0

    before = created()
    with client(feedback_service, feedback_service.api_key) as http:
        assert http.post("/v1/feedback", json=[thumb(), thumb()]).status_code == 200
    assert created() == before + 2
    page = httpx.get(feedback_service.base_url + "/metrics", trust_env=False)
    assert page.headers["content-type"].startswith("text/plain")
    for name in ("datamoat_flush_rows_bucket", "datamoat_request_seconds_bucket", "datamoat_dead_letters"):
        assert name in page.text


def planted(service: FeedbackService) -> str:
    """The id of a dead letter whose cause is gone."""
    key_id = str(uuid7())
    caller = Caller(key_id, "support", ("ingest",))
    item = prepare_event(json.dumps(thumb()).encode(), caller, b"k" * 32, datetime.now(UTC))
    dead_letter_id = str(uuid7())
    with psycopg.connect(service.database_url) as conn:
        conn.execute(
            "insert into feedback.dead_letter (dead_letter_id, log, key, row, reason, api_key_id)"
            " values (%s, 'feedback_event', %s, %s, 'it was refused', %s)",
            (dead_letter_id, item.id, msgspec.json.encode(item.row), key_id),
        )
    return dead_letter_id


def test_dead_letters_are_listed_and_replayed(feedback_service: FeedbackService, admin: httpx.Client) -> None:
    letter = planted(feedback_service)
    listed = {one["dead_letter_id"]: one for one in admin.get("/v1/admin/dead-letters").json()}
    assert listed[letter]["reason"] == "it was refused"
    assert "thumb" not in str(listed[letter])
    replay = f"/v1/admin/dead-letters/{letter}/replay"
    assert admin.post(replay).json() == {"status": "created", "reason": None}
    assert admin.post(replay).json()["status"] == "duplicate"
    assert letter not in admin.get("/v1/admin/dead-letters").text
    assert letter in admin.get("/v1/admin/dead-letters", params={"replayed": True}).text
    assert admin.post(f"/v1/admin/dead-letters/{uuid7()}/replay").status_code == 404
    newest = admin.get("/v1/admin/audit", params={"limit": 1}).json()[0]
    assert (newest["subject"], newest["after"]["outcome"]) == ("dead_letter", "duplicate")
    assert newest["actor"].startswith("Ada") and "row" not in newest["after"]


def test_dead_letters_by_command_line(feedback_service: FeedbackService) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "feedback", "dead-letter", *arguments],
            env={"PATH": os.environ["PATH"], "DATABASE_URL": feedback_service.database_url},
            capture_output=True,
            text=True,
            check=False,
        )

    letter = planted(feedback_service)
    assert letter in command("list").stdout
    assert "created" in command("replay", letter).stdout
    assert letter not in command("list").stdout
    unknown = command("replay", str(uuid7()))
    assert (unknown.returncode, "there is no dead letter" in unknown.stderr) == (1, True)

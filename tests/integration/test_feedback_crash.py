"""What is acknowledged survives: the database or the service is killed while clients keep sending."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psycopg
import pytest

from feedback.client import FeedbackClient
from feedback.ids import uuid7
from tests.integration.conftest import Cluster, FeedbackService


def test_a_killed_database_is_503_and_nothing_acknowledged_is_lost(
    new_cluster: Callable[[], Cluster], tmp_path: Path
) -> None:
    cluster = new_cluster()
    service = FeedbackService(cluster.new_database(), tmp_path / "pseudonym.key")
    service.start()
    acknowledged: list[str] = []
    codes: set[int] = set()
    done = threading.Event()

    def send() -> None:
        headers = {"X-API-Key": service.api_key}
        with httpx.Client(base_url=service.base_url, headers=headers, trust_env=False, timeout=60) as http:
            while not done.is_set():
                event_id = str(uuid7())
                answer = http.post(
                    "/v1/feedback",
                    json={"event_id": event_id, "kind": "thumb", "score": 1, "interaction_id": "i"},
                )
                codes.add(answer.status_code)
                if answer.status_code == 201:
                    acknowledged.append(event_id)
                else:
                    assert answer.headers["Retry-After"]
                    time.sleep(0.05)

    senders = [threading.Thread(target=send) for _ in range(4)]
    try:
        for sender in senders:
            sender.start()
        time.sleep(1)
        cluster.kill()
        time.sleep(1)
        before = len(acknowledged)
        ready = httpx.get(service.base_url + "/readyz", trust_env=False, timeout=60)
        assert (ready.status_code, "Retry-After" in ready.headers) == (503, True)
        assert httpx.get(service.base_url + "/healthz", trust_env=False).status_code == 200
        cluster.start()
        deadline = time.monotonic() + 60
        while len(acknowledged) < before + 50:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        done.set()
        for sender in senders:
            sender.join(30)
        service.stop()
    assert codes == {201, 503}
    with psycopg.connect(service.database_url) as conn:
        found = conn.execute(
            "SELECT count(*), count(DISTINCT event_id) FROM feedback.feedback_event WHERE event_id = ANY(%s::uuid[])",
            [acknowledged],
        ).fetchone()
    assert found == (len(acknowledged), len(acknowledged))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the worker by /proc")
def test_a_killed_worker_loses_nothing_acknowledged_and_retries_double_nothing(
    cluster: Cluster, tmp_path: Path
) -> None:
    service = FeedbackService(cluster.new_database(), tmp_path / "pseudonym.key")
    service.start()
    acknowledged: list[str] = []
    done = threading.Event()

    def send() -> None:
        headers = {"X-API-Key": service.api_key}
        with httpx.Client(base_url=service.base_url, headers=headers, trust_env=False, timeout=60) as http:
            while not done.is_set():
                event_id = str(uuid7())
                event = {"event_id": event_id, "kind": "thumb", "score": 1, "interaction_id": "i"}
                # As any careful client: the same item, with the same id, until it is acknowledged.
                while True:
                    try:
                        answer = http.post("/v1/feedback", json=event)
                    except httpx.TransportError:
                        time.sleep(0.05)
                        continue
                    assert answer.status_code in (200, 201)
                    acknowledged.append(event_id)
                    break

    senders = [threading.Thread(target=send) for _ in range(8)]
    try:
        for sender in senders:
            sender.start()
        before = 0
        for _ in range(2):
            deadline = time.monotonic() + 60
            while len(acknowledged) < before + 200:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            before = len(acknowledged)
            if before < 400:
                os.kill(_worker_of(service), signal.SIGKILL)
    finally:
        done.set()
        for sender in senders:
            sender.join(60)
        service.stop()
    with psycopg.connect(service.database_url) as conn:
        found = conn.execute("SELECT array_agg(event_id::text) FROM feedback.feedback_event").fetchone()
    assert found is not None
    assert sorted(found[0]) == sorted(acknowledged)


def _worker_of(service: FeedbackService) -> int:
    assert service.process is not None
    parent = service.process.pid
    children = map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    (worker,) = (pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return worker


def test_the_client_waits_for_the_database(new_cluster: Callable[[], Cluster], tmp_path: Path) -> None:
    cluster = new_cluster()
    service = FeedbackService(cluster.new_database(), tmp_path / "pseudonym.key")
    service.start()
    cluster.kill()
    restart = threading.Timer(2, cluster.start)
    restart.start()
    try:
        with FeedbackClient(service.base_url, service.api_key) as client:
            report = client.send_feedback(
                {"kind": "thumb", "score": 1, "interaction_id": str(n)} for n in range(700)
            )
        assert (report.created, report.duplicate, report.refused) == (700, 0, [])
    finally:
        restart.join()
        service.stop()

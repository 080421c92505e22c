"""The Python client against the real service: a loader's batches, an application's calls, processes that die."""

import json
import logging
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import psycopg
import pytest
from psycopg.rows import dict_row

from feedback import client as client_module
from feedback.client import (
    FeedbackClient,
    FeedbackFields,
    InteractionFields,
    Message,
    PayloadError,
    RequestFailed,
    Retrieved,
    SendFailed,
    SendReport,
    outbox,
)
from feedback.ids import uuid7
from feedback.keys import create_key
from feedback.payloads import FeedbackEvent, Interaction
from tests.integration.conftest import FeedbackService, free_port

SECONDS = 30.0


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "backoff", lambda *_: 0.05)


@pytest.fixture
def host(feedback_service: FeedbackService, tmp_path: Path) -> Iterator[FeedbackClient]:
    """A client as an application has it."""
    with FeedbackClient(
        feedback_service.base_url, feedback_service.api_key, spool=tmp_path / "spool"
    ) as client:
        yield client


def stored(service: FeedbackService, event_ids: list[str]) -> dict[str, dict[str, Any]]:
    with psycopg.connect(service.database_url, row_factory=dict_row) as conn:
        rows = conn.execute(
            "SELECT * FROM feedback.feedback_event WHERE event_id = ANY(%s::uuid[])", [event_ids]
        ).fetchall()
    return {str(row["event_id"]): row for row in rows}


def start(script: str, *arguments: str) -> "subprocess.Popen[str]":
    """An application of its own process, with a client of ``sys.argv``: URL, key, folder."""
    head = """
        import sys
        from feedback.client import FeedbackClient
        client = FeedbackClient(*sys.argv[1:3], spool=sys.argv[3])
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(script), *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )


def interaction(**changes: Any) -> dict[str, Any]:
    item = {
        "interaction_id": str(uuid7()),
        "messages": [{"role": "user", "content": "How?"}],
        "output": "So.",
    }
    return item | changes


def test_batches_repeats_and_progress(feedback_service: FeedbackService) -> None:
    items = [interaction(occurred_at=datetime(2026, 1, 31, tzinfo=UTC)) for _ in range(1201)]
    seen: list[int] = []
    with FeedbackClient(feedback_service.base_url, feedback_service.api_key) as client:
        first = client.send_interactions(iter(items), on_progress=lambda report: seen.append(report.sent))
        second = client.send_interactions(items)
    assert (first.created, first.duplicate, first.refused) == (1201, 0, [])
    assert seen == [500, 1000, 1201]
    assert (second.created, second.duplicate) == (0, 1201)


def test_refused_items_are_reported_with_their_reasons(feedback_service: FeedbackService) -> None:
    good, changed = interaction(), interaction()
    items = [
        good,
        interaction(sentiment=1),
        interaction(output=float("nan")),
        interaction(output=object()),
        interaction(output="\ud800"),
        changed,
        changed | {"output": "Not so."},
        interaction(metadata={"large": "x" * 9_000_000}),
    ]
    with FeedbackClient(feedback_service.base_url, feedback_service.api_key) as client:
        report = client.send_interactions(items)
    assert report.created == 2
    assert report.sent == len(items)
    by_index = {item.index: item for item in report.refused}
    assert sorted(by_index) == [1, 2, 3, 4, 6, 7]
    assert by_index[1].field == "sentiment"
    assert by_index[4].field == "output"
    assert by_index[6].code == "conflict"
    assert by_index[7].code == "body_too_large"
    assert all(item.id == items[item.index]["interaction_id"] for item in report.refused)


def test_nothing_to_send_is_an_empty_report(feedback_service: FeedbackService) -> None:
    with FeedbackClient(feedback_service.base_url, feedback_service.api_key) as client:
        assert client.send_feedback([]) == SendReport()


def test_a_wrong_key_stops_with_the_reason(feedback_service: FeedbackService) -> None:
    with FeedbackClient(feedback_service.base_url, "wrong") as client, pytest.raises(SendFailed, match="401"):
        client.send_interactions([interaction()])


def test_a_service_that_stays_away_ends_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MAX_ATTEMPTS", 2)
    with (
        FeedbackClient(f"http://127.0.0.1:{free_port()}", "key") as client,
        pytest.raises(SendFailed) as caught,
    ):
        client.send_interactions([interaction()])
    assert "2 attempts" in str(caught.value)
    assert caught.value.report == SendReport()


def test_the_typed_fields_are_those_of_the_service() -> None:
    """What the methods take by name of their own is not among the fields that any of them takes."""
    event = {each.name for each in msgspec.structs.fields(FeedbackEvent)}
    own = {"kind", "op", "event_id", "feedback_id", "revision", "interaction_id"}
    content = {"score", "label", "explanation", "correction", "value"}
    assert get_type_hints(FeedbackFields).keys() == event - own - content
    answer = {each.name for each in msgspec.structs.fields(Interaction)}
    # The app is that of the key.
    assert get_type_hints(InteractionFields).keys() == answer - {"messages", "output", "app"}


def test_every_call_is_stored_as_it_was_meant(
    feedback_service: FeedbackService, host: FeedbackClient
) -> None:
    at = datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)
    answer = host.interaction(
        [Message(role="system", content="Be brief."), {"role": "user", "content": "How?"}],
        "So.",
        session_id="s-1",
        user_id="customer-7",
        occurred_at=at,
        retrieved=[Retrieved(chunk_id="c-1", rank=1), {"document_id": "d-1", "score": 0.5}],
        model="in-house-7b",
        latency_ms=12.5,
        metadata={"shop": "north"},
    )
    other = host.interaction([{"role": "user", "content": "And?"}], interaction_id=str(uuid7()))
    said = {
        "up": host.thumb(answer, True, author_id="customer-7", reasons=("accurate",)),
        "down": host.thumb(
            answer, up=False, explanation="Wrong shop", occurred_at=at, author_role="end_user"
        ),
        "rating": host.rating(answer, 0.75, label="4 stars", name="helpfulness"),
        "category": host.category(answer, "billing", annotator_kind="LLM", score=0.9),
        "comment": host.comment(answer, "Ünklar \N{PILE OF POO}"),
        "correction": host.correction(answer, "Not so.", explanation="It moved"),
        "flag": host.flag(answer, "unsafe", identifier="c-1"),
        "preference": host.preference(answer, over=other),
        "implicit": host.implicit(answer, "copied"),
        "session": host.rating(None, 1.0, scope="session", session_id="s-1"),
    }
    revised = host.revise(said["up"].feedback_id, "thumb", answer, label="down")
    retracted = host.retract(said["rating"].feedback_id, "rating")
    assert host.close(SECONDS)
    assert host.status().acknowledged == 14

    rows = stored(feedback_service, [each.event_id for each in (*said.values(), revised, retracted)])
    found = {name: rows[ids.event_id] for name, ids in said.items()}
    assert all(
        ids.event_id == ids.feedback_id == str(found[name]["feedback_id"]) for name, ids in said.items()
    )
    assert (found["up"]["score"], found["up"]["label"], found["up"]["reasons"]) == (1, "up", ["accurate"])
    assert found["up"]["author_ref"] not in (None, "customer-7")
    assert (found["down"]["score"], found["down"]["explanation"]) == (0, "Wrong shop")
    assert (found["down"]["occurred_at"], found["down"]["author_role"]) == (at, "end_user")
    assert (found["rating"]["name"], found["rating"]["label"]) == ("helpfulness", "4 stars")
    assert (found["category"]["label"], found["category"]["annotator_kind"]) == ("billing", "LLM")
    assert found["comment"]["explanation"] == "Ünklar \N{PILE OF POO}"
    assert (found["correction"]["correction"], found["correction"]["explanation"]) == ("Not so.", "It moved")
    assert (found["flag"]["label"], found["flag"]["identifier"]) == ("unsafe", "c-1")
    assert found["preference"]["value"] == {"chosen": answer, "rejected": other}
    assert found["implicit"]["label"] == "copied"
    assert (found["session"]["scope"], found["session"]["interaction_id"]) == ("session", None)
    assert {row["interaction_id"] for name, row in found.items() if name != "session"} == {answer}
    for ids, op, create in ((revised, "revise", said["up"]), (retracted, "retract", said["rating"])):
        assert ids.feedback_id == create.feedback_id != ids.event_id
        assert (rows[ids.event_id]["op"], rows[ids.event_id]["revision"]) == (op, 2)
    with psycopg.connect(feedback_service.database_url, row_factory=dict_row) as conn:
        row = conn.execute(
            "SELECT * FROM feedback.interaction WHERE interaction_id = %s", [answer]
        ).fetchone()
    assert row is not None
    assert [message["role"] for message in row["messages"]] == ["system", "user"]
    assert [passage.get("rank") for passage in row["retrieved"]] == [1, None]
    assert (row["output"], row["occurred_at"], row["metadata"]) == ("So.", at, {"shop": "north"})


def test_what_the_service_would_refuse_is_refused_at_the_call(host: FeedbackClient) -> None:
    wrong: list[tuple[str, Any]] = [
        ("score", lambda: host.rating("a", 4)),
        ("score", lambda: host.thumb("a", "down")),  # type: ignore[arg-type]
        ("label", lambda: host.implicit("a", "liked")),  # type: ignore[arg-type]
        ("interaction_id", lambda: host.comment(None, "of what?")),
        ("explanation", lambda: host.comment("a", "nothing\0")),
        ("author", lambda: host.flag("a", "unsafe", author="me")),  # type: ignore[call-arg]
        ("messages", lambda: host.interaction([])),
        (
            "occurred_at",
            lambda: host.interaction([{"role": "user", "content": "x"}], occurred_at=datetime(2026, 1, 1)),
        ),
    ]
    for field, call in wrong:
        with pytest.raises(PayloadError) as caught:
            call()
        assert caught.value.field == field
    for value in (float("nan"), object()):
        with pytest.raises(PayloadError, match="JSON"):
            host.flag("a", "unsafe", metadata={"x": value})
    assert host.status().recorded == 0


def test_single_items_need_a_spool(feedback_service: FeedbackService) -> None:
    with FeedbackClient(feedback_service.base_url, feedback_service.api_key) as client:
        with pytest.raises(RuntimeError, match="spool=FOLDER"):
            client.thumb("a", True)
        with pytest.raises(RuntimeError, match="spool=FOLDER"):
            client.status()


def test_a_service_that_comes_late_gets_everything_in_order(
    feedback_service: FeedbackService, tmp_path: Path
) -> None:
    late = FeedbackService(feedback_service.database_url, feedback_service.pseudonym_key_file)
    with FeedbackClient(late.base_url, feedback_service.api_key, spool=tmp_path) as client:
        said = [client.thumb("late", n % 2 == 0) for n in range(1200)]
        assert client.flush(SECONDS)
        try:
            late.start()
            assert client.close(SECONDS)
        finally:
            late.stop()
        assert client.status().acknowledged == 1200
    rows = stored(feedback_service, [each.event_id for each in said])
    arrived = [rows[each.event_id]["received_at"] for each in said]
    assert arrived == sorted(arrived)
    assert list(tmp_path.iterdir()) == []


def test_what_was_on_disk_when_the_host_was_killed_arrives_once(
    feedback_service: FeedbackService, tmp_path: Path
) -> None:
    """Killed while it records and sends: confirmed items and those of the torn write before are told apart."""
    script = """
        confirmed = []
        while True:
            confirmed.append(client.comment("killed", "x" * 200).event_id)
            if len(confirmed) == 20 and client.flush():
                print(" ".join(confirmed), flush=True)
                confirmed.clear()
    """
    process = start(script, feedback_service.base_url, feedback_service.api_key, str(tmp_path))
    assert process.stdout is not None
    confirmed = [line.split() for line in (process.stdout.readline() for _ in range(25))]
    process.kill()
    confirmed += [line.split() for line in process.stdout if line.endswith("\n")]
    process.stdout.close()
    process.wait()
    for path in tmp_path.glob("*.spool"):
        with path.open("ab") as file:
            file.write(b"\x40\0\0\0torn")
    heir = FeedbackClient(feedback_service.base_url, feedback_service.api_key, spool=tmp_path)
    assert heir.close(SECONDS)
    assert heir.status().refused == 0
    ids = [each for line in confirmed for each in line]
    assert len(ids) >= 500
    assert stored(feedback_service, ids).keys() == set(ids)
    assert list(tmp_path.iterdir()) == []


def test_processes_share_a_folder_and_inherit_from_each_other(
    feedback_service: FeedbackService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "ADOPT_SECONDS", 0.1)
    script = """
        import os, signal
        ids = [client.implicit("shared", "shown").event_id for _ in range(300)]
        assert client.flush(30)
        print(" ".join(ids), flush=True)
        if sys.argv[4] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    """
    nowhere = f"http://127.0.0.1:{free_port()}"
    with FeedbackClient(feedback_service.base_url, feedback_service.api_key, spool=tmp_path) as client:
        processes = [
            start(script, url, feedback_service.api_key, str(tmp_path), end)
            for url, end in ((feedback_service.base_url, "well"), (nowhere, "killed"))
        ]
        ours = [client.implicit("shared", "shown").event_id for _ in range(300)]
        printed = [process.communicate(timeout=60)[0].split() for process in processes]
        assert [process.returncode for process in processes] == [0, -signal.SIGKILL]
        expected = {*ours, *printed[0], *printed[1]}
        assert len(expected) == 900
        deadline = time.monotonic() + SECONDS
        while stored(feedback_service, list(expected)).keys() != expected:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert client.close(SECONDS)
    assert list(tmp_path.iterdir()) == []


def test_a_contradiction_goes_to_the_refused_and_holds_nothing_up(
    host: FeedbackClient, feedback_service: FeedbackService, tmp_path: Path
) -> None:
    prompt = [{"role": "user", "content": "How?"}]
    answer = host.interaction(prompt, "So.")
    host.interaction(prompt, "Not so.", interaction_id=answer)
    after = host.thumb(answer, True)
    assert host.close(SECONDS)
    assert (host.status().acknowledged, host.status().refused) == (2, 1)
    [line] = (tmp_path / "spool" / "refused.jsonl").read_text().splitlines()
    refused = json.loads(line)
    assert refused["item"]["output"] == "Not so."
    assert refused["error"]["code"] == "conflict"
    assert after.event_id in stored(feedback_service, [after.event_id])


def test_the_applications_log_does_not_tell_of_each_batch(
    host: FeedbackClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        host.thumb("a", True)
        assert host.close(SECONDS)
    assert host.status().acknowledged == 1
    assert caplog.records == []


def test_a_wrong_key_keeps_everything_for_the_right_one(
    feedback_service: FeedbackService, tmp_path: Path
) -> None:
    wrong = FeedbackClient(feedback_service.base_url, "wrong", spool=tmp_path)
    said = wrong.thumb("a", True)
    assert not wrong.close(SECONDS)
    assert wrong.status().stopped
    assert "401" in (wrong.status().problem or "")
    assert not wrong.close(SECONDS)
    assert wrong.status().waiting_bytes > 0
    with FeedbackClient(feedback_service.base_url, feedback_service.api_key, spool=tmp_path) as right:
        assert right.close(SECONDS)
    assert said.event_id in stored(feedback_service, [said.event_id])


def test_a_forked_worker_sends_its_own(feedback_service: FeedbackService, tmp_path: Path) -> None:
    """As servers do that load the application first and fork then."""
    script = """
        import os, warnings
        warnings.simplefilter("ignore")
        mine = [client.thumb("forked", True).event_id]
        child = os.fork()
        if child == 0:
            mine = [client.thumb("forked", False).event_id]
        else:
            assert os.waitpid(child, 0)[1] == 0
        assert client.close(30)
        assert client.status().acknowledged == 1
        print(" ".join(mine), flush=True)
        os._exit(0)
    """
    process = start(script, feedback_service.base_url, feedback_service.api_key, str(tmp_path))
    ids = process.communicate(timeout=60)[0].split()
    assert process.returncode == 0
    assert stored(feedback_service, ids).keys() == set(ids)
    assert len(ids) == 2
    assert list(tmp_path.iterdir()) == []


def test_tokens_for_the_answers_of_a_page(feedback_service: FeedbackService) -> None:
    with FeedbackClient(feedback_service.base_url, feedback_service.api_key) as client:
        assert client.tokens() == []
        tokens = client.tokens(
            "a-1", "a-2", user_id="customer-7", session_id="s", kinds=["thumb"], expires_in_seconds=600
        )
        assert [token.interaction_id for token in tokens] == ["a-1", "a-2"]
        assert all(token.token.startswith("dmt_") for token in tokens)
        assert all(0 < token.expires_at - time.time() <= 600 for token in tokens)
        with pytest.raises(RequestFailed, match="expires_in") as caught:
            client.tokens("a-1", expires_in_seconds=1)
        assert caught.value.status == 422


def test_what_was_said_can_be_read_back(feedback_service: FeedbackService, tmp_path: Path) -> None:
    with psycopg.connect(feedback_service.database_url) as conn:
        key = create_key(conn, "reader", ("ingest", "read"))[1]
    with FeedbackClient(feedback_service.base_url, key, spool=tmp_path) as client:
        answer = client.interaction([{"role": "user", "content": "How?"}], "So.")
        thumb = client.thumb(answer, True)
        client.revise(thumb.feedback_id, "thumb", answer, label="down")
        comment = client.comment(answer, "Hm.")
        assert client.flush(SECONDS)
        deadline = time.monotonic() + SECONDS
        while client.status().waiting_bytes:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        states = client.state(answer, "another")
        assert {(each.feedback_id, each.kind, each.label) for each in states.feedback} == {
            (thumb.feedback_id, "thumb", "down"),
            (comment.feedback_id, "comment", None),
        }
        assert [each.kind for each in client.state(answer, kinds=["comment"]).feedback] == ["comment"]
    with (
        FeedbackClient(feedback_service.base_url, feedback_service.api_key) as unread,
        pytest.raises(RequestFailed, match="403"),
    ):
        unread.state(answer)

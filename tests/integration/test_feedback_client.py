"""The loader's client against the real service: batching, repeats, refusals, a wrong key."""

from datetime import UTC, datetime
from typing import Any

import pytest

from feedback import client as client_module
from feedback.client import FeedbackClient, SendFailed, SendReport
from feedback.ids import uuid7
from tests.integration.conftest import FeedbackService, free_port


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

"""Reading one row of the signals mart: prompts that trainers cannot take, contexts in rank order."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from assets.datasets.signals import Signal, signal_of


def mart_row(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "signal_id": "s1",
        "interaction_id": "i1",
        "event_ids": ["e1", "e2"],
        "kind": "thumb",
        "occurred_at": datetime(2026, 3, 1, 12, tzinfo=UTC),
        "session_id": "chat-1",
        "user_ref": "u1",
        "author_ref": None,
        "prompt": [{"role": "user", "content": "How?"}],
        "prompt_sha256": "ab" * 32,
        "completion": "Like this.",
        "correction": None,
        "is_positive": True,
        "retrieved": None,
        "sources": None,
        "exclusion_reason": None,
    }
    return row | changes


def read(**changes: Any) -> Signal:
    return signal_of(mart_row(**changes))


def test_a_row_becomes_a_record() -> None:
    signal = read(sources=["handbook"])
    assert signal.prompt == ({"role": "user", "content": "How?"},)
    assert signal.event_ids == ("e1", "e2")
    assert signal.sources == ("handbook",)
    assert signal.context == ()


def test_missing_and_unsupported_prompts_differ() -> None:
    assert read(prompt=None).prompt == ()
    assert read(prompt=[]).prompt == ()
    assert read(prompt={"role": "user"}).prompt is None
    assert read(prompt=["hello"]).prompt is None
    assert read(prompt=[{"role": "user", "content": [{"type": "image"}]}]).prompt is None
    assert read(prompt=[{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]).prompt is None


def test_extra_keys_of_a_turn_do_not_reach_the_trainer() -> None:
    assert read(prompt=[{"role": "user", "content": "a", "name": "Ann"}]).prompt == (
        {"role": "user", "content": "a"},
    )


def test_context_follows_rank_and_prefers_the_chunk() -> None:
    retrieved = [
        {"document_id": "handbook/b.md", "rank": 2},
        {"document_id": "handbook/a.md", "chunk_id": "c1", "rank": 1},
        {"source": "handbook", "rank": 3},
    ]
    assert read(retrieved=retrieved).context == ("c1", "handbook/b.md")


def test_fingerprint_sees_every_field_but_not_the_time_zone() -> None:
    base = read()
    later = base.occurred_at.astimezone(timezone(timedelta(hours=5)))
    assert read(occurred_at=later).fingerprint() == base.fingerprint()
    changes: list[dict[str, Any]] = [
        {"completion": "Other."},
        {"event_ids": ["e1"]},
        {"exclusion_reason": "train_not_ok"},
        {"sources": ["handbook"]},
        {"is_positive": False},
        {"author_ref": "a"},
    ]
    for change in changes:
        assert read(**change).fingerprint() != base.fingerprint(), change

"""Training signals as typed records: what `marts.training_signals` says, one record per feedback item.

What belongs here: the record, and reading it from Postgres. What does not: deciding what a signal
teaches (builders) and the SQL that folds, joins and redacts (dbt).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypedDict

import psycopg
from psycopg.rows import dict_row

from assets.datasets.canonical import digest


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Signal:
    """One current feedback item and the answer it judges; every text is redacted.

    `prompt` is empty when the signal has none, and None when it holds something other than plain text turns
    (tool calls, images). `is_positive` is None for corrections. `context` are the ids retrieved for the
    answer, best first. `exclusion_reason` is None when the signal may be used for training.
    """

    signal_id: str
    interaction_id: str | None
    event_ids: tuple[str, ...]
    kind: str
    occurred_at: datetime
    session_id: str | None
    user_ref: str | None
    author_ref: str | None
    prompt: tuple[Message, ...] | None
    prompt_sha256: str | None
    completion: str | None
    correction: str | None
    is_positive: bool | None
    context: tuple[str, ...]
    sources: tuple[str, ...]
    exclusion_reason: str | None

    def fingerprint(self) -> str:
        """SHA-256 over every field: two builds from equal fingerprints had equal inputs."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        fields["occurred_at"] = self.occurred_at.astimezone(UTC).isoformat()
        return digest(fields)


_SELECT = """
    select signal_id::text, interaction_id::text, event_ids::text[], kind, occurred_at, session_id, user_ref,
           author_ref, prompt, prompt_sha256, completion, correction, is_positive, retrieved, sources::text[],
           exclusion_reason
      from marts.training_signals
     order by signal_id
"""


def read_signals(conn: psycopg.Connection[Any]) -> list[Signal]:
    """Every row of `marts.training_signals`, excluded ones too: the builders count them by reason."""
    with conn.cursor(row_factory=dict_row) as cursor:
        return [signal_of(row) for row in cursor.execute(_SELECT)]


def signal_of(row: Mapping[str, Any]) -> Signal:
    """The record of one row of `marts.training_signals`; jsonb columns come as Python values."""
    return Signal(
        signal_id=row["signal_id"],
        interaction_id=row["interaction_id"],
        event_ids=tuple(row["event_ids"] or ()),
        kind=row["kind"],
        occurred_at=row["occurred_at"],
        session_id=row["session_id"],
        user_ref=row["user_ref"],
        author_ref=row["author_ref"],
        prompt=_messages(row["prompt"]),
        prompt_sha256=row["prompt_sha256"],
        completion=row["completion"],
        correction=row["correction"],
        is_positive=row["is_positive"],
        context=_context(row["retrieved"]),
        sources=tuple(row["sources"] or ()),
        exclusion_reason=row["exclusion_reason"],
    )


def _messages(value: Any) -> tuple[Message, ...] | None:
    if value is None:
        return ()
    if not isinstance(value, list):
        return None
    messages: list[Message] = []
    for turn in value:
        if not isinstance(turn, dict):
            return None
        role, content = turn.get("role"), turn.get("content")
        if not isinstance(role, str) or not isinstance(content, str) or turn.get("tool_calls"):
            return None
        messages.append({"role": role, "content": content})
    return tuple(messages)


def _context(value: Any) -> tuple[str, ...]:
    items = [item for item in value or () if isinstance(item, dict)]
    ranked = sorted(enumerate(items), key=lambda pair: (pair[1].get("rank") or 0, pair[0]))
    ids = (item.get("chunk_id") or item.get("document_id") for _, item in ranked)
    return tuple(str(identifier) for identifier in ids if identifier)

"""Upserts on an append-only log: a body under an id that is there already becomes a new revision.

Belongs here: finding out whether a body says something new, and naming its event. Does not belong here: the fold
itself (SQL, ``feedback.current``), any protocol.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from feedback import log
from feedback.access import Caller
from feedback.answers import ItemResult, error_of
from feedback.compat.shared import encoded, store
from feedback.formats import Item, content_id
from feedback.payloads import FeedbackEvent, PayloadError, parse_event
from feedback.service import Service


@dataclass
class _State:
    """The newest revision of a feedback item, and what it says."""

    event_id: str
    revision: int
    op: str
    said: dict[str, Any]


# What a feedback item says: all that is compared to find out whether a new body says something new.
_SAID = tuple(
    name
    for name in FeedbackEvent.__struct_fields__
    if name not in ("event_id", "feedback_id", "op", "revision", "occurred_at", "author_id")
)


async def upsert(service: Service, caller: Caller, bodies: Sequence[Mapping[str, Any]]) -> list[ItemResult]:
    """Make each feedback item say what its body says, in order; each body has a ``feedback_id``.

    The first body of an id creates it, one that says what it says already changes nothing, and any other is a new
    revision, also one that was said before. The event's id follows from the event before it and from the body, so
    that the same body sent twice at once is stored once. Raises Unavailable.
    """
    ids = list({body["feedback_id"] for body in bodies})
    columns = ", ".join(f'"{name}"' for name in ("event_id", "feedback_id", "revision", "op", *_SAID))
    rows = await log.fetch(
        service.review, f"SELECT {columns} FROM feedback.current($1::uuid[]) AS current", ids
    )
    states = {
        str(row["feedback_id"]): _State(
            str(row["event_id"]),
            row["revision"],
            row["op"],
            {name: _plain(name, row[name]) for name in _SAID},
        )
        for row in rows
    }
    results: dict[int, ItemResult] = {}
    events: dict[int, Item] = {}
    for place, body in enumerate(bodies):
        feedback_id = body["feedback_id"]
        before = states.get(feedback_id)
        event = {name: value for name, value in body.items() if name != "event_id"}
        try:
            said = _said(parse_event(encoded(event)))
        except PayloadError as error:
            results[place] = ItemResult(None, "invalid", error=error_of(error))
            continue
        if before is not None and before.op != "retract" and before.said == said:
            results[place] = ItemResult(before.event_id, "duplicate", feedback_id=feedback_id)
            continue
        event["op"] = "create" if before is None else "revise"
        event["revision"] = 1 if before is None else before.revision + 1
        previous = feedback_id if before is None else before.event_id
        event["event_id"] = content_id("revision", previous, body=event)
        states[feedback_id] = _State(event["event_id"], event["revision"], event["op"], said)
        events[place] = Item("feedback", event)
    stored = await store(service, caller, list(events.values()))
    results |= dict(zip(events, stored, strict=True))
    return [results[place] for place in range(len(bodies))]


def _said(item: FeedbackEvent) -> dict[str, Any]:
    said = {name: getattr(item, name) for name in _SAID}
    return said | {"name": item.name or item.kind}


def _plain(name: str, value: Any) -> Any:
    """The value of a column; asyncpg hands JSON over as text."""
    return json.loads(value) if name in ("value", "metadata") and isinstance(value, str) else value

"""Comet Opik: traces with their feedback scores, as its REST API and SDK export them.

Belongs here: the mapping of a trace and its ``feedback_scores``. Does not belong here: spans, calling Opik.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from feedback.formats import Item, given, number, opinion, stable_id
from feedback.formats.records import (
    from_messages,
    from_text,
    inner,
    keep,
    kept,
    milliseconds,
    moment,
    need,
    objects,
    restore,
    said,
    text,
    to_messages,
    to_text,
)

NAME = "opik"
_KINDS = {"ui": "HUMAN", "sdk": "CODE", "online_scoring": "LLM"}
_PEOPLE = ("created_by", "last_updated_by")


def to_items(record: Any) -> Iterator[Item]:
    """A trace and its feedback scores. Raises PayloadError if it is no trace."""
    trace_id = need(record, "id")
    yield Item("interaction", _trace(record))
    for score in objects(record, "feedback_scores"):
        yield Item("feedback", _score(trace_id, score))


def from_items(items: Sequence[Item]) -> dict[str, Any]:
    """The trace with its scores; who gave them is not given back."""
    trace: dict[str, Any] = {}
    scores = []
    for item in items:
        if item.kind == "interaction":
            trace = _trace_back(item)
        else:
            scores.append(_score_back(item))
    return trace | ({"feedback_scores": scores} if scores else {})


def _trace(trace: Mapping[str, Any]) -> dict[str, Any]:
    messages, asked = to_messages(trace.get("input") or "")
    output, answered = to_text(trace["output"]) if trace.get("output") is not None else (None, None)
    usage = inner(trace, "usage")
    body = given(
        interaction_id=trace["id"],
        session_id=trace.get("thread_id"),
        occurred_at=moment(trace.get("start_time")),
        latency_ms=milliseconds(trace.get("start_time"), trace.get("end_time")),
        messages=messages,
        output=output,
        input_tokens=usage.get("prompt_tokens"),
        output_tokens=usage.get("completion_tokens"),
        cost_usd=trace.get("total_estimated_cost"),
        metadata={NAME: given(asked=asked, answered=answered)},
    )
    left = keep(trace, _trace_back(Item("interaction", body)), left_out=("feedback_scores", *_PEOPLE))
    return body | {"metadata": {NAME: body["metadata"][NAME] | {"rest": left}}}


def _trace_back(item: Item) -> dict[str, Any]:
    body, own = item.body, kept(item, NAME)
    rebuilt = given(
        id=body["interaction_id"],
        thread_id=body.get("session_id"),
        start_time=body.get("occurred_at"),
        input=from_messages(body["messages"], own["asked"]) or None,
        output=from_text(body["output"], own["answered"]) if "answered" in own else None,
        total_estimated_cost=body.get("cost_usd"),
    )
    return restore(rebuilt, own.get("rest"))


def _score(trace_id: str, score: Mapping[str, Any]) -> dict[str, Any]:
    """Opik knows a score by its trace, author and name: the newest of these is the one that counts."""
    name = need(score, "name")
    author = score.get("created_by")
    changed = score.get("last_updated_at") or score.get("created_at")
    category = said(text(score, "category_name")).get("label")
    value = number(need(score, "value", (int, float)), "value")
    body = opinion(value, category, score.get("reason")) | given(
        event_id=stable_id(NAME, trace_id, str(author), name, str(changed), str(value)),
        feedback_id=stable_id(NAME, trace_id, str(author), name),
        interaction_id=trace_id,
        name=name,
        annotator_kind=_KINDS.get(str(score.get("source")), "CODE"),
        author_id=author,
        occurred_at=moment(changed),
    )
    left = keep(score, _score_back(Item("feedback", body)), left_out=_PEOPLE)
    return body | {"metadata": {NAME: {"rest": left}}}


def _score_back(item: Item) -> dict[str, Any]:
    body = item.body
    rebuilt = given(
        name=body["name"],
        value=body.get("score", body.get("value")),
        category_name=body.get("label"),
        reason=body.get("explanation"),
    )
    return restore(rebuilt, kept(item, NAME).get("rest"))

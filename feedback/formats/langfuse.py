"""Langfuse's scores, traces and observations, as its API returns them and as its SDKs send scores; and back.

- A score is feedback. BOOLEAN by a person is a thumb, by anything else a rating of 0 or 1; NUMERIC follows
  ``feedback.formats.opinion``; CATEGORICAL is a category, TEXT a comment, CORRECTION a correction. Without
  ``dataType`` a text is CATEGORICAL and a number NUMERIC, as in Langfuse.
- Who judged: ``metadata.annotator_kind`` if it says; else source EVAL is an LLM, ANNOTATION a reviewer, and API a
  person: it is what Langfuse's widgets send. Code that posts scores should say so in ``metadata.annotator_kind``.
- An observation is named ``trace id:observation id``, which for OpenTelemetry-based SDKs is what ``feedback.formats.otlp``
  makes of the same span; a trace is an interaction of its own id. Observations other than generations yield nothing.
- A score that was edited over there (updated more than a second after it was created) was said when it was updated.
- What was richer than text (parts, calls of tools) comes back as it was, unless it is large; then as its text.
- ``authorUserId`` and ``userId`` become pseudonyms at the door; a score's ``trace``, which the API joins to it, is left.

Belongs here: Langfuse's fields. Does not belong here: its routes and its upserts (``feedback.compat``).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from feedback.formats import Item, content_id, given, number, opinion, span_key, stable_id
from feedback.formats.messages import answer, fits, prompt
from feedback.formats.records import (
    from_messages,
    from_text,
    keep,
    kept,
    milliseconds,
    moment,
    need,
    to_messages,
    to_text,
)
from feedback.payloads import PayloadError

NAME = "langfuse"
_KINDS = {"EVAL": "LLM", "ANNOTATION": "HUMAN", "API": "HUMAN"}
_EDITED_MS = 1000


def to_items(record: Any, owner: str = "") -> Iterator[Item]:
    """The item of one score, trace or observation. Raises PayloadError if it is none of them.

    ``owner`` keeps apart scores of several projects (here: apps) that have the same ids.
    """
    if not isinstance(record, Mapping):
        raise PayloadError("The record is not an object", remedy="Give one score, trace or observation")
    if "startTime" in record:
        if str(record.get("type")).upper() == "GENERATION":
            yield _observation(record)
    elif {"value", "stringValue", "dataType"} & set(record):
        yield _score(record, owner)
    elif "timestamp" in record:
        yield _trace(record)
    else:
        raise PayloadError(
            "The record is neither a score (value), nor a trace (timestamp), nor an observation (startTime)",
            remedy="Export scores, traces or observations from Langfuse's API, one object a line",
        )


def from_items(items: Sequence[Item]) -> dict[str, Any]:
    """The one record that ``to_items`` made ``items`` from."""
    (item,) = items
    rebuilt = _score_back(item) if item.kind == "feedback" else _interaction_back(item)
    rest: dict[str, Any] = kept(item, NAME)["rest"]
    return rebuilt | rest


def _score(record: Mapping[str, Any], owner: str) -> Item:
    name = need(record, "name")
    said = record.get("metadata")
    kind = str(said.get("annotator_kind", "")).upper() if isinstance(said, Mapping) else ""
    source = str(record.get("source") or "API")
    body: dict[str, Any] = {
        "name": name,
        "annotator_kind": kind or _KINDS.get(source, "HUMAN"),
        **given(author_role="reviewer" if source == "ANNOTATION" else None),
        **given(identifier=record.get("id"), author_id=record.get("authorUserId")),
        **_target(record),
    }
    body |= _content(record, body["annotator_kind"])
    edited = (milliseconds(record.get("createdAt"), record.get("updatedAt")) or 0) > _EDITED_MS
    body |= given(occurred_at=moment(record.get("updatedAt" if edited else "timestamp")))
    if record.get("id") is not None:
        body["feedback_id"] = stable_id(NAME, owner, "score", str(record["id"]))
    rest = keep(record, _score_back(Item("feedback", body)), left_out=("trace", "authorUserId"))
    body["metadata"] = {NAME: {"rest": rest}}
    if "feedback_id" in body:
        # A record that is read again without a change makes the same event.
        body["event_id"] = content_id(NAME, body=body)
    return Item("feedback", body)


def _content(record: Mapping[str, Any], annotator_kind: str) -> dict[str, Any]:
    """What the score says. Raises PayloadError if its value is not of its type."""
    value, comment = record.get("value"), record.get("comment") or None
    written = record.get("stringValue") if isinstance(record.get("stringValue"), str) else value
    kind = record.get("dataType") or ("CATEGORICAL" if isinstance(written, str) else "NUMERIC")
    counted = isinstance(value, int | float) and not (isinstance(value, bool) and kind != "BOOLEAN")
    if counted:
        number(value, "value")
    if kind in ("NUMERIC", "BOOLEAN") and not counted:
        raise _mistyped(kind, "a number")
    if kind not in ("NUMERIC", "BOOLEAN") and not isinstance(written, str):
        raise _mistyped(kind, "a text")
    if kind == "NUMERIC":
        return opinion(value, None, comment)
    if kind == "BOOLEAN":
        if value not in (0, 1):
            raise _mistyped(kind, "0 or 1")
        human = annotator_kind == "HUMAN"
        return opinion(float(value), None if human else str(bool(value)).lower(), comment, boolean=human)
    if kind == "CATEGORICAL":
        return given(value=value if counted else None) | opinion(None, written, comment)
    if kind == "TEXT":
        return {"kind": "comment", "explanation": written}
    if kind == "CORRECTION":
        return {"kind": "correction", "correction": written} | given(explanation=comment)
    raise PayloadError(
        f"dataType {kind} is not known",
        field="dataType",
        remedy="Send NUMERIC, BOOLEAN, CATEGORICAL, TEXT or CORRECTION",
    )


def _mistyped(kind: str, wanted: str) -> PayloadError:
    return PayloadError(
        f"The value of a {kind} score is {wanted}", field="value", remedy="Correct value or dataType"
    )


def _target(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the score is about. Raises PayloadError if it is no answer of the product."""
    trace, observation, session = (record.get(name) for name in ("traceId", "observationId", "sessionId"))
    subject = record.get("subject")
    if isinstance(subject, Mapping):
        about, found = subject.get("kind"), subject.get("id")
        trace = found if about == "trace" else subject.get("traceId")
        observation = found if about == "observation" else None
        session = found if about == "session" else None
    hexadecimal = isinstance(trace, str) and re.fullmatch("[0-9a-f]{32}", trace)
    traced = given(trace_id=trace if hexadecimal else None, session_id=session)
    if observation:
        if hexadecimal and isinstance(observation, str) and re.fullmatch("[0-9a-f]{16}", observation):
            traced["span_id"] = observation
        return {"interaction_id": span_key(str(trace), str(observation)) if trace else observation, **traced}
    if trace:
        return {"interaction_id": trace, **traced} | ({"scope": "trace"} if hexadecimal else {})
    if session:
        return {"scope": "session", "session_id": session}
    raise PayloadError(
        "The score is about no trace, observation or session",
        field="traceId",
        remedy="Send traceId (and observationId) or sessionId; scores of dataset runs are no feedback on answers",
    )


def _score_back(item: Item) -> dict[str, Any]:
    """The fields of a score that an item tells; ``keep`` holds the others."""
    body = item.body
    value = body.get("value")
    if body["kind"] in ("thumb", "rating"):
        value = body["score"]
    elif body["kind"] == "correction":
        value = body["correction"]
    elif not isinstance(value, int | float):
        value = body["label"] if body["kind"] == "category" else body["explanation"]
    return {
        "name": body["name"],
        "value": value,
        **given(
            id=body.get("identifier"),
            comment=body.get("explanation") if body["kind"] != "comment" else None,
            timestamp=body.get("occurred_at"),
            authorUserId=body.get("author_id"),
        ),
    }


def _trace(record: Mapping[str, Any]) -> Item:
    trace = need(record, "id")
    return _interaction(
        record,
        interaction_id=trace,
        session_id=record.get("sessionId"),
        user_id=record.get("userId"),
        occurred_at=moment(record.get("timestamp")),
        app_release=record.get("release"),
        cost_usd=record.get("totalCost"),
        latency_ms=_scaled(record.get("latency"), 1000),
        metadata={"trace_id": trace},
    )


def _observation(record: Mapping[str, Any]) -> Item:
    trace, observation = need(record, "traceId"), need(record, "id")
    usage = record.get("usageDetails") or record.get("usage")
    usage = usage if isinstance(usage, Mapping) else {}
    costs = record.get("costDetails")
    cost = costs.get("total") if isinstance(costs, Mapping) else None
    version = record.get("promptVersion")
    return _interaction(
        record,
        interaction_id=span_key(trace, observation),
        session_id=record.get("sessionId"),
        user_id=record.get("userId"),
        occurred_at=moment(record.get("startTime")),
        latency_ms=milliseconds(record.get("startTime"), record.get("endTime")),
        input_tokens=usage.get("input"),
        output_tokens=usage.get("output"),
        cost_usd=record.get("calculatedTotalCost") if cost is None else cost,
        model=record.get("model"),
        prompt_name=record.get("promptName"),
        prompt_version=None if version is None else str(version),
        metadata={"trace_id": trace, "span_id": observation},
    )


def _interaction(record: Mapping[str, Any], *, metadata: dict[str, Any], **fields: Any) -> Item:
    """The interaction of a record with ``input`` and ``output``. Raises PayloadError if nothing was asked."""
    messages, asked = to_messages(record.get("input"))
    if prompt(record.get("input")) != messages and asked == "json":
        # Richer than plain messages: read for what it says, and kept as it was.
        messages, asked = prompt(record.get("input")), ""
    if not messages:
        raise PayloadError(
            "The record holds no input",
            field="input",
            remedy="Export it with its input and output; without a question there is no interaction",
        )
    output, answered = to_text(record["output"]) if record.get("output") is not None else (None, "")
    if answered == "json" and answer(record["output"]) != output:
        output, answered = answer(record["output"]), ""
    body = given(messages=messages, output=output, **fields)
    body["metadata"] = metadata | {NAME: {"asked": asked, "answered": answered}}
    rebuilt = _interaction_back(Item("interaction", body))
    rest = keep(record, rebuilt, left_out=("userId",))
    body["metadata"][NAME]["rest"] = {name: value for name, value in rest.items() if fits(value)}
    return Item("interaction", body)


def _interaction_back(item: Item) -> dict[str, Any]:
    """The fields of a trace or observation that an item tells; ``keep`` holds the others."""
    body, metadata, shape = item.body, item.body["metadata"], kept(item, NAME)
    record = given(
        input=from_messages(body["messages"], shape["asked"]) if shape["asked"] else None,
        output=from_text(body["output"], shape["answered"]) if shape["answered"] else None,
        sessionId=body.get("session_id"),
        userId=body.get("user_id"),
    )
    if "span_id" in metadata:
        return record | given(
            id=metadata["span_id"],
            traceId=metadata["trace_id"],
            startTime=body.get("occurred_at"),
            model=body.get("model"),
            promptName=body.get("prompt_name"),
        )
    return record | given(
        id=metadata["trace_id"],
        timestamp=body.get("occurred_at"),
        release=body.get("app_release"),
        totalCost=body.get("cost_usd"),
    )


def _scaled(value: Any, factor: float) -> Any:
    return value * factor if isinstance(value, int | float) else value

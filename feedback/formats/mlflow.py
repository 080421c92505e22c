"""MLflow: traces with their assessments, as ``Trace.to_json()`` writes them.

Of a trace, ``info`` is taken (the V3 form), with the inputs and outputs of its root span where ``data.spans`` is there;
other spans are not ours to keep. A feedback assessment becomes an event; an expectation becomes a correction; one that
overrides another revises it; one that is no longer ``valid`` is withdrawn.

Belongs here: that mapping. Does not belong here: reading a tracking store.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from feedback.formats import Item, given, number, opinion, stable_id
from feedback.formats.messages import too_deep
from feedback.formats.records import (
    from_messages,
    from_text,
    inner,
    keep,
    kept,
    moment,
    need,
    objects,
    restore,
    said,
    to_messages,
    to_text,
)

NAME = "mlflow"
_KINDS = {"HUMAN": "HUMAN", "LLM_JUDGE": "LLM", "AI_JUDGE": "LLM", "CODE": "CODE"}


def to_items(record: Any) -> Iterator[Item]:
    """A trace and its assessments. Raises PayloadError if it is no trace."""
    info = need(record, "info", Mapping)
    trace_id = need(info, "trace_id")
    yield Item("interaction", _trace(info, objects(inner(record, "data"), "spans")))
    assessments = objects(info, "assessments")
    revised = {
        need(one, "assessment_id"): need(one, "overrides") for one in assessments if one.get("overrides")
    }
    for assessment in assessments:
        yield Item("feedback", _assessment(trace_id, assessment, revised))


def from_items(items: Sequence[Item]) -> dict[str, Any]:
    """The trace's ``info``; its spans, and who assessed, are not given back."""
    info: dict[str, Any] = {}
    assessments = []
    for item in items:
        if item.kind == "interaction":
            info = _info_back(item)
        else:
            assessments.append(_assessment_back(item))
    return {"info": info | ({"assessments": assessments} if assessments else {})}


def _trace(info: Mapping[str, Any], spans: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    known = inner(info, "trace_metadata")
    root = inner(next((span for span in spans if not span.get("parent_span_id")), {}), "attributes")
    asked_for = _parsed(root.get("mlflow.spanInputs") or known.get("mlflow.traceInputs"))
    answered_with = _parsed(root.get("mlflow.spanOutputs") or known.get("mlflow.traceOutputs"))
    messages, asked = to_messages(info.get("request_preview", "") if asked_for is None else asked_for)
    if answered_with is None:
        answered_with = info.get("response_preview")
    output, answered = (None, None) if answered_with is None else to_text(answered_with)
    usage = _parsed(known.get("mlflow.trace.tokenUsage"))
    usage = usage if isinstance(usage, Mapping) else {}
    body = given(
        interaction_id=info["trace_id"],
        session_id=known.get("mlflow.trace.session"),
        user_id=known.get("mlflow.trace.user"),
        occurred_at=moment(info.get("request_time")),
        latency_ms=_milliseconds(info.get("execution_duration")),
        messages=messages,
        output=output,
        input_tokens=usage.get("input_tokens"),
        output_tokens=usage.get("output_tokens"),
        metadata={NAME: given(asked=asked, answered=answered)},
    )
    # Previews and metadata repeat the texts: what our fields hold is not kept twice.
    left = keep(info, _info_back(Item("interaction", body)), left_out=("assessments",))
    if "trace_metadata" in left:
        left["trace_metadata"] = {k: v for k, v in known.items() if k != "mlflow.trace.user"}
    return body | {"metadata": {NAME: body["metadata"][NAME] | {"rest": left}}}


def _info_back(item: Item) -> dict[str, Any]:
    body, own = item.body, kept(item, NAME)
    rebuilt = given(
        trace_id=body["interaction_id"],
        request_time=body.get("occurred_at"),
        request_preview=_preview(from_messages(body["messages"], own["asked"])),
        response_preview=_preview(from_text(body["output"], own["answered"])) if body.get("output") else None,
    )
    return restore(rebuilt, own.get("rest"))


def _assessment(trace_id: str, one: Mapping[str, Any], revised: Mapping[str, str]) -> dict[str, Any]:
    id, source = need(one, "assessment_id"), inner(one, "source")
    changed = one.get("last_update_time") or one.get("create_time")
    first, depth = id, 1
    while first in revised and depth <= len(revised):
        first, depth = revised[first], depth + 1
    common = given(
        event_id=stable_id(NAME, id, str(changed), str(one.get("valid", True))),
        feedback_id=stable_id(NAME, first),
        interaction_id=trace_id,
        name=need(one, "assessment_name"),
        annotator_kind=_KINDS.get(str(source.get("source_type")), "CODE"),
        author_id=source.get("source_id") if source.get("source_type") == "HUMAN" else None,
        identifier=source.get("source_id") if source.get("source_type") != "HUMAN" else None,
        occurred_at=moment(changed),
        op="create" if depth == 1 else "revise",
        revision=2 * depth - 1,
    )
    rationale = one.get("rationale")
    if isinstance(one.get("expectation"), Mapping):
        text, shape = to_text(one["expectation"].get("value"))
        content = given(kind="correction", correction=text, explanation=rationale)
        own: dict[str, Any] = {"expected": shape}
    else:
        value = inner(one, "feedback").get("value")
        own = {}
        if isinstance(value, bool):
            content = opinion(float(value), None, rationale, boolean=True)
        elif isinstance(value, int | float):
            content = opinion(number(value, "feedback.value"), None, rationale)
        else:
            spoken = said(value) if isinstance(value, str) else {}
            content = opinion(None, spoken.get("label"), rationale or spoken.get("explanation"))
            if "label" not in content and "explanation" not in content:
                # Lists, objects and errors have no form of ours but the value as it is.
                content = {"kind": "category", "label": "other", "value": one.get("feedback")}
    if one.get("valid") is False and first == id and id not in revised.values():
        common |= {"op": "retract", "revision": 2 * depth}
    body = common | content | {"metadata": {NAME: {"id": id} | own}}
    left = keep(one, _assessment_back(Item("feedback", body)), left_out=("source",))
    left["source"] = {k: v for k, v in source.items() if k != "source_id" or "identifier" in common}
    body["metadata"][NAME]["rest"] = left
    return body


def _assessment_back(item: Item) -> dict[str, Any]:
    body, own = item.body, kept(item, NAME)
    rebuilt = given(
        assessment_id=own["id"],
        trace_id=body["interaction_id"],
        assessment_name=body["name"],
        rationale=body.get("explanation"),
    )
    if "expected" in own:
        rebuilt["expectation"] = {"value": from_text(body["correction"], own["expected"])}
    elif body["kind"] == "thumb":
        rebuilt["feedback"] = {"value": bool(body["score"])}
    elif body["kind"] == "rating":
        rebuilt["feedback"] = {"value": body["score"]}
    elif "value" in body:
        rebuilt["feedback"] = body["value"] if isinstance(body["value"], dict) else {"value": body["value"]}
    elif "label" in body:
        rebuilt["feedback"] = {"value": body["label"]}
    return restore(rebuilt, own.get("rest"))


def _parsed(text: Any) -> Any:
    """Values in metadata and attributes are JSON texts; some exports have them decoded already."""
    if not isinstance(text, str):
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if too_deep(found) else found


def _preview(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _milliseconds(duration: Any) -> float | None:
    """A protobuf duration in JSON, such as ``1.5s``."""
    try:
        return float(str(duration).removesuffix("s")) * 1000 if duration is not None else None
    except ValueError:
        return None

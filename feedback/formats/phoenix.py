"""Arize Phoenix: spans and annotations, as its REST API lists them.

A record is one span of ``GET /v1/projects/{project}/spans`` (its attributes follow OpenInference), with the span's
annotations of ``GET /v1/projects/{project}/span_annotations`` under ``annotations``; or one annotation alone.

Belongs here: the mapping of those two. Does not belong here: spans that arrive by OTLP (``feedback.formats.otlp``).
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

NAME = "phoenix"


def to_items(record: Any) -> Iterator[Item]:
    """A span and its annotations, or one annotation. Raises PayloadError if it is neither."""
    if isinstance(record, Mapping) and "annotator_kind" in record:
        yield Item("feedback", _annotation(record))
        return
    yield Item("interaction", _span(record))
    for annotation in objects(record, "annotations"):
        yield Item("feedback", _annotation(annotation))


def from_items(items: Sequence[Item]) -> dict[str, Any]:
    """The span with its annotations, or the annotation alone; who annotated is not given back."""
    annotations = [_annotation_back(item) for item in items if item.kind == "feedback"]
    spans = [_span_back(item) for item in items if item.kind == "interaction"]
    if not spans:
        return annotations[0]
    return spans[0] | ({"annotations": annotations} if annotations else {})


def _span(span: Any) -> dict[str, Any]:
    context = need(span, "context", Mapping)
    known = need(span, "attributes", Mapping)
    messages, asked = to_messages(known.get("input.value", ""))
    output, answered = to_text(known["output.value"]) if "output.value" in known else (None, None)
    body = given(
        interaction_id=need(context, "span_id"),
        session_id=known.get("session.id"),
        user_id=known.get("user.id"),
        occurred_at=moment(span.get("start_time")),
        latency_ms=milliseconds(span.get("start_time"), span.get("end_time")),
        messages=messages,
        output=output,
        input_tokens=known.get("llm.token_count.prompt"),
        output_tokens=known.get("llm.token_count.completion"),
        provider=known.get("llm.provider"),
        model=known.get("llm.model_name"),
        metadata={NAME: given(asked=asked, answered=answered)},
    )
    rebuilt = _span_back(Item("interaction", body))
    left = keep(span, rebuilt, left_out=("annotations", "attributes"))
    attributes = keep(known, rebuilt["attributes"], left_out=("user.id",))
    return body | {"metadata": {NAME: body["metadata"][NAME] | {"rest": left, "attributes": attributes}}}


def _span_back(item: Item) -> dict[str, Any]:
    body, own = item.body, kept(item, NAME)
    attributes = given(
        **{
            "session.id": body.get("session_id"),
            "input.value": from_messages(body["messages"], own["asked"]),
            "output.value": from_text(body["output"], own["answered"]) if "answered" in own else None,
            "llm.token_count.prompt": body.get("input_tokens"),
            "llm.token_count.completion": body.get("output_tokens"),
            "llm.provider": body.get("provider"),
            "llm.model_name": body.get("model"),
        }
    )
    rebuilt = given(start_time=body.get("occurred_at"), attributes=restore(attributes, own.get("attributes")))
    return restore(rebuilt, own.get("rest"))


def _annotation(annotation: Mapping[str, Any]) -> dict[str, Any]:
    id, result = need(annotation, "id"), inner(annotation, "result")
    changed = annotation.get("updated_at") or annotation.get("created_at")
    spoken = said(text(result, "label"))
    content = opinion(
        number(result.get("score"), "result.score"),
        spoken.get("label"),
        result.get("explanation") or spoken.get("explanation"),
    )
    if content == {"kind": "comment"}:
        content = {"kind": "category", "label": "noted"}
    body = content | given(
        event_id=stable_id(NAME, id, str(changed)),
        feedback_id=stable_id(NAME, id),
        interaction_id=need(annotation, "span_id"),
        name=need(annotation, "name"),
        annotator_kind=need(annotation, "annotator_kind"),
        author_id=annotation.get("user_id"),
        identifier=annotation.get("identifier") or None,
        occurred_at=moment(changed),
        metadata={NAME: {"id": id}},
    )
    left = keep(annotation, _annotation_back(Item("feedback", body)), left_out=("user_id",))
    return body | {"metadata": {NAME: {"id": id, "rest": left}}}


def _annotation_back(item: Item) -> dict[str, Any]:
    body, own = item.body, kept(item, NAME)
    rebuilt = given(
        id=own["id"],
        span_id=body["interaction_id"],
        name=body["name"],
        annotator_kind=body["annotator_kind"],
        identifier=body.get("identifier"),
        result={
            "label": body.get("label"),
            "score": body.get("score", body.get("value")),
            "explanation": body.get("explanation"),
        },
    )
    return restore(rebuilt, own.get("rest"))

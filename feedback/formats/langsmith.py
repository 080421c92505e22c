"""LangSmith: runs with their feedback, or feedback alone, as its SDK lists them.

A run is ``client.list_runs()`` as JSON, with ``client.list_feedback(run_ids=[...])`` under ``feedback``. The fields are
those of the SDK's ``schemas.Run`` and ``schemas.Feedback``.

Belongs here: the mapping of those two. Does not belong here: calling LangSmith.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from feedback.formats import Item, given, opinion, stable_id
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
    to_messages,
    to_text,
)

NAME = "langsmith"
_KINDS = {"model": "LLM", "auto_eval": "LLM", "app": "HUMAN", "api": "HUMAN"}


def to_items(record: Any) -> Iterator[Item]:
    """A run and its feedback, or one feedback. Raises PayloadError if it is neither."""
    if isinstance(record, Mapping) and "key" in record:
        yield from _feedback(record)
        return
    yield _run(record)
    for feedback in objects(record, "feedback"):
        yield from _feedback(feedback)


def from_items(items: Sequence[Item]) -> dict[str, Any]:
    """The run with its feedback, or the feedback alone; who gave it is not given back."""
    feedback: dict[str, dict[str, Any]] = {}
    for item in items:
        if item.kind == "feedback":
            found = feedback.setdefault(kept(item, NAME)["id"], {})
            found |= _feedback_back(item)
    runs = [item for item in items if item.kind == "interaction"]
    if not runs:
        return next(iter(feedback.values()))
    return _run_back(runs[0]) | ({"feedback": list(feedback.values())} if feedback else {})


def _run(run: Any) -> Item:
    name = need(run, "id")
    metadata = inner(inner(run, "extra"), "metadata")
    messages, asked = to_messages(need(run, "inputs", (dict, str, list)))
    output, answered = to_text(run["outputs"]) if run.get("outputs") is not None else (None, None)
    body = given(
        interaction_id=name,
        session_id=metadata.get("thread_id") or metadata.get("session_id") or metadata.get("conversation_id"),
        user_id=metadata.get("user_id"),
        occurred_at=moment(run.get("start_time")),
        latency_ms=milliseconds(run.get("start_time"), run.get("end_time")),
        messages=messages,
        output=output,
        input_tokens=run.get("prompt_tokens"),
        output_tokens=run.get("completion_tokens"),
        cost_usd=_number(run.get("total_cost")),
        provider=metadata.get("ls_provider"),
        model=metadata.get("ls_model_name"),
        metadata={NAME: given(asked=asked, answered=answered)},
    )
    left = keep(run, _run_back(Item("interaction", body)), left_out=("feedback",))
    if "user_id" in metadata:
        left["extra"] = {
            **run["extra"],
            "metadata": {name: value for name, value in metadata.items() if name != "user_id"},
        }
    body["metadata"][NAME]["rest"] = left
    return Item("interaction", body)


def _run_back(item: Item) -> dict[str, Any]:
    body, own = item.body, kept(item, NAME)
    rebuilt = given(
        id=body["interaction_id"],
        inputs=from_messages(body["messages"], own["asked"]),
        outputs=from_text(body["output"], own["answered"]) if body.get("output") is not None else None,
        start_time=body.get("occurred_at"),
        prompt_tokens=body.get("input_tokens"),
        completion_tokens=body.get("output_tokens"),
        total_cost=body.get("cost_usd"),
    )
    return restore(rebuilt, own.get("rest"))


def _feedback(feedback: Mapping[str, Any]) -> Iterator[Item]:
    """The judgement, and the correction given with it as an event of its own."""
    id, source = need(feedback, "id"), inner(feedback, "feedback_source")
    changed = feedback.get("modified_at") or feedback.get("created_at")
    common = given(
        interaction_id=need(feedback, "run_id"),
        name=need(feedback, "key"),
        annotator_kind=_KINDS.get(str(source.get("type")), "HUMAN"),
        author_id=source.get("user_id"),
        occurred_at=moment(changed),
    )
    corrected = ("correction",) if feedback.get("correction") is not None else ()
    score, value = feedback.get("score"), feedback.get("value")
    spoken = said(value) if isinstance(value, str) else {}
    comment = feedback.get("comment") or spoken.get("explanation")
    if score is not None or spoken or comment or not corrected:
        body = (
            common
            | opinion(_number(score), spoken.get("label"), comment, boolean=isinstance(score, bool))
            | {"event_id": stable_id(NAME, id, str(changed)), "feedback_id": stable_id(NAME, id)}
        )
        if body["kind"] == "comment" and "explanation" not in body:
            # A key alone says that something was observed.
            body |= {"kind": "category", "label": "noted"}
        body["metadata"] = {NAME: {"id": id}}
        body["metadata"][NAME]["rest"] = _personless(
            keep(feedback, _feedback_back(Item("feedback", body)), corrected)
        )
        yield Item("feedback", body)
    if corrected:
        text, shape = to_text(feedback["correction"])
        yield Item(
            "feedback",
            common
            | {
                "kind": "correction",
                "correction": text,
                "event_id": stable_id(NAME, id, str(changed), "correction"),
                "feedback_id": stable_id(NAME, id, "correction"),
                "metadata": {
                    NAME: {
                        "id": id,
                        "corrected": shape,
                        "rest": _personless(keep(feedback, {}, corrected)),
                    }
                },
            },
        )


def _feedback_back(item: Item) -> dict[str, Any]:
    body, own = item.body, kept(item, NAME)
    rebuilt = given(
        id=own["id"],
        run_id=body["interaction_id"],
        key=body["name"],
        score=bool(body["score"]) if body["kind"] == "thumb" else body.get("score"),
        comment=body.get("explanation"),
        correction=from_text(body["correction"], own["corrected"]) if "correction" in body else None,
    )
    return restore(rebuilt, own.get("rest"))


def _personless(left: dict[str, Any]) -> dict[str, Any]:
    source = left.get("feedback_source")
    if isinstance(source, dict) and "user_id" in source:
        left = left | {"feedback_source": {k: v for k, v in source.items() if k != "user_id"}}
    return left


def _number(value: Any) -> float | None:
    """Costs come as text where they are decimals."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        return None

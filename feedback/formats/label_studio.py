"""Label Studio: tasks with annotations and predictions, its JSON export.

A task is an interaction: its ``data`` is the prompt, its first prediction's text (if it has one) the answer. Each
region of an annotation becomes an event: choices and taxonomies a category, a rating its stars, a text area a
correction where the control answers the task, else a comment, pairwise a preference. A cancelled annotation says that
the annotator skipped the task.

Belongs here: that mapping. Does not belong here: labels of images, audio or spans of text, kept as they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from feedback.formats import Item, given, number, stable_id
from feedback.formats.records import (
    from_messages,
    inner,
    keep,
    kept,
    moment,
    need,
    objects,
    restore,
    said,
    to_messages,
)

NAME = "label_studio"
_CORRECTIONS = ("answer", "correction", "response", "rewrite")


def to_items(record: Any) -> Iterator[Item]:
    """A task and what was annotated on it. Raises PayloadError if it is no task."""
    task_id = str(need(record, "id", (int, str)))
    yield Item("interaction", _task(task_id, record))
    for annotation in objects(record, "annotations"):
        yield from _annotation(task_id, annotation)


def from_items(items: Sequence[Item]) -> dict[str, Any]:
    """The task with its annotations; who annotated is not given back."""
    task: dict[str, Any] = {}
    annotations: dict[str, dict[str, Any]] = {}
    for item in items:
        own = kept(item, NAME)
        if item.kind == "interaction":
            task = _task_back(item)
        else:
            annotation = annotations.setdefault(
                str(own["annotation"]["id"]), {**own["annotation"], "result": []}
            )
            if "region" in own:
                annotation["result"].append(_region_back(item))
    return task | ({"annotations": list(annotations.values())} if annotations else {})


def _task(task_id: str, task: Mapping[str, Any]) -> dict[str, Any]:
    messages, asked = to_messages(need(task, "data", Mapping))
    predicted = objects(task, "predictions")
    texts = [
        "\n".join(lines)
        for prediction in predicted
        for region in objects(prediction, "result")
        if (lines := _lines(inner(region, "value")))
    ]
    body = given(
        interaction_id=f"label-studio/{task_id}",
        occurred_at=moment(task.get("created_at")),
        messages=messages,
        output=texts[0] if texts else None,
        model=said(str(predicted[0].get("model_version") or "")).get("label") if predicted else None,
        metadata={NAME: {"id": task["id"], "asked": asked}},
    )
    left = keep(task, _task_back(Item("interaction", body)), left_out=("annotations", "updated_by"))
    body["metadata"][NAME]["rest"] = left
    return body


def _task_back(item: Item) -> dict[str, Any]:
    body, own = item.body, kept(item, NAME)
    rebuilt = given(
        id=own["id"],
        data=from_messages(body["messages"], own["asked"]),
        created_at=body.get("occurred_at"),
    )
    return restore(rebuilt, own.get("rest"))


def _annotation(task_id: str, annotation: Mapping[str, Any]) -> Iterator[Item]:
    id = str(need(annotation, "id", (int, str)))
    changed = str(annotation.get("updated_at") or annotation.get("created_at"))
    who = annotation.get("completed_by")
    common = given(
        interaction_id=f"label-studio/{task_id}",
        author_role="reviewer",
        author_id=str(who.get("id") if isinstance(who, Mapping) else who) if who is not None else None,
        occurred_at=moment(annotation.get("updated_at") or annotation.get("created_at")),
    )
    head = {
        k: v
        for k, v in annotation.items()
        if k not in ("result", "completed_by", "created_username", "updated_by")
    }
    regions = objects(annotation, "result")
    if annotation.get("was_cancelled") or not regions:
        label = "skipped" if annotation.get("was_cancelled") else "empty"
        yield _event(
            common,
            id,
            changed,
            "",
            {"kind": "category", "name": "annotation", "label": label},
            {"annotation": head},
        )
    for place, region in enumerate(regions):
        # The annotation itself goes with its first event; the others name it.
        content = _content(region)
        if content["kind"] in ("correction", "comment") and len(_lines(region["value"]) or ()) == 1:
            # The text is in our own field, where it can be redacted and erased.
            region = {**region, "value": {k: v for k, v in region["value"].items() if k != "text"}}
        own = {"annotation": head if place == 0 else {"id": annotation["id"]}, "region": region}
        yield _event(common, id, changed, str(region.get("id") or place), content, own)


def _region_back(item: Item) -> dict[str, Any]:
    region: dict[str, Any] = kept(item, NAME)["region"]
    text = item.body.get("correction") or item.body.get("explanation")
    value = region.get("value") or {}
    return {**region, "value": {**value, "text": [text]}} if text and "text" not in value else region


def _event(
    common: dict[str, Any], id: str, changed: str, part: str, content: dict[str, Any], own: dict[str, Any]
) -> Item:
    ids = {
        "event_id": stable_id(NAME, id, part, str(content.get("name")), changed),
        "feedback_id": stable_id(NAME, id, part, str(content.get("name"))),
    }
    return Item("feedback", common | ids | content | {"metadata": {NAME: own}})


def _content(region: Mapping[str, Any]) -> dict[str, Any]:
    """What a region says, by the type of its control; a region of any other type is kept in ``value``."""
    value, name = inner(region, "value"), str(region.get("from_name") or "region")
    match region.get("type"):
        case "choices" | "taxonomy" if _list(value, region["type"]):
            chosen = [str(one[-1] if isinstance(one, list) and one else one) for one in value[region["type"]]]
            label = said(chosen[0]).get("label")
            if label is not None:
                return {"kind": "category", "name": name, "label": label, "value": {"chosen": chosen}}
        case "rating" if isinstance(value.get("rating"), int | float):
            # How many stars there were to give stands in the labelling configuration, not in the export.
            stars = number(value["rating"], "rating")
            return {"kind": "category", "name": name, "label": f"{stars:g}", "value": value}
        case "textarea" if value.get("text"):
            lines = _lines(value)
            text = str(value["text"]) if lines is None else "\n".join(lines)
            if any(word in name.lower() for word in _CORRECTIONS):
                return {"kind": "correction", "name": name, "correction": text}
            return {"kind": "comment", "name": name, "explanation": text}
        case "pairwise" if value.get("selected"):
            return {"kind": "preference", "name": name, "label": str(value["selected"]), "value": value}
        case _:
            pass
    return {
        "kind": "category",
        "name": name,
        "label": str(region.get("type") or "region"),
        "value": dict(value),
    }


def _list(value: Mapping[str, Any], name: str) -> list[Any]:
    """The list ``value[name]``; empty if it is none."""
    found = value.get(name)
    return found if isinstance(found, list) else []


def _lines(value: Mapping[str, Any]) -> list[str] | None:
    """The lines of a text area; None if that is not what ``value`` holds."""
    lines = _list(value, "text")
    return lines if lines and all(isinstance(line, str) for line in lines) else None

"""What the importers of other systems' exports share: keeping what we have no field for, and the shapes of texts.

An importer maps what it can and says how to map it back; whatever that does not give back exactly is kept beside the
item, so that nothing of the export is lost and the export can be made again. What names a person is left out of that:
it becomes a pseudonym at the door and cannot be given back.

Belongs here: that mechanism, and the reading of fields. Does not belong here: any one system.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from feedback.formats import Item
from feedback.payloads import LABEL_PATTERN, PayloadError

_LABEL = re.compile(LABEL_PATTERN)
_LABEL_LENGTH = 200
# Holds the names of fields that we would give back but that the record does not have.
_ABSENT = "-"
_ROLES = ("system", "developer", "user", "assistant", "tool")


def need(record: Any, field: str, kind: type | tuple[type, ...] = str) -> Any:
    """``record[field]``. Raises PayloadError if the record is no object, or the field is missing or of another kind."""
    if not isinstance(record, Mapping):
        raise PayloadError(
            f"The record is {type(record).__name__}, not an object",
            remedy="Export one JSON object per record",
        )
    value = record.get(field)
    if not isinstance(value, kind) or value == "":
        raise PayloadError(
            f"{field} is missing or not {_name(kind)}",
            field=field,
            remedy="Check that the file is an export of the format it is imported as",
        )
    return value


def objects(record: Mapping[str, Any], field: str) -> list[Mapping[str, Any]]:
    """The objects listed in ``record[field]``; none if it is absent. Raises PayloadError if it holds anything else."""
    found = record.get(field) or []
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise PayloadError(
            f"{field} is not a list of objects", field=field, remedy="Export it again, unchanged"
        )
    return found


def inner(record: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """The object in ``record[field]``; empty if it is absent. Raises PayloadError if it is anything else."""
    found = record.get(field) or {}
    if not isinstance(found, Mapping):
        raise PayloadError(f"{field} is not an object", field=field, remedy="Export it again, unchanged")
    return found


def text(record: Mapping[str, Any], field: str) -> str | None:
    """The text in ``record[field]``; None if it is absent. Raises PayloadError if it is anything else."""
    found = record.get(field)
    if found is not None and not isinstance(found, str):
        raise PayloadError(f"{field} is not a text", field=field, remedy="Export it again, unchanged")
    return found


def keep(
    record: Mapping[str, Any], rebuilt: Mapping[str, Any], left_out: Collection[str] = ()
) -> dict[str, Any]:
    """The fields of ``record`` that ``rebuilt``, what our fields give back, lacks or changes; ``restore`` adds them.

    ``left_out`` names what is stored as items of its own, and what names people.
    """
    left = {
        name: value
        for name, value in record.items()
        if name not in left_out and (name not in rebuilt or _json(rebuilt[name]) != _json(value))
    }
    absent = sorted(set(rebuilt) - set(record))
    return left | ({_ABSENT: absent} if absent else {})


def kept(item: Item, name: str) -> dict[str, Any]:
    """What ``keep`` found when the item was imported from format ``name``."""
    found: dict[str, Any] = (item.body.get("metadata") or {}).get(name, {})
    return found


def restore(rebuilt: Mapping[str, Any], left: Mapping[str, Any] | None) -> dict[str, Any]:
    """The foreign record again, from what our fields give back and what ``keep`` left."""
    whole = {**rebuilt, **(left or {})}
    for name in whole.pop(_ABSENT, ()):
        del whole[name]
    return whole


def said(text: str | None) -> dict[str, str]:
    """A word or a sentence as ``label`` if it may be one (short, nothing personal in it), else as ``explanation``."""
    if not text:
        return {}
    return {"label": text} if len(text) <= _LABEL_LENGTH and _LABEL.match(text) else {"explanation": text}


def moment(value: Any) -> str | None:
    """A foreign time in the form our API takes; text without an offset is in UTC, as these systems store it."""
    if isinstance(value, bool) or value in (None, ""):
        return None
    if isinstance(value, int | float):
        try:
            return datetime.fromtimestamp(value / 1000, UTC).isoformat()
        except (ValueError, OverflowError, OSError):
            return str(value)  # as below
    try:
        found = datetime.fromisoformat(str(value))
    except ValueError:
        return str(value)  # the API says what is wrong with it
    return str(value) if found.tzinfo else f"{value}Z"


def milliseconds(start: Any, end: Any) -> float | None:
    """From ``start`` to ``end``, if both are times."""
    first, last = moment(start), moment(end)
    try:
        passed = datetime.fromisoformat(last or "") - datetime.fromisoformat(first or "")
    except ValueError:
        return None
    return max(0.0, passed.total_seconds() * 1000)


def to_messages(value: Any) -> tuple[list[dict[str, str]], str]:
    """A foreign prompt as messages, and the shape it had: ``from_messages`` gives it back.

    Chat messages stay messages, a text or the one text of an object becomes the user's message, and anything else
    the JSON of it.
    """
    listed = value.get("messages") if isinstance(value, dict) and len(value) == 1 else value
    if isinstance(listed, list) and listed and all(_is_message(one) for one in listed):
        return listed, "list" if listed is value else "messages"
    text, shape = to_text(value)
    return [{"role": "user", "content": text}], shape


def from_messages(messages: Sequence[Mapping[str, Any]], shape: str) -> Any:
    if shape in ("list", "messages"):
        listed = [dict(message) for message in messages]
        return listed if shape == "list" else {"messages": listed}
    return from_text(str(messages[0]["content"]), shape)


def to_text(value: Any) -> tuple[str, str]:
    """A foreign output as text, and the shape it had: ``text``, ``field:NAME`` or ``json``."""
    if isinstance(value, str):
        return value, "text"
    if isinstance(value, dict) and len(value) == 1:
        (name, only), *_ = value.items()
        if isinstance(only, str):
            return only, f"field:{name}"
    return json.dumps(value, ensure_ascii=False), "json"


def from_text(text: str, shape: str) -> Any:
    if shape == "text":
        return text
    kind, _, name = shape.partition(":")
    return {name: text} if kind == "field" else json.loads(text)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"role", "content"}
        and value["role"] in _ROLES
        and isinstance(value["content"], str)
    )


def _json(value: Any) -> str:
    """Python takes 1, 1.0 and True for equal; an export does not."""
    return json.dumps(value, sort_keys=True)


def _name(kind: type | tuple[type, ...]) -> str:
    return " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))

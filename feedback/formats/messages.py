"""Chat messages as others write them, made into ours: a role and a text.

Every format that carries conversations writes them in one of a few ways: a plain text, OpenAI's messages (whose
content is a text or a list of parts), OpenTelemetry's (role and parts), or any of these inside an object with
``messages`` or ``choices``. What is not text (a tool call, an image reference) becomes its own JSON within the text,
so that nothing a model was shown or said goes missing.

Belongs here: reading one message, a prompt, an answer. Does not belong here: which field of a format holds them.
"""

import json
from collections.abc import Mapping
from typing import Any

from feedback.payloads import PayloadError

_ROLES = {"human": "user", "ai": "assistant", "model": "assistant", "bot": "assistant", "function": "tool"}
MAX_DEPTH = 64
_MAX_KEPT = 16_384
_TEXT_PARTS = ("text", "input_text", "output_text", None)


def decoded(value: Any) -> Any:
    """``value``, or what it says if it is the JSON text of an object or array."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return value if too_deep(found) else found
    return value


def too_deep(value: Any) -> bool:
    """Whether decoded JSON is nested so deeply that handling it could end in a RecursionError."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for one in level
            if isinstance(one, dict | list)
            for child in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return True


def text(content: Any) -> str:
    """The text of a message's content: itself, its parts one to a line, or its JSON."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(isinstance(part, str | Mapping) for part in content):
        return "\n".join(_part(part) for part in content)
    return json.dumps(content, ensure_ascii=False)


def message(value: Any, role: str = "user") -> dict[str, str]:
    """One message of ours; ``role`` is for what names none. Raises PayloadError if it is not a message."""
    if isinstance(value, str):
        return {"role": role, "content": value}
    if not isinstance(value, Mapping):
        raise PayloadError(
            f"A message is a text or an object, not {type(value).__name__}",
            field="messages",
            remedy="Send each message as {role, content} or {role, parts}",
        )
    named = str(value.get("role") or value.get("type") or role)
    contents = [value[key] for key in ("content", "parts", "tool_calls") if value.get(key)]
    said = "\n".join(filter(None, (text(part) for part in contents)))
    return {"role": _ROLES.get(named, named), "content": said}


def prompt(value: Any) -> list[dict[str, str]]:
    """The messages of a prompt in any of the forms above; anything else is one message of the user. None is none."""
    written, value = value, decoded(value)
    if isinstance(value, Mapping) and isinstance(value.get("messages"), list):
        value = value["messages"]
    # LangChain writes a batch of one conversation.
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    if value is None or value == "" or value == []:
        return []
    if isinstance(value, list) and all(_is_message(entry) for entry in value):
        return [message(entry) for entry in value]
    if _is_message(value):
        return [message(value)]
    return [{"role": "user", "content": text(written)}]


def answer(value: Any) -> str | None:
    """What a model answered, from a text, a message, or the first of several choices; None if nothing was said."""
    written, value = value, decoded(value)
    if isinstance(value, Mapping):
        for key in ("choices", "messages"):
            if isinstance(value.get(key), list):
                return answer(value[key])
    if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
        if "message" in value[0]:
            return answer(value[0]["message"])
        if _is_message(value[0]):
            return message(value[0], "assistant")["content"] or None
    if isinstance(value, Mapping) and _is_message(value):
        return message(value, "assistant")["content"] or None
    return text(written) or None


def fits(value: Any) -> bool:
    """Whether ``value`` is small enough to be kept in metadata beside what was made of it."""
    return len(json.dumps(value)) <= _MAX_KEPT


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and "role" in value
        and bool({"content", "parts", "tool_calls"} & set(value))
    )


def _part(part: str | Mapping[str, Any]) -> str:
    if isinstance(part, str):
        return part
    if part.get("type") in _TEXT_PARTS:
        for key in ("text", "content"):
            if isinstance(part.get(key), str):
                return str(part[key])
    return json.dumps(part, ensure_ascii=False)

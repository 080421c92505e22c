"""Chat logs: one line a call of a model, as NVIDIA's data flywheel and OpenAI's fine-tuning files have them; and back.

- A log line, ``{timestamp, workload_id, client_id, request, response}`` with OpenAI's request and response, is an
  interaction named by ``response.id``; ``workload_id``, the task that the call does, is its ``prompt_name``.
- A training line, ``{messages, ...}``, is an interaction whose output is the last message, if that is the assistant's.

Where there is no id of its own, the line's content makes it, so that the same line is stored once for each app.

Belongs here: the fields of such lines. Does not belong here: reading files, HTTP (``feedback.compat``).
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from feedback.formats import Item, content_id, given
from feedback.formats.messages import answer, fits, message
from feedback.formats.records import keep, kept, need, objects
from feedback.payloads import PayloadError

NAME = "chatlog"


def to_items(record: Any, owner: str = "") -> Iterator[Item]:
    """The interaction of one line. Raises PayloadError if it is neither form.

    ``owner`` keeps apart lines of several apps that say the same and have no id of their own.
    """
    if not isinstance(record, Mapping) or not {"request", "messages"} & set(record):
        raise PayloadError(
            "The line has neither request nor messages",
            remedy="Send {request, response, ...} or {messages} as one JSON object a line",
        )
    yield _logged(record, owner) if "request" in record else _trained(record, owner)


def from_items(items: Sequence[Item]) -> dict[str, Any]:
    """The one line that ``to_items`` made ``items`` from; what was not text (tool calls, parts) comes
    back as it was, unless it is large."""
    (item,) = items
    found = kept(item, NAME)
    rebuilt = _trained_back(item) if "request" not in found else _logged_back(item)
    rest: dict[str, Any] = found["rest"]
    return rebuilt | rest


def _logged(record: Mapping[str, Any], owner: str) -> Item:
    request, response = need(record, "request", dict), record.get("response") or {}
    if not isinstance(response, Mapping):
        raise PayloadError("response is not an object", field="response", remedy="Send OpenAI's response")
    usage = response.get("usage")
    usage = usage if isinstance(usage, Mapping) else {}
    body: dict[str, Any] = {
        "interaction_id": response.get("id") or _digest(record, owner),
        "messages": [message(entry) for entry in objects(request, "messages")],
        **given(
            output=answer(response["choices"]) if response.get("choices") else None,
            occurred_at=_moment(record.get("timestamp")),
            prompt_name=record.get("workload_id"),
            model=response.get("model") or request.get("model"),
            input_tokens=usage.get("prompt_tokens"),
            output_tokens=usage.get("completion_tokens"),
            user_id=request.get("user"),
        ),
    }
    said = {"messages": body["messages"]} | given(user=body.get("user_id"))
    parameters = keep(request, said, left_out=("user",))
    body["metadata"] = {NAME: {"request": _fitting(parameters)}}
    if response:
        body["metadata"][NAME]["response"] = _fitting(_without_answer(response, body.get("output")))
    rest = keep(record, _logged_back(Item("interaction", body)), left_out=("request",))
    body["metadata"][NAME]["rest"] = _fitting(rest)
    return Item("interaction", body)


def _logged_back(item: Item) -> dict[str, Any]:
    body, found = item.body, kept(item, NAME)
    said = {"messages": [dict(entry) for entry in body["messages"]]} | given(user=body.get("user_id"))
    response = _with_answer(found["response"], body.get("output")) if "response" in found else None
    return {"request": said | found["request"]} | given(
        workload_id=body.get("prompt_name"), response=response
    )


def _without_answer(response: Mapping[str, Any], output: str | None) -> dict[str, Any]:
    """``response`` without the text that is the interaction's output already."""
    first, said = _first(response)
    if output is None or said.get("content") != output:
        return dict(response)
    left = {name: value for name, value in said.items() if name != "content"}
    return {**response, "choices": [{**first, "message": left}, *response["choices"][1:]]}


def _with_answer(response: Mapping[str, Any], output: str | None) -> dict[str, Any]:
    first, said = _first(response)
    if output is None or not said or "content" in said:
        return dict(response)
    whole = {**said, "content": output}
    return {**response, "choices": [{**first, "message": whole}, *response["choices"][1:]]}


def _first(response: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The first choice of a response and its message; empty where there is none."""
    choices = response.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    said = first.get("message") if isinstance(first, Mapping) else None
    return (first, said) if isinstance(first, Mapping) and isinstance(said, Mapping) else ({}, {})


def _fitting(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if fits(value)}


def _trained(record: Mapping[str, Any], owner: str) -> Item:
    messages = [message(entry) for entry in objects(record, "messages")]
    body: dict[str, Any] = {"interaction_id": _digest(record, owner), "messages": messages}
    if len(messages) > 1 and messages[-1]["role"] == "assistant":
        body |= {"messages": messages[:-1], "output": messages[-1]["content"]}
    rest = keep(record, _trained_back(Item("interaction", body)))
    body["metadata"] = {NAME: {"rest": _fitting(rest)}}
    return Item("interaction", body)


def _trained_back(item: Item) -> dict[str, Any]:
    messages = [dict(entry) for entry in item.body["messages"]]
    if "output" in item.body:
        messages.append({"role": "assistant", "content": item.body["output"]})
    return {"messages": messages}


def _moment(value: Any) -> Any:
    """Seconds since 1970, or a time as text, which the API judges."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return datetime.fromtimestamp(value, UTC).isoformat()
        except (ValueError, OverflowError, OSError):
            return str(value)
    return value


def _digest(record: Mapping[str, Any], owner: str) -> str:
    """The id of a line that has none; of the person who asked it tells nothing."""
    request = record.get("request")
    if isinstance(request, Mapping):
        request = {name: value for name, value in request.items() if name != "user"}
    return content_id(NAME, owner, body={**record, "request": request})

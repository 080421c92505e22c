"""Others' formats: pure translators between a foreign record and what our own JSON API takes.

A format is one module with two functions (``Format`` below), which do no I/O and know no database:

- ``to_items(record)`` yields what one foreign record says as items; ``record`` is one decoded line, row or message of
  that system's export. A record that the format knows but that says nothing of interest yields nothing; one that is
  not of the format raises ``PayloadError``, which names the field, the rule and the remedy.
- ``from_items(items)`` makes the one record back from its items, so that ``from_items(to_items(record))`` equals
  ``record`` in everything the format defines.

The rules all of them follow:

- Ids are the foreign ones where they fit, else ``stable_id`` of what identifies the record over there: reading the
  same record again stores nothing.
- A body is not validated here. It goes through ``feedback.payloads`` like everything else, so a translator carries
  over what it is given and guesses nothing: a score whose scale is unknown is not made a rating (see ``opinion``).
- What has no field of ours is kept in ``metadata``, under the name of the format; ``trace_id``, ``span_id`` and
  ``response_id`` of an interaction lie at its top, where SQL finds them. Ids of people go into ``user_id`` and
  ``author_id`` alone, where they become pseudonyms.
- An interaction that is one span (or observation) of a trace is called ``trace id:span id`` everywhere (``span_key``),
  so that a trace sent by one way in and the feedback sent by another meet.

Belongs here: the shape of a format, and what several formats share. Does not belong here: validation
(``feedback.payloads``), routes (``feedback.compat``), reading files (``feedback.importing``).
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from uuid import UUID, uuid5

from feedback.payloads import PayloadError

_THUMBS = {
    **dict.fromkeys(("up", "thumbs_up", "thumbs-up", "thumbs up", "thumbsup", "👍"), 1.0),
    **dict.fromkeys(("down", "thumbs_down", "thumbs-down", "thumbs down", "thumbsdown", "👎"), 0.0),
}
_NAMESPACE = UUID("6f0d0a52-5f6e-5c0e-9a59-0d4a7c1c9b7e")


@dataclass(frozen=True)
class Item:
    """One thing to store; ``body`` is exactly what ``POST /v1/interactions`` or ``POST /v1/feedback`` takes."""

    kind: Literal["interaction", "feedback"]
    body: dict[str, Any]


class Format(Protocol):
    """What a module of this package offers."""

    def to_items(self, record: Any) -> Iterator[Item]: ...

    def from_items(self, items: Sequence[Item]) -> Any: ...


def stable_id(*parts: str) -> str:
    """The UUID (version 5) that stands for ``parts``: the format's name, then what identifies the record there."""
    # Half of a surrogate pair, of which validation will tell, has no bytes in UTF-8.
    name = "\0".join(parts).encode(errors="backslashreplace").decode()
    return str(uuid5(_NAMESPACE, name))


def content_id(*parts: str, body: Mapping[str, Any]) -> str:
    """As ``stable_id``, of ``parts`` and all that ``body`` says but for who said it.

    The rest of a body is stored, and with it an id made from a person's raw id could be guessed back.
    """
    said = {name: value for name, value in body.items() if name not in ("author_id", "user_id")}
    return stable_id(*parts, json.dumps(said, sort_keys=True))


def span_key(trace_id: str, span_id: str) -> str:
    """The interaction_id of the interaction that is one span of a trace."""
    return f"{trace_id}:{span_id}"


def given(**fields: Any) -> dict[str, Any]:
    """``fields`` without those that are None: what was not said is not sent."""
    return {name: value for name, value in fields.items() if value is not None}


def number(value: Any, field: str) -> float | None:
    """``value``, which is a number or None. Raises PayloadError, for ``field``, if it is no number or has no float."""
    if value is None or isinstance(value, float):
        return value
    if isinstance(value, int) and abs(value) <= sys.float_info.max:
        return value
    raise PayloadError(
        f"{field} is {'a number beyond all bounds' if isinstance(value, int) else 'not a number'}",
        field=field,
        remedy="Send a number; wording goes into a label or a comment",
    )


def opinion(
    score: float | None, label: str | None, explanation: str | None, *, boolean: bool = False
) -> dict[str, Any]:
    """What a judgement says, as kind, score, label, explanation and value of a feedback event.

    A label that names a thumb, or a score known to mean yes or no (``boolean``), is a thumb. Other scores from 0 to 1
    are ratings. A score on a scale that nobody told us is not squeezed into one: it stays as it came in ``value``, its
    ``score`` is left out so that no average takes it for a rating, and it is a category (labelled, for want of a
    label, by the number). Without a score it is a category if it has a label, else a comment.
    """
    said = given(explanation=explanation)
    thumb = _THUMBS.get(label.strip().lower()) if isinstance(label, str) else None
    if thumb is None and boolean and score in (0, 1):
        thumb = float(score)
    if thumb is not None and score in (None, thumb):
        kept = label if label not in (None, "up", "down") else None
        return (
            {"kind": "thumb", "score": thumb, "label": "up" if thumb else "down"} | given(value=kept) | said
        )
    if score is not None and 0 <= score <= 1:
        return {"kind": "rating", "score": float(score)} | given(label=label) | said
    if score is not None:
        # At most five digits: a label may not look like a telephone number.
        return {"kind": "category", "label": label or f"{round(score, 4):.5g}", "value": score} | said
    if label is not None:
        return {"kind": "category", "label": label} | said
    return {"kind": "comment"} | said

"""What clients may send: the shapes, the rules, and the hash that tells a retry from a contradiction.

Belongs here: validation of one item, cutting a request body into items, the canonical body hash.
Does not belong here: HTTP, the database, pseudonyms, or anything the server adds to a row.
"""

import hashlib
import json
import math
import re
import typing
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from msgspec import Meta

Op = Literal["create", "revise", "retract"]
Kind = Literal["thumb", "rating", "category", "comment", "correction", "flag", "preference", "implicit"]
AnnotatorKind = Literal["HUMAN", "LLM", "CODE"]
Scope = Literal["interaction", "session", "trace", "span"]
Role = Literal["system", "developer", "user", "assistant", "tool"]
ImplicitLabel = Literal[
    "shown", "accepted", "rejected", "edited", "copied", "deleted", "rephrased", "regenerated", "abandoned"
]

MAX_ITEMS = 1000
MAX_JSON_BYTES = 65_536
MAX_DEPTH = 64
FIRST_YEAR, LAST_YEAR = 2000, 2099

# Ids, names and labels are passed on as they are, so they may not hold what only redacted texts may: an e-mail
# address anywhere, and in labels seven digits in a row, as telephone numbers have.
Short = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[^@\x00]*$")]
LABEL_PATTERN = r"^(?![\s\S]*\d(?:[\s().+/-]?\d){6})[^@\x00]*$"
Label = Annotated[str, Meta(min_length=1, max_length=200, pattern=LABEL_PATTERN)]
PersonId = Annotated[str, Meta(min_length=1, max_length=500)]
Text = Annotated[str, Meta(max_length=1_000_000)]
FilledText = Annotated[str, Meta(min_length=1, max_length=1_000_000)]
Count = Annotated[int, Meta(ge=0, le=2_147_483_647)]
Amount = Annotated[float, Meta(ge=0)]
Moment = Annotated[
    datetime, Meta(tz=True, description="ISO-8601 with an offset, such as 2026-01-31T12:00:00Z")
]


class PayloadError(ValueError):
    """One item (or a whole body) that cannot be accepted; ``field`` is a path such as ``messages[0].role``."""

    def __init__(
        self, message: str, *, field: str | None = None, remedy: str | None = None, code: str = "invalid"
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.remedy = remedy
        self.code = code


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One message of the prompt."""

    role: Role
    content: Text


class Retrieved(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One passage that was put before the model; give at least one of ``document_id`` and ``chunk_id``."""

    document_id: Annotated[str, Meta(min_length=1, max_length=1000)] | None = None
    chunk_id: Annotated[str, Meta(min_length=1, max_length=1000)] | None = None
    source: Short | None = None
    rank: Count | None = None
    score: float | None = None


class Interaction(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One answer of the product: what it was asked, what it said, and which version said it."""

    interaction_id: Annotated[
        Short, Meta(description="Chosen by the client; sending the same interaction again is safe.")
    ]
    messages: Annotated[
        list[Message], Meta(min_length=1, max_length=500, description="The prompt, in order.")
    ]
    output: Annotated[Text, Meta(description="What the model answered.")] | None = None
    app: (
        Annotated[Short, Meta(description="Defaults to the app of the API key, and must equal it.")] | None
    ) = None
    session_id: Short | None = None
    user_id: (
        Annotated[PersonId, Meta(description="Raw id of the person; stored only as a keyed pseudonym.")]
        | None
    ) = None
    occurred_at: Annotated[Moment, Meta(description="When it happened; defaults to now.")] | None = None
    retrieved: Annotated[list[Retrieved], Meta(max_length=1000)] | None = None
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    cost_usd: Amount | None = None
    latency_ms: Amount | None = None
    provider: Short | None = None
    model: Short | None = None
    prompt_name: Short | None = None
    prompt_version: Short | None = None
    prompt_hash: Short | None = None
    app_release: Short | None = None
    config_hash: Short | None = None
    variant: Short | None = None
    train_ok: Annotated[bool, Meta(description="Whether this interaction may be used for training.")] = True
    metadata: dict[str, Any] | None = None


class FeedbackEvent(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One entry of the feedback log. Nothing is ever changed: a new opinion is a new event with the same
    ``feedback_id`` and op ``revise``, a withdrawn one has op ``retract``."""

    kind: Kind
    op: Op = "create"
    event_id: (
        Annotated[
            UUID, Meta(description="Chosen by the client (UUIDv7), so that a retry is safe; else minted.")
        ]
        | None
    ) = None
    feedback_id: (
        Annotated[
            UUID, Meta(description="Stays the same across revisions; a create defaults to its event_id.")
        ]
        | None
    ) = None
    revision: (
        Annotated[
            Count,
            Meta(
                description="Defaults to 1 for create, 2 for revise and retract; whoever numbers revisions numbers them all."
            ),
        ]
        | None
    ) = None
    name: Annotated[Label, Meta(description="What is judged; defaults to the kind.")] | None = None
    score: float | None = None
    label: (
        Annotated[Label, Meta(description="A code or a grade; free text goes into explanation.")] | None
    ) = None
    explanation: FilledText | None = None
    correction: Annotated[FilledText, Meta(description="The right answer (kind correction only).")] | None = (
        None
    )
    reasons: Annotated[list[Label], Meta(max_length=50)] | None = None
    value: Any = None
    annotator_kind: AnnotatorKind = "HUMAN"
    author_id: (
        Annotated[PersonId, Meta(description="Raw id of the author; stored only as a keyed pseudonym.")]
        | None
    ) = None
    author_role: Label | None = None
    identifier: Short | None = None
    scope: Scope = "interaction"
    interaction_id: (
        Annotated[Short, Meta(description="May be sent before the interaction itself has arrived.")] | None
    ) = None
    session_id: Short | None = None
    trace_id: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")] | None = None
    span_id: Annotated[str, Meta(pattern="^[0-9a-f]{16}$")] | None = None
    occurred_at: Annotated[Moment, Meta(description="When it was said; defaults to now.")] | None = None
    metadata: dict[str, Any] | None = None


_interactions = msgspec.json.Decoder(Interaction)
_events = msgspec.json.Decoder(FeedbackEvent)
_raw_items = msgspec.json.Decoder(Annotated[list[msgspec.Raw], Meta(max_length=MAX_ITEMS)])
_canonical = msgspec.json.Encoder(order="sorted")

_CHOICES = {
    "op": typing.get_args(Op),
    "kind": typing.get_args(Kind),
    "annotator_kind": typing.get_args(AnnotatorKind),
    "scope": typing.get_args(Scope),
    "role": typing.get_args(Role),
}
_AT_PATH = re.compile(r"^(?P<message>.*?)(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL)
_NAMED_FIELD = re.compile(r"^Object (?:contains unknown|missing required) field `(?P<name>.*)`$", re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_interaction(raw: bytes) -> Interaction:
    """Validate one interaction from its JSON. Raises PayloadError."""
    item: Interaction = decode(_interactions, raw)
    item.occurred_at = _in_utc(item.occurred_at)
    for index, passage in enumerate(item.retrieved or ()):
        if passage.document_id is None and passage.chunk_id is None:
            raise PayloadError(
                "A retrieved passage needs document_id or chunk_id",
                field=f"retrieved[{index}]",
                remedy="Say which document or chunk was retrieved",
            )
    _check_json_size("metadata", item.metadata)
    return item


def parse_event(raw: bytes, bind: Callable[[FeedbackEvent], None] | None = None) -> FeedbackEvent:
    """Validate one feedback event from its JSON; of a thumb's score and label, fill the one not sent.

    ``bind`` may fill or refuse fields before the rules between fields are checked. Raises PayloadError.
    """
    item: FeedbackEvent = decode(_events, raw)
    if bind is not None:
        bind(item)
    item.occurred_at = _in_utc(item.occurred_at)
    _check_json_size("metadata", item.metadata)
    _check_json_size("value", item.value)
    if item.op != "create" and item.feedback_id is None:
        raise PayloadError(
            f"op {item.op} needs feedback_id",
            field="feedback_id",
            remedy="Send the feedback_id that the create was answered with",
        )
    if item.kind == "thumb":
        _fill_thumb(item)
    if item.correction is not None and item.kind != "correction":
        raise PayloadError(
            f"correction does not belong to kind {item.kind}",
            field="correction",
            remedy="Send the right answer as an event of its own, of kind correction",
        )
    if item.op != "retract":
        _check_content(item)
        _check_target(item)
    return item


def body_sha256(item: Interaction | FeedbackEvent, person_ref: str | None) -> str:
    """Hash of the canonical JSON of a validated item, as 64 hex characters.

    Key order, white space, spelled-out defaults and the offset of a time do not change it. The raw person id is
    replaced by ``person_ref``, its pseudonym: with everything else stored, a hash over the raw id could be guessed.
    """
    if isinstance(item, Interaction):
        canonical: Any = msgspec.structs.replace(item, user_id=person_ref)
    else:
        canonical = msgspec.structs.replace(item, author_id=person_ref)
    return hashlib.sha256(_canonical.encode(canonical)).hexdigest()


def split(body: bytes) -> tuple[list[bytes], bool]:
    """Cut a request body into the JSON of its items; the flag says whether it was one object, not an array.

    More than 1,000 items are refused while they are counted, before they cost memory.

    An item that is not JSON in the strict sense (NaN, a lone surrogate) is cut out like the others, so that it
    fails alone when it is parsed. Raises PayloadError, with the position, if the body cannot be cut at all.
    """
    start = body.lstrip(b" \t\r\n")[:1]
    if start not in (b"{", b"["):
        raise PayloadError(
            "The body is neither a JSON object nor an array",
            code="malformed_json",
            remedy="Send one object, or an array of objects",
        )
    single = start == b"{"
    try:
        if single:
            msgspec.json.decode(body, type=msgspec.Raw)
            return [body], True
        cut = _raw_items.decode(body)
    except msgspec.ValidationError:
        raise _too_many() from None
    except (msgspec.DecodeError, RecursionError):
        items = _lenient(body)
        if not single and len(items) > MAX_ITEMS:
            raise _too_many() from None
        return [json.dumps(item).encode() for item in ([items] if single else items)], single

    return [bytes(item) for item in cut], False


def _too_many() -> PayloadError:
    return PayloadError(
        f"The array has more than {MAX_ITEMS} items",
        code="too_many_items",
        remedy=f"Send at most {MAX_ITEMS} items per request",
    )


def item_id(raw: bytes, field: str) -> str | None:
    """The id of an item that could not be accepted, if it can be read at all."""
    try:
        item = json.loads(raw)
        found = item.get(field) if isinstance(item, dict) else None
        if isinstance(found, str) and len(found) <= 200:
            found.encode()
            return found
    except (ValueError, RecursionError):
        pass
    return None


def _lenient(body: bytes) -> Any:
    """Decode JSON as the standard library does: NaN and lone surrogates pass. Raises PayloadError."""
    remedy = "Send valid JSON encoded as UTF-8"
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        raise PayloadError(
            f"Malformed JSON: {error.msg} at line {error.lineno}, column {error.colno} (character {error.pos})",
            code="malformed_json",
            remedy=remedy,
        ) from None
    except RecursionError:
        raise PayloadError("The JSON is nested too deeply", code="malformed_json", remedy=remedy) from None
    except ValueError as error:
        raise PayloadError(f"Malformed JSON: {error}", code="malformed_json", remedy=remedy) from None


def decode(decoder: "msgspec.json.Decoder[Any]", raw: bytes) -> Any:
    """What ``decoder`` makes of one JSON text that Postgres can hold. Raises PayloadError, naming the field."""
    try:
        item = decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        refused = _unstorable(_lenient(raw))
        raise refused or PayloadError(f"Malformed JSON: {error}", remedy="Send valid JSON") from None
    except RecursionError:
        raise PayloadError("The JSON is nested too deeply", remedy="Flatten metadata and value") from None
    if b"\\u0000" in raw:
        refused = _unstorable(msgspec.to_builtins(item))
        if refused is not None:
            raise refused
    return item


def _explained(text: str) -> PayloadError:
    """Turn msgspec's message into ours: the field as a path of its own, and what to do about it."""
    match = _AT_PATH.match(text)
    assert match is not None, "the pattern accepts any text"
    message, path = match["message"], match["path"]
    named = _NAMED_FIELD.match(message)
    remedy = "See /docs for the type and the limits of this field"
    if named:
        field = f"{path}.{named['name']}" if path else named["name"]
        if message.startswith("Object contains unknown"):
            message, remedy = f"Unknown field {field}", "Remove it, or put it into metadata"
        else:
            message, remedy = f"Missing field {field}", f"Send {field}"
        return PayloadError(message, field=field, remedy=remedy)
    if "timezone" in message or "RFC3339" in message:
        remedy = "Send an ISO-8601 time with its offset, such as 2026-01-31T12:00:00Z"
        if "timezone" in message:
            message = "The time has no offset from UTC"
    elif message.startswith("Invalid enum value"):
        choices = _CHOICES.get((path or "").rpartition(".")[2])
        remedy = f"Send one of: {', '.join(choices)}" if choices else remedy
    return PayloadError(message, field=path, remedy=remedy)


def _unstorable(value: Any, path: str = "") -> PayloadError | None:
    """The first thing in decoded JSON that JSON or Postgres' text cannot hold, or None."""
    if isinstance(value, str):
        if "\0" in value:
            return PayloadError(
                "Text contains a NUL character", field=path or None, remedy="Remove \\u0000 from the text"
            )
        if _SURROGATE.search(value):
            return PayloadError(
                "Text contains half of a surrogate pair, which is not a character",
                field=path or None,
                remedy="Do not cut text in the middle of a character; send valid UTF-8",
            )
    elif isinstance(value, float):
        if not math.isfinite(value):
            return PayloadError(
                f"{value} is not a number that JSON knows", field=path or None, remedy="Leave the field out"
            )
    elif isinstance(value, dict):
        for key, member in value.items():
            inner = f"{path}.{key}" if path else str(key)
            found = _unstorable(key, path) or _unstorable(member, inner)
            if found is not None:
                return found
    elif isinstance(value, list):
        for index, member in enumerate(value):
            found = _unstorable(member, f"{path}[{index}]")
            if found is not None:
                return found
    return None


def _in_utc(moment: datetime | None) -> datetime | None:
    if moment is None:
        return None
    if not FIRST_YEAR <= moment.year <= LAST_YEAR:
        raise PayloadError(
            f"occurred_at lies outside the years {FIRST_YEAR} to {LAST_YEAR}",
            field="occurred_at",
            remedy="Check the clock, and the unit the time was made from",
        )
    return moment.astimezone(UTC)


def _check_json_size(field: str, value: Any) -> None:
    if value is None:
        return
    if _deeper_than(value, MAX_DEPTH):
        raise PayloadError(
            f"{field} is nested more than {MAX_DEPTH} levels deep",
            field=field,
            remedy="Flatten it: whoever reads it back must be able to",
        )
    if len(msgspec.json.encode(value)) > MAX_JSON_BYTES:
        raise PayloadError(
            f"{field} is larger than {MAX_JSON_BYTES} bytes of JSON",
            field=field,
            remedy="Keep large content elsewhere and send a reference to it",
        )


def _deeper_than(value: Any, levels: int) -> bool:
    """Whether JSON is nested deeper, found level by level: recursion would fail where it matters."""
    level = [value]
    for _ in range(levels):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return any(isinstance(one, dict | list) for one in level)


def _fill_thumb(item: FeedbackEvent) -> None:
    if item.op == "retract" and item.score is None and item.label is None:
        return
    if item.score is None and item.label in ("up", "down"):
        item.score = 1.0 if item.label == "up" else 0.0
    if item.score not in (0.0, 1.0):
        raise PayloadError(
            "A thumb needs score 1 (up) or 0 (down)",
            field="score" if item.label is None or item.score is not None else "label",
            remedy="Send score 1 or 0, or label up or down; graded opinions are of kind rating",
        )
    label = "up" if item.score else "down"
    if item.label not in (None, label):
        raise PayloadError(
            f"label {item.label} contradicts score {item.score:g}",
            field="label",
            remedy="Send one of score and label; the other is filled in",
        )
    item.label = label


def _check_content(item: FeedbackEvent) -> None:
    missing = None
    if item.kind == "rating":
        if item.score is None or not 0 <= item.score <= 1:
            raise PayloadError(
                "A rating needs a score from 0 to 1",
                field="score",
                remedy="Scale it: 4 of 1 to 5 stars is 0.75; its wording goes into label",
            )
    elif item.kind in ("category", "flag") and item.label is None:
        missing = "label"
    elif item.kind == "comment" and item.explanation is None:
        missing = "explanation"
    elif item.kind == "correction" and item.correction is None:
        missing = "correction"
    elif item.kind == "preference" and item.value is None:
        missing = "value"
    elif item.kind == "implicit" and item.label not in typing.get_args(ImplicitLabel):
        raise PayloadError(
            "Implicit feedback needs a known label",
            field="label",
            remedy=f"Send one of: {', '.join(typing.get_args(ImplicitLabel))}",
        )
    if missing is not None:
        raise PayloadError(f"kind {item.kind} needs {missing}", field=missing, remedy=f"Send {missing}")


def _check_target(item: FeedbackEvent) -> None:
    found = (
        item.interaction_id or item.trace_id
        if item.scope == "interaction"
        else getattr(item, f"{item.scope}_id")
    )
    if found is None:
        field = f"{item.scope}_id"
        raise PayloadError(
            f"scope {item.scope} needs {field}",
            field=field,
            remedy=f"Send {field}, or set scope to what the feedback is about",
        )

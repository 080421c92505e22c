"""OTLP: spans and log records, in protobuf or OTLP's JSON, as interactions and feedback, and back.

What becomes of a span (see ``feedback.formats.semconv`` for how each is recognised):

- A call of a model is an interaction, and so is the root span of a trace if it is a chain, workflow or agent that
  holds what was asked. Its interaction_id is the attribute ``datamoat.interaction.id`` if there is one, else
  ``trace id:span id`` in hexadecimal. (Not ``gen_ai.response.id``: a framework's span and the client's span within it
  often carry the same one. It is kept in ``metadata.response_id``.)
- A retrieval gives what it found to one interaction: of those in the same request, the nearest that it lies within, else
  the first of its trace to end after it. If there is none, it is an interaction of its own, without output.
- A judgement on it (OpenInference's annotations and evaluations, ``gen_ai.evaluation.result`` events) is feedback. It
  is about the span it is on, or, on a carrier (a span with kind EVALUATOR, or one that is nothing else to us and has
  links), about the one span that the carrier links to.
- Any other span is ignored.

Log records: ``gen_ai.evaluation.result`` is feedback on the span of its context, else on ``gen_ai.response.id``, its
trace or its session; ``gen_ai.client.inference.operation.details`` is an interaction. Others are ignored.

Ids of feedback are made from everything a judgement says, so that an exporter's retry stores nothing. One with an
``identifier`` keeps its feedback_id for each target and name: a later one takes the place of an earlier.

Belongs here: which record becomes what. Does not belong here: encodings (``feedback.formats.otlp_wire``), names of
attributes (``feedback.formats.semconv``), HTTP and answers (``feedback.compat``).
"""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from feedback.formats import Item, content_id, given, otlp_wire, semconv, span_key, stable_id
from feedback.formats.otlp_wire import Context, LogRecord, Span, pairs
from feedback.formats.semconv import DETAILS_EVENT, EVALUATION_EVENT, Attributes
from feedback.payloads import PayloadError

NAME = "otlp"
MAX_RETRIEVED = 1000
MAX_RETRIEVED_BYTES = 262_144
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass
class Translation:
    """What a request says: items, each with the number of the span or log record it came from."""

    items: list[tuple[int, Item]] = field(default_factory=list)
    rejected: dict[int, PayloadError] = field(default_factory=dict)
    ignored: int = 0

    @contextmanager
    def rejecting(self, number: int) -> Iterator[None]:
        """Turns a PayloadError within into a rejection of record ``number``; the first reason is kept."""
        try:
            yield
        except PayloadError as error:
            self.rejected.setdefault(number, error)


def to_items(record: Any) -> Iterator[Item]:
    """The items of one line of the collector's file exporter: an object with ``resourceSpans`` or ``resourceLogs``.

    Yields what can be read, then raises PayloadError for the first record that cannot.
    """
    if not isinstance(record, Mapping) or not {"resourceSpans", "resourceLogs"} & set(record):
        raise PayloadError(
            "The record has neither resourceSpans nor resourceLogs",
            remedy="Give lines as the OpenTelemetry collector's file exporter writes them in JSON",
        )
    spans, logs = translate_spans(record), translate_logs(record)
    for translation in (spans, logs):
        yield from (item for _, item in translation.items)
    for error in (*spans.rejected.values(), *logs.rejected.values()):
        raise error


def from_items(items: Sequence[Item]) -> dict[str, Any]:
    """Items as OTLP JSON: interactions as spans with ``gen_ai.*``, feedback as ``gen_ai.evaluation.result`` records.

    OpenTelemetry has no words for a preference or for implicit feedback beyond name, score, label and explanation.
    """
    record: dict[str, Any] = {}
    spans = [_span_of(item.body) for item in items if item.kind == "interaction"]
    records = [_record_of(item.body) for item in items if item.kind == "feedback"]
    if spans:
        record["resourceSpans"] = [{"scopeSpans": [{"spans": spans}]}]
    if records:
        record["resourceLogs"] = [{"scopeLogs": [{"logRecords": records}]}]
    return record


def translate_spans(request: bytes | Mapping[str, Any]) -> Translation:
    """The items in an ExportTraceServiceRequest, as protobuf or decoded JSON.

    Raises PayloadError if the request as a whole cannot be read.
    """
    translation = Translation()
    spans: list[tuple[int, Span, semconv.Role | None]] = []
    for number, span in enumerate(otlp_wire.spans(request)):
        with translation.rejecting(number):
            if isinstance(span, PayloadError):
                raise span
            spans.append((number, span, semconv.role(span.attributes)))
    said: dict[int, dict[str, Any]] = {}
    searches: list[tuple[int, Span, list[dict[str, Any]]]] = []
    for number, span, role in spans:
        with translation.rejecting(number):
            if role == "retrieval":
                _check(span.context)
                searches.append((number, span, semconv.retrieved(span.attributes)))
            elif (body := _interaction(span, role)) is not None:
                said[number] = body
    takers = _Takers([(number, span) for number, span, _ in spans], said)
    taken: dict[int, _Passages] = {}
    alone: list[tuple[int, Item]] = []
    for number, span, found in sorted(searches, key=lambda search: search[1].end):
        taker = takers.of(span)
        with translation.rejecting(number):
            if taker is None:
                alone.append((number, Item("interaction", _search(span, _Passages().adding(found)))))
            else:
                taken.setdefault(taker, _Passages()).adding(found)
    for number, span, role in spans:
        with translation.rejecting(number):
            if number in said:
                passages = taken.get(number, _Passages()).ranked
                passages = passages or _Passages().adding(semconv.retrieved(span.attributes))
                body = said[number] | given(retrieved=passages or None)
                translation.items.append((number, Item("interaction", body)))
        _judge(translation, number, span, role)
    translation.items += alone
    used = {number for number, _ in translation.items} | set(translation.rejected)
    translation.ignored = sum(number not in used and role != "retrieval" for number, _, role in spans)
    return translation


def translate_logs(request: bytes | Mapping[str, Any]) -> Translation:
    """The items in an ExportLogsServiceRequest, as protobuf or decoded JSON. Raises as ``translate_spans``."""
    translation = Translation()
    for number, record in enumerate(otlp_wire.log_records(request)):
        with translation.rejecting(number):
            if isinstance(record, PayloadError):
                raise record
            if record.event.name == EVALUATION_EVENT:
                target = _target(record.context, record.event.attributes)
                body = semconv.evaluation(record.event.attributes)
                translation.items.append((number, _feedback(body, target, record.event.time)))
            elif record.event.name == DETAILS_EVENT:
                translation.items.append((number, Item("interaction", _details(record))))
            else:
                translation.ignored += 1
    return translation


class _Takers:
    """Which interaction of a request gets what a retrieval found.

    It is one alone: given to all calls of its trace, a passage would be stored as often as there are calls.
    """

    def __init__(self, spans: Sequence[tuple[int, Span]], interactions: Container[int]) -> None:
        self._parents: dict[Context | None, Context] = {}
        self._within: dict[Context | None, int | None] = {None: None}
        self._ends: dict[str, list[tuple[int, int]]] = {}
        for number, span in spans:
            self._parents[span.context] = Context(span.context.trace_id, span.parent_id)
            if number in interactions:
                self._within[span.context] = number
                self._ends.setdefault(span.context.trace_id, []).append((span.end, number))
        for ends in self._ends.values():
            ends.sort()

    def of(self, span: Span) -> int | None:
        """The number of the span that is the interaction; None if there is none."""
        within = self._nearest(span.context)
        if within is not None:
            return within
        ends = self._ends.get(span.context.trace_id, [])
        after = bisect_left(ends, (span.end, -1))
        return ends[after][1] if after < len(ends) else None

    def _nearest(self, context: Context) -> int | None:
        passed: list[Context | None] = []
        at: Context | None = context
        while at not in self._within:
            passed.append(at)
            self._within[at] = None  # a circle of parents ends here
            at = self._parents.get(at)
        # Told to all that were passed: every span is looked at once, however deep it lies.
        self._within.update(dict.fromkeys(passed, self._within[at]))
        return self._within[context]


@dataclass
class _Passages:
    """What was put before one answer, in order."""

    ranked: list[dict[str, Any]] = field(default_factory=list)
    size: int = 0

    def adding(self, found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """All passages, with those ``found`` behind the others. Raises PayloadError if they would be too many."""
        size = self.size + len(json.dumps(found))
        if len(self.ranked) + len(found) > MAX_RETRIEVED or size > MAX_RETRIEVED_BYTES:
            raise PayloadError(
                f"More than {MAX_RETRIEVED} documents, or {MAX_RETRIEVED_BYTES} bytes of their ids, before one answer",
                field="retrieved",
                remedy="Record fewer documents, or give them shorter ids",
            )
        self.ranked += [{**passage, "rank": rank} for rank, passage in enumerate(found, len(self.ranked) + 1)]
        self.size = size
        return self.ranked


def _interaction(span: Span, role: semconv.Role | None) -> dict[str, Any] | None:
    """The body of the interaction that ``span`` is; None if it is none."""
    named = semconv.INTERACTION_ID in span.attributes and role != "retrieval" and not _carries(span, role)
    if not named and role != "model" and (role != "flow" or span.parent_id):
        return None
    said = semconv.interaction(span.attributes, span.events, span.resource)
    if said is None and role == "flow" and not named:
        # A flow that holds no question is only the frame of the calls within it.
        return None
    return _identified(span, said)


def _search(span: Span, found: list[dict[str, Any]]) -> dict[str, Any]:
    said = {"messages": semconv.query(span.attributes), "retrieved": found}
    if not said["messages"]:
        raise PayloadError(
            "The retrieval does not say what was searched for",
            field="input.value",
            remedy="Send the retriever's input, or the span of the model call in the same request",
        )
    session = span.attributes.text(semconv.SESSION)
    return _identified(span, given(**said, session_id=session))


def _identified(span: Span, said: dict[str, Any] | None) -> dict[str, Any]:
    """What was said, with id, times and where it came from. Raises PayloadError if nothing was."""
    _check(span.context)
    if said is None:
        raise PayloadError(
            "The call of a model holds no messages",
            field="gen_ai.input.messages",
            remedy="Have the instrumentation capture content (OpenTelemetry: "
            "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT)",
        )
    kept = given(span_name=span.name or None, parent_span_id=span.parent_id or None)
    kept |= semconv.details(span.attributes)
    metadata = {
        "trace_id": span.context.trace_id,
        "span_id": span.context.span_id,
        **given(response_id=span.attributes.get(semconv.RESPONSE_ID)),
        NAME: kept,
    }
    return {
        "interaction_id": _interaction_id(span.context, span.attributes),
        **said,
        **given(
            occurred_at=_moment(span.start),
            latency_ms=(span.end - span.start) / 1e6 if span.end >= span.start > 0 else None,
        ),
        "metadata": metadata,
    }


def _details(record: LogRecord) -> dict[str, Any]:
    """The interaction that a log record tells the whole of."""
    attributes = record.event.attributes
    span = Span(record.context, "", "", record.event.time, 0, attributes, (), (), record.resource)
    return _identified(span, semconv.interaction(attributes, (), record.resource))


def _judge(translation: Translation, number: int, span: Span, role: semconv.Role | None) -> None:
    """Add the judgements that ``span`` carries."""
    for found in semconv.judgements(span.attributes):
        with translation.rejecting(number):
            if isinstance(found, PayloadError):
                raise found
            target = _target(_subject(span, role, found.scope), span.attributes, found.scope)
            translation.items.append((number, _feedback(found.body, target, span.end)))
    for event in span.events:
        if event.name == EVALUATION_EVENT:
            with translation.rejecting(number):
                target = _target(_subject(span, role, "span"), Attributes(span.attributes | event.attributes))
                body = semconv.evaluation(event.attributes)
                translation.items.append((number, _feedback(body, target, event.time or span.end)))


def _carries(span: Span, role: semconv.Role | None) -> bool:
    """Whether ``span`` exists to carry judgements of another one."""
    return role == "evaluator" or (role is None and bool(span.links))


def _subject(span: Span, role: semconv.Role | None, scope: str) -> Context:
    """The span that a judgement on ``span`` is about. Raises PayloadError if a carrier does not say."""
    if not _carries(span, role) or scope == "session":
        return span.context
    if len(span.links) == 1:
        return span.links[0]
    if semconv.INTERACTION_ID in span.attributes and scope == "span":
        return Context("", "")
    raise PayloadError(
        f"A span that carries judgements of another has {len(span.links)} links",
        field="links",
        remedy="Link it to exactly the span that is judged",
    )


def _target(context: Context, attributes: Attributes, scope: str = "span") -> dict[str, Any]:
    """What a judgement is about, as fields of a feedback event. Raises PayloadError if nothing says so."""
    session = attributes.text(semconv.SESSION)
    if scope == "session":
        if session is None:
            raise PayloadError(
                "A judgement of a session needs session.id",
                field="session.id",
                remedy="Set session.id on the span that carries it",
            )
        return {"scope": "session", "session_id": session}
    trace = given(trace_id=context.trace_id or None, session_id=session)
    if scope == "trace":
        _check(context)
        return {"scope": "trace", **trace}
    named = semconv.INTERACTION_ID in attributes
    if named or context.span_id:
        if not named:
            _check(context)
        return {
            "interaction_id": _interaction_id(context, attributes),
            **trace,
            **given(span_id=context.span_id or None),
        }
    response = attributes.text((semconv.RESPONSE_ID,))
    if response is not None:
        return {"interaction_id": response, **trace}
    if context.trace_id:
        return {"scope": "trace", **trace}
    if session is not None:
        return {"scope": "session", "session_id": session}
    raise PayloadError(
        "The judgement does not say what it is about",
        field="span_id",
        remedy="Log it within the context of the judged span, or set gen_ai.response.id",
    )


def _feedback(body: dict[str, Any], target: dict[str, Any], time: int) -> Item:
    body = {**body, **target, **given(occurred_at=_moment(time))}
    if "identifier" in body and "feedback_id" not in body:
        about = [target.get(name) or "" for name in ("scope", "interaction_id", "trace_id", "session_id")]
        body["feedback_id"] = stable_id(NAME, *map(str, (*about, body["name"], body["identifier"])))
    body.setdefault("event_id", content_id(NAME, body=body))
    return Item("feedback", body)


def _interaction_id(context: Context, attributes: Attributes) -> Any:
    named = attributes.text((semconv.INTERACTION_ID,))
    return span_key(context.trace_id, context.span_id) if named is None else named


def _check(context: Context) -> None:
    for name, value, size in (("trace_id", context.trace_id, 32), ("span_id", context.span_id, 16)):
        if len(value) != size or not value.strip("0"):
            raise PayloadError(
                f"{name} has {len(value) // 2} bytes" + ("" if len(value) != size else ", all of them zero"),
                field=name,
                remedy=f"Send the {size // 2} bytes that the tracer made",
            )


def _moment(time: int) -> str | None:
    return (_EPOCH + timedelta(microseconds=time // 1000)).isoformat() if time else None


# Writing OTLP's JSON


def _span_of(body: Mapping[str, Any]) -> dict[str, Any]:
    metadata = body.get("metadata") or {}
    context = _context_of(metadata.get("trace_id"), metadata.get("span_id"), body["interaction_id"])
    attributes = semconv.described(body)
    if body["interaction_id"] != span_key(context.trace_id, context.span_id):
        attributes[semconv.INTERACTION_ID] = body["interaction_id"]
    start = _nanoseconds(body.get("occurred_at"))
    kept = metadata.get(NAME) or {}
    return {
        "traceId": context.trace_id,
        "spanId": context.span_id,
        **given(parentSpanId=kept.get("parent_span_id")),
        "name": kept.get("span_name") or "chat",
        "startTimeUnixNano": str(start),
        "endTimeUnixNano": str(start + round(body.get("latency_ms", 0) * 1e6)),
        "attributes": pairs(attributes),
    }


def _record_of(body: Mapping[str, Any]) -> dict[str, Any]:
    time = str(_nanoseconds(body.get("occurred_at")))
    return {
        **given(traceId=body.get("trace_id"), spanId=body.get("span_id")),
        "timeUnixNano": time,
        "eventName": EVALUATION_EVENT,
        "attributes": pairs(semconv.evaluated(body)),
    }


def _context_of(trace_id: Any, span_id: Any, interaction_id: str) -> Context:
    """The span of an interaction; one that never was a span gets ids made from its own."""
    digest = hashlib.sha256(interaction_id.encode()).hexdigest()
    valid = re.fullmatch("[0-9a-f]{32}", str(trace_id)) and re.fullmatch("[0-9a-f]{16}", str(span_id))
    return Context(str(trace_id), str(span_id)) if valid else Context(digest[:32], digest[32:48])


def _nanoseconds(moment: str | None) -> int:
    if moment is None:
        return 0
    return (datetime.fromisoformat(moment) - _EPOCH) // timedelta(microseconds=1) * 1000

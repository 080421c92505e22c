"""OTLP's two encodings: spans and log records out of protobuf or OTLP's JSON, and attributes into the latter.

JSON is read into protobuf's own classes, a record at a time, so that both encodings mean the same and one wrong
record does not spoil its request.

Belongs here: encodings and limits. Does not belong here: what a record means (``feedback.formats.otlp``).
"""

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

from google.protobuf.json_format import ParseDict, ParseError  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.logs.v1 import logs_pb2
from opentelemetry.proto.resource.v1 import resource_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from feedback.formats.messages import MAX_DEPTH
from feedback.formats.semconv import Attributes, Event
from feedback.payloads import PayloadError

# Counting groups too: each costs time, also if it is empty.
MAX_RECORDS = 20_000

# What protobuf's reader of JSON raises; SystemError for half of a surrogate pair, which has no UTF-8.
_UNREADABLE = (
    ParseError,
    ValueError,
    TypeError,
    AttributeError,
    RecursionError,
    OverflowError,
    SystemError,
)

_M = TypeVar("_M", bound=Message)
_R = TypeVar("_R")


@dataclass(frozen=True)
class Context:
    """Which span is meant, in hexadecimal; empty where nothing was said."""

    trace_id: str
    span_id: str


@dataclass(frozen=True)
class Span:
    """One span; times in nanoseconds since 1970, 0 if unknown."""

    context: Context
    parent_id: str
    name: str
    start: int
    end: int
    attributes: Attributes
    events: tuple[Event, ...]
    links: tuple[Context, ...]
    resource: Attributes


@dataclass(frozen=True)
class LogRecord:
    """One log record that is an event."""

    context: Context
    event: Event
    resource: Attributes


def spans(request: bytes | Mapping[str, Any]) -> Iterator[Span | PayloadError]:
    """The spans of an ExportTraceServiceRequest, in protobuf or decoded JSON; an error for each that is none.

    Raises PayloadError if the request as a whole cannot be read.
    """
    path = ("resourceSpans", "scopeSpans", "spans")
    return _records(request, ExportTraceServiceRequest, path, trace_pb2.Span, _span)


def log_records(request: bytes | Mapping[str, Any]) -> Iterator[LogRecord | PayloadError]:
    """The log records of an ExportLogsServiceRequest, as ``spans``."""
    path = ("resourceLogs", "scopeLogs", "logRecords")
    return _records(request, ExportLogsServiceRequest, path, logs_pb2.LogRecord, _log_record)


def pairs(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Attributes in OTLP's JSON."""
    return [{"key": name, "value": _any_value(value)} for name, value in attributes.items()]


def _any_value(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    return {"doubleValue": value} if isinstance(value, float) else {"stringValue": str(value)}


def _records(
    request: bytes | Mapping[str, Any],
    kind: Callable[[], Message],
    path: tuple[str, str, str],
    record: type[_M],
    read: Callable[[_M, Attributes], _R],
) -> Iterator[_R | PayloadError]:
    """Each record of a request, read together with the attributes of its resource."""
    outer, middle, inner = path
    message: Any = request
    if isinstance(request, bytes):
        message = kind()
        try:
            message.ParseFromString(request)
        except DecodeError as error:
            raise PayloadError(
                f"The body is not {type(message).__name__} in protobuf: {error}",
                code="malformed_protobuf",
                remedy="Send OTLP as http/protobuf, or as http/json with Content-Type: application/json",
            ) from None
    counter = count(1)

    def counted(entries: Iterable[Any]) -> Iterator[Any]:
        for entry in entries:
            if next(counter) > MAX_RECORDS:
                raise PayloadError(
                    f"The request has more than {MAX_RECORDS} spans or log records",
                    code="too_many_items",
                    remedy="Set a smaller maximal batch size in the exporter or collector",
                )
            yield entry

    for group in counted(_list(message, outer)):
        resource = group.resource if isinstance(group, Message) else group.get("resource") or {}
        attributes = _attributes(_parsed(resource, resource_pb2.Resource).attributes)
        for scope in counted(_list(group, middle)):
            for entry in counted(_list(scope, inner)):
                try:
                    yield read(_parsed(entry, record), attributes)
                except PayloadError as error:
                    yield error


def _list(value: Any, name: str) -> Any:
    """The array ``name`` of a message in protobuf or JSON."""
    if isinstance(value, Message):
        return getattr(value, _snake(name))
    found = value.get(name) or []
    if not isinstance(found, list) or not all(isinstance(entry, Mapping) for entry in found):
        raise PayloadError(
            f"{name} is not an array of objects", field=name, code="malformed_json", remedy="Send OTLP's JSON"
        )
    return found


def _parsed(value: Any, kind: type[_M]) -> _M:
    """``value``, or the message that OTLP's JSON says. Raises PayloadError."""
    if isinstance(value, kind):
        return value
    try:
        message: _M = kind()
        ParseDict(_with_bytes(value), message, ignore_unknown_fields=True, max_recursion_depth=MAX_DEPTH)
        return message
    except _UNREADABLE as error:
        raise PayloadError(
            f"Not a {kind.DESCRIPTOR.name} in OTLP's JSON: {error}",
            remedy="Write ids in hexadecimal, 64-bit integers as strings, names in lowerCamelCase",
        ) from None


def _with_bytes(value: Any) -> dict[str, Any]:
    """OTLP writes ids in hexadecimal where protobuf's JSON has base64. Raises PayloadError."""
    if not isinstance(value, Mapping):
        raise PayloadError(f"{value!r:.40} is not an object", remedy="Send OTLP's JSON")
    changed = dict(value)
    for name in ("traceId", "spanId", "parentSpanId"):
        if changed.get(name):
            try:
                changed[name] = base64.b64encode(bytes.fromhex(changed[name])).decode()
            except (ValueError, TypeError):
                raise PayloadError(
                    f"{name} is not hexadecimal", field=name, remedy="OTLP's JSON has ids in hexadecimal"
                ) from None
    if isinstance(changed.get("links"), list):
        changed["links"] = [_with_bytes(link) for link in changed["links"]]
    return changed


def _span(span: trace_pb2.Span, resource: Attributes) -> Span:
    return Span(
        context=Context(span.trace_id.hex(), span.span_id.hex()),
        parent_id=span.parent_span_id.hex(),
        name=span.name,
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        events=tuple(
            Event(event.name, event.time_unix_nano, _attributes(event.attributes)) for event in span.events
        ),
        links=tuple(Context(link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        resource=resource,
    )


def _log_record(record: logs_pb2.LogRecord, resource: Attributes) -> LogRecord:
    """A log record. Older SDKs write the name of an event as attribute ``event.name``, some all of it as the body."""
    attributes = _attributes(record.attributes)
    body = _value(record.body)
    if isinstance(body, dict):
        attributes = Attributes(body | attributes)
    name = record.event_name or attributes.get("event.name")
    time = record.time_unix_nano or record.observed_time_unix_nano
    return LogRecord(
        Context(record.trace_id.hex(), record.span_id.hex()),
        Event(str(name or ""), time, attributes),
        resource,
    )


def _attributes(pairs: Any) -> Attributes:
    return Attributes({pair.key: _value(pair.value) for pair in pairs})


def _value(value: Any) -> Any:
    """The plain value in an AnyValue; bytes in base64, as OTLP's JSON has them."""
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    found = getattr(value, kind)
    if kind == "array_value":
        return [_value(entry) for entry in found.values]
    if kind == "kvlist_value":
        return {pair.key: _value(pair.value) for pair in found.values}
    return base64.b64encode(found).decode() if kind == "bytes_value" else found


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)

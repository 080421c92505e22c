"""OTLP over HTTP: requests in protobuf or JSON, answered in the same encoding with what was rejected and why.

A request that can never succeed is answered 400 or 413, one that is worth sending again 429 or 503 with Retry-After.

Belongs here: OTLP's answers. Does not belong here: what spans and log records mean (``feedback.formats.otlp``).
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import MessageToDict  # type: ignore[import-untyped]
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as logs_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb2
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from feedback.answers import Error, error_of
from feedback.compat.shared import (
    REFUSALS,
    TEXT,
    Endpoint,
    authenticated,
    described,
    inline,
    json_object,
    sentence,
    store,
)
from feedback.formats import otlp, otlp_wire
from feedback.http import JSON, RETRY_AFTER_SECONDS, Refused, answer, check_type, read_body
from feedback.log import Unavailable
from feedback.payloads import PayloadError
from feedback.service import Service

PROTOBUF = "application/x-protobuf"
NAMED_REASONS = 3


def routes(service: Service) -> list[Route]:
    """The routes; Langfuse's SDKs send their traces as OTLP to a path of their own."""
    traces, logs = _otlp(service, _TRACES), _otlp(service, _LOGS)
    return [
        Route("/v1/traces", traces, methods=["POST"]),
        Route("/v1/logs", logs, methods=["POST"]),
        Route("/api/public/otel/v1/traces", traces, methods=["POST"]),
    ]


@dataclass(frozen=True)
class _Signal:
    """One signal of OTLP: how its requests are read and answered."""

    translate: Callable[[bytes | Mapping[str, Any]], otlp.Translation]
    response: Callable[..., Any]
    partial: Callable[..., Any]
    rejected: str
    noun: str


_TRACES = _Signal(
    otlp.translate_spans,
    trace_pb2.ExportTraceServiceResponse,
    trace_pb2.ExportTracePartialSuccess,
    "rejected_spans",
    "span",
)
_LOGS = _Signal(
    otlp.translate_logs,
    logs_pb2.ExportLogsServiceResponse,
    logs_pb2.ExportLogsPartialSuccess,
    "rejected_log_records",
    "log record",
)


def _otlp(service: Service, signal: _Signal) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        encoding = check_type(request, (PROTOBUF, JSON))
        try:
            caller = await authenticated(service, request)
            body = await read_body(request, (PROTOBUF, JSON), gzip=True)
            # A full batch takes a while; other requests go on meanwhile.
            translation = await asyncio.to_thread(_translated, signal, body, encoding)
            results = await store(service, caller, [item for _, item in translation.items])
        except Refused as refused:
            return _status(encoding, refused.status, refused.error.message, refused.headers)
        except PayloadError as error:
            status = 413 if error.code == "too_many_items" else 400
            return _status(encoding, status, sentence(error_of(error)))
        except Unavailable:
            return _status(
                encoding,
                503,
                "The database does not answer; nothing was acknowledged",
                {"Retry-After": str(RETRY_AFTER_SECONDS)},
            )
        reasons = {number: error_of(error) for number, error in translation.rejected.items()}
        for (number, _), result in zip(translation.items, results, strict=True):
            if result.error is not None:
                reasons.setdefault(number, result.error)
        return _exported(signal, encoding, reasons, translation.ignored)

    return endpoint


def _translated(signal: _Signal, body: bytes, encoding: str) -> otlp.Translation:
    return signal.translate(json_object(body) if encoding == JSON else body)


def _exported(signal: _Signal, encoding: str, reasons: Mapping[int, Error], ignored: int) -> Response:
    """200: how many records were rejected, and why the first of them were; nothing if none."""
    message = ""
    if reasons:
        first = [f"{signal.noun} {number}: {sentence(reasons[number])}" for number in sorted(reasons)]
        more = f"; and {len(first) - NAMED_REASONS} more" if len(first) > NAMED_REASONS else ""
        message = "; ".join(first[:NAMED_REASONS]) + more
        if ignored:
            message += f"; {ignored} others are neither calls of a model nor judgements and were ignored"
    full = signal.response()
    if reasons:
        partial = signal.partial(**{signal.rejected: len(reasons), "error_message": message})
        full = signal.response(partial_success=partial)
    if encoding == JSON:
        return answer(200, MessageToDict(full))
    return Response(full.SerializeToString(), 200, media_type=PROTOBUF)


def _status(encoding: str, status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """A refusal as google.rpc.Status, which OTLP wants."""
    if encoding == JSON:
        return answer(status, {"message": message}, headers)
    # On the wire a Status with a message alone is what this one is: field 2, a string.
    content = trace_pb2.ExportTracePartialSuccess(error_message=message).SerializeToString()
    return Response(content, status, headers, PROTOBUF)


_CONTEXT = {"traceId": "4bf0a1c2d3e4f5a6b7c8d9e0f1a2b3c4", "spanId": "a1b2c3d4e5f6a7b8"}
_SPAN = {
    **_CONTEXT,
    "name": "chat in-house-7b",
    "startTimeUnixNano": "1769860800000000000",
    "endTimeUnixNano": "1769860801000000000",
    "attributes": otlp_wire.pairs(
        {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": "in-house-7b",
            "gen_ai.input.messages": '[{"role": "user", "content": "How do I return a parcel?"}]',
            "gen_ai.output.messages": '[{"role": "assistant", "content": "Print the label in your account."}]',
        }
    ),
}
_EVALUATION = {
    **_CONTEXT,
    "timeUnixNano": "1769860860000000000",
    "eventName": "gen_ai.evaluation.result",
    "attributes": otlp_wire.pairs(
        {
            "gen_ai.evaluation.name": "groundedness",
            "gen_ai.evaluation.score.value": 0.9,
            "gen_ai.evaluation.explanation": "The handbook says so",
            "datamoat.annotator_kind": "LLM",
        }
    ),
}
_SPANS = {"resourceSpans": [{"scopeSpans": [{"spans": [_SPAN]}]}]}
_RECORDS = {"resourceLogs": [{"scopeLogs": [{"logRecords": [_EVALUATION]}]}]}
_PARTS = {
    "type": "object",
    "description": "rejectedSpans or rejectedLogRecords, and errorMessage with the first reasons; absent if none.",
}
_EXPORTED = {"type": "object", "properties": {"partialSuccess": _PARTS}}
_STATUS = {"type": "object", "properties": {"message": TEXT}}


def _description(summary: str, operation: str, request: str, example: Mapping[str, Any]) -> dict[str, Any]:
    types = (PROTOBUF, JSON)
    records = {"type": "array", "items": {"type": "object"}}
    described_json = {
        "schema": {"type": "object", "properties": dict.fromkeys(example, records)},
        "examples": {"one record": {"value": example}},
    }
    refusals = {
        status: inline(f"{refusal['description']} (google.rpc.Status)", _STATUS, types)
        for status, refusal in REFUSALS.items()
        if status != "415"
    }
    return described(
        summary,
        f"OTLP/HTTP: an {request}, answered in its encoding. Records that are no business of this service are "
        "ignored; those that are, but cannot be stored, are counted and explained in partialSuccess. For an exporter: "
        "OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf and OTEL_EXPORTER_OTLP_HEADERS=Authorization=Bearer%20KEY.",
        operation,
        {PROTOBUF: {"schema": {"type": "string", "format": "binary"}}, JSON: described_json},
        {"200": inline("Stored but for what partialSuccess names", _EXPORTED, types), **refusals}
        | {"415": REFUSALS["415"]},
    )


OPENAPI = {
    "/v1/traces": _description(
        "Record spans of model calls (OTLP)", "otlp_traces", "ExportTraceServiceRequest", _SPANS
    ),
    "/v1/logs": _description(
        "Record evaluation events (OTLP)", "otlp_logs", "ExportLogsServiceRequest", _RECORDS
    ),
    "/api/public/otel/v1/traces": _description(
        "Record spans, where Langfuse's SDKs send them",
        "langfuse_traces",
        "ExportTraceServiceRequest",
        _SPANS,
    ),
}

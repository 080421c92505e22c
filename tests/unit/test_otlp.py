"""What spans and log records become, in every vocabulary and both encodings; and what hostile ones become."""

import asyncio
import base64
import json
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict  # type: ignore[import-untyped]
from hypothesis import given as given_examples
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue, KeyValueList
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, ResourceLogs, ScopeLogs
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span

from feedback.answers import ItemResult
from feedback.compat import shared
from feedback.formats import Item, otlp, semconv
from feedback.formats.otlp_wire import MAX_RECORDS
from feedback.payloads import MAX_ITEMS, PayloadError, parse_event, parse_interaction

TRACE, SPAN, OTHER = "ab" * 16, "cd" * 8, "ef" * 8
START = 1_760_000_000_000_000_000
CHAT = {
    "gen_ai.operation.name": "chat",
    "gen_ai.input.messages": '[{"role": "user", "parts": [{"type": "text", "content": "How?"}]}]',
}


def any_value(value: Any) -> AnyValue:
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, int):
        return AnyValue(int_value=value)
    if isinstance(value, float):
        return AnyValue(double_value=value)
    if isinstance(value, list):
        return AnyValue(array_value=ArrayValue(values=map(any_value, value)))
    if isinstance(value, dict):
        return AnyValue(kvlist_value=KeyValueList(values=pairs(value)))
    return AnyValue() if value is None else AnyValue(string_value=value)


def pairs(attributes: dict[str, Any]) -> list[KeyValue]:
    return [KeyValue(key=name, value=any_value(value)) for name, value in attributes.items()]


def span(attributes: dict[str, Any], **more: Any) -> Span:
    fields: dict[str, Any] = {
        "trace_id": bytes.fromhex(TRACE),
        "span_id": bytes.fromhex(SPAN),
        "name": "call",
        "start_time_unix_nano": START,
        "end_time_unix_nano": START + 1_500_000_000,
    }
    return Span(attributes=pairs(attributes), **(fields | more))


def event(name: str, **attributes: Any) -> Span.Event:
    return Span.Event(name=name, time_unix_nano=START, attributes=pairs(attributes))


def link(span_id: str = OTHER) -> Span.Link:
    return Span.Link(trace_id=bytes.fromhex(TRACE), span_id=bytes.fromhex(span_id))


def traces(*spans: Span, **resource: Any) -> ExportTraceServiceRequest:
    return ExportTraceServiceRequest(
        resource_spans=[
            ResourceSpans(
                resource=Resource(attributes=pairs(resource)), scope_spans=[ScopeSpans(spans=list(spans))]
            )
        ]
    )


def logs(*records: LogRecord) -> ExportLogsServiceRequest:
    return ExportLogsServiceRequest(
        resource_logs=[ResourceLogs(scope_logs=[ScopeLogs(log_records=list(records))])]
    )


def as_json(message: Any) -> dict[str, Any]:
    """OTLP's JSON of a request: protobuf's, but for the ids in hexadecimal and the enums as numbers."""

    def hexed(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                name: base64.b64decode(inner).hex()
                if name in ("traceId", "spanId", "parentSpanId")
                else hexed(inner)
                for name, inner in value.items()
            }
        return [hexed(inner) for inner in value] if isinstance(value, list) else value

    found: dict[str, Any] = hexed(MessageToDict(message, use_integers_for_enums=True))
    return found


def valid(translation: otlp.Translation) -> list[Item]:
    """The items, each of which our own API would take."""
    items = [item for _, item in translation.items]
    for item in items:
        body = json.dumps(item.body).encode()
        parse_interaction(body) if item.kind == "interaction" else parse_event(body)
    return items


def bodies(*spans: Span, **resource: Any) -> list[dict[str, Any]]:
    request = traces(*spans, **resource)
    translation = otlp.translate_spans(request.SerializeToString())
    assert not translation.rejected
    from_json = otlp.translate_spans(as_json(request))
    assert from_json.items == translation.items, "both encodings say the same"
    return [item.body for item in valid(translation)]


def logged(*records: LogRecord) -> list[dict[str, Any]]:
    request = logs(*records)
    translation = otlp.translate_logs(request.SerializeToString())
    assert not translation.rejected
    assert otlp.translate_logs(as_json(request)).items == translation.items
    return [item.body for item in valid(translation)]


def reasons(*spans: Span) -> dict[int, PayloadError]:
    return otlp.translate_spans(traces(*spans).SerializeToString()).rejected


def test_a_chat_span_in_todays_names() -> None:
    attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-x",
        "gen_ai.response.model": "gpt-x-2026",
        "gen_ai.request.temperature": 0.2,
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.conversation.id": "session-1",
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.prompt.name": "answer",
        "gen_ai.system_instructions": '[{"type": "text", "content": "Be brief."}]',
        "gen_ai.input.messages": json.dumps(
            [
                {"role": "user", "parts": [{"type": "text", "content": "How?"}]},
                {"role": "assistant", "parts": [{"type": "tool_call", "name": "find"}]},
                {"role": "tool", "parts": [{"type": "tool_call_response", "result": "So."}]},
            ]
        ),
        "gen_ai.output.messages": '[{"role": "assistant", "parts": [{"type": "text", "content": "So."}]}]',
        "user.id": "ana",
    }
    (body,) = bodies(span(attributes), **{"service.version": "1.2", "datamoat.train_ok": False})
    assert body == {
        "interaction_id": f"{TRACE}:{SPAN}",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "How?"},
            {"role": "assistant", "content": '{"type": "tool_call", "name": "find"}'},
            {"role": "tool", "content": '{"type": "tool_call_response", "result": "So."}'},
        ],
        "output": "So.",
        "session_id": "session-1",
        "user_id": "ana",
        "provider": "openai",
        "model": "gpt-x-2026",
        "prompt_name": "answer",
        "app_release": "1.2",
        "input_tokens": 12,
        "output_tokens": 5,
        "train_ok": False,
        "occurred_at": "2025-10-09T08:53:20+00:00",
        "latency_ms": 1500.0,
        "metadata": {
            "trace_id": TRACE,
            "span_id": SPAN,
            "response_id": "chatcmpl-1",
            "otlp": {"span_name": "call", "request": {"temperature": 0.2, "model": "gpt-x"}},
        },
    }


OLD_NAMES = {
    "gen_ai.system": "openai",
    "gen_ai.request.model": "gpt-x",
    "gen_ai.usage.prompt_tokens": 12,
    "gen_ai.usage.completion_tokens": 5,
}
VOCABULARIES: dict[str, Span] = {
    "structured messages": span(
        OLD_NAMES
        | {
            "gen_ai.input.messages": [{"role": "user", "parts": [{"type": "text", "content": "How?"}]}],
            "gen_ai.output.messages": [{"role": "assistant", "parts": [{"type": "text", "content": "So."}]}],
        }
    ),
    "openllmetry": span(
        OLD_NAMES
        | {
            "gen_ai.prompt.0.role": "user",
            "gen_ai.prompt.0.content": '[{"type": "text", "text": "How?"}]',
            "gen_ai.completion.0.role": "assistant",
            "gen_ai.completion.0.content": "So.",
        }
    ),
    "content events": span(
        OLD_NAMES,
        events=[
            event("gen_ai.content.prompt", **{"gen_ai.prompt": '[{"role": "user", "content": "How?"}]'}),
            event("gen_ai.content.completion", **{"gen_ai.completion": "So."}),
        ],
    ),
    "message events": span(
        OLD_NAMES,
        events=[
            event("gen_ai.user.message", content="How?"),
            event("gen_ai.choice", index=0, message='{"role": "assistant", "content": "So."}'),
        ],
    ),
    "message events with content as JSON": span(
        OLD_NAMES,
        events=[
            event("gen_ai.user.message", **{"gen_ai.event.content": '{"content": "How?"}'}),
            event(
                "gen_ai.choice",
                **{
                    "gen_ai.event.content": '{"index": 0, "message": {"role": "assistant", "content": "So."}}'
                },
            ),
        ],
    ),
    "details event": span(
        OLD_NAMES,
        events=[
            event(
                semconv.DETAILS_EVENT,
                **{
                    "gen_ai.input.messages": '[{"role": "user", "parts": [{"type": "text", "content": "How?"}]}]',
                    "gen_ai.output.messages": '[{"role": "assistant", "parts": [{"type": "text", "content": "So."}]}]',
                },
            )
        ],
    ),
    "openinference": span(
        {
            "openinference.span.kind": "LLM",
            "llm.provider": "openai",
            "llm.model_name": "gpt-x",
            "llm.token_count.prompt": 12,
            "llm.token_count.completion": 5,
            "llm.input_messages.0.message.role": "user",
            "llm.input_messages.0.message.contents.0.message_content.type": "text",
            "llm.input_messages.0.message.contents.0.message_content.text": "How?",
            "llm.output_messages.0.message.role": "assistant",
            "llm.output_messages.0.message.content": "So.",
        }
    ),
    "openinference values": span(
        {
            "openinference.span.kind": "LLM",
            "llm.provider": "openai",
            "llm.model_name": "gpt-x",
            "llm.token_count.prompt": 12.0,
            "llm.token_count.completion": "5",
            "input.value": '{"messages": [{"role": "user", "content": "How?"}], "temperature": 0}',
            "output.value": '{"choices": [{"message": {"role": "assistant", "content": "So."}}]}',
        }
    ),
    "langfuse": span(
        {
            "langfuse.observation.type": "generation",
            "langfuse.observation.model.name": "gpt-x",
            "llm.provider": "openai",
            "gen_ai.usage.input_tokens": 12,
            "gen_ai.usage.output_tokens": 5,
            "langfuse.observation.input": "How?",
            "langfuse.observation.output": '{"role": "assistant", "content": "So."}',
        }
    ),
    "vercel": span(
        OLD_NAMES | {"ai.prompt.messages": '[{"role": "user", "content": "How?"}]', "ai.response.text": "So."}
    ),
    "mlflow": span(
        OLD_NAMES
        | {
            "mlflow.spanType": '"CHAT_MODEL"',
            "mlflow.spanInputs": '{"messages": [{"role": "human", "content": "How?"}]}',
            "mlflow.spanOutputs": '"So."',
        }
    ),
}


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_every_vocabulary_says_the_same(vocabulary: str) -> None:
    (body,) = bodies(VOCABULARIES[vocabulary])
    assert body["messages"] == [{"role": "user", "content": "How?"}]
    assert body["output"] == "So."
    assert (body["provider"], body["model"]) == ("openai", "gpt-x")
    assert (body["input_tokens"], body["output_tokens"]) == (12, 5)


def test_openinference_session_user_and_tags() -> None:
    attributes = {
        "openinference.span.kind": "LLM",
        "input.value": "How?",
        "output.value": '{"answer": 42}',
        "session.id": "s",
        "user.id": "ana",
        "metadata": '{"tenant": "t1"}',
        "tag.tags": ["a", "b"],
        "traceloop.prompt.key": "answer",
        "traceloop.prompt.version": 3,
        "traceloop.prompt.version_hash": "h1",
    }
    (body,) = bodies(span(attributes))
    assert (body["session_id"], body["user_id"]) == ("s", "ana")
    assert body["output"] == '{"answer": 42}', "an answer in JSON stays as the model wrote it"
    assert (body["prompt_name"], body["prompt_version"], body["prompt_hash"]) == ("answer", "3", "h1")
    assert body["metadata"]["otlp"]["metadata"] == {"tenant": "t1"}
    assert body["metadata"]["otlp"]["tags"] == ["a", "b"]
    assert "ana" not in json.dumps(body["metadata"])


def test_our_own_id_wins() -> None:
    (body,) = bodies(span(CHAT | {"datamoat.interaction.id": "answer-7", "gen_ai.response.id": "r"}))
    assert body["interaction_id"] == "answer-7"


def test_a_chain_is_an_interaction_only_as_root_and_with_a_question() -> None:
    chain = {"openinference.span.kind": "CHAIN", "input.value": "How?", "output.value": "So."}
    (body,) = bodies(span(chain))
    assert body["messages"] == [{"role": "user", "content": "How?"}]
    assert bodies(span(chain, parent_span_id=bytes.fromhex(OTHER))) == []
    assert bodies(span({"openinference.span.kind": "CHAIN"})) == []
    assert reasons(span(chain, trace_id=b""))[0].field == "trace_id"


def retriever(span_id: str = OTHER, end: int = START + 10, documents: Any = ()) -> Span:
    attributes = {
        "openinference.span.kind": "RETRIEVER",
        "input.value": "How?",
        "retrieval.documents.0.document.id": "handbook/a.md",
        "retrieval.documents.0.document.score": 0.75,
        "retrieval.documents.1.document.content": "Without an id",
    }
    return span(
        attributes | dict(documents),
        span_id=bytes.fromhex(span_id),
        start_time_unix_nano=START,
        end_time_unix_nano=end,
    )


def test_what_was_retrieved_before_the_answer_goes_with_it() -> None:
    (body,) = bodies(retriever(), span(CHAT))
    assert [(passage["rank"], passage.get("score")) for passage in body["retrieved"]] == [
        (1, 0.75),
        (2, None),
    ]
    assert body["retrieved"][0]["document_id"] == "handbook/a.md"
    assert body["retrieved"][1]["chunk_id"].startswith("sha256:")


def test_a_retrieval_without_an_answer_is_kept_by_itself() -> None:
    late = retriever(end=START + 10_000_000_000)
    answered, searched = bodies(span(CHAT), late)
    assert "retrieved" not in answered
    assert searched["interaction_id"] == f"{TRACE}:{OTHER}"
    assert len(searched["retrieved"]) == 2


CHAIN = {"openinference.span.kind": "CHAIN", "input.value": "How?", "output.value": "So."}
ROOT, CALL, INNER = "11" * 8, "22" * 8, "33" * 8


def within(attributes: dict[str, Any], span_id: str, parent: str = "", **more: Any) -> Span:
    return span(attributes, span_id=bytes.fromhex(span_id), parent_span_id=bytes.fromhex(parent), **more)


def takers(*spans: Span) -> dict[str, int]:
    """How many passages went to which interaction, by span id."""
    return {
        body["metadata"]["span_id"]: len(body["retrieved"]) for body in bodies(*spans) if "retrieved" in body
    }


def test_a_retrieval_goes_to_the_nearest_interaction_that_it_lies_within() -> None:
    chain, call = within(CHAIN, ROOT), within(CHAT, CALL, ROOT)
    frame = within({"openinference.span.kind": "CHAIN"}, INNER, ROOT)
    searched = retriever()
    for parent, taker in ((ROOT, ROOT), (INNER, ROOT), (CALL, CALL)):
        searched.parent_span_id = bytes.fromhex(parent)
        assert takers(searched, chain, frame, call) == {taker: 2}


def test_a_retrieval_within_no_interaction_goes_to_the_first_answer_after_it() -> None:
    calls = [
        within(CHAT, span_id, ROOT, end_time_unix_nano=START + end)
        for span_id, end in ((SPAN, 5), (INNER, 30), (CALL, 20))
    ]
    frame = within({"openinference.span.kind": "CHAIN"}, ROOT)
    assert takers(retriever(), frame, *calls) == {CALL: 2}
    circle = retriever()
    circle.parent_span_id = circle.span_id
    assert takers(circle, *calls) == {CALL: 2}


def test_several_retrievals_are_ranked_on() -> None:
    (body,) = bodies(retriever(end=START + 20), retriever(span_id=INNER), span(CHAT))
    assert [passage["rank"] for passage in body["retrieved"]] == [1, 2, 3, 4]


def test_a_request_is_not_multiplied_by_what_its_spans_share() -> None:
    documents = {f"retrieval.documents.{n}.document.id": "d" * 200 + str(n) for n in range(1000)}
    calls = [within(CHAT, f"{n:016x}") for n in range(1, 251)]
    request = traces(retriever(documents=documents), *calls).SerializeToString()
    assert size(otlp.translate_spans(request)) < 2 * len(request)
    judged = {f"annotations.{n}.annotation.{field}": "x" for n in range(250) for field in ("name", "label")}
    for attributes, resource in (
        (CHAT, {"service.version": "v" * 100_000}),
        (CHAT, {"datamoat.train_ok": "v" * 100_000}),
        (CHAT | judged | {"session.id": "s" * 100_000}, {}),
        (CHAT | judged | {"datamoat.interaction.id": "s" * 100_000}, {}),
    ):
        request = traces(*[within(attributes, f"{n:016x}") for n in range(1, 3)], **resource)
        translation = otlp.translate_spans(request.SerializeToString())
        assert size(translation) < 2 * len(request.SerializeToString())
        assert translation.rejected[0].field in attributes | resource


def size(translation: otlp.Translation) -> int:
    return sum(len(json.dumps(item.body)) for _, item in translation.items)


def test_more_than_an_answer_may_hold_is_refused_with_the_retrieval_and_not_with_the_answer() -> None:
    long = {f"retrieval.documents.{n}.document.id": "d" * 900 + str(n) for n in range(300)}
    many = {f"retrieval.documents.{n}.document.id": str(n) for n in range(1001)}
    for documents in (long, many):
        request = traces(retriever(end=START + 5, documents=documents), retriever(span_id=INNER), span(CHAT))
        translation = otlp.translate_spans(request.SerializeToString())
        assert {number: error.field for number, error in translation.rejected.items()} == {0: "retrieved"}
        ((number, item),) = translation.items
        assert (number, len(item.body["retrieved"])) == (2, 2)


def test_a_retrieval_in_opentelemetrys_names() -> None:
    attributes = {
        "gen_ai.operation.name": "retrieval",
        "gen_ai.retrieval.query.text": "How?",
        "gen_ai.retrieval.documents": '[{"id": 7, "score": 0.5}]',
    }
    (body,) = bodies(span(attributes))
    assert body["retrieved"] == [{"document_id": "7", "score": 0.5, "rank": 1}]


def test_other_spans_are_ignored_and_counted() -> None:
    others = [
        span({"http.method": "GET"}),
        span({"gen_ai.operation.name": "embeddings", "gen_ai.system": "openai", "gen_ai.request.model": "e"}),
        span({"openinference.span.kind": "TOOL"}),
        Span(name="not even an id"),
    ]
    translation = otlp.translate_spans(traces(*others).SerializeToString())
    assert (translation.items, translation.rejected, translation.ignored) == ([], {}, 4)


def test_a_call_without_content_is_rejected_with_the_remedy() -> None:
    error = reasons(span({"gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai"}))[0]
    assert error.remedy is not None
    assert "CAPTURE_MESSAGE_CONTENT" in error.remedy


def evaluation(**attributes: Any) -> dict[str, Any]:
    return {"gen_ai.evaluation." + name.replace("_", "."): value for name, value in attributes.items()}


def record(attributes: dict[str, Any], **more: Any) -> LogRecord:
    fields: dict[str, Any] = {
        "event_name": "gen_ai.evaluation.result",
        "time_unix_nano": START,
        "trace_id": bytes.fromhex(TRACE),
        "span_id": bytes.fromhex(SPAN),
    }
    return LogRecord(attributes=pairs(attributes), **(fields | more))


def test_an_evaluation_in_a_log_record() -> None:
    attributes = evaluation(name="relevance", score_value=0.8, score_label="good", explanation="To the point")
    (body,) = logged(record(attributes | {"annotator_kind": "LLM", "gen_ai.response.id": "r"}))
    assert body.pop("event_id")
    assert body == {
        "name": "relevance",
        "annotator_kind": "LLM",
        "kind": "rating",
        "score": 0.8,
        "label": "good",
        "explanation": "To the point",
        "interaction_id": f"{TRACE}:{SPAN}",
        "trace_id": TRACE,
        "span_id": SPAN,
        "occurred_at": "2025-10-09T08:53:20+00:00",
    }


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"score_value": 1.0}, {"kind": "rating", "score": 1.0}),
        ({"score_value": 4}, {"kind": "category", "label": "4", "value": 4}),
        ({"score_value": -0.123456789}, {"kind": "category", "label": "-0.1235", "value": -0.123456789}),
        ({"score_value": 4, "score_label": "good"}, {"kind": "category", "label": "good", "value": 4}),
        ({"score_label": "pass"}, {"kind": "category", "label": "pass"}),
        (
            {"score_label": "thumbs-down"},
            {"kind": "thumb", "score": 0.0, "label": "down", "value": "thumbs-down"},
        ),
        ({"score_label": "up", "score_value": 1}, {"kind": "thumb", "score": 1.0, "label": "up"}),
        ({"score_label": "up", "score_value": 7}, {"kind": "category", "label": "up", "value": 7}),
        ({"explanation": "Wrong"}, {"kind": "comment", "explanation": "Wrong"}),
    ],
)
def test_the_kind_follows_from_what_is_said(said: dict[str, Any], expected: dict[str, Any]) -> None:
    (body,) = logged(record(evaluation(name="quality", **said)))
    assert {
        name: body[name] for name in ("kind", "score", "label", "value", "explanation") if name in body
    } == expected


def test_who_judged_is_never_guessed_to_be_a_person() -> None:
    def kind(**attributes: Any) -> Any:
        (body,) = logged(record(evaluation(name="q", score_value=True) | attributes))
        return body["annotator_kind"], body["kind"], body.get("author_id"), body.get("metadata")

    assert kind() == ("CODE", "rating", None, None)
    assert kind(annotator_kind="crowd") == ("CODE", "rating", None, {"annotator_kind": "crowd"})
    assert kind(**{"annotation.annotator_kind": "HUMAN", "user.id": "ana"}) == ("HUMAN", "thumb", "ana", None)


def test_a_correction_and_chosen_ids() -> None:
    event_id = "01932f6e-4a00-7000-8000-0000000000b2"
    attributes = evaluation(name="output") | {"datamoat.correction": "Thus.", "datamoat.event_id": event_id}
    (body,) = logged(record(attributes))
    assert (body["kind"], body["correction"], body["event_id"]) == ("correction", "Thus.", event_id)


def test_what_an_evaluation_is_about() -> None:
    said = evaluation(name="q", score_value=1)

    def about(attributes: dict[str, Any], **more: Any) -> Any:
        (body,) = logged(record(said | attributes, **more))
        return body.get("scope", "interaction"), body.get("interaction_id", body.get("session_id"))

    nowhere = {"trace_id": b"", "span_id": b""}
    assert about({"datamoat.interaction.id": "a"}) == ("interaction", "a")
    assert about({"gen_ai.response.id": "r"}, **nowhere) == ("interaction", "r")
    assert about({"session.id": "s"}, **nowhere) == ("session", "s")
    assert about({}, span_id=b"") == ("trace", None)
    rejected = otlp.translate_logs(logs(record(said, **nowhere)).SerializeToString()).rejected
    assert "what it is about" in rejected[0].message


def test_older_forms_of_an_event_in_a_log_record() -> None:
    said = evaluation(name="q", score_value=1)
    (named,) = logged(record(said | {"event.name": "gen_ai.evaluation.result"}, event_name=""))
    (in_body,) = logged(record({}, body=any_value(said)))
    assert named["score"] == in_body["score"] == 1.0


def test_details_in_a_log_record_are_an_interaction() -> None:
    (body,) = logged(record(CHAT | {"gen_ai.request.model": "m"}, event_name=semconv.DETAILS_EVENT))
    assert (body["interaction_id"], body["model"]) == (f"{TRACE}:{SPAN}", "m")
    assert "latency_ms" not in body


def annotation(prefix: str = "annotations.0.annotation", **fields: Any) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in fields.items()}


def test_an_annotation_inline_is_about_its_span() -> None:
    said = annotation(name="correct", score=1, annotator_kind="HUMAN", metadata='{"rubric": "2"}')
    interaction, body = bodies(span(CHAT | said | {"datamoat.interaction.id": "a", "session.id": "s"}))
    assert body["interaction_id"] == interaction["interaction_id"] == "a"
    assert (body["annotator_kind"], body["kind"], body["metadata"]) == ("HUMAN", "rating", {"rubric": "2"})


def test_both_forms_and_several_indices() -> None:
    said = (
        annotation(name="a", score=1)
        | annotation("annotations.1.annotation", name="b", score=1)
        | annotation("evaluations.0.evaluation", name="a", score=1)
        | annotation("annotation", name="c", label="good")
    )
    found = bodies(span(CHAT | said))[1:]
    assert [body["name"] for body in found] == ["a", "b", "a", "c"]
    assert found[0] == found[2], "the same result in both forms is one event"


def test_annotations_of_trace_and_session() -> None:
    said = annotation("trace.annotations.0.annotation", name="t", score=0.9) | annotation(
        "session.annotations.0.annotation", name="s", label="coherent"
    )
    _, trace, session = bodies(span(CHAT | said | {"session.id": "s1"}))
    assert (trace["scope"], trace["trace_id"], trace.get("interaction_id")) == ("trace", TRACE, None)
    assert (session["scope"], session["session_id"]) == ("session", "s1")
    assert "session.id" in str(reasons(span(CHAT | said))[0].message)


def test_a_carrier_judges_the_one_span_that_it_links_to() -> None:
    said = {"openinference.span.kind": "EVALUATOR"} | annotation(name="q", score=0, identifier="judge-2")
    (body,) = bodies(span(said, links=[link()]))
    assert (body["interaction_id"], body["span_id"]) == (f"{TRACE}:{OTHER}", OTHER)
    (later,) = bodies(span(said | annotation(score=1), links=[link()]))
    assert later["feedback_id"] == body["feedback_id"] != later["event_id"] != body["event_id"]
    assert reasons(span(said))[0].field == "links"
    assert reasons(span(said, links=[link(), link(SPAN)]))[0].field == "links"


def test_a_carrier_may_name_the_interaction() -> None:
    said = {"openinference.span.kind": "EVALUATOR", "datamoat.interaction.id": "a"} | annotation(
        name="q", score=0
    )
    (body,) = bodies(span(said))
    assert body["interaction_id"] == "a"


def test_an_evaluation_as_an_event_of_a_span() -> None:
    said = event("gen_ai.evaluation.result", **evaluation(name="q", score_value=0.5))
    _, inline = bodies(span(CHAT, events=[said]))
    (carried,) = bodies(span({}, events=[said], links=[link()]))
    assert inline["interaction_id"] == f"{TRACE}:{SPAN}"
    assert carried["interaction_id"] == f"{TRACE}:{OTHER}"


def test_ids_are_those_of_the_record() -> None:
    request = traces(span(CHAT | annotation(name="a", score=1))).SerializeToString()
    assert otlp.translate_spans(request).items == otlp.translate_spans(request).items


@pytest.mark.parametrize(
    "attributes",
    [
        {"gen_ai.input.messages": [1, 2], "gen_ai.operation.name": "chat"},
        CHAT | {"gen_ai.request.model": ["a"]},
        CHAT | {"gen_ai.usage.input_tokens": "many"},
        CHAT | {"session.id": "ana@example.org"},
        CHAT | {"gen_ai.conversation.id": {"a": {"b": 1}}},
        CHAT | {"gen_ai.usage.cost": float("nan")},
        CHAT | annotation(name="", score=1),
        CHAT | annotation(name="q", score="high"),
        CHAT | annotation(name="q"),
        CHAT | {"annotations.99999999999999999999.annotation.name": "x"},
        CHAT | {"datamoat.train_ok": "perhaps"},
        {"openinference.span.kind": ["LLM"], "input.value": 5},
        {"openinference.span.kind": "RETRIEVER", "retrieval.documents.0.document.score": "x"},
        {"gen_ai.operation.name": "retrieval", "gen_ai.retrieval.documents": "[[]]"},
    ],
)
def test_wrong_types_never_lose_the_batch(attributes: dict[str, Any]) -> None:
    translation = otlp.translate_spans(traces(span(attributes), span(CHAT)).SerializeToString())
    good = [item for number, item in translation.items if number == 1]
    assert len(good) == 1
    for number, item in translation.items:
        if number == 0:
            parse = parse_interaction if item.kind == "interaction" else parse_event
            try:
                parse(json.dumps(item.body).encode())
            except PayloadError as error:
                assert error.message


@pytest.mark.parametrize("size", [0, 1, 15, 17])
def test_ids_of_other_lengths_are_rejected(size: int) -> None:
    rejected = reasons(span(CHAT, trace_id=b"\x01" * size), span(CHAT))
    assert list(rejected) == [0]
    assert rejected[0].field == "trace_id"
    assert "zero" in reasons(span(CHAT, span_id=b"\0" * 8))[0].message


@pytest.mark.parametrize("body", [b"\xff\xff\xff", b"\x0a\xff\x01", b"garbage in, garbage out"])
def test_garbage_is_refused_as_a_whole(body: bytes) -> None:
    for translate in (otlp.translate_spans, otlp.translate_logs):
        with pytest.raises(PayloadError) as refused:
            translate(body)
        assert refused.value.code == "malformed_protobuf"


@pytest.mark.parametrize(
    "record",
    [
        {"traceId": "xyz"},
        {"traceId": 5},
        {"spanId": {"a": 1}},
        {"startTimeUnixNano": "soon"},
        {"startTimeUnixNano": -1},
        {"startTimeUnixNano": "99999999999999999999999"},
        {"attributes": {"gen_ai.system": "x"}},
        {"attributes": [{"key": 5, "value": {"stringValue": "x"}}]},
        {"attributes": [{"key": "x", "value": {"stringValue": 5}}]},
        {"attributes": [{"key": "x", "value": {"intValue": "1e400"}}]},
        {"attributes": [{"key": "x", "value": {"intValue": 10**400}}]},
        {"attributes": [{"key": "x", "value": {"doubleValue": 10**400}}]},
        {"attributes": [{"key": "x", "value": {"stringValue": "\ud800"}}]},
        {"attributes": [5]},
        {"events": 5},
        {"links": [{"traceId": "zz"}]},
        {"kind": [1]},
    ],
)
def test_a_wrong_span_in_json_is_rejected_alone(record: dict[str, Any]) -> None:
    request = as_json(traces(span(CHAT), span(CHAT)))
    spans = request["resourceSpans"][0]["scopeSpans"][0]["spans"]
    spans[0] |= record
    translation = otlp.translate_spans(request)
    assert list(translation.rejected) == [0]
    assert [number for number, _ in translation.items] == [1]


@pytest.mark.parametrize(
    "request_body",
    [
        {"resourceSpans": 5},
        {"resourceSpans": [5]},
        {"resourceSpans": [{"scopeSpans": "x"}]},
        {"resourceSpans": [{"resource": 5, "scopeSpans": []}]},
        {"resourceSpans": [{"resource": {"attributes": 5}}]},
        {"resourceSpans": [{"scopeSpans": [{"spans": [5]}]}]},
    ],
)
def test_a_wrong_frame_in_json_is_refused_as_a_whole(request_body: dict[str, Any]) -> None:
    with pytest.raises(PayloadError):
        otlp.translate_spans(request_body)


def test_unknown_fields_of_json_are_ignored() -> None:
    request = as_json(traces(span(CHAT)))
    request["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["fromTheFuture"] = {"a": [1]}
    assert len(otlp.translate_spans(request).items) == 1


def test_deep_values_are_read_or_rejected() -> None:
    nested: Any = "x"
    for _ in range(8):
        nested = {"a": [nested]}
    assert len(bodies(span(CHAT | {"deep": nested}))) == 1
    text = "[" * 5000 + "]" * 5000
    (body,) = bodies(span(CHAT | {"gen_ai.input.messages": text}))
    assert body["messages"][0]["content"] == text


def test_a_request_has_a_limit() -> None:
    spans = [Span(name="x")] * MAX_RECORDS
    with pytest.raises(PayloadError) as refused:
        otlp.translate_spans(traces(*spans).SerializeToString())
    assert refused.value.code == "too_many_items"
    empty = ExportTraceServiceRequest(resource_spans=[ResourceSpans()] * (MAX_RECORDS + 1))
    with pytest.raises(PayloadError):
        otlp.translate_spans(empty.SerializeToString())


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [
        "openinference.span.kind",
        "gen_ai.operation.name",
        "gen_ai.system",
        "gen_ai.request.model",
        "gen_ai.input.messages",
        "gen_ai.output.messages",
        "gen_ai.system_instructions",
        "gen_ai.prompt.0.content",
        "gen_ai.prompt.0.role",
        "gen_ai.completion.0.tool_calls.0.name",
        "llm.input_messages.0.message.contents.0.message_content.text",
        "input.value",
        "output.value",
        "datamoat.interaction.id",
        "metadata",
        "annotations.0.annotation.name",
        "annotations.0.annotation.score",
        "annotations.0.annotation.label",
        "annotations.0.annotation.metadata",
        "annotations.0.annotation.identifier",
        "retrieval.documents.0.document.id",
        "gen_ai.retrieval.documents",
        "gen_ai.evaluation.name",
        "gen_ai.evaluation.score.value",
    ]
)


@given_examples(
    st.dictionaries(NAMES, VALUES | st.sampled_from(["LLM", "chat", "CHAIN", "RETRIEVER", "[]", "{}"]))
)
def test_no_attributes_break_the_translation(attributes: dict[str, Any]) -> None:
    name = "gen_ai.evaluation.result"
    hostile = span(attributes, events=[event(name, **attributes), event("gen_ai.choice", **attributes)])
    translation = otlp.translate_spans(traces(hostile).SerializeToString())
    records = otlp.translate_logs(logs(record(attributes)).SerializeToString())
    for _, item in translation.items + records.items:
        parse = parse_interaction if item.kind == "interaction" else parse_event
        try:
            parse(json.dumps(item.body).encode())
        except PayloadError as error:
            assert error.message


def test_lines_of_the_collectors_file_exporter() -> None:
    request = as_json(traces(span(CHAT), span({"gen_ai.operation.name": "chat"})))
    items = otlp.to_items(request)
    assert next(items).kind == "interaction"
    with pytest.raises(PayloadError):
        next(items)
    wrongs: tuple[Any, ...] = ({}, [], "x", {"spans": []})
    for wrong in wrongs:
        with pytest.raises(PayloadError):
            list(otlp.to_items(wrong))


def test_a_round_trip_keeps_everything_otlp_has_words_for() -> None:
    said = evaluation(name="q", score_value=0.5, explanation="Because") | {"annotator_kind": "LLM"}
    request = as_json(traces(*VOCABULARIES.values())) | as_json(
        logs(
            record(said),
            record(said | {"datamoat.correction": "Thus."}),
            record(evaluation(name="thumb", score_label="up")),
        )
    )
    items = list(otlp.to_items(request))
    assert list(otlp.to_items(otlp.from_items(items))) == items


def test_an_interaction_that_never_was_a_span_gets_ids_of_its_own() -> None:
    item = Item("interaction", {"interaction_id": "i-1", "messages": [{"role": "user", "content": "How?"}]})
    record = otlp.from_items([item])
    assert otlp.from_items([item]) == record
    (back,) = otlp.to_items(record)
    assert (back.body["interaction_id"], back.body["messages"]) == ("i-1", item.body["messages"])


def test_items_are_stored_in_pieces_and_answered_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[list[bytes]] = []

    async def accept(_service: Any, _caller: Any, _kind: Any, bodies: list[bytes]) -> list[ItemResult]:
        pieces.append(bodies)
        return [ItemResult(json.loads(body)["id"], "created") for body in bodies]

    monkeypatch.setattr(shared, "accept", accept)
    small = [Item("feedback" if n % 2 else "interaction", {"id": str(n)}) for n in range(4002)]
    large = [Item("interaction", {"id": f"large {n}", "text": "x" * 1_500_000}) for n in range(5)]
    huge = [Item("interaction", {"id": "huge", "text": "x" * 2 * shared.PIECE_BYTES})]
    items = large + small + huge
    results = asyncio.run(shared.store(None, None, items))  # type: ignore[arg-type]
    assert [result.id for result in results] == [item.body["id"] for item in items]
    assert max(map(len, pieces)) == MAX_ITEMS
    assert all(len(piece) == 1 or sum(map(len, piece)) <= shared.PIECE_BYTES for piece in pieces)
    assert len(pieces) <= 10, "a piece is filled"


def test_ids_do_not_give_people_away() -> None:
    def event_id(user: str) -> Any:
        said = evaluation(name="q", score_label="up") | {"annotator_kind": "HUMAN", "user.id": user}
        return logged(record(said))[0]["event_id"]

    assert event_id("ana") == event_id("ben"), (
        "an id made from a raw id and from what is stored could be guessed"
    )

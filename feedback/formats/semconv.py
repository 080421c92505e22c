"""What attributes mean: the vocabularies in which instrumentations describe a call of a model and a judgement of it.

Known are OpenTelemetry's ``gen_ai.*`` in its old and new names, OpenInference, OpenLLMetry (``gen_ai.prompt.N.*``,
``traceloop.*``, ``llm.*``), the SDKs of Langfuse and MLflow, and Vercel's AI SDK. For each of our fields there is a list of names, the
one that says most about it first. To know one more vocabulary is to add names.

What none of them has a word for is ours. On the span of an interaction: ``datamoat.interaction.id``, ``.prompt_hash``,
``.config_hash``, ``.variant``, ``.cost_usd`` and ``.train_ok`` (false keeps it out of training; also on the resource).
On a judgement: ``datamoat.interaction.id``, ``.correction``, ``.annotator_kind``, ``.identifier``, ``.metadata``,
``.event_id`` and ``.feedback_id``.

Belongs here: names, and reading values by them. Does not belong here: spans, requests, encodings
(``feedback.formats.otlp``).
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from feedback.formats import given, number, opinion
from feedback.formats.messages import answer, decoded, message, prompt, text
from feedback.payloads import PayloadError

# What a span is to us. A "model" call is an interaction; a "flow" is one if it is what the user talked to, the root of
# its trace; a "retrieval" says what was put before the model; an "evaluator" carries judgements of another span.
Role = Literal["model", "flow", "retrieval", "evaluator"]
_ROLES: dict[str, dict[str, Role]] = {
    "openinference.span.kind": {
        "LLM": "model",
        "CHAIN": "flow",
        "AGENT": "flow",
        "RETRIEVER": "retrieval",
        "EVALUATOR": "evaluator",
    },
    "gen_ai.operation.name": {
        "chat": "model",
        "text_completion": "model",
        "generate_content": "model",
        "invoke_agent": "flow",
        "invoke_workflow": "flow",
        "retrieval": "retrieval",
    },
    "llm.request.type": {"chat": "model", "completion": "model"},
    "traceloop.span.kind": {"workflow": "flow", "agent": "flow"},
    "langfuse.observation.type": {
        "generation": "model",
        "span": "flow",
        "chain": "flow",
        "agent": "flow",
        "retriever": "retrieval",
        "evaluator": "evaluator",
    },
    "mlflow.spanType": {
        "LLM": "model",
        "CHAT_MODEL": "model",
        "CHAIN": "flow",
        "AGENT": "flow",
        "RETRIEVER": "retrieval",
    },
}
_PROVIDER = ("gen_ai.provider.name", "gen_ai.system", "llm.provider", "llm.system")
_MODEL = (
    "gen_ai.response.model",
    "gen_ai.request.model",
    "llm.model_name",
    "langfuse.observation.model.name",
    "llm.response.model",
    "llm.request.model",
)

INTERACTION_ID = "datamoat.interaction.id"
RESPONSE_ID = "gen_ai.response.id"
TRAIN_OK = "datamoat.train_ok"
MAX_NAME = 500
SESSION = (
    "gen_ai.conversation.id",
    "session.id",
    "traceloop.association.properties.session_id",
    "langfuse.session.id",
)
_USER = (
    "user.id",
    "enduser.id",
    "traceloop.association.properties.user_id",
    "langfuse.user.id",
    "gen_ai.request.user",
    "gen_ai.user",
    "llm.user",
)
_TEXTS: dict[str, tuple[str, ...]] = {
    "session_id": SESSION,
    "user_id": _USER,
    "provider": _PROVIDER,
    "model": _MODEL,
    "prompt_name": (
        "gen_ai.prompt.name",
        "traceloop.prompt.key",
        "langfuse.observation.prompt.name",
        "prompt.id",
    ),
    "prompt_version": (
        "gen_ai.prompt.version",
        "traceloop.prompt.version",
        "langfuse.observation.prompt.version",
        "llm.prompt_template.version",
    ),
    "prompt_hash": ("datamoat.prompt_hash", "traceloop.prompt.version_hash"),
    "app_release": ("service.version", "langfuse.release"),
    "config_hash": ("datamoat.config_hash",),
    "variant": ("datamoat.variant",),
}
_NUMBERS: dict[str, tuple[str, ...]] = {
    "input_tokens": (
        "gen_ai.usage.input_tokens",
        "gen_ai.usage.prompt_tokens",
        "llm.token_count.prompt",
        "llm.usage.prompt_tokens",
    ),
    "output_tokens": (
        "gen_ai.usage.output_tokens",
        "gen_ai.usage.completion_tokens",
        "llm.token_count.completion",
        "llm.usage.completion_tokens",
    ),
    "cost_usd": ("datamoat.cost_usd", "gen_ai.usage.cost", "llm.cost.total"),
}
_INPUT = (
    "gen_ai.prompt",
    "langfuse.observation.input",
    "ai.prompt.messages",
    "input.value",
    "traceloop.entity.input",
    "mlflow.spanInputs",
)
_OUTPUT = (
    "gen_ai.completion",
    "langfuse.observation.output",
    "ai.response.text",
    "output.value",
    "traceloop.entity.output",
    "mlflow.spanOutputs",
)
_OWN = ("correction", "event_id", "feedback_id")
_REQUEST = "gen_ai.request."
DETAILS_EVENT = "gen_ai.client.inference.operation.details"
_MESSAGE_EVENT = re.compile(r"^gen_ai\.(system|user|assistant|tool)\.message$")

_ANNOTATION = re.compile(
    r"^(?:(?P<scope>trace|session)\.)?(?:(?P<list>annotations|evaluations)\.(?P<index>\d{1,6})\.)?"
    r"(?P<form>annotation|evaluation)\.(?P<field>name|score|label|explanation|annotator_kind|identifier|metadata)$"
)
_EVALUATION = "gen_ai.evaluation."
EVALUATION_EVENT = "gen_ai.evaluation.result"


class Attributes(dict[str, Any]):
    """Attributes by name; values are plain Python."""

    def first(self, names: Sequence[str]) -> Any:
        """The value of the first of ``names`` that is there and not empty, else None."""
        return next((self[name] for name in names if self.get(name) not in (None, "")), None)

    def text(self, names: Sequence[str]) -> str | None:
        """As ``first``, for an id or a name; a number is its text. Raises PayloadError if it is no short text.

        What one attribute says, of a resource or of a span with many judgements, many items say; a long one would
        multiply its request.
        """
        value = self.first(names)
        value = str(value) if isinstance(value, int | float) else value
        if value is None or (isinstance(value, str) and len(value) <= MAX_NAME):
            return value
        name = next(name for name in names if self.get(name) is value)
        raise PayloadError(
            f"{name} is not a text of at most {MAX_NAME} characters",
            field=name,
            remedy="Send an id or a name",
        )

    def number(self, names: Sequence[str]) -> Any:
        """As ``first``, a whole number as an int, also if it was written as a text or a float."""
        value = self.first(names)
        if isinstance(value, str) and re.fullmatch(r"\d{1,18}", value):
            return int(value)
        return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True)
class Event:
    """A named thing that happened within a span; ``time`` in nanoseconds since 1970, 0 if unknown."""

    name: str
    time: int
    attributes: Attributes


@dataclass(frozen=True)
class Judgement:
    """What somebody or something said of ``scope``; ``body`` is a feedback event without its target and ids."""

    scope: Literal["span", "trace", "session"]
    body: dict[str, Any]


def role(attributes: Attributes) -> Role | None:
    """What a span with these attributes is to us; None if none of our business."""
    for name, roles in _ROLES.items():
        if name in attributes:
            value = attributes[name]
            # MLflow writes a text as JSON, in quotes.
            return roles.get(value.strip('"')) if isinstance(value, str) else None
    return "model" if attributes.first(_PROVIDER) and attributes.first(_MODEL) else None


def interaction(
    attributes: Attributes, events: Sequence[Event], resource: Attributes
) -> dict[str, Any] | None:
    """The body of an interaction, without id and times; None if no prompt was captured. Raises PayloadError."""
    messages, output = _conversation(attributes, events)
    if not messages:
        return None
    everything = Attributes(resource | attributes)
    body: dict[str, Any] = {"messages": messages, "output": output}
    body |= {field: everything.text(names) for field, names in _TEXTS.items()}
    body |= {field: attributes.number(names) for field, names in _NUMBERS.items()}
    body["train_ok"] = _train_ok(everything)
    return given(**body)


def _train_ok(attributes: Attributes) -> bool | None:
    value = attributes.get(TRAIN_OK)
    if value is None or isinstance(value, bool):
        return value
    raise PayloadError(f"{TRAIN_OK} is not true or false", field=TRAIN_OK, remedy="Send a boolean")


def details(attributes: Attributes) -> dict[str, Any]:
    """What has no field of an interaction: parameters of the request, tags, and what the app added."""
    request = {
        name.removeprefix(_REQUEST): value
        for name, value in attributes.items()
        if name.startswith(_REQUEST) and name not in ("gen_ai.request.model", "gen_ai.request.user")
    }
    if attributes.first(_MODEL) != attributes.get("gen_ai.request.model"):
        request |= given(model=attributes.get("gen_ai.request.model"))
    return given(
        request=request or None,
        tags=attributes.first(("tag.tags", "langfuse.trace.tags")),
        metadata=decoded(attributes.get("metadata")),
        finish_reasons=attributes.get("gen_ai.response.finish_reasons"),
    )


def query(attributes: Attributes) -> list[dict[str, str]]:
    """What a retrieval searched for, as the messages of an interaction."""
    return prompt(_spoken(attributes, ("gen_ai.retrieval.query.text", *_INPUT)))


def retrieved(attributes: Attributes) -> list[dict[str, Any]]:
    """The passages that a retrieval found, best first; one without an id is named by the hash of its text."""
    found = [
        {name.removeprefix("document."): value for name, value in entry.items()}
        for entry in _indexed(attributes, "retrieval.documents")
    ]
    documents = found or decoded(attributes.get("gen_ai.retrieval.documents"))
    passages = []
    for document in documents if isinstance(documents, list) else ():
        if not isinstance(document, Mapping):
            raise PayloadError("A retrieved document is not an object", field="gen_ai.retrieval.documents")
        name = document.get("id")
        passage = given(document_id=None if name is None else str(name), score=document.get("score"))
        if name in (None, ""):
            passage = {"chunk_id": _digest(text(document.get("content")))} | given(
                score=document.get("score")
            )
        passages.append(passage)
    return passages


def judgements(attributes: Attributes) -> Iterator[Judgement | PayloadError]:
    """The annotations (OpenInference's word; ``evaluations`` mean the same) among the attributes of a span."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for name, value in attributes.items():
        match = _ANNOTATION.match(name)
        if match:
            key = (match["scope"] or "span", match["list"] or "", match["index"] or "", match["form"])
            found.setdefault(key, {})[match["field"]] = value
    for (scope, *_), fields in found.items():
        try:
            yield Judgement(scope, judgement(fields))  # type: ignore[arg-type]
        except PayloadError as error:
            yield error


def evaluation(attributes: Attributes) -> dict[str, Any]:
    """The judgement in the attributes of a ``gen_ai.evaluation.result``. Raises PayloadError.

    A right answer in ``datamoat.correction`` makes it a correction; ``datamoat.event_id`` and ``datamoat.feedback_id``
    are ids that the client chose.
    """
    fields = {
        "name": attributes.get(_EVALUATION + "name"),
        "score": attributes.get(_EVALUATION + "score.value"),
        "label": attributes.get(_EVALUATION + "score.label"),
        "explanation": attributes.get(_EVALUATION + "explanation"),
    }
    for field in ("annotator_kind", "identifier", "metadata"):
        prefixes = ("datamoat.", _EVALUATION, "annotation.", "evaluation.", "")
        fields[field] = attributes.first([prefix + field for prefix in prefixes])
    own = {name: attributes.get(f"datamoat.{name}") for name in _OWN}
    body = judgement(fields, own.pop("correction")) | given(**own)
    if body["annotator_kind"] == "HUMAN":
        body |= given(author_id=attributes.text(_USER))
    return body


def judgement(fields: Mapping[str, Any], correction: Any = None) -> dict[str, Any]:
    """The body of a feedback event, without its target and ids. Raises PayloadError.

    Who judged is what ``annotator_kind`` says. Where nothing is said, or a kind of their own, it is CODE: only what is
    called a person's judgement is counted as one.
    """
    name, score, label = fields.get("name"), number(fields.get("score"), "score"), fields.get("label")
    explanation = fields.get("explanation")
    if name in (None, ""):
        raise PayloadError("A judgement needs a name", field="name", remedy="Say what was judged")
    if correction is None and score is None and label in (None, "") and explanation in (None, ""):
        raise PayloadError(
            "A judgement needs a score, a label or an explanation",
            field="score",
            remedy="Leave out a judgement that says nothing",
        )
    said = str(fields.get("annotator_kind") or "")
    kind = said.upper() if said.upper() in ("HUMAN", "LLM", "CODE") else "CODE"
    metadata = decoded(fields.get("metadata"))
    if metadata is not None and not isinstance(metadata, dict):
        metadata = {"metadata": metadata}
    if said and said.upper() != kind:
        metadata = (metadata or {}) | {"annotator_kind": said}
    if correction is not None:
        content = {"kind": "correction", "correction": correction} | given(explanation=explanation or None)
    else:
        boolean = isinstance(score, bool) and kind == "HUMAN"
        content = opinion(score, _label(label), explanation or None, boolean=boolean)
    return {"name": name, "annotator_kind": kind, **content} | given(
        identifier=fields.get("identifier"), metadata=metadata
    )


def described(body: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a span that say what the body of an interaction says."""
    attributes = {names[0]: body[field] for field, names in (_TEXTS | _NUMBERS).items() if field in body}
    messages = [{"role": said["role"], "parts": _text_part(said["content"])} for said in body["messages"]]
    attributes |= {"gen_ai.operation.name": "chat", "gen_ai.input.messages": json.dumps(messages)}
    if body.get("output") is not None:
        answered = [{"role": "assistant", "parts": _text_part(body["output"])}]
        attributes["gen_ai.output.messages"] = json.dumps(answered)
    documents = [
        given(id=passage.get("document_id", passage.get("chunk_id")), score=passage.get("score"))
        for passage in body.get("retrieved", ())
    ]
    metadata = body.get("metadata", {})
    return attributes | given(
        **{
            "gen_ai.retrieval.documents": json.dumps(documents) if documents else None,
            TRAIN_OK: body.get("train_ok"),
            RESPONSE_ID: metadata.get("response_id"),
        }
    )


def evaluated(body: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a ``gen_ai.evaluation.result`` that says what the body of a feedback event says."""
    value = body.get("value")
    score = value if isinstance(value, int | float) else body.get("score")
    metadata = json.dumps(body["metadata"]) if body.get("metadata") else None
    return given(
        **{
            _EVALUATION + "name": body.get("name", body["kind"]),
            _EVALUATION + "score.value": score,
            _EVALUATION + "score.label": value if isinstance(value, str) else body.get("label"),
            _EVALUATION + "explanation": body.get("explanation"),
            "datamoat.annotator_kind": body.get("annotator_kind", "HUMAN"),
            "datamoat.identifier": body.get("identifier"),
            "datamoat.metadata": metadata,
            "user.id": body.get("author_id"),
            "gen_ai.conversation.id": body.get("session_id"),
            INTERACTION_ID: body.get("interaction_id"),
        },
        **{f"datamoat.{name}": body.get(name) for name in _OWN},
    )


def _text_part(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "content": content}]


def _label(label: Any) -> Any:
    return None if label == "" else str(label) if isinstance(label, int | float) else label


def _conversation(attributes: Attributes, events: Sequence[Event]) -> tuple[list[dict[str, str]], str | None]:
    """The prompt and the answer, each from the first place that has one."""
    instructions = [
        {"role": "system", "content": text(decoded(value))}
        for value in (attributes.get("gen_ai.system_instructions"),)
        if value
    ]
    messages = prompt(attributes.get("gen_ai.input.messages"))
    output = answer(attributes.get("gen_ai.output.messages"))
    for prefix in ("gen_ai.prompt", "llm.input_messages"):
        messages = messages or [_flat_message(entry, "user") for entry in _indexed(attributes, prefix)]
    for prefix in ("gen_ai.completion", "llm.output_messages"):
        for entry in _indexed(attributes, prefix)[:1] if output is None else ():
            output = _flat_message(entry, "assistant")["content"] or None
    if not messages or output is None:
        said, answered = _told(events)
        messages, output = messages or said, answered if output is None else output
    messages = messages or prompt(_spoken(attributes, _INPUT))
    output = answer(_spoken(attributes, _OUTPUT)) if output is None else output
    return instructions + messages, output


def _told(events: Sequence[Event]) -> tuple[list[dict[str, str]], str | None]:
    """The prompt and the answer in the events of a span."""
    messages: list[dict[str, str]] = []
    output = None
    for event in events:
        attributes = event.attributes
        content = decoded(attributes.first(("gen_ai.event.content", "message", "content")))
        named = _MESSAGE_EVENT.match(event.name)
        if event.name == DETAILS_EVENT:
            said, answered = _conversation(attributes, ())
            messages += said
            output = output or answered
        elif named and content is not None:
            values = content if isinstance(content, dict) else {"content": content}
            messages.append(message({"role": attributes.get("role") or named[1]} | values))
        elif event.name == "gen_ai.choice":
            output = output or answer([content] if isinstance(content, dict) else content)
        else:
            messages += prompt(attributes.get("gen_ai.prompt"))
            output = output or answer(attributes.get("gen_ai.completion"))
    return messages, output


def _spoken(attributes: Attributes, names: Sequence[str]) -> Any:
    """The value of the first of ``names`` that is there; MLflow writes also a text as JSON."""
    name = next((name for name in names if attributes.get(name) not in (None, "")), None)
    value = attributes.get(name) if name else None
    if name in ("mlflow.spanInputs", "mlflow.spanOutputs") and isinstance(value, str) and value[:1] == '"':
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _indexed(attributes: Attributes, prefix: str) -> list[dict[str, Any]]:
    """The objects that were flattened to ``prefix.N.name``, in the order of N."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d{1,6})\.(.+)")
    found: dict[int, dict[str, Any]] = {}
    for name, value in attributes.items():
        match = pattern.fullmatch(name)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = value
    return [found[index] for index in sorted(found)]


def _flat_message(entry: Mapping[str, Any], role: str) -> dict[str, str]:
    """A message from its flattened fields; OpenInference writes ``message.`` before each."""
    fields = Attributes({name.removeprefix("message."): value for name, value in entry.items()})
    content = fields.get("content")
    parts = decoded(content)
    if isinstance(parts, list) and all(isinstance(part, dict) and "type" in part for part in parts):
        content = parts
    if content is None:
        parts = _indexed(fields, "contents")
        content = [part.get("message_content.text", json.dumps(part)) for part in parts] or None
    calls = _indexed(fields, "tool_calls")
    return message({"role": fields.get("role") or role, "content": content, "tool_calls": calls})


def _digest(content: str) -> str:
    return "sha256:" + hashlib.sha256(content.encode()).hexdigest()

"""The Python client: calls that record what happened at once, for applications; batches, for loaders.

Belongs here: the calls, their types, the reports of loaders.
Does not belong here: threads and retries without end (``feedback.client.outbox``), HTTP (``feedback.client.delivery``), what a
valid item is (``feedback.payloads``), anything for a browser.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypedDict, TypeVar, Unpack
from uuid import UUID

import msgspec

from feedback.answers import Error, FeedbackStates, ItemResult, Token
from feedback.client.delivery import (
    BATCH_BYTES,
    BATCH_ITEMS,
    Connection,
    RequestFailed,
    backoff,
    deliver,
    error_of,
)
from feedback.client.outbox import FEEDBACK, INTERACTION, Outbox, SpoolFull, SpoolStatus
from feedback.ids import uuid7
from feedback.payloads import (
    AnnotatorKind,
    ImplicitLabel,
    Kind,
    Message,
    PayloadError,
    Retrieved,
    Scope,
    parse_event,
    parse_interaction,
)

__all__ = [
    "FeedbackClient",
    "Message",
    "PayloadError",
    "Recorded",
    "RequestFailed",
    "Retrieved",
    "SendFailed",
    "SendReport",
    "SpoolFull",
    "SpoolStatus",
    "Token",
]

MAX_ATTEMPTS = 10
LONGEST_WAIT_SECONDS = 10.0

Item = dict[str, Any]
Answer = TypeVar("Answer")


class InteractionFields(TypedDict, total=False):
    """What may be said about an answer beside prompt and output; the fields of ``POST /v1/interactions``."""

    interaction_id: str
    session_id: str | None
    user_id: str | None
    occurred_at: datetime
    retrieved: Sequence[Retrieved | dict[str, Any]]
    input_tokens: int | None
    output_tokens: int | None
    cost_usd: float | None
    latency_ms: float | None
    provider: str | None
    model: str | None
    prompt_name: str | None
    prompt_version: str | None
    prompt_hash: str | None
    app_release: str | None
    config_hash: str | None
    variant: str | None
    train_ok: bool
    metadata: dict[str, Any] | None


class FeedbackFields(TypedDict, total=False):
    """What may be said with any kind of feedback; the fields of ``POST /v1/feedback``."""

    name: str | None
    author_id: str | None
    author_role: str | None
    annotator_kind: AnnotatorKind
    identifier: str | None
    reasons: Sequence[str] | None
    scope: Scope
    session_id: str | None
    trace_id: str | None
    span_id: str | None
    occurred_at: datetime
    metadata: dict[str, Any] | None


class Recorded(NamedTuple):
    """The ids of a call: of this event, and of the feedback that later calls may revise or retract."""

    event_id: str
    feedback_id: str


@dataclass(frozen=True)
class RefusedItem:
    """An item that was not stored: its position among all that were sent, its id if it had one, and why."""

    index: int
    id: str | None
    code: str
    message: str
    field: str | None = None
    remedy: str | None = None


@dataclass
class SendReport:
    """How many items were stored now, were there before, or were refused; the three add up to ``sent``."""

    created: int = 0
    duplicate: int = 0
    refused: list[RefusedItem] = field(default_factory=list)

    @property
    def sent(self) -> int:
        return self.created + self.duplicate + len(self.refused)


class SendFailed(Exception):
    """Sending stopped; ``report`` says what was acknowledged before. Sending everything again is safe."""

    def __init__(self, message: str, report: SendReport) -> None:
        super().__init__(message)
        self.report = report


OnProgress = Callable[[SendReport], None]


class FeedbackClient:
    """Sends interactions and feedback to the service at ``base_url``. Close it, or use it in a ``with`` block.

    **In an application**, give it ``spool``, a folder on a local disk::

        client = FeedbackClient("http://feedback.internal:8080", api_key, spool="/var/lib/shop/feedback")
        answer = client.interaction([{"role": "user", "content": question}], output, model="in-house-7b")
        client.thumb(answer, up=False, author_id=user.id, reasons=["outdated_source"])

    Such a call takes microseconds: it mints the ids, checks the item, and hands it to a thread that writes it to the
    folder, from where another thread sends it for as long as it takes. An item is lost only if the process dies in the
    milliseconds before it is written; ``flush`` waits for that moment. With ``fsync=False`` the machine's crash may
    also lose what its disk had not written. The processes of one application may share a folder, and each sends what
    others left behind when they died, with its own key: give every application a folder of its own.

    The calls raise nothing but PayloadError, for what the service would refuse (checked before it is taken, so that
    the stack trace points to the caller), SpoolFull once the folder holds ``max_spool_bytes`` or its disk takes nothing
    more, and RuntimeError on a client that is closed or has no spool; ``status`` counts and explains. What the service refuses nevertheless goes to ``refused.jsonl`` in the
    folder, each line with the reason. Segments and refused lines hold texts and raw ids of people: treat the folder as
    you treat your logs, and delete refused lines once they are dealt with.

    **In a loader**, ``send_interactions`` and ``send_feedback`` post many items and report on each.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        spool: Path | str | None = None,
        max_spool_bytes: int = 256 * 1024 * 1024,
        fsync: bool = True,
        timeout_seconds: float = 60.0,
    ) -> None:
        """``timeout_seconds`` is for one request. Raises OSError if the spool folder cannot be used."""
        self._connection = Connection(base_url, api_key, timeout_seconds)
        self._outbox = (
            None
            if spool is None
            else Outbox(Path(spool), self._connection.post, max_bytes=max_spool_bytes, fsync=fsync)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def interaction(
        self,
        messages: Sequence[Message | dict[str, str]],
        output: str | None = None,
        **fields: Unpack[InteractionFields],
    ) -> str:
        """Record an answer of the product: its prompt and its text. Returns the interaction_id."""
        interaction_id = fields.get("interaction_id") or str(uuid7())
        item = {"occurred_at": datetime.now(UTC), **fields}
        item |= {"interaction_id": interaction_id, "messages": messages, "output": output}
        body = encode(item)
        parse_interaction(body)
        self._spooled().put(INTERACTION, body)
        return interaction_id

    def thumb(
        self,
        interaction_id: str | None,
        up: bool,
        *,
        explanation: str | None = None,
        **fields: Unpack[FeedbackFields],
    ) -> Recorded:
        """Record a thumb up or down."""
        score = int(up) if isinstance(up, bool) else up  # "down" is true, but no thumb up: it is refused
        return self._record("thumb", interaction_id, fields, score=score, explanation=explanation)

    def rating(
        self,
        interaction_id: str | None,
        score: float,
        *,
        label: str | None = None,
        explanation: str | None = None,
        **fields: Unpack[FeedbackFields],
    ) -> Recorded:
        """Record a graded opinion, ``score`` from 0 to 1: 4 of 1 to 5 stars is 0.75."""
        return self._record(
            "rating", interaction_id, fields, score=score, label=label, explanation=explanation
        )

    def category(
        self,
        interaction_id: str | None,
        label: str,
        *,
        score: float | None = None,
        explanation: str | None = None,
        **fields: Unpack[FeedbackFields],
    ) -> Recorded:
        """Record which class somebody put the answer into."""
        return self._record(
            "category", interaction_id, fields, label=label, score=score, explanation=explanation
        )

    def comment(self, interaction_id: str | None, text: str, **fields: Unpack[FeedbackFields]) -> Recorded:
        """Record what somebody wrote about the answer."""
        return self._record("comment", interaction_id, fields, explanation=text)

    def correction(
        self,
        interaction_id: str | None,
        text: str,
        *,
        explanation: str | None = None,
        **fields: Unpack[FeedbackFields],
    ) -> Recorded:
        """Record the right answer, whole."""
        return self._record("correction", interaction_id, fields, correction=text, explanation=explanation)

    def flag(
        self,
        interaction_id: str | None,
        label: str,
        *,
        explanation: str | None = None,
        **fields: Unpack[FeedbackFields],
    ) -> Recorded:
        """Record that the answer needs somebody's attention, and why: ``label`` is a code such as ``unsafe``."""
        return self._record("flag", interaction_id, fields, label=label, explanation=explanation)

    def preference(
        self,
        interaction_id: str | None,
        over: str,
        *,
        explanation: str | None = None,
        **fields: Unpack[FeedbackFields],
    ) -> Recorded:
        """Record that this answer was preferred to the one of the interaction ``over``."""
        value = {"chosen": interaction_id, "rejected": over}
        return self._record("preference", interaction_id, fields, value=value, explanation=explanation)

    def implicit(
        self,
        interaction_id: str | None,
        label: ImplicitLabel,
        *,
        score: float | None = None,
        **fields: Unpack[FeedbackFields],
    ) -> Recorded:
        """Record what somebody did with the answer. ``shown`` gives all rates their denominator."""
        return self._record("implicit", interaction_id, fields, label=label, score=score)

    def revise(
        self,
        feedback_id: str | UUID,
        kind: Kind,
        interaction_id: str | None,
        *,
        revision: int | None = None,
        score: float | None = None,
        label: str | None = None,
        explanation: str | None = None,
        correction: str | None = None,
        value: Any = None,
        **fields: Unpack[FeedbackFields],
    ) -> Recorded:
        """Record a new opinion in place of an earlier one, complete: nothing is carried over from before.

        Among revisions of one number, which is 2 unless given, the latest holds.
        """
        content = {
            "score": score,
            "label": label,
            "explanation": explanation,
            "correction": correction,
            "value": value,
        }
        return self._record(
            kind, interaction_id, fields, op="revise", feedback_id=feedback_id, revision=revision, **content
        )

    def retract(
        self,
        feedback_id: str | UUID,
        kind: Kind,
        interaction_id: str | None = None,
        *,
        revision: int | None = None,
        **fields: Unpack[FeedbackFields],
    ) -> Recorded:
        """Record that an opinion is withdrawn. ``kind`` is what it was; ``revision`` is as in ``revise``."""
        return self._record(
            kind, interaction_id, fields, op="retract", feedback_id=feedback_id, revision=revision
        )

    def flush(self, timeout_seconds: float = 5.0) -> bool:
        """Wait until everything recorded before is on disk. False if it is not by then: ``status`` says why."""
        return self._spooled().flush(timeout_seconds)

    def close(self, timeout_seconds: float = 5.0) -> bool:
        """Wait until the service has acknowledged everything recorded, and end.

        False if it had not by then; what is on disk is sent by the next process that opens the folder. Happens by
        itself when the interpreter exits (not on ``os._exit`` or a signal), for at most 3 seconds.
        """
        complete = self._outbox is None or self._outbox.close(timeout_seconds)
        self._connection.close()
        return complete

    def status(self) -> SpoolStatus:
        """What became of what was recorded, and what stands in the way."""
        return self._spooled().status()

    def tokens(
        self,
        *interaction_ids: str,
        user_id: str | None = None,
        session_id: str | None = None,
        kinds: Sequence[Kind] | None = None,
        expires_in_seconds: int | None = None,
    ) -> list[Token]:
        """One token per answer, with which a browser may give feedback on it as the person ``user_id``.

        Waits for the service. ``kinds`` are all, and a token lasts a day, unless given. Raises RequestFailed.
        """
        shared: dict[str, Any] = {"user_id": user_id, "session_id": session_id, "kinds": kinds}
        if expires_in_seconds is not None:
            shared["expires_in"] = expires_in_seconds
        wanted = [{"interaction_id": interaction_id, **shared} for interaction_id in interaction_ids]
        return self._call(list[Token], "POST", "/v1/tokens", content=encode(wanted))

    def state(self, *interaction_ids: str, kinds: Sequence[Kind] = ()) -> FeedbackStates:
        """What the service holds of the feedback on up to 100 answers; of all kinds unless some are named.

        Waits for the service, and needs a key with scope ``read``. Raises RequestFailed.
        """
        asked = {"interaction_id": interaction_ids, "kind": tuple(kinds)}
        return self._call(FeedbackStates, "GET", "/v1/feedback", params=asked)

    def send_interactions(self, items: Iterable[Item], on_progress: OnProgress | None = None) -> SendReport:
        """Send interactions in batches. ``on_progress`` gets the running report after each batch.

        Refused items are in the report, never an exception. Raises SendFailed when the service stays away,
        or does not accept the key.
        """
        return self._send("/v1/interactions", "interaction_id", items, on_progress)

    def send_feedback(self, items: Iterable[Item], on_progress: OnProgress | None = None) -> SendReport:
        """Send feedback events, as ``send_interactions`` does. An event without ``event_id`` is given one."""
        with_ids = (item if item.get("event_id") else {**item, "event_id": str(uuid7())} for item in items)
        return self._send("/v1/feedback", "event_id", with_ids, on_progress)

    def _spooled(self) -> Outbox:
        if self._outbox is None:
            raise RuntimeError(
                "this FeedbackClient has no spool; make it with spool=FOLDER to record single items"
            )
        return self._outbox

    def _record(
        self, kind: Kind, interaction_id: str | None, fields: FeedbackFields, **content: Any
    ) -> Recorded:
        outbox = self._spooled()
        event_id = str(uuid7())
        item = {"occurred_at": datetime.now(UTC), **fields, "event_id": event_id, "kind": kind}
        item["interaction_id"] = interaction_id
        item |= {name: value for name, value in content.items() if value is not None}
        body = encode(item)
        parse_event(body)
        outbox.put(FEEDBACK, body)
        return Recorded(event_id, str(content.get("feedback_id", event_id)))

    def _call(self, answer: type[Answer], method: str, path: str, **content: Any) -> Answer:
        response = self._connection.call(method, path, **content)
        if not response.is_success:
            refused = error_of(response)
            where = f" ({refused.field})" if refused.field else ""
            raise RequestFailed(
                f"{refused.message}{where}. {refused.remedy or ''}".strip(), response.status_code
            )
        try:
            return msgspec.json.decode(response.content, type=answer)
        except msgspec.MsgspecError as error:
            raise RequestFailed(f"{method} {path} was not answered by this service: {error}") from error

    def _send(
        self, path: str, id_field: str, items: Iterable[Item], on_progress: OnProgress | None
    ) -> SendReport:
        report = SendReport()

        def post(path: str, bodies: Sequence[bytes]) -> list[ItemResult] | Error:
            return self._post(path, bodies, report)

        for batch in _batches(items, id_field, report):
            results = deliver(post, path, [item.body for item in batch])
            for item, result in zip(batch, results, strict=True):
                if result.error is not None:
                    report.refused.append(
                        RefusedItem(item.index, item.id, **msgspec.structs.asdict(result.error))
                    )
                elif result.status == "created":
                    report.created += 1
                else:
                    report.duplicate += 1
            if on_progress is not None:
                on_progress(report)
        return report

    def _post(self, path: str, bodies: Sequence[bytes], report: SendReport) -> list[ItemResult] | Error:
        """Post until answered. Ids make it safe to send again what may have been stored already."""
        for attempt in range(MAX_ATTEMPTS):
            try:
                return self._connection.post(path, bodies)
            except RequestFailed as error:
                if not error.temporary:
                    raise SendFailed(str(error), report) from error
                reason = error
            if attempt + 1 < MAX_ATTEMPTS:
                wait = max(backoff(attempt, LONGEST_WAIT_SECONDS), reason.wait_seconds)
                time.sleep(min(wait, LONGEST_WAIT_SECONDS))
        raise SendFailed(
            f"a batch was not accepted in {MAX_ATTEMPTS} attempts ({reason}); start the service, then send "
            "everything again",
            report,
        )


@dataclass(frozen=True)
class _Encoded:
    index: int
    id: str | None
    body: bytes


def _batches(items: Iterable[Item], id_field: str, report: SendReport) -> Iterator[list[_Encoded]]:
    """Encode and group items; what has no JSON form goes to the report."""
    batch: list[_Encoded] = []
    size = 0
    for index, item in enumerate(items):
        item_id = str(item[id_field]) if item.get(id_field) else None
        try:
            body = encode(item)
        except PayloadError as error:
            report.refused.append(RefusedItem(index, item_id, error.code, error.message, remedy=error.remedy))
            continue
        if batch and (len(batch) == BATCH_ITEMS or size + len(body) > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(_Encoded(index, item_id, body))
        size += len(body) + 1
    yield batch


def encode(item: Any) -> bytes:
    """The JSON of an item. Raises PayloadError for what JSON cannot express."""
    try:
        return _encoder.encode(item).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise PayloadError(str(error), remedy="Send only what JSON can express") from None


def _jsonable(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, msgspec.Struct):
        return msgspec.to_builtins(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


_encoder = json.JSONEncoder(allow_nan=False, separators=(",", ":"), default=_jsonable)

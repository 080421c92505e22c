"""What the service answers: one shape for an item, one for a batch, one for the state of feedback, one for errors.

Belongs here: the response bodies, which are also the response schemas of the API description.
Does not belong here: deciding what to answer (``feedback.service``).
"""

from datetime import datetime
from typing import Literal

import msgspec

from feedback.payloads import AnnotatorKind, Kind, Op, PayloadError


class Error(msgspec.Struct, omit_defaults=True):
    """Why something was refused, where, and what to do about it."""

    code: str
    message: str
    field: str | None = None
    remedy: str | None = None


def error_of(error: PayloadError) -> Error:
    """What is answered about an item that cannot be accepted."""
    return Error(error.code, error.message, field=error.field, remedy=error.remedy)


class ErrorBody(msgspec.Struct):
    """The body of every refused request."""

    error: Error


class ItemResult(msgspec.Struct, omit_defaults=True):
    """What became of one item. ``id`` is the interaction_id or event_id; null if it could not be read."""

    id: str | None
    status: Literal["created", "duplicate", "conflict", "invalid"]
    feedback_id: str | None = None
    error: Error | None = None


class BatchResult(msgspec.Struct):
    """What became of each item of an array, in order, and how many came to the same end."""

    results: list[ItemResult]
    created: int
    duplicate: int
    conflict: int
    invalid: int


class FeedbackState(msgspec.Struct, kw_only=True):
    """One feedback item as its newest event leaves it. ``event_id`` and ``op`` are those of that event."""

    feedback_id: str
    event_id: str
    interaction_id: str
    kind: Kind
    name: str
    identifier: str | None
    score: float | None
    label: str | None
    explanation: str | None
    correction: str | None
    reasons: list[str] | None
    annotator_kind: AnnotatorKind
    author_role: str | None
    op: Op
    revision: int
    retracted: bool
    occurred_at: datetime


class FeedbackStates(msgspec.Struct):
    """Items, last changed first. ``more``: there are others, and naming kinds or fewer interactions shows them."""

    feedback: list[FeedbackState]
    more: bool


class Token(msgspec.Struct, frozen=True):
    """What a browser needs to give feedback on one answer; ``expires_at`` in Unix seconds."""

    interaction_id: str
    token: str
    expires_at: int

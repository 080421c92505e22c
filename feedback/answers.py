"""What the service answers: one shape for an item, one for a batch, one for errors.

Belongs here: the response bodies, which are also the response schemas of the API description.
Does not belong here: deciding what to answer (``feedback.service``).
"""

from typing import Literal

import msgspec


class Error(msgspec.Struct, omit_defaults=True):
    """Why something was refused, where, and what to do about it."""

    code: str
    message: str
    field: str | None = None
    remedy: str | None = None


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

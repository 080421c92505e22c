"""One request to the service and what its answer means, for everything that sends.

Belongs here: the connection, telling what may be sent again from what may not, splitting what is too large.
Does not belong here: how often to try (``feedback.client`` for loaders, ``feedback.client.outbox`` for host applications).
"""

import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import msgspec

from feedback.answers import BatchResult, Error, ErrorBody, ItemResult

BATCH_ITEMS = 500
BATCH_BYTES = 4 * 1024 * 1024
FIRST_WAIT_SECONDS = 0.25
LONGEST_RETRY_AFTER_SECONDS = 300.0

# Answers that speak of the service's state, and of the body; all others speak of how we are set up.
_LATER = {408, 425, 429, 500, 502, 503, 504}
_ABOUT_THE_BODY = {400, 409, 413, 415, 422}

_batch = msgspec.json.Decoder(BatchResult)
_error = msgspec.json.Decoder(ErrorBody)

# What became of each item, or the one error that all of them were answered with.
Post = Callable[[str, Sequence[bytes]], list[ItemResult] | Error]


class RequestFailed(Exception):
    """The service did not do what was asked. ``status`` is None when it did not answer at all.

    ``temporary`` says that the same request may succeed later; ``wait_seconds`` is what the service asked for.
    """

    def __init__(self, message: str, status: int | None = None, wait_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.temporary = status is None or status in _LATER
        self.wait_seconds = wait_seconds


class Connection:
    """HTTP to the service at ``base_url``; safe to use from any thread, and after a fork.

    Proxy settings of the environment are ignored: what is sent goes to the service and nowhere else.
    """

    def __init__(self, base_url: str, api_key: str, timeout_seconds: float) -> None:
        self.base_url = base_url
        self._api_key = api_key
        self._timeout_seconds = timeout_seconds
        self._open()

    def _open(self) -> None:
        self._client = httpx.Client(
            base_url=self.base_url,
            headers={"Authorization": f"Bearer {self._api_key}", "Content-Type": "application/json"},
            timeout=self._timeout_seconds,
            trust_env=False,
        )
        self._pid = os.getpid()

    def close(self) -> None:
        self._client.close()

    def call(self, method: str, path: str, **content: Any) -> httpx.Response:
        """Send one request. Raises RequestFailed unless it is answered with a 2xx, or an error about its body."""
        if self._pid != os.getpid():  # two processes must not share a socket
            self._open()
        try:
            response = self._client.request(method, path, **content)
        except httpx.RequestError as error:
            raise RequestFailed(
                f"the service at {self.base_url} did not answer: {type(error).__name__}: {error}"
            ) from error
        if response.is_success or response.status_code in _ABOUT_THE_BODY:
            return response
        raise RequestFailed(
            f"the service answered {response.status_code}: {response.text[:500]}",
            response.status_code,
            _seconds(response.headers.get("Retry-After")),
        )

    def post(self, path: str, bodies: Sequence[bytes]) -> list[ItemResult] | Error:
        """Post items, each given as its JSON, as one array. Raises RequestFailed."""
        response = self.call("POST", path, content=b"[" + b",".join(bodies) + b"]")
        if not response.is_success:
            return error_of(response)
        try:
            results = _batch.decode(response.content).results
        except msgspec.MsgspecError:
            results = []
        if len(results) != len(bodies):
            raise RequestFailed(f"what answered at {self.base_url}{path} is not the feedback service")
        return results


def deliver(post: Post, path: str, bodies: Sequence[bytes]) -> list[ItemResult]:
    """Post items and say what became of each, in order. What is refused as a whole is sent in halves."""
    if not bodies:
        return []
    answered = post(path, bodies)
    if not isinstance(answered, Error):
        return answered
    if len(bodies) == 1:
        return [ItemResult(None, "invalid", error=answered)]
    middle = len(bodies) // 2
    return deliver(post, path, bodies[:middle]) + deliver(post, path, bodies[middle:])


def error_of(response: httpx.Response) -> Error:
    """The error of a refused request, also when something before the service refused it."""
    try:
        return _error.decode(response.content).error
    except msgspec.MsgspecError:
        return Error("refused", f"the service answered {response.status_code}: {response.text[:500]}")


def backoff(attempt: int, longest_seconds: float) -> float:
    """Seconds to wait after the failed ``attempt`` (from 0): doubling, and spread so that clients do not march."""
    return min(FIRST_WAIT_SECONDS * 2.0 ** min(attempt, 30), longest_seconds) * random.uniform(0.5, 1.0)


def _seconds(header: str | None) -> float:
    seconds = float(header) if header and header.isascii() and header.isdecimal() else 0.0
    return min(seconds, LONGEST_RETRY_AFTER_SECONDS)

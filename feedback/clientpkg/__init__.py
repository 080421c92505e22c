"""A small synchronous client for scripts and loaders that send many items.

Belongs here: batching, safe retries, collecting what was refused.
Does not belong here: validation (the service's), or anything for a browser.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import Any, Self
from uuid import UUID

import httpx

from feedback.ids import uuid7

BATCH_ITEMS = 500
BATCH_BYTES = 4 * 1024 * 1024
MAX_ATTEMPTS = 8
LONGEST_WAIT_SECONDS = 10.0

Item = dict[str, Any]


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

    Proxy settings of the environment are ignored: what is sent goes to the service and nowhere else.
    """

    def __init__(self, base_url: str, api_key: str, *, timeout_seconds: float = 60.0) -> None:
        self._http = httpx.Client(
            base_url=base_url,
            headers={"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"},
            timeout=timeout_seconds,
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

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

    def _send(
        self, path: str, id_field: str, items: Iterable[Item], on_progress: OnProgress | None
    ) -> SendReport:
        report = SendReport()
        for batch in _batches(items, id_field, report):
            self._send_batch(path, batch, report)
            if on_progress is not None:
                on_progress(report)
        return report

    def _send_batch(self, path: str, batch: "list[_Encoded]", report: SendReport) -> None:
        if not batch:
            return
        response = self._post(path, b"[" + b",".join(item.body for item in batch) + b"]", report)
        if response.status_code == 413 and len(batch) > 1:
            middle = len(batch) // 2
            self._send_batch(path, batch[:middle], report)
            self._send_batch(path, batch[middle:], report)
            return
        if response.status_code == 413:
            report.refused.append(_refused(batch[0], response.json()["error"]))
            return
        if response.status_code not in (200, 207):
            raise SendFailed(f"the service answered {response.status_code}: {response.text[:500]}", report)
        for item, result in zip(batch, response.json()["results"], strict=True):
            if result["status"] == "created":
                report.created += 1
            elif result["status"] == "duplicate":
                report.duplicate += 1
            else:
                report.refused.append(_refused(item, result["error"]))

    def _post(self, path: str, body: bytes, report: SendReport) -> httpx.Response:
        """Post until answered. Ids make it safe to send again what may have been stored already."""
        wait = 0.25
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                response = self._http.post(path, content=body)
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}"
            else:
                if response.status_code != 503:
                    return response
                reason = response.text[:500]
                wait = max(wait, _seconds(response.headers.get("Retry-After")))
            if attempt < MAX_ATTEMPTS:
                time.sleep(min(wait, LONGEST_WAIT_SECONDS))
                wait *= 2
        raise SendFailed(
            f"the service at {self._http.base_url} did not accept a batch in {MAX_ATTEMPTS} attempts ({reason}); "
            "start it, then send everything again",
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
            body = json.dumps(item, allow_nan=False, default=_jsonable).encode()
        except (TypeError, ValueError) as error:
            report.refused.append(
                RefusedItem(index, item_id, "invalid", str(error), remedy="Send only what JSON can express")
            )
            continue
        if batch and (len(batch) == BATCH_ITEMS or size + len(body) > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(_Encoded(index, item_id, body))
        size += len(body) + 1
    yield batch


def _jsonable(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _refused(item: _Encoded, error: dict[str, Any]) -> RefusedItem:
    return RefusedItem(
        item.index, item.id, error["code"], error["message"], error.get("field"), error.get("remedy")
    )


def _seconds(header: str | None) -> float:
    return float(header) if header and header.isdecimal() else 0.0

"""What the service tells Prometheus: counts of items and requests, the work of the group commit, what waits.

Belongs here: the metrics, and the page they are read from. Nothing in them names a person, an app or a text, so the
page is open, as is usual. Does not belong here: judging the figures (``docs/grafana/feedback.json`` draws them).
"""

import os
import tempfile
from pathlib import Path

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client import multiprocess as shared
from prometheus_client.registry import REGISTRY
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from feedback import log
from feedback.service import Service

SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"

ITEMS = Counter("datamoat_items", "Items, by log and by what became of them", ["log", "status"])
REQUESTS = Histogram(
    "datamoat_request_seconds",
    "From the head of a request that writes to its answer, by status code",
    ["status"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
FLUSH_ROWS = Histogram(
    "datamoat_flush_rows",
    "Rows that one commit carried",
    ["log"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
)
FLUSH_SECONDS = Histogram(
    "datamoat_flush_seconds",
    "From sending rows to their commit",
    ["log"],
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 30),
)
WAITING_ROWS = Gauge(
    "datamoat_waiting_rows", "Rows that wait for their commit", ["log"], multiprocess_mode="livesum"
)

OPENAPI = {
    "/metrics": {
        "get": {
            "summary": "Figures for Prometheus",
            "tags": ["health"],
            "responses": {"200": {"description": "Prometheus' text format", "content": {"text/plain": {}}}},
        }
    }
}


def routes(service: Service) -> list[Route]:
    """The page that Prometheus reads."""

    async def metrics(_: Request) -> Response:
        body = generate_latest(_counted()) + generate_latest(await _stored(service))
        return Response(body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    return [Route("/metrics", metrics, methods=["GET"])]


def share_between_workers() -> "tempfile.TemporaryDirectory[str]":
    """Let the processes started from now on count together. Keep the folder for as long as they run."""
    folder = tempfile.TemporaryDirectory(prefix="datamoat-metrics-", ignore_cleanup_errors=True)
    os.environ[SHARED_FOLDER] = folder.name
    return folder


def _counted() -> CollectorRegistry:
    """What this process has counted, or all workers together."""
    folder = os.environ.get(SHARED_FOLDER)
    if folder is None:
        return REGISTRY
    # What waited in a dead worker waits no longer; what it counted stays counted.
    for file in Path(folder).glob("gauge_live*.db"):
        pid = int(file.stem.rpartition("_")[2])
        if not _alive(pid):
            shared.mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    shared.MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
    return registry


async def _stored(service: Service) -> CollectorRegistry:
    """What the database knows; left out while it is away, so that the page itself never fails."""
    registry = CollectorRegistry()
    try:
        letters = await log.fetch(
            service.admin, "SELECT count(*) FROM feedback.dead_letter WHERE replayed_at IS NULL"
        )
        items = await log.fetch(
            service.review,
            "SELECT count(*) FROM feedback.review_item WHERE state = 'open'",
        )
    except log.Unavailable:
        return registry
    Gauge("datamoat_dead_letters", "Dead letters not replayed yet", registry=registry).set(letters[0][0])
    Gauge("datamoat_review_open_items", "Items that wait for a reviewer", registry=registry).set(items[0][0])
    return registry


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

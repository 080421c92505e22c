"""What every request meets first: room in memory, other origins' pages, and the short way to the busiest routes.

Belongs here: what holds for all rooms alike. Does not belong here: who is asking (``feedback.access``), any route.
"""

import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

from fastapi import FastAPI
from prometheus_client import Histogram
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from feedback import metrics
from feedback.http import HELD, Refused, Room, fault, refusal
from feedback.log import Unavailable, logger

Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]

# What other origins' pages may use: the API, Langfuse's part of it, and the element itself.
SHARED = ("/v1/", "/api/public/", "/widget/")
_LANGFUSE_HEADERS = ("Public-Key", "Sdk-Name", "Sdk-Version", "Sdk-Variant", "Sdk-Integration")
_WITHOUT_BODY = frozenset({"GET", "HEAD", "OPTIONS"})
_PREFLIGHT_SECONDS = 86_400


class Front(FastAPI):
    """The app, with a way around FastAPI's layers for POSTs to the paths in ``direct``: they cost more than the work.

    ``allowed_origins`` may call the API from a page, such as ``https://app.example.com``; ``*`` stands for any.
    """

    def __init__(self, *, allowed_origins: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(**settings)
        self.direct: dict[str, Endpoint] = {}
        self._room = Room()
        self._cors = CORSMiddleware(
            self._admit,
            allow_origins=tuple(allowed_origins),
            allow_methods=("GET", "POST"),
            allow_headers=(
                "Authorization",
                "Content-Encoding",
                "Content-Type",
                *(f"X-Langfuse-{name}" for name in _LANGFUSE_HEADERS),
            ),
            expose_headers=("Retry-After",),
            max_age=_PREFLIGHT_SECONDS,
        )
        self._shares = bool(allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
        elif self._shares and scope["path"].startswith(SHARED) and _from_a_page(scope):
            await self._cors(scope, receive, send)
        else:
            await self._admit(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in _WITHOUT_BODY:
            await self._route(scope, receive, send)
            return
        endpoint = self.direct.get(scope["path"]) if scope["method"] == "POST" else None
        if endpoint is not None:
            response = await self.answer(endpoint, scope, receive)
            await response(scope, receive, send)
            return
        try:
            held = scope[HELD] = self._room.enter()
        except Refused as error:
            await refusal(error)(scope, receive, send)
            return
        try:
            await self._route(scope, receive, send)
        finally:
            held.leave()

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except Exception:
            # Answered already, if nothing of an answer was sent: the connection need not end with it.
            logger.exception("%s failed", scope["path"])

    async def answer(self, endpoint: Endpoint, scope: Scope, receive: Receive) -> Response:
        """What one of the ``direct`` routes answers to a request, whichever way it came."""
        try:
            held = scope[HELD] = self._room.enter()
        except Refused as error:
            return refusal(error)
        began = time.perf_counter()
        try:
            response = await endpoint(Request(scope, receive))
        except (Refused, Unavailable) as error:
            response = refusal(error)
        except Exception:
            logger.exception("%s failed", scope["path"])
            response = fault()
        finally:
            held.leave()
        _requests(response.status_code).observe(time.perf_counter() - began)
        return response


@functools.cache
def _requests(status: int) -> Histogram:
    return metrics.REQUESTS.labels(str(status))


def _from_a_page(scope: Scope) -> bool:
    return any(name == b"origin" for name, _ in scope["headers"])

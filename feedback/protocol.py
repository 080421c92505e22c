"""HTTP/1.1 as the service speaks it: Uvicorn's protocol, with a short way for the busiest routes.

A small POST to one of ``Front.direct`` goes to its endpoint once its body is there, without ASGI's messages and without
the state that a body in parts needs; everything else is Uvicorn's. What a request meets first is the same
either way, in ``feedback.front``, and the app stays plain ASGI for other servers.

Belongs here: requests and answers as bytes on a connection, and when a silent connection ends. Does not belong here:
any rule for requests, how the server is started (``feedback.server``).
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from starlette.types import Message
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from feedback.front import Endpoint, Front
from feedback.http import WHOLE_BODY

# For the head of a request, and for an idle connection between two; longer than proxies keep theirs, so that they
# end it and not we, while a request is on its way.
HEAD_SECONDS = 65.0
# Many clients send a head and its body one after the other. So long, and so much of it on each connection, the short way
# waits for a body; Uvicorn, with which rooms count and time it, does for longer ones.
_BODY_SECONDS = 0.2
_BODY_BYTES = 8192
# Headers that ask for more than the short way has: a page's headers, an answer before the body, another protocol.
_BEYOND = frozenset({b"origin", b"expect", b"upgrade"})


class Protocol(HttpToolsProtocol):
    """One connection. The arguments are those Uvicorn gives; the app it serves is a ``Front``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._front: Front = self.config.loaded_app
        self._direct: _Direct | None = None
        self._waiting: asyncio.TimerHandle | None = None
        self._silent_since = self.loop.time()
        # One timer for all requests of the connection: one for each would cost more than reading its head.
        self._look = self.loop.call_later(HEAD_SECONDS, self._end_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        self._look.cancel()
        self._end_waiting()
        super().connection_lost(exc)

    def _end_if_silent(self) -> None:
        silent = self.loop.time() - self._silent_since if self._idle else 0.0
        if silent >= HEAD_SECONDS:
            self.transport.close()
        else:
            self._look = self.loop.call_later(HEAD_SECONDS - silent, self._end_if_silent)

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._direct is not None and self._waiting is None:
            length = next((value for name, value in self.headers if name == b"content-length"), b"")
            if length.isdigit() and int(length) <= _BODY_BYTES:
                self._waiting = self.loop.call_later(_BODY_SECONDS, self._hand_over)
            else:
                self._hand_over()

    def _hand_over(self) -> None:
        """Let Uvicorn wait for the rest of the body."""
        direct = self._end_waiting()
        if direct is not None and not self.transport.is_closing():
            super().on_headers_complete()
            super().on_body(direct.body)

    def _end_waiting(self) -> "_Direct | None":
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        direct, self._direct = self._direct, None
        return direct

    def shutdown(self) -> None:
        self._hand_over()
        super().shutdown()

    def on_headers_complete(self) -> None:
        # A request behind one that is not answered yet waits its turn with Uvicorn.
        if self._idle and self.parser.get_method() == b"POST":
            endpoint = self._front.direct.get(self.url.decode("latin-1"))
            if endpoint is not None and not any(name in _BEYOND for name, _ in self.headers):
                self._direct = _Direct(endpoint)
                return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._direct is None:
            super().on_body(body)
        else:
            self._direct.body += body

    def on_message_complete(self) -> None:
        direct = self._end_waiting()
        if direct is None:
            super().on_message_complete()
            return
        self.cycle = direct  # type: ignore[assignment]
        direct.keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        self.scope["method"] = "POST"
        self.scope["path"] = self.url.decode("latin-1")
        task = self.loop.create_task(self._answer(direct, {**self.scope, WHOLE_BODY: direct.body}))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _answer(self, direct: "_Direct", scope: dict[str, Any]) -> None:
        response = await self._front.answer(direct.endpoint, scope, _nothing_more)
        direct.response_complete = True
        headers = [*self.server_state.default_headers, *response.raw_headers]
        if (b"connection", b"close") in headers:
            direct.keep_alive = False
        elif not direct.keep_alive:
            headers.append((b"connection", b"close"))
        if not self.transport.is_closing():
            self.transport.write(_as_bytes(response.status_code, headers, bytes(response.body)))
            if not direct.keep_alive:
                self.transport.close()
        self.on_response_complete()

    def on_response_complete(self) -> None:
        self._silent_since = self.loop.time()
        if not self.transport.is_closing():
            self.flow.resume_reading()
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())


@dataclass(eq=False, slots=True)
class _Direct:
    """A request on the short way, in the place of Uvicorn's ``RequestResponseCycle`` until it is answered."""

    endpoint: Endpoint
    body: bytes = b""
    keep_alive: bool = True
    response_complete: bool = False
    disconnected: bool = False

    @property
    def message_event(self) -> "_Direct":
        return self

    def set(self) -> None:
        """Nobody waits for more of its body."""


async def _nothing_more() -> Message:
    return {"type": "http.disconnect"}


def _as_bytes(status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> bytes:
    return b"%b%b\r\n%b" % (STATUS_LINE[status], b"".join([b"%b: %b\r\n" % one for one in headers]), body)

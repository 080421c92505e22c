"""HTTP/1.1 as the service speaks it: Uvicorn's protocol, with a short way for the busiest routes.

A small POST to one of ``Front.direct`` goes to its endpoint once its body is there, without ASGI's messages and without
the state that a body in parts needs; everything else is Uvicorn's. What a request meets first is the same
either way, in ``feedback.front``, and the app stays plain ASGI for other servers.

Belongs here: requests and answers as bytes on a connection, and when a silent connection ends. Does not belong here:
any rule for requests, how the server is started (``feedback.server``).
"""

import asyncio
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Any

import httptools
from starlette.types import Message
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from feedback.front import Endpoint, Front
from feedback.http import WHOLE_BODY

# For the head of a request, and for an idle connection between two; longer than proxies keep theirs, so that they
# end it and not we, while a request is on its way.
HEAD_SECONDS = 65.0
# About so much of a head is read, and so many requests of a connection wait behind one that is not answered yet: each
# takes many times its bytes of memory, before anyone knows who sends.
HEAD_BYTES = 65_536
MAX_PIPELINED = 512
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
        # Bytes since the last end of a head, or part of a body: of a head, of what stands between chunks.
        self._head_bytes = 0
        # Bytes of answers the client had not read yet when it was looked at last.
        self._unread = 0
        self._silent_since = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport, self.pipeline)
        # One timer for all requests of the connection: one for each would cost more than reading its head.
        self._look = self.loop.call_later(HEAD_SECONDS, self._end_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        self._look.cancel()
        self._end_waiting()
        super().connection_lost(exc)

    def _end_if_silent(self) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread < self._unread:
            self._unread = unread
            self._silent_since = self.loop.time()
        waiting = self._idle or self.flow.write_paused
        silent = self.loop.time() - self._silent_since if waiting else 0.0
        if silent >= HEAD_SECONDS:
            # Not close: that would wait until the client has read its answers.
            self.transport.abort()
        else:
            self._look = self.loop.call_later(HEAD_SECONDS - silent, self._end_if_silent)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.flow.pause_reading()
        self._unread = self.transport.get_write_buffer_size()
        self._silent_since = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.flow.resume_reading()

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        if self._head_bytes > HEAD_BYTES:
            self.send_400_response("The head is too large")
            return
        self._head_bytes += len(data)
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = self._without_upgrade() + data[upgrade.args[0] :]
                continue
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
            break
        if self._direct is not None and self._waiting is None:
            length = next((value for name, value in self.scope["headers"] if name == b"content-length"), b"")
            # The parser has bounded the number, but not the zeros before it.
            if length.isdigit() and int(length[-20:]) <= _BODY_BYTES:
                self._waiting = self.loop.call_later(_BODY_SECONDS, self._hand_over)
            else:
                self._hand_over()

    def _without_upgrade(self) -> bytes:
        """The head just read, as of a request that wishes for no other protocol, for a parser that has a body follow."""
        line = self.parser.get_method(), self.url, self.parser.get_http_version().encode()
        self.parser = httptools.HttpRequestParser(self)
        headers = [one for one in self.scope["headers"] if one[0] != b"upgrade"]
        return _head(b"%b %b HTTP/%b\r\n" % line, headers)

    def _should_upgrade(self) -> bool:
        return self.parser.get_method() != b"CONNECT"

    def send_400_response(self, msg: str) -> None:
        if self._idle or (self.cycle.more_body and not self.pipeline):
            super().send_400_response(msg)
        else:
            # It would be read as the answer to an earlier request. That gets its own, and then the connection ends.
            self.cycle.keep_alive = False

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
        self._head_bytes = 0
        self.headers = []  # what a body's trailer says is of no request
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("more requests than wait on one connection")
        # A request behind one that is not answered yet waits its turn with Uvicorn.
        if self._idle and self.parser.get_method() == b"POST":
            endpoint = self._front.direct.get(self.url.decode("latin-1"))
            if endpoint is not None and not any(name in _BEYOND for name, _ in self.scope["headers"]):
                self._direct = _Direct(endpoint)
                return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
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
            self.transport.write(_head(STATUS_LINE[response.status_code], headers) + bytes(response.body))
            if not direct.keep_alive:
                self.transport.close()
        self.on_response_complete()

    def on_response_complete(self) -> None:
        self._silent_since = self.loop.time()
        if not self.transport.is_closing():
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())
            if self.flow.read_paused:
                self.flow.resume_reading()


class _Flow(FlowControl):
    """Reads on only while what was read is being answered, and the client reads the answers."""

    def __init__(self, transport: asyncio.Transport, pipeline: Sized) -> None:
        super().__init__(transport)
        self._pipeline = pipeline

    def resume_reading(self) -> None:
        if not self._pipeline and not self.write_paused:
            super().resume_reading()


@dataclass(eq=False, slots=True)
class _Direct:
    """A request on the short way, in the place of Uvicorn's ``RequestResponseCycle`` until it is answered."""

    endpoint: Endpoint
    body: bytes = b""
    keep_alive: bool = True
    response_complete: bool = False
    disconnected: bool = False
    more_body: bool = False

    @property
    def message_event(self) -> "_Direct":
        return self

    def set(self) -> None:
        """Nobody waits for more of its body."""


async def _nothing_more() -> Message:
    return {"type": "http.disconnect"}


def _head(line: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"%b%b\r\n" % (line, b"".join([b"%b: %b\r\n" % one for one in headers]))

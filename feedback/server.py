"""The process that serves the app: Granian workers, one line when ready, a clean end.

Belongs here: ports, workers, signals. Does not belong here: routes or the database.
"""

import contextlib
import functools
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from http.client import HTTPConnection, HTTPException
from typing import Any

from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server import Server

from feedback import metrics
from feedback.app import create_app
from feedback.rsgi import Rsgi

DRAIN_SECONDS = 30
# For the head of a request, and for an idle connection between two; longer than proxies keep theirs, so that they
# end it and not we, while a request is on its way.
HEADER_SECONDS = 65
GC_ALLOCATIONS = 50_000
# Per worker; idle ones cost little, and a limit near the usual 1024 would let idle ones keep others out.
MAX_CONNECTIONS = 8192
READY_SECONDS = 60.0

# Standard output is for the one line that says where the service listens.
_TO_STDERR = {"class": "logging.StreamHandler", "stream": "ext://sys.stderr", "formatter": "line"}
_LOGGING = {
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"console": _TO_STDERR},
    "loggers": {
        name: {"handlers": ["console"], "level": "WARNING", "propagate": False}
        for name in ("_granian", "feedback")
    },
}


class PortTaken(OSError):
    """Something listens on the wanted port already."""


def serve(
    database_url: str,
    *,
    pseudonym_key: bytes,
    host: str = "127.0.0.1",
    port: int = 8787,
    workers: int = 1,
    allowed_origins: Sequence[str] = (),
    search: str | None = None,
    on_ready: Callable[[str], None] = print,
) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight are answered first. Blocks.

    ``allowed_origins`` and ``search`` as for ``create_app``. ``on_ready`` is called once, with a line naming the
    address, when the first request was answered. Raises PortTaken if the port is in use.
    """
    _check_port(host, port)
    # Workers are fresh interpreters on every platform: nothing of this process leaks into them, threads included.
    multiprocessing.set_start_method("spawn", force=True)
    server = Server(
        "feedback.app:create_app",
        address=host,
        port=port,
        interface=Interfaces.RSGI,
        workers=workers,
        websockets=False,
        http=HTTPModes.http1,
        http1_settings=HTTP1Settings(header_read_timeout=HEADER_SECONDS * 1000),
        backlog=MAX_CONNECTIONS,
        backpressure=MAX_CONNECTIONS,
        log_level=LogLevels.warning,
        log_dictconfig=_LOGGING,
        workers_kill_timeout=DRAIN_SECONDS,
        respawn_failed_workers=True,
    )
    server.on_startup(functools.partial(_announce_in_background, host, port, on_ready))
    with metrics.share_between_workers() if workers > 1 else contextlib.nullcontext():
        server.serve(
            target_loader=functools.partial(_load, database_url, pseudonym_key, allowed_origins, search),
            wrap_loader=False,
        )


def _load(database_url: str, pseudonym_key: bytes, allowed_origins: Sequence[str], search: str | None) -> Any:
    """Runs in each worker."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    app = create_app(
        database_url, pseudonym_key=pseudonym_key, allowed_origins=allowed_origins, search=search
    )
    # What is loaded now stays, and a request leaves few cycles: looking for garbage all the time would hold up others.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS)
    return Rsgi(app)


def _end_with(sentinel: int) -> None:
    """End this worker when its parent was killed: it would hold the port for ever."""
    multiprocessing.connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _check_port(host: str, port: int) -> None:
    # Granian shares its port among workers, so a second service would silently take half of the first one's requests.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortTaken(
                f"cannot listen on {host}:{port} ({error.strerror}); stop what uses it, or choose another --port"
            ) from error


def _announce_in_background(host: str, port: int, on_ready: Callable[[str], None]) -> None:
    threading.Thread(target=_announce, args=(host, port, on_ready), daemon=True).start()


def _announce(host: str, port: int, on_ready: Callable[[str], None]) -> None:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        connection = HTTPConnection(reachable, port, timeout=5)
        try:
            connection.request("GET", "/healthz")
            if connection.getresponse().status == 200:
                shown = f"[{reachable}]" if ":" in reachable else reachable
                on_ready(f"feedback service ready on http://{shown}:{port} (API: /docs)")
                return
        except (OSError, HTTPException):
            time.sleep(0.05)
        finally:
            connection.close()

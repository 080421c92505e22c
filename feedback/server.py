"""The process that serves the app: Uvicorn workers under its supervisor, one line when ready, a clean end.

Belongs here: ports, workers, signals. Does not belong here: routes or the database.
"""

import contextlib
import functools
import gc
import logging
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.client import HTTPConnection, HTTPException

from uvicorn.config import STARTUP_FAILURE, Config
from uvicorn.supervisors.multiprocess import Multiprocess

from feedback import metrics
from feedback.app import create_app
from feedback.front import Front
from feedback.log import logger
from feedback.protocol import Protocol

DRAIN_SECONDS = 30
GC_ALLOCATIONS = 50_000
# Per worker; idle ones cost little, and a limit near the usual 1024 would let idle ones keep others out.
MAX_CONNECTIONS = 8192
READY_SECONDS = 60.0
# A worker that does not get to answer its supervisor for so long hangs, and is replaced.
HUNG_SECONDS = 30

# Standard output is for the one line that says where the service listens.
_TO_STDERR = {"class": "logging.StreamHandler", "stream": "ext://sys.stderr", "formatter": "line"}
_LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"console": _TO_STDERR},
    "loggers": {
        name: {"handlers": ["console"], "level": level, "propagate": False}
        # What clients get wrong is answered, not logged: they would fill the disk.
        for name, level in (("uvicorn", "ERROR"), ("feedback", "WARNING"))
    },
}


class PortTaken(OSError):
    """Something listens on the wanted port already."""


class NotStarted(RuntimeError):
    """The app could not start in a worker; starting it again would fail the same way."""


class _Supervisor(Multiprocess):
    def keep_subprocess_alive(self) -> None:
        for process in self.processes:
            # The worker's end of the pipe. While it is open here too, one that dies when asked whether it lives would be
            # waited for as long as one that hangs.
            process.child_conn.close()
        super().keep_subprocess_alive()


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
    address, when the first request was answered. Raises PortTaken if the port is in use, NotStarted if the app cannot
    start; why is in the log.
    """
    listening = _listen(host, port)
    config = Config(
        functools.partial(_load, database_url, pseudonym_key, allowed_origins, search),
        factory=True,
        interface="asgi3",
        lifespan="on",
        http=Protocol,
        ws="none",
        loop="uvloop",
        workers=workers,
        backlog=MAX_CONNECTIONS,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        timeout_worker_healthcheck=HUNG_SECONDS,
        log_config=_LOGGING,
        access_log=False,
        proxy_headers=False,
        server_header=False,
    )
    # What becomes of workers is for the operator: those that die again and again, too.
    logging.getLogger("uvicorn").setLevel(logging.INFO)
    _allow_files()
    threading.Thread(target=_announce, args=(*listening.getsockname()[:2], on_ready), daemon=True).start()
    with metrics.share_between_workers() if workers > 1 else contextlib.nullcontext():
        # Workers are fresh interpreters on every platform: nothing of this process leaks into them, threads included.
        supervisor = _Supervisor(config, [listening])
        supervisor.run()
    if any(worker.exitcode == STARTUP_FAILURE for worker in supervisor.processes):
        raise NotStarted("the service cannot start; the lines above say why")


def _listen(host: str, port: int) -> socket.socket:
    """The socket that all workers take connections from. It stays open while one of them is replaced."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(MAX_CONNECTIONS)
    except OSError as error:
        listening.close()
        raise PortTaken(
            f"cannot listen on {host}:{port} ({error.strerror}); stop what uses it, or choose another --port"
        ) from error
    listening.set_inheritable(True)
    return listening


def _allow_files() -> None:
    """Let workers hold MAX_CONNECTIONS, and what else they open, where the operator's limit is the usual lower one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + 256
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _load(
    database_url: str, pseudonym_key: bytes, allowed_origins: Sequence[str], search: str | None
) -> Front:
    """Runs in each worker."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    try:
        app = create_app(
            database_url, pseudonym_key=pseudonym_key, allowed_origins=allowed_origins, search=search
        )
    except Exception:
        logger.exception("the app cannot be loaded")
        sys.exit(STARTUP_FAILURE)
    # What is loaded now stays, and a request leaves few cycles: looking for garbage all the time would hold up others.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS)
    return app


def _end_with(sentinel: int) -> None:
    """End this worker when its parent was killed: it would hold the port for ever."""
    multiprocessing.connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _announce(host: str, port: int, on_ready: Callable[[str], None]) -> None:
    """Say so when the service answers."""
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

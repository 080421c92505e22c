"""Child processes: the feedback service, and Dagster's UI and daemon.

Belongs here: starting them with the right environment, once for a deployment, and stopping them. Does not belong
here: what they do.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from orchestration.settings import OPT_OUTS, Settings
from storage.supervisor import die_with_parent

if TYPE_CHECKING:
    from orchestration.prepare import Prepared

HOST = "127.0.0.1"


class ServiceError(Exception):
    """A child process did not start; the message says which and where its log is."""


@contextmanager
def only_one(settings: Settings) -> Iterator[None]:
    """Hold the deployment's services for as long as the block runs.

    Two daemons on one deployment would both request what the sensors find.

    Raises:
        ServiceError: Another process holds them; the message names it.
    """
    path = settings.folder / "dev.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ServiceError(
                f"the services of {settings.folder} are running already: {file.read().strip() or 'they just started'}."
                " Use those, or stop them with Ctrl-C where they were started."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} since {datetime.now().astimezone():%Y-%m-%d %H:%M}\n")
        file.flush()
        # The kernel drops the lock with the process, however it ends; children close the file when they start.
        yield


def environment(settings: Settings, prepared: Prepared) -> dict[str, str]:
    """The environment of every child: this deployment, and no telemetry."""
    return {
        **os.environ,
        **OPT_OUTS,
        "EXAMPLE": settings.example,
        "DATAMOAT_HOME": str(settings.home),
        "DAGSTER_HOME": str(settings.dagster_home),
        "PYTHONUNBUFFERED": "1",
    }


def free_port(wanted: int) -> int:
    """``wanted`` if nobody listens there, else a free port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted))
        except OSError:
            probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def start_feedback(
    settings: Settings, prepared: Prepared, port: int, search: str | None = None
) -> subprocess.Popen[bytes]:
    """Start the feedback service; its output goes to ``<deployment>/logs/feedback.log``.

    Args:
        search: The function that answers its ask page, as ``module:function``.
    """
    return _start(
        [
            *(sys.executable, "-m", "feedback", "serve", "--host", HOST, "--port", str(port)),
            *(("--search", search) if search else ()),
        ],
        settings.folder / "logs" / "feedback.log",
        {
            **environment(settings, prepared),
            "DATABASE_URL": prepared.warehouse.database.url,
            "DATAMOAT_PSEUDONYM_KEY_FILE": str(settings.pseudonym_key_file),
        },
    )


def start_dagster(settings: Settings, prepared: Prepared, port: int) -> subprocess.Popen[bytes]:
    """Start Dagster's UI and daemon; their output goes to ``<deployment>/logs/dagster.log``."""
    return _start(
        [
            str(Path(sys.executable).parent / "dagster"),
            "dev",
            "-w",
            str(settings.root / "workspace.yaml"),
            "-h",
            HOST,
            "-p",
            str(port),
        ],
        settings.folder / "logs" / "dagster.log",
        environment(settings, prepared),
    )


@contextmanager
def feedback_service(settings: Settings, prepared: Prepared) -> Iterator[str]:
    """The feedback service on a free port for as long as the block runs; yields its base URL."""
    # Any free port: nobody else is to find it, and no other deployment's service is to be taken for it.
    port = free_port(0)
    process = start_feedback(settings, prepared, port)
    try:
        url = f"http://{HOST}:{port}"
        wait_until_ready(process, f"{url}/readyz", settings.folder / "logs" / "feedback.log")
        yield url
    finally:
        stop(process)


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float = 120) -> None:
    """Return once ``url`` answers 200.

    Raises:
        ServiceError: The process ended, or ``seconds`` passed.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServiceError(f"{log}: the process ended with {process.returncode} before it was ready")
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise ServiceError(f"{log}: {url} did not answer within {seconds:.0f} s")


def stop(process: subprocess.Popen[bytes], seconds: float = 20) -> None:
    """Ask the process to end, and kill what is left of it and its children after ``seconds``."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.send_signal(signal.SIGTERM)
        process.wait(seconds)
    # Dagster's code servers are not always stopped by their parent; the group is ours alone (see _start).
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _start(command: list[str], log: Path, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        # A group of its own: Ctrl-C reaches us, and we end our children in order.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(variables),
            start_new_session=True,
            # A killed moat must not leave a service behind that holds its port (Linux only).
            preexec_fn=die_with_parent(signal.SIGTERM),
        )

"""Progress of long steps, as log lines.

Belongs here: how often and in what words a long step says how far it is. Does not belong here: drawing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``: ``what`` names the unit ("rows", "files"); ``total`` is 0 when unknown."""

SECONDS_BETWEEN_LINES = 2.0


class _Log(Protocol):
    def info(self, message: str) -> None: ...


def log_progress(log: _Log) -> Progress:
    """A Progress that writes to ``log`` at most every two seconds, and always at the end."""
    last = time.monotonic()

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES and (total == 0 or done < total):
            return
        last = now
        log.info(f"{done:,} of {total:,} {what}" if total else f"{done:,} {what}")

    return progress

"""What a person sees while ``moat`` works: lines, live progress on a terminal, plain lines elsewhere.

Belongs here: drawing. Does not belong here: Dagster, or deciding what to show.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from rich.console import Console
from rich.status import Status
from rich.text import Text

NAME_WIDTH = 34


class Screen:
    """Writes lines to ``stream``; on a terminal the step under way has a spinner and its newest progress.

    Thread-safe: Dagster logs from the thread that runs a step.
    """

    def __init__(self, stream: IO[str]) -> None:
        self.console = Console(file=stream, highlight=False, soft_wrap=True, markup=False, emoji=False)
        if not self.console.is_terminal:
            # A file has no width; rich would assume 80 columns and break every table.
            self.console.width = 160
        self._status: Status | None = None
        self._lock = threading.Lock()

    def title(self, text: str) -> None:
        """A heading."""
        self.console.print(f"\n{text}", style="bold")

    def line(self, name: str, text: str, style: str = "") -> None:
        """A finished fact: its name, then what there is to say of it."""
        with self._lock:
            # One print: between two, the live line would be drawn over the first.
            self.console.print(Text.assemble(f"  {name:<{NAME_WIDTH}} ", (text, style)))

    def progress(self, name: str, text: str) -> None:
        """How far the step ``name`` is: replaces the live line on a terminal, a line of its own elsewhere."""
        if self._status is not None:
            self._status.update(Text(f"{name} · {text}"))
        else:
            self.line(name, text, style="dim")

    @contextmanager
    def live(self, text: str) -> Iterator[None]:
        """Show that something is under way."""
        if not self.console.is_terminal:
            yield
            return
        with self.console.status(text) as status:
            self._status = status
            try:
                yield
            finally:
                self._status = None

"""What a person sees while ``moat`` works: one line a step, live progress, plain lines when not a terminal.

Belongs here: drawing. Does not belong here: deciding what to run.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import dagster as dg
from rich.console import Console
from rich.status import Status

NAME_WIDTH = 34


class Screen:
    """Writes lines to ``stream``; on a terminal the step under way has a spinner and its newest progress.

    Thread-safe: Dagster logs from the thread that runs a step.
    """

    def __init__(self, stream: IO[str]) -> None:
        self.console = Console(file=stream, highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            # A file has no width; rich would assume 80 columns and break every table.
            self.console.width = 160
        self._status: Status | None = None
        self._lock = threading.Lock()

    def title(self, text: str) -> None:
        """A heading."""
        self.console.print(f"\n[bold]{text}[/bold]")

    def line(self, name: str, text: str, style: str = "") -> None:
        """A finished fact: its name, then what there is to say of it."""
        with self._lock:
            self.console.print(f"  {name:<{NAME_WIDTH}} ", end="", markup=False)
            self.console.print(text, style=style, markup=False)

    def progress(self, name: str, text: str) -> None:
        """How far the step ``name`` is: replaces the live line on a terminal, a line of its own elsewhere."""
        if self._status is not None:
            self._status.update(f"{name} · {text}")
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


class StepHandler(logging.Handler):
    """Turns Dagster's log records of one run into lines of a Screen."""

    def __init__(self, screen: Screen) -> None:
        super().__init__(logging.INFO)
        self.screen = screen
        self._started: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Show step ends, progress and warnings; everything else stays in the run's log."""
        meta: dict[str, Any] | None = getattr(record, "dagster_meta", None)
        if meta is None:
            return
        event: dg.DagsterEvent | None = meta.get("dagster_event")
        step = display_name(meta.get("step_key") or "")
        if event is None:
            if not step or _is_chatter(step, record.levelno, meta["orig_message"]):
                return
            if record.levelno >= logging.WARNING:
                self.screen.line(step, meta["orig_message"], style="yellow")
            else:
                self.screen.progress(step, meta["orig_message"].splitlines()[-1])
        elif event.event_type_value == "STEP_START":
            self._started[step] = time.monotonic()
            self.screen.progress(step, "started") if self.screen.console.is_terminal else None
        elif event.event_type_value == "STEP_SUCCESS":
            self.screen.line(step, f"{time.monotonic() - self._started.get(step, time.monotonic()):.1f} s")
        elif event.event_type_value == "STEP_FAILURE":
            self.screen.line(step, _reason(event), style="bold red")
        elif event.event_type_value == "STEP_SKIPPED":
            self.screen.line(step, "stopped: something it depends on failed", style="yellow")
        elif event.event_type_value == "ASSET_CHECK_EVALUATION":
            check = event.asset_check_evaluation_data
            if not check.passed:
                style = "bold red" if check.severity is dg.AssetCheckSeverity.ERROR else "yellow"
                self.screen.line(
                    check.asset_key.to_user_string(), f"check {check.check_name} did not pass", style
                )


def _is_chatter(step: str, level: int, message: str) -> bool:
    """What Dagster and dbt say of their own workings, or say again in an event."""
    return (
        (step.startswith("dbt_") and level < logging.WARNING)
        or message.startswith("Dependencies for step")
        or "Logging an `AssetObservation`" in message
    )


def display_name(step_key: str) -> str:
    """``raw__tickets`` as people write it: ``raw/tickets``."""
    return step_key.replace("__", "/")


def _reason(event: dg.DagsterEvent) -> str:
    failure = event.step_failure_data
    error = failure.error
    if error is None:
        return event.message or "failed"
    # Dagster wraps what a step raised; the innermost cause is what the person has to act on.
    while error.cause is not None:
        error = error.cause
    if failure.user_failure_data is not None and failure.user_failure_data.description:
        return str(failure.user_failure_data.description)
    return error.message.strip()


_screen: Screen | None = None


def use_screen(screen: Screen | None) -> None:
    """The screen that runs executed in this process draw on."""
    global _screen
    _screen = screen


@dg.logger(config_schema=None, description="One line a step, for people at a terminal.")
def moat_logger(_: dg.InitLoggerContext) -> logging.Logger:
    """The logger of runs that ``moat run`` executes in its own process."""
    logger = logging.Logger("moat", logging.INFO)
    logger.addHandler(StepHandler(_screen or Screen(sys.stderr)))
    return logger

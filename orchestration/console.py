"""Dagster's log of a run as lines for a person.

Belongs here: which records are worth a line. Does not belong here: drawing (screen) or deciding what to run.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import dagster as dg

from orchestration.screen import Screen


class StepHandler(logging.Handler):
    """Turns Dagster's log records of one run into lines of a Screen."""

    def __init__(self, screen: Screen) -> None:
        super().__init__(logging.DEBUG)
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
        level < logging.INFO
        or (step.startswith("dbt_") and level < logging.WARNING)
        or message.startswith(("[pipes]", "Dependencies for step"))
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
    logger = logging.Logger("moat", logging.DEBUG)
    logger.addHandler(StepHandler(_screen or Screen(sys.stderr)))
    return logger

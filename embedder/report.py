"""What a run tells a person or a log while it runs, and its figures in words.

Belongs here: wording, and how often. Every report writes to stderr; stdout belongs to the result.
Does not belong here: Dagster, exit codes.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from embedder.budget import Estimate
from embedder.job import DONE, Progress, Summary, Watcher


class Report(Watcher):
    """A watcher that is also told how the run ended."""

    def ended(self, summary: Summary) -> None:
        """The figures of a run that was done, or stopped early."""

    def failed(self, error: str) -> None:
        """Why the run ended without its result."""


class Lines(Report):
    """Lines for a person: progress is one line rewritten each second on a terminal, else one each 10 seconds."""

    def __init__(self, terminal: bool) -> None:
        self._terminal = terminal
        self._due = Every(1 if terminal else 10)

    def say(self, line: str) -> None:
        # A notice replaces the progress line it would be written into.
        print(f"\r\x1b[K{line}" if self._terminal else line, file=sys.stderr, flush=True)

    def estimated(self, estimate: Estimate) -> None:
        self.say(estimate_in_words(estimate))

    def progressed(self, progress: Progress) -> None:
        if self._due():
            line = progress_in_words(progress)
            end = "\r" if self._terminal else "\n"
            print(f"\x1b[K{line}" if self._terminal else line, end=end, file=sys.stderr, flush=True)

    def ended(self, summary: Summary) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def failed(self, error: str) -> None:
        self.say(error)


class JsonLines(Report):
    """One JSON object a line: ts (UTC), level, event, and the event's own fields; progress each 10 seconds."""

    def __init__(self) -> None:
        self._due = Every(10)

    def say(self, line: str) -> None:
        self._line("warning", "notice", message=line)

    def estimated(self, estimate: Estimate) -> None:
        self._line("info", "estimate", **asdict(estimate))

    def progressed(self, progress: Progress) -> None:
        if self._due():
            derived = {
                "tokens_per_s": round(progress.tokens_per_s, 1),
                "seconds_left": round(progress.seconds_left, 1),
                "share": round(progress.share, 4),
            }
            self._line("info", "progress", **asdict(progress), **derived)

    def ended(self, summary: Summary) -> None:
        self._line("info" if summary.status == DONE else "warning", "ended", **summary.as_dict())

    def failed(self, error: str) -> None:
        self._line("error", "failed", message=error)

    def _line(self, level: str, event: str, **fields: Any) -> None:
        moment = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"ts": moment, "level": level, "event": event, **fields})
        print(line, file=sys.stderr, flush=True)


class Every:
    """True when called first after so many seconds since it was last true, or since it was made."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = time.monotonic()

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


def summary_in_words(summary: Summary) -> str:
    """The figures for a person, in a few lines."""
    s = summary
    line = (
        f"{s.distinct:,} distinct texts in {s.chunks:,} rows: {s.embedded:,} embedded, "
        f"{s.skipped:,} already there, {s.failed:,} failed, {s.parked:,} parked, {s.truncated:,} truncated"
    )
    lines = [line + (f" by {s.truncated_tokens:,} tokens" if s.truncated else "")]
    if s.conflicting:
        lines.append(f"{s.conflicting:,} content hashes stand before several texts; the first was taken")
    if s.embedded:
        lines.append(
            f"{s.chunks_per_s:,.0f} texts/s, {s.tokens_per_s:,.0f} tokens/s, {s.seconds:.1f} s in all, "
            f"padding {s.padding_share:.1%}, {s.engine} {s.precision} on {s.device}, {s.streams} streams, "
            f"release {s.release}"
        )
    if s.cost is not None and s.cost_of_work is not None:
        earlier = f", with earlier attempts {s.cost_of_work:,.4f}" if s.cost_of_work > s.cost else ""
        lines.append(f"cost {s.cost:,.4f}{earlier}")
    lines.extend(f"not sound: {problem}" for problem in s.unsound)
    return "\n".join(lines)


def estimate_in_words(estimate: Estimate) -> str:
    """What is to be done, in one line."""
    line = f"to embed: {estimate.rows:,} texts, about {estimate.tokens:,} tokens"
    if estimate.seconds is None:
        line += "; the first shard will tell how long that takes"
    else:
        line += f", {estimate.seconds:,.0f} s at {estimate.tokens_per_s:,.0f} tokens/s"
    if estimate.cost is not None:
        line += f", cost {estimate.cost:,.4f}"
    return line if estimate.fits else f"{line}: above the ceiling, so the run stops there"


def progress_in_words(progress: Progress) -> str:
    """How far a run is, in one line."""
    return (
        f"{progress.share:.0%}: {progress.rows:,} of {progress.total_rows:,} texts, shard {progress.shard} of "
        f"{progress.shards}, {progress.tokens_per_s:,.0f} tokens/s, padding {progress.padding_share:.1%}, "
        f"{progress.seconds_left:.0f} s left"
    )

"""What a work costs: the estimate before it, the ceiling that stops it, and the true cost after it.

A work may take several attempts; what earlier ones spent is kept in `run.json` of the output folder and counts
against the ceiling, so that repeating a command does not spend its ceiling again. The same file keeps the rate
and the start-up time that were measured last, for the next estimate.

Belongs here: prices, rates, ceilings, the run record.
Does not belong here: counting tokens, embedding.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from embedder import protocol
from embedder.protocol import EmbedderError
from embedder.shards import write_bytes


class OverBudget(Exception):
    """The work reached its ceiling. Finished shards stay; the same command with a higher ceiling continues."""

    def __init__(self, reason: str, option: str) -> None:
        super().__init__(f"stopped by the budget: {reason}; finished shards stay, raise {option} to continue")


@dataclass(frozen=True)
class Limits:
    """What a person allows and knows. Money is in whatever unit the price has."""

    price_per_hour: float | None = None
    """Of everything that runs while the job runs: all GPUs, all machines."""
    rate: float | None = None
    """Tokens per second to estimate with; None takes what this machine measured last."""
    max_cost: float | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        """Raises EmbedderError for a ceiling that could not be watched."""
        if self.max_cost is not None and self.price_per_hour is None:
            raise EmbedderError("a ceiling on cost needs a price; give --price-per-hour with --max-cost")

    def cost(self, seconds: float) -> float | None:
        """None without a price."""
        return None if self.price_per_hour is None else round(self.price_per_hour * seconds / 3600, 6)


@dataclass(frozen=True)
class Estimate:
    """What is still to be done, before it is done."""

    rows: int
    """Texts to embed."""
    tokens: int
    """From a sample of them."""
    tokens_per_s: float | None
    """None as long as nothing is known: the first shard will tell."""
    seconds: float | None
    """Start-up included."""
    cost: float | None
    fits: bool
    """Whether it stays below the ceilings, as far as is known; a run that does not will stop at them."""


@dataclass
class _Record:
    """run.json: what was measured last, and what the unfinished work has spent."""

    host: str = ""
    tokens_per_s: float | None = None
    startup_s: float = 0.0
    work: str = ""
    tokens: int = 0
    seconds: float = 0.0


class Ledger:
    """The account of one work: its earlier attempts from the record, this attempt as it goes.

    `timer` gives seconds from any origin, `started` is its reading when this attempt began.
    """

    def __init__(
        self,
        folder: Path,
        work: str,
        limits: Limits,
        *,
        timer: Callable[[], float] = time.perf_counter,
        started: float | None = None,
    ) -> None:
        self._path = folder / protocol.RUN_FILE
        self._limits = limits
        self._timer = timer
        self._started = timer() if started is None else started
        self._embedding_since: float | None = None
        self._record = _read(self._path)
        if self._record.work != work:
            self._record.work, self._record.tokens, self._record.seconds = work, 0, 0.0
        if self._record.host != platform.node():
            self._record.host, self._record.tokens_per_s, self._record.startup_s = platform.node(), None, 0.0
        self.rate = limits.rate or self._record.tokens_per_s
        """Tokens per second to reckon with, None as long as nothing is known."""
        self.tokens = 0
        """Spent by this attempt."""
        self.startup_seconds = 0.0
        """Of this attempt, until its engine was ready."""

    @property
    def seconds(self) -> float:
        """Spent by this attempt."""
        return self._timer() - self._started

    @property
    def embedding_seconds(self) -> float:
        """Spent by this attempt since the engine was ready; 0 before."""
        return 0.0 if self._embedding_since is None else self._timer() - self._embedding_since

    @property
    def cost(self) -> float | None:
        """Of this attempt; None without a price."""
        return self._limits.cost(self.seconds)

    @property
    def cost_of_work(self) -> float | None:
        """Of all attempts at this work; None without a price."""
        return self._limits.cost(self._record.seconds + self.seconds)

    def estimate(self, rows: int, tokens: int) -> Estimate:
        """What `rows` texts with about `tokens` tokens will take, if nothing is done of them yet."""
        limits, record = self._limits, self._record
        seconds = None if self.rate is None else record.startup_s + tokens / self.rate
        cost = None if seconds is None else limits.cost(seconds)
        in_all = None if seconds is None else limits.cost(record.seconds + seconds)
        fits = (limits.max_tokens is None or record.tokens + tokens <= limits.max_tokens) and (
            limits.max_cost is None or in_all is None or in_all <= limits.max_cost
        )
        return Estimate(rows, tokens, self.rate, seconds, cost, fits)

    def start_embedding(self, seconds_ago: float = 0.0) -> None:
        """The engine is ready: what came before was start-up, which costs money but says nothing of the rate."""
        self._embedding_since = self._timer() - seconds_ago
        self.startup_seconds = self._embedding_since - self._started
        self._record.startup_s = round(self.startup_seconds, 3)

    def reserve(self, tokens: int) -> None:
        """Before a shard of so many tokens: raises OverBudget when it would not be finished below the ceiling,
        rather than paying for work that is then thrown away."""
        spent, limit = self._record.tokens + self.tokens, self._limits.max_tokens
        if limit is not None and spent + tokens > limit:
            raise OverBudget(
                f"{spent:,} of at most {limit:,} tokens are spent and the next shard has {tokens:,}",
                "--max-tokens",
            )
        self._check_cost(tokens / self.rate if self.rate else 0.0)

    def spend(self, tokens: int) -> None:
        """Count a batch."""
        self.tokens += tokens

    def check(self) -> None:
        """Before a batch: raises OverBudget when the cost has reached its ceiling."""
        self._check_cost(0.0)

    def measure(self) -> None:
        """After a shard: reckon from now on with the rate of this attempt."""
        if self.tokens and self.embedding_seconds:
            self._record.tokens_per_s = self.rate = round(self.tokens / self.embedding_seconds, 1)

    def save(self) -> None:
        """Keep what is spent and measured, for the next attempt and the next estimate."""
        record = self._record
        seconds = round(record.seconds + self.seconds, 3)
        self._write(replace(record, tokens=record.tokens + self.tokens, seconds=seconds))

    def close(self) -> None:
        """The work is done: what it spent counts against nothing any more."""
        self._write(replace(self._record, work="", tokens=0, seconds=0.0))

    def _write(self, record: _Record) -> None:
        if record != _read(self._path):
            write_bytes(self._path, json.dumps(asdict(record)).encode())

    def _check_cost(self, seconds_ahead: float) -> None:
        spent, limit = self.cost_of_work, self._limits.max_cost
        ahead = self._limits.cost(seconds_ahead)
        if limit is not None and spent is not None and ahead is not None and spent + ahead > limit:
            next_one = f", and the next shard costs about {ahead:,.4f}" if ahead else ""
            raise OverBudget(
                f"{spent:,.4f} of at most {limit:,.4f} are spent, earlier attempts included{next_one}",
                "--max-cost",
            )


def _read(path: Path) -> _Record:
    """A record that is absent or damaged starts anew."""
    try:
        found = json.loads(path.read_bytes())
        rate = found["tokens_per_s"]
        return _Record(
            host=str(found["host"]),
            tokens_per_s=None if rate is None else float(rate),
            startup_s=float(found["startup_s"]),
            work=str(found["work"]),
            tokens=int(found["tokens"]),
            seconds=float(found["seconds"]),
        )
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return _Record()

"""A piece of work that is asked of Dagster until a run of it succeeds: what was asked, how it ended, when to ask again.

The runs of the sensors are retried by this and by nothing else (see ``TAGS``), so that one place knows how often
a piece of work has failed.

Belongs here: the life of a request. Does not belong here: which work there is.
"""

from dataclasses import dataclass
from typing import Literal

import dagster as dg

State = Literal["idle", "under way", "succeeded", "failed"]

# Seconds to wait after the first failure, the second, ...; after the last of them the work waits for new input.
PAUSES = (30.0, 120.0, 480.0)

TAGS = {
    # Dagster's own retries, which would be a second count.
    "dagster/max_retries": "0",
    # A run whose process vanished unseen counts as failed after this many seconds.
    "dagster/max_runtime": "3600",
}

_UNDER_WAY = {
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.MANAGED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
}


@dataclass
class Attempts:
    """The requests for one piece of work.

    Attributes:
        run_key: The run under way; empty when there is none.
        upto: The position in the log that this run, or the last one, covers.
        failures: Runs that failed since the last one that succeeded.
        not_before: No request before this time (Unix seconds).
    """

    run_key: str = ""
    upto: int = 0
    failures: int = 0
    not_before: float = 0

    @property
    def exhausted(self) -> bool:
        """Whether the work failed so often that only new input brings another attempt."""
        return self.failures >= len(PAUSES)

    def ask(self, name: str, upto: int, now: float) -> str:
        """Note a request for the work up to position ``upto``; its run key.

        Dagster remembers run keys for ever and drops a request whose key it knows: the key holds the position, for
        new input, and the time, for another attempt at the same.
        """
        self.run_key, self.upto = f"{name}:{upto}:{now:.3f}", upto
        return self.run_key

    def settle(self, instance: dg.DagsterInstance, now: float) -> State:
        """How the run under way stands. A run that ended is noted here and told once."""
        if not self.run_key:
            return "idle"
        runs = instance.get_runs(dg.RunsFilter(tags={"dagster/run_key": self.run_key}), limit=1)
        if not runs:
            # Never launched, or deleted: the key is free to be used again.
            self.run_key = ""
            return "idle"
        status = runs[0].status
        if status in _UNDER_WAY:
            return "under way"
        self.run_key = ""
        if status is dg.DagsterRunStatus.SUCCESS:
            self.failures, self.not_before = 0, 0
            return "succeeded"
        # What a person cancelled is not started again behind their back.
        cancelled = status is dg.DagsterRunStatus.CANCELED
        self.failures = len(PAUSES) if cancelled else min(self.failures + 1, len(PAUSES))
        self.not_before = now + PAUSES[self.failures - 1]
        return "failed"

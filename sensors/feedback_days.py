"""The days whose facts have changed, and which of them are folded: read from the feedback log, kept in a ledger.

The log is read by transaction id up to the oldest transaction still running, never by sequence or time: a row that
commits late has an id at or above that horizon and is seen by a later reading. Every change below the ledger's
position is either folded or its day is open; both are written in one transaction, so a crash at any point, a failed
run and a restored backup lose no day. The sensor and ``moat run`` share the ledger.

Belongs here: which days have changed, which are open. Does not belong here: when to fold a day, and how.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import psycopg

from sensors import checkpoint
from sensors.attempts import Attempts

Connection = psycopg.Connection[Any]

CHECKPOINT = "feedback_days"

# Seconds to let further rows arrive before a day is folded: many events in a few seconds are one run. Interactions
# that nobody has judged yet may wait longer, or a busy app would have its day folded without a pause.
SETTLE_FEEDBACK = 5.0
SETTLE_INTERACTIONS = 60.0

# An event changes its own day; a revision also changes the day its feedback began, where it is counted.
_CHANGED_DAYS = """
with new_event as (
  select
    feedback_id,
    (least(occurred_at, received_at) at time zone 'UTC')::date as day,
    received_at + make_interval(secs => %(feedback)s) as due
  from feedback.feedback_event
  where xact_id >= %(after)s::text::xid8 and xact_id < %(before)s::text::xid8
),
changed as (
  select day, due from new_event
  union all
  select min((least(e.occurred_at, e.received_at) at time zone 'UTC')::date), min(n.due)
  from feedback.feedback_event as e
  join (select feedback_id, min(due) as due from new_event group by feedback_id) as n using (feedback_id)
  group by e.feedback_id
  union all
  select
    (least(occurred_at, received_at) at time zone 'UTC')::date,
    received_at + make_interval(secs => %(interactions)s)
  from feedback.interaction
  where xact_id >= %(after)s::text::xid8 and xact_id < %(before)s::text::xid8
)
select day::text, extract(epoch from min(due))::float8 from changed group by day order by day
"""

_EVERYTHING = 2**63 - 1


@dataclass(frozen=True)
class Changes:
    """Days (``YYYY-MM-DD``, UTC) touched by transactions below ``horizon``, each with the time it is due to be folded."""

    horizon: int
    days: dict[str, float]


def changed_days(connection: Connection, after: int) -> Changes:
    """What transactions from ``after`` up to the oldest one still running have changed.

    A position ahead of that transaction is of another server, from which this database was restored: transaction ids
    began anew, and everything is read again.
    """
    row = connection.execute("select pg_snapshot_xmin(pg_current_snapshot())::text").fetchone()
    assert row is not None
    horizon = int(row[0])
    restored = after > horizon
    rows = connection.execute(
        _CHANGED_DAYS,
        {
            "after": "0" if restored else str(after),
            "before": str(_EVERYTHING if restored else horizon),
            "feedback": SETTLE_FEEDBACK,
            "interactions": SETTLE_INTERACTIONS,
        },
    ).fetchall()
    return Changes(horizon, dict(rows))


def clock(connection: Connection) -> float:
    """The database's time, which ``received_at`` is of (Unix seconds)."""
    row = connection.execute("select extract(epoch from clock_timestamp())::float8").fetchone()
    assert row is not None
    return float(row[0])


@dataclass
class OpenDay:
    """A day with changes that are not known to be folded.

    Attributes:
        opened: No change below this position is waiting;
        changed: all that wait are below this one.
        due: When to fold it (Unix seconds); None when it failed too often, until it changes again.
        attempts: The runs that were to fold it.
    """

    opened: int
    changed: int
    due: float | None
    attempts: Attempts = field(default_factory=Attempts)

    def is_due(self, now: float) -> bool:
        """Whether a run is to be asked for now."""
        return (
            not self.attempts.run_key
            and self.due is not None
            and max(self.due, self.attempts.not_before) <= now
        )


@dataclass
class Ledger:
    """How far the log has been read, and the open days by name.

    Attributes:
        position: Every transaction below it has been read.
        days: Open days.
    """

    position: int = 0
    days: dict[str, OpenDay] = field(default_factory=dict)

    def take_in(self, changes: Changes, first: str) -> list[str]:
        """Open the changed days and move the position; returns the days before the ``first`` partition, which stay out."""
        restored = self.position > changes.horizon
        if restored:
            self.position, self.days = 0, {}
        for day, due in changes.days.items():
            if day >= first:
                self.open(day, changes.horizon, due)
        if changes.days or restored:
            self.position = changes.horizon
        return [day for day in changes.days if day < first]

    def open(self, day: str, horizon: int, due: float) -> None:
        """Note that ``day`` has changed below ``horizon`` and is to be folded from the time ``due``."""
        entry = self.days.setdefault(day, OpenDay(self.position, horizon, due))
        entry.changed = horizon
        entry.due = due if entry.due is None else min(entry.due, due)

    def folded(self, day: str, upto: int) -> None:
        """Close a day that a fold begun at position ``upto`` has finished, unless it has changed since."""
        entry = self.days.get(day)
        if entry is not None and entry.changed <= upto:
            del self.days[day]
        elif entry is not None:
            entry.opened = max(entry.opened, upto)

    @property
    def folded_upto(self) -> int:
        """Every change below this position is folded, but for the days given up."""
        waiting = [entry.opened for entry in self.days.values() if not entry.attempts.exhausted]
        return min(waiting, default=self.position)

    def given_up(self) -> list[str]:
        """Days whose fold failed so often that it is not tried again without new input."""
        return sorted(day for day, entry in self.days.items() if entry.attempts.exhausted)


def read_ledger(connection: Connection) -> Ledger:
    """The ledger as it is; an empty one before the first reading of the log."""
    stored = checkpoint.read(connection, CHECKPOINT)
    days = {
        day: OpenDay(**{**entry, "attempts": Attempts(**entry["attempts"])})
        for day, entry in stored.get("open", {}).items()
    }
    return Ledger(stored.get("xid", 0), days)


@contextmanager
def ledger_for_update(connection: Connection) -> Iterator[Ledger]:
    """The ledger, for nobody else to change until the transaction ends; changes are written when the block ends."""
    checkpoint.lock(connection, CHECKPOINT)
    ledger = read_ledger(connection)
    before = asdict(ledger)
    yield ledger
    if (after := asdict(ledger)) != before:
        checkpoint.write(connection, CHECKPOINT, {"xid": after["position"], "open": after["days"]})

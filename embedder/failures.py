"""The texts that could not be embedded: what was wrong, how often it was tried, and when it is tried again.

One row a text in `failures.parquet` of the output folder. A text leaves it by being embedded, or by being
absent from every input for as long as the longest wait.

Belongs here: the table, its file, and when a text is due.
Does not belong here: what makes a text fail.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedder import protocol
from embedder.model import canonical
from embedder.shards import write_table

FIRST_WAIT = timedelta(hours=1)
LONGEST_WAIT = timedelta(days=30)

ENDED_PROCESS = "it ended the process it was in"
"""Words in the error of a text that raised nothing but ended everything: it is only tried again apart from others."""

SCHEMA = pa.schema(
    [
        pa.field(protocol.CONTENT_HASH, pa.string(), nullable=False),
        pa.field(protocol.ERROR, pa.string(), nullable=False),
        pa.field(protocol.ATTEMPTS, pa.int32(), nullable=False),
        pa.field(protocol.NEXT_ATTEMPT_AT, pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)


@dataclass(frozen=True)
class Failure:
    """One text that failed."""

    error: str
    attempts: int
    next_attempt_at: datetime


def wait_after(attempts: int) -> timedelta:
    """How long a text rests after so many failed attempts: 1 h, 4 h, 16 h, 2.7 d, 10.7 d, then 30 d each time."""
    # The exponent is limited before a timedelta would overflow.
    doublings: int = 2 * min(attempts - 1, 10)
    return min(LONGEST_WAIT, FIRST_WAIT * (1 << doublings))


def read(
    folder: Path, fingerprint: Mapping[str, Any], say: Callable[[str], None] = lambda _line: None
) -> dict[str, Failure]:
    """The failures of earlier runs with this fingerprint, by content hash; without a file there are none.

    What another model refused does not count. A file that is not such a table is renamed and said.
    """
    path = folder / protocol.FAILURES_FILE
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        return {}
    except (pa.ArrowInvalid, OSError) as error:
        aside = path.with_suffix(".unreadable")
        path.replace(aside)
        say(f"{path} is not readable ({error}); moved aside to {aside.name}, its texts are tried again")
        return {}
    if (table.schema.metadata or {}).get(protocol.META_FINGERPRINT) != canonical(dict(fingerprint)).encode():
        return {}
    return {
        row[protocol.CONTENT_HASH]: Failure(
            row[protocol.ERROR], row[protocol.ATTEMPTS], row[protocol.NEXT_ATTEMPT_AT]
        )
        for row in table.to_pylist()
    }


def parked(known: Mapping[str, Failure], now: datetime) -> set[str]:
    """The keys that are not due yet. A time beyond the longest wait was set by a clock that was wrong, and counts not."""
    return {key for key, failure in known.items() if now < failure.next_attempt_at <= now + LONGEST_WAIT}


def deadly(known: Mapping[str, Failure]) -> set[str]:
    """The keys whose text ended the process it was in."""
    return {key for key, failure in known.items() if ENDED_PROCESS in failure.error}


def updated(
    known: Mapping[str, Failure], tried: Container[str], failed: Mapping[str, str], now: datetime
) -> dict[str, Failure]:
    """The table after a run.

    Args:
        known: The table before it.
        tried: Keys that have a vector now, unless they are in `failed`. Keys of `known` that are not among
            them were parked, or belong to another input.
        failed: Key -> error.
        now: When the run was planned.
    """
    kept = {
        key: failure
        for key, failure in known.items()
        if key not in tried and failure.next_attempt_at + LONGEST_WAIT > now
    }
    for key, error in failed.items():
        attempts = known[key].attempts + 1 if key in known else 1
        kept[key] = Failure(error, attempts, now + wait_after(attempts))
    return kept


def write(folder: Path, fingerprint: Mapping[str, Any], failures: Mapping[str, Failure]) -> None:
    """Replace the table; no failure gives a file without rows. The bytes depend on the arguments alone."""
    rows = [(key, *dataclasses.astuple(failures[key])) for key in sorted(failures)]
    columns = [pa.array([row[i] for row in rows], field.type) for i, field in enumerate(SCHEMA)]
    schema = SCHEMA.with_metadata({protocol.META_FINGERPRINT: canonical(dict(fingerprint)).encode()})
    write_table(folder / protocol.FAILURES_FILE, pa.Table.from_arrays(columns, schema=schema))

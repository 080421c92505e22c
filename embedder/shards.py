"""The output folder: which keys it holds, which shards are to be made, and writing one so that a kill is harmless.

A shard is up to `shard_size` keys, named by the hash of the fingerprint and those keys, so a file that exists
under its name is finished. The shards of a run are fixed before the first is made and do not depend on how far
an earlier attempt came: `plan.json` names the shards that were there when the work was planned, and while the
same input is worked on again, only the keys in those count as already present. The file is removed at the end.

Belongs here: everything that touches the output folder.
Does not belong here: reading texts, tokenising, encoding.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedder import protocol
from embedder.model import canonical, release_id
from embedder.protocol import EmbedderError

SHARD_SIZE = 4096

FAILURE_SCHEMA = pa.schema([(protocol.CONTENT_HASH, pa.string()), (protocol.ERROR, pa.string())])


@dataclass(frozen=True)
class Shard:
    """One unit of work: keys in first-seen order and the input rows that hold their texts."""

    shard_id: str
    keys: list[str]
    rows: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """All shards of a run, and which of them an earlier, killed attempt has already finished."""

    shards: list[Shard]
    finished: frozenset[str]
    distinct: int
    """Distinct keys of the input."""
    present: int
    """Distinct keys of the input that earlier runs had embedded."""


@contextlib.contextmanager
def locked(folder: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Create the folder and keep other runs out of it; the lock ends with the process, however it ends.

    While a live run holds the folder, `waiting` is called every half second; what it raises ends the wait.
    (The launcher of that run may be dead: what it still embeds is work that need not be done again.)
    Also removes the temporary files of dead runs. Raises EmbedderError when the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / protocol.LOCK_FILE).open("a")
    except OSError as error:
        raise EmbedderError(
            f"{folder} cannot be written to ({error.strerror}); name another --output folder"
        ) from error
    with lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                time.sleep(0.5)
            else:
                break
        for path in folder.glob(".*.tmp"):
            path.unlink()
        yield


def distinct_rows(keys: pa.ChunkedArray) -> tuple[pa.Array, npt.NDArray[np.int64]]:
    """(distinct keys in first-seen order, int64 number of the row where each is first seen)."""
    if len(keys) == 0:
        return pa.array([], pa.large_string()), np.zeros(0, np.int64)
    encoded = keys.cast(pa.large_string()).combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0)
    _codes, first = np.unique(encoded.indices.to_numpy(), return_index=True)
    return encoded.dictionary, first.astype(np.int64)


def make_plan(
    folder: Path,
    fingerprint: dict[str, Any],
    keys: pa.ChunkedArray,
    *,
    shard_size: int = SHARD_SIZE,
    say: Callable[[str], None] = lambda _line: None,
) -> Plan:
    """Decide what is to be embedded, and record it in `plan.json`. Needs the lock.

    Keys in the folder's shards of this fingerprint are left out. When `plan.json` is of this very work and the
    folder has changed since by nothing but shards of this work, the earlier decision is kept: the result is then
    the same, byte for byte, as if the work had never been interrupted. Otherwise everything present counts,
    so no key is embedded twice. A shard file that cannot be read is renamed to `*.unreadable` and said.
    """
    distinct, rows = distinct_rows(keys)
    existing = _existing_keys(folder, fingerprint, say)
    work = hashlib.sha256(
        json.dumps([canonical(fingerprint), shard_size, distinct.to_pylist()]).encode()
    ).hexdigest()

    earlier = _planned_earlier(folder, work)
    if earlier is not None and earlier <= existing.keys():
        shards, present = _cut(fingerprint, distinct, rows, [existing[name] for name in earlier], shard_size)
        finished = existing.keys() - earlier
        if finished <= {shard.shard_id for shard in shards}:
            return Plan(shards, frozenset(finished), len(distinct), present)

    shards, present = _cut(fingerprint, distinct, rows, list(existing.values()), shard_size)
    if shards:
        plan = json.dumps({"work": work, "earlier": sorted(existing)}).encode()
        _write_atomically(folder / protocol.PLAN_FILE, lambda path: _write_bytes(path, plan))
    else:
        end_plan(folder)
    return Plan(shards, frozenset(), len(distinct), present)


def end_plan(folder: Path) -> None:
    """Forget the plan: all its shards are written."""
    (folder / protocol.PLAN_FILE).unlink(missing_ok=True)


def shard_id(fingerprint: dict[str, Any], keys: Sequence[str]) -> str:
    """32 hex digits; depends on the fingerprint, the keys and their order."""
    text = json.dumps([canonical(fingerprint), list(keys)], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def write_shard(
    folder: Path,
    shard: Shard,
    vectors: npt.NDArray[np.float32],
    failures: dict[str, str],
    *,
    fingerprint: dict[str, Any],
    engine: str,
    dtype: str,
) -> None:
    """Write one shard: `vectors` are float32[n, d] for the keys that are not in `failures`, in order.

    The failures (key: error) go into the file's metadata, so that a resumed run can report them. A shard in
    which every key failed is not written. Bytes depend only on the arguments.
    """
    good = [key for key in shard.keys if key not in failures]
    if not good:
        return
    flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    schema = pa.schema(
        [
            pa.field(protocol.CONTENT_HASH, pa.string(), nullable=False),
            pa.field(protocol.VECTOR, column.type, nullable=False),
        ],
        metadata={
            protocol.META_FINGERPRINT: canonical(fingerprint).encode(),
            protocol.META_RELEASE: release_id(fingerprint).encode(),
            protocol.META_ENGINE: engine.encode(),
            protocol.META_DTYPE: dtype.encode(),
            protocol.META_FAILURES: json.dumps(failures, sort_keys=True).encode(),
        },
    )
    table = pa.Table.from_arrays([pa.array(good, pa.string()), column], schema=schema)
    _write_table(folder / f"{shard.shard_id}.parquet", table)


def shard_failures(folder: Path, shard: Shard) -> dict[str, str]:
    """The failures recorded in a finished shard."""
    metadata = protocol.shard_metadata(folder / f"{shard.shard_id}.parquet")
    return dict(json.loads(metadata.get(protocol.META_FAILURES, b"{}")))


def write_failures(folder: Path, failures: dict[str, str]) -> None:
    """Replace `failures.parquet` by the failures of this run; no failure gives a file without rows."""
    columns = [pa.array(list(failures), pa.string()), pa.array(list(failures.values()), pa.string())]
    _write_table(folder / protocol.FAILURES_FILE, pa.Table.from_arrays(columns, schema=FAILURE_SCHEMA))


def count_present(folder: Path, fingerprint: dict[str, Any], keys: pa.ChunkedArray) -> int:
    """How many distinct keys of the input the folder's shards of this fingerprint hold."""
    distinct, _rows = distinct_rows(keys)
    existing = _existing_keys(folder, fingerprint, lambda _line: None)
    return int(np.count_nonzero(_is_in(distinct, list(existing.values()))))


def _cut(
    fingerprint: dict[str, Any],
    distinct: pa.Array,
    rows: npt.NDArray[np.int64],
    done: list[pa.Array],
    shard_size: int,
) -> tuple[list[Shard], int]:
    pending = np.flatnonzero(~_is_in(distinct, done))
    shards = []
    for start in range(0, len(pending), shard_size):
        chosen = pending[start : start + shard_size]
        keys = distinct.take(pa.array(chosen)).to_pylist()
        shards.append(Shard(shard_id(fingerprint, keys), keys, rows[chosen]))
    return shards, len(distinct) - len(pending)


def _is_in(keys: pa.Array, done: list[pa.Array]) -> npt.NDArray[np.bool_]:
    known = pa.chunked_array(done, pa.large_string()).combine_chunks()
    found: npt.NDArray[np.bool_] = pc.is_in(keys, value_set=known).to_numpy(zero_copy_only=False)
    return found


def _existing_keys(
    folder: Path, fingerprint: dict[str, Any], say: Callable[[str], None]
) -> dict[str, pa.Array]:
    wanted = canonical(fingerprint).encode()
    existing: dict[str, pa.Array] = {}
    for path in protocol.shard_paths(folder):
        try:
            if protocol.shard_metadata(path)[protocol.META_FINGERPRINT] != wanted:
                continue
            keys = pq.read_table(path, columns=[protocol.CONTENT_HASH])[protocol.CONTENT_HASH]
        except (EmbedderError, pa.ArrowInvalid, OSError) as error:
            aside = path.with_suffix(".unreadable")
            path.replace(aside)
            say(f"{error}; moved aside to {aside.name}, its texts are embedded again")
            continue
        existing[path.stem] = pa.concat_arrays(keys.cast(pa.large_string()).chunks)
    return existing


def _planned_earlier(folder: Path, work: str) -> set[str] | None:
    try:
        plan = json.loads((folder / protocol.PLAN_FILE).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(plan, dict) or plan.get("work") != work or not isinstance(plan.get("earlier"), list):
        return None
    return set(plan["earlier"])


def _write_table(path: Path, table: pa.Table) -> None:
    # Hashes and floats repeat too little for dictionaries to pay.
    def write(temporary: Path) -> None:
        pq.write_table(table, temporary, compression="zstd", use_dictionary=False)

    _write_atomically(path, write)


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`path` holds its old content or the whole new one, also after a loss of power."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

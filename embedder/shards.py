"""The output folder: which keys it holds, which shards are to be made, and writing one so that a kill is harmless.

A shard is up to `shard_size` keys, named by the hash of the fingerprint and those keys, so a file that exists
under its name is finished. The shards of a run are fixed before the first is made and do not depend on how far
an earlier attempt came: `plan.json` names, for each work begun and not ended, the shards that were there when it was
planned, and while the same input is worked on again, only the keys in those count as already present.

What is in the making has a mark, `.<name>.begun`, with its keys. A mark that a dead run has left makes its keys
suspects: one of their texts may have ended the process.

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
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
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

SHARD_SIZES = {"cpu": 4096, "cuda": 65_536}
"""Device -> texts per shard: seconds of work each, which is what a killed run can lose."""

KEPT = timedelta(days=30)
"""So long a work may lie unfinished before what is known of it is forgotten."""

_MARKS = ".*.begun"


@dataclass(frozen=True, eq=False)
class Shard:
    """One unit of work, small enough to be sent to another process: which rows of the input, under which name."""

    number: int
    """From 0, in the order of the input."""
    shard_id: str
    """The hash of the fingerprint and of the rows' keys in order, so it proves that the right rows were read."""
    rows: npt.NDArray[np.int64]
    """Rising row numbers, each the first row with its key."""


@dataclass(frozen=True)
class Plan:
    """All shards of a work, and which of them an earlier, killed attempt has already finished."""

    work: str
    """Names what is to be done: input keys, fingerprint, settings that decide results."""
    planned_at: datetime
    """When the first attempt at this work decided which failed texts are due."""
    shards: list[Shard]
    finished: frozenset[str]
    distinct: int
    """Distinct keys of the input."""
    present: int
    """Distinct keys of the input that earlier runs had embedded."""
    parked: frozenset[str]
    """Keys of the input that are left out because they failed and are not due yet."""
    suspect: frozenset[str] = frozenset()
    """Shards with a text that may end the process it is in."""

    @property
    def missing(self) -> list[Shard]:
        """The shards still to be made."""
        return [shard for shard in self.shards if shard.shard_id not in self.finished]


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
            except OSError as error:
                raise EmbedderError(
                    f"{folder} cannot be locked ({error.strerror}); name an --output folder on a file system with locks"
                ) from error
            else:
                break
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)
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


def among(keys: pa.ChunkedArray, wanted: Collection[str]) -> frozenset[str]:
    """Those of `wanted` that are among the keys of the input."""
    candidates = pa.array(list(wanted), pa.large_string())
    return frozenset(keys.filter(pc.is_in(keys, value_set=candidates)).to_pylist())


def make_plan(
    folder: Path,
    fingerprint: dict[str, Any],
    keys: pa.ChunkedArray,
    *,
    now: datetime,
    parked: Callable[[datetime], Collection[str]] = lambda _now: (),
    suspects: Collection[str] = (),
    shard_size: int = SHARD_SIZES["cpu"],
    policy: str = "",
    say: Callable[[str], None] = lambda _line: None,
) -> Plan:
    """Decide what is to be embedded, and record it in `plan.json`. Needs the lock.

    Keys in the folder's shards of this fingerprint are left out, and those that `parked` names at the time of the
    decision. When `plan.json` knows this very work, and the folder has since gained shards of this work and none
    of others with a key of it, the earlier decision is kept, its time included: the result is then the same, byte
    for byte, as if the work had never been interrupted. Otherwise everything present counts, so no key is embedded
    twice. `policy` stands for further settings that make it another work; `suspects` are keys that make a shard
    suspect and change nothing else. A shard file that cannot be read is renamed to `*.unreadable` and said.
    """
    distinct, rows = distinct_rows(keys)
    existing = _existing_keys(folder, fingerprint, say)
    work = _work_id([canonical(fingerprint), shard_size, policy], distinct)

    def plan_of(earlier: Collection[str], planned_at: datetime) -> Plan:
        done = _is_in(distinct, [existing[name] for name in earlier])
        left_out = _is_in(distinct, [pa.array(list(parked(planned_at)), pa.large_string())]) & ~done
        wanted = ~(done | left_out)
        shards, suspect = _cut(fingerprint, distinct, rows, wanted, shard_size, frozenset(suspects))
        finished = frozenset(existing.keys() - earlier) & {shard.shard_id for shard in shards}
        resting = frozenset(distinct.filter(pa.array(left_out)).to_pylist())
        return Plan(work, planned_at, shards, finished, len(distinct), int(done.sum()), resting, suspect)

    recorded = _plans(folder, now).get(work)
    if recorded is not None and recorded[0] <= existing.keys():
        plan = plan_of(*recorded)
        foreign = existing.keys() - recorded[0] - plan.finished
        if plan.finished and not _is_in(distinct, [existing[name] for name in foreign]).any():
            return plan

    plan = plan_of(existing.keys(), now)
    _record(folder, work, (set(existing), now) if plan.shards else None, now)
    return plan


def end_plan(folder: Path, plan: Plan) -> None:
    """Forget the plan: all its shards are written."""
    _record(folder, plan.work, None, plan.planned_at)


def begin(folder: Path, name: str, keys: Sequence[str]) -> None:
    """Mark something as being in the making. Not forced to disk: a power cut says nothing against a text."""
    path = _mark(folder, name)
    try:
        path.write_text(json.dumps(keys), encoding="ascii")
    except OSError as error:
        raise _unwritable(path, error) from error


def begun(folder: Path, name: str) -> bool:
    """Whether the mark is there."""
    return _mark(folder, name).exists()


def ended(folder: Path, name: str) -> None:
    """Take the mark away."""
    _mark(folder, name).unlink(missing_ok=True)


def marks(folder: Path) -> dict[Path, frozenset[str]]:
    """The marks that dead runs left, with their keys; old ones are removed. Needs the lock."""
    found = {}
    for path in folder.glob(_MARKS):
        if time.time() - path.stat().st_mtime > KEPT.total_seconds():
            path.unlink()
            continue
        try:
            found[path] = frozenset(map(str, json.loads(path.read_bytes())))
        except (ValueError, TypeError):  # the run died while it wrote it, so before it did anything else
            found[path] = frozenset()
    return found


def settle(left: dict[Path, frozenset[str]]) -> None:
    """Reduce marks to the keys that are left of each."""
    for path, keys in left.items():
        if keys:
            write_bytes(path, json.dumps(sorted(keys)).encode())
        else:
            path.unlink(missing_ok=True)


def shard_id(fingerprint: dict[str, Any], keys: Sequence[str]) -> str:
    """32 hex digits; depends on the fingerprint, the keys and their order."""
    text = json.dumps([canonical(fingerprint), list(keys)], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def write_shard(
    folder: Path,
    shard: Shard,
    keys: Sequence[str],
    vectors: npt.NDArray[np.float32],
    failures: dict[str, str],
    *,
    chunk_ids: pa.Array | None = None,
    fingerprint: dict[str, Any],
    engine: str,
    device: str,
    dtype: str,
) -> None:
    """Write one shard: `vectors` are float32[n, d] for its `keys`, and `chunk_ids` as many strings.

    The failures (key: error) go into the file's metadata, so that a resumed run can report them. A shard in
    which every key failed is not written. Bytes depend only on the arguments.
    """
    if not len(keys):
        return
    flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    fields = [
        pa.field(protocol.CONTENT_HASH, pa.string(), nullable=False),
        pa.field(protocol.VECTOR, column.type, nullable=False),
    ]
    columns = [pa.array(keys, pa.string()), column]
    if chunk_ids is not None:
        fields.insert(0, pa.field(protocol.CHUNK_ID, pa.string()))
        columns.insert(0, chunk_ids)
    metadata = {
        protocol.META_FINGERPRINT: canonical(fingerprint).encode(),
        protocol.META_RELEASE: release_id(fingerprint).encode(),
        protocol.META_ENGINE: engine.encode(),
        protocol.META_DEVICE: device.encode(),
        protocol.META_DTYPE: dtype.encode(),
        protocol.META_FAILURES: json.dumps(failures, sort_keys=True).encode(),
    }
    table = pa.Table.from_arrays(columns, schema=pa.schema(fields, metadata=metadata))
    write_table(_path(folder, shard.shard_id), table)


def shard_failures(folder: Path, shard_id: str) -> dict[str, str]:
    """The failures recorded in a finished shard."""
    metadata = protocol.shard_metadata(_path(folder, shard_id))
    return dict(json.loads(metadata.get(protocol.META_FAILURES, b"{}")))


def count_rows(folder: Path, shards: Sequence[Shard]) -> int:
    """How many vectors the files of these shards hold; one that is not there holds none."""
    paths = (_path(folder, shard.shard_id) for shard in shards)
    return sum(pq.read_metadata(path).num_rows for path in paths if path.exists())


def write_table(path: Path, table: pa.Table) -> None:
    """Replace a Parquet file at once: `path` holds its old content or all of the new, whatever happens."""
    # Hashes and floats repeat too little for dictionaries to pay.
    _write(path, lambda temporary: pq.write_table(table, temporary, compression="zstd", use_dictionary=False))


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a small file at once, see `write_table`."""
    _write(path, lambda temporary: temporary.write_bytes(data))


def _work_id(parts: list[Any], keys: pa.Array) -> str:
    """Depends on the parts, the keys and their order. Hashes Arrow's own memory: there may be millions."""
    found = hashlib.sha256(json.dumps([*parts, len(keys)]).encode())
    if len(keys):
        ends = np.frombuffer(keys.buffers()[1], np.int64, len(keys) + 1)
        found.update(ends.tobytes())
        found.update(memoryview(keys.buffers()[2])[: ends[-1]])
    return found.hexdigest()


def _path(folder: Path, shard_id: str) -> Path:
    return folder / f"{shard_id}.parquet"


def _cut(
    fingerprint: dict[str, Any],
    distinct: pa.Array,
    rows: npt.NDArray[np.int64],
    wanted: npt.NDArray[np.bool_],
    shard_size: int,
    suspects: frozenset[str],
) -> tuple[list[Shard], frozenset[str]]:
    """(the shards, the names of those with a suspect)."""
    pending = np.flatnonzero(wanted)
    shards, suspect = [], set()
    for number, start in enumerate(range(0, len(pending), shard_size)):
        chosen = pending[start : start + shard_size]
        keys = distinct.take(pa.array(chosen)).to_pylist()
        shards.append(Shard(number, shard_id(fingerprint, keys), rows[chosen]))
        if not suspects.isdisjoint(keys):
            suspect.add(shards[-1].shard_id)
    return shards, frozenset(suspect)


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
        existing[path.stem] = keys.cast(pa.large_string()).combine_chunks()
    return existing


def _plans(folder: Path, now: datetime) -> dict[str, tuple[set[str], datetime]]:
    """Work -> the shards there were when it was planned, and when that was; not what has lain for too long."""
    try:
        found = {
            work: (set(plan["earlier"]), datetime.fromisoformat(plan["planned_at"]))
            for work, plan in json.loads((folder / protocol.PLAN_FILE).read_bytes()).items()
        }
        return {work: plan for work, plan in found.items() if plan[1] + KEPT > now}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _record(folder: Path, work: str, plan: tuple[set[str], datetime] | None, now: datetime) -> None:
    """Replace what `plan.json` says of a work, None for nothing."""
    plans = _plans(folder, now)
    plans.pop(work, None)
    if plan is not None:
        plans[work] = plan
    path = folder / protocol.PLAN_FILE
    if plans:
        content = {
            work: {"earlier": sorted(earlier), "planned_at": planned_at.isoformat()}
            for work, (earlier, planned_at) in plans.items()
        }
        write_bytes(path, json.dumps(content).encode())
    else:
        path.unlink(missing_ok=True)


def _mark(folder: Path, name: str) -> Path:
    return folder / f".{name}.begun"


def _write(path: Path, write: Callable[[Path], object]) -> None:
    # Not named by the process: several machines may share the folder.
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> EmbedderError:
    return EmbedderError(
        f"{path} cannot be written ({error.strerror or error}); make room or name another --output folder, "
        "then run the same command again: finished shards stay"
    )

"""Immutable dataset versions: content-addressed Parquet, a canonical manifest, and the registry's pointer.

What belongs here: how a built set becomes files, what names it, and the proof that the files are still
those. What does not: which rows a set has (builders) and the text of its card (card).

Layout under the lake, all paths relative to it::

    datasets/objects/<aa>/<sha256>.parquet      every shard of every version, named by its bytes
    datasets/<dataset>/<version>/manifest.json  canonical JSON; its SHA-256 is the version
    datasets/<dataset>/<version>/README.md      dataset card, with the file list that loaders read
    datasets/<dataset>/<version>/*.parquet      links to the objects: train, validation, test, lineage

Trainer files hold the trainer's columns and nothing else; `lineage` has one line per row with what it came
from. A row is found there by its id, the SHA-256 of its canonical JSON; both are sorted by it.
"""

import hashlib
import io
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
from psycopg.types.json import Jsonb

from assets.datasets.builders import CODE_VERSION, Built, Kind, Row, kto_weights
from assets.datasets.canonical import canonical, digest, digest_of_ids
from assets.datasets.card import card
from assets.datasets.splits import SPLITS
from storage.lake import write_atomic

ROWS_PER_SHARD = 65_536
"""About this many at most: beyond it a split is cut by the first digits of its row ids."""
LINEAGE = "lineage"

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_IDS = pa.list_(pa.string())
SCHEMAS: dict[Kind, pa.Schema] = {
    "sft": pa.schema([("prompt", _MESSAGES), ("completion", _MESSAGES)]),
    "preference": pa.schema([("prompt", _MESSAGES), ("chosen", _MESSAGES), ("rejected", _MESSAGES)]),
    "kto": pa.schema([("prompt", _MESSAGES), ("completion", _MESSAGES), ("label", pa.bool_())]),
}
LINEAGE_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("split", pa.string()),
        ("origin", pa.string()),
        ("signal_ids", _IDS),
        ("event_ids", _IDS),
        ("interaction_ids", _IDS),
        ("sources", _IDS),
    ]
)


@dataclass(frozen=True, slots=True)
class Stored:
    """A version whose files are in the lake, whether or not the registry knows it."""

    dataset: str
    version: str
    manifest: dict[str, Any]
    folder: Path

    @property
    def rows(self) -> int:
        """Rows over all splits."""
        return sum(split["rows"] for split in self.manifest["splits"].values())


@dataclass(frozen=True, slots=True)
class DatasetVersion:
    """A published version; `created` is False when the registry had it already."""

    dataset: str
    version: str
    rows: int
    uri: str
    created: bool


@dataclass(frozen=True, slots=True)
class Problem:
    """A broken promise of a version: the file (relative to the lake), the rule, and what to do."""

    file: str
    rule: str
    remedy: str


def publish(
    conn: psycopg.Connection[Any],
    lake: Path,
    dataset: str,
    built: Built,
    *,
    run_id: str | None = None,
    moved_by: str = "pipeline",
) -> DatasetVersion:
    """Store the files, then register the version and move the alias `latest`, in one transaction.

    Killed at any point and run again, it ends in the same state; run twice, the second writes nothing. When
    the caller has a transaction open, the registry's rows become visible with the caller's commit.
    """
    stored = store(lake, dataset, built)
    uri = stored.folder.resolve().as_uri()
    with conn.transaction():
        created = _register(conn, stored, uri, run_id)
        set_alias(conn, dataset, "latest", stored.version, moved_by)
    return DatasetVersion(dataset, stored.version, stored.rows, uri, created)


def set_alias(conn: psycopg.Connection[Any], dataset: str, alias: str, version: str, moved_by: str) -> bool:
    """Point `alias` at a registered version; True when it moved. Rolling back is this call with the old version.

    Raises LookupError when the registry has no such version.
    """
    known = conn.execute(
        "select 1 from registry.dataset_version where dataset = %s and version = %s", (dataset, version)
    ).fetchone()
    if known is None:
        raise LookupError(
            f"registry.dataset_version has no version {version} of {dataset}: publish it, or pick a listed one"
        )
    moved = conn.execute(
        """
        insert into registry.dataset_alias as held (dataset, alias, version, moved_at, moved_by)
        values (%s, %s, %s, now(), %s)
        on conflict (dataset, alias) do update
           set version = excluded.version, moved_at = excluded.moved_at, moved_by = excluded.moved_by
         where held.version is distinct from excluded.version
        """,
        (dataset, alias, version, moved_by),
    )
    return moved.rowcount == 1


def store(lake: Path, dataset: str, built: Built) -> Stored:
    """Write what is missing of a version's objects and folder; `dataset` is a lower-case name with underscores."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", dataset) or dataset == "objects":
        raise ValueError(
            f"dataset name {dataset!r}: use lower-case letters, digits and underscores, but not `objects`"
        )
    schema = SCHEMAS[built.kind]
    splits: dict[str, Any] = {}
    for split in SPLITS:
        rows = [row for row in built.rows if row.split == split]
        shards = [_put_shard(lake, [row.content for row in part], schema) for part in _parts(rows)]
        splits[split] = {"rows": len(rows), "shards": shards}
    shards = [
        _put_shard(lake, [_lineage(row) for row in part], LINEAGE_SCHEMA) for part in _parts(built.rows)
    ]
    lineage = {"rows": len(built.rows), "shards": shards}
    manifest = _manifest(dataset, built, splits, lineage)
    payload = canonical(manifest)
    version = hashlib.sha256(payload).hexdigest()
    folder = _folder(lake, dataset, version)
    folder.mkdir(parents=True, exist_ok=True)
    for name, sha256 in files(manifest):
        _link(_object(lake, sha256), folder / name)
    _put(folder / "README.md", card(manifest, version).encode())
    _put(folder / "manifest.json", payload)
    return Stored(dataset, version, manifest, folder)


def files(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """The Parquet files of a version's folder as (name, sha256 of the object)."""
    named = []
    for split, part in [*manifest["splits"].items(), (LINEAGE, manifest["lineage"])]:
        shards = part["shards"]
        for number, shard in enumerate(shards):
            suffix = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
            named.append((f"{split}{suffix}.parquet", shard["sha256"]))
    return named


def verify(lake: Path, dataset: str, version: str) -> list[Problem]:
    """Read every file of a version again and compare it with its name, its digest and its manifest.

    An empty list means that each byte is what was published.
    """
    folder = _folder(lake, dataset, version)
    path = folder / "manifest.json"
    try:
        payload = path.read_bytes()
    except FileNotFoundError:
        return [_problem(lake, path, "the manifest exists")]
    if hashlib.sha256(payload).hexdigest() != version:
        return [_problem(lake, path, "the manifest's SHA-256 is the version")]
    manifest = orjson.loads(payload)
    problems: list[Problem] = []
    row_ids: list[str] = []
    for part in manifest["splits"].values():
        for shard in part["shards"]:
            rows = _verify_shard(lake, shard, problems)
            row_ids += [digest(row) for row in rows]
    explained: list[str] = []
    for shard in manifest["lineage"]["shards"]:
        explained += [entry["row_id"] for entry in _verify_shard(lake, shard, problems)]
    if not problems and sorted(row_ids) != sorted(explained):
        problems.append(_problem(lake, path, "every row has one line of lineage"))
    for name, sha256 in files(manifest):
        problems += _verify_copy(lake, folder / name, sha256)
    if not (folder / "README.md").exists():
        problems.append(_problem(lake, folder / "README.md", "the card exists"))
    return problems


def _verify_shard(lake: Path, shard: dict[str, Any], problems: list[Problem]) -> list[dict[str, Any]]:
    path = _object(lake, shard["sha256"])
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        problems.append(_problem(lake, path, "the object exists"))
        return []
    if hashlib.sha256(data).hexdigest() != shard["sha256"]:
        problems.append(_problem(lake, path, "the object's SHA-256 is its name"))
        return []
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(data)).to_pylist()
    if len(rows) != shard["rows"]:
        problems.append(_problem(lake, path, f"the object holds {shard['rows']} rows"))
    elif digest_of_ids(digest(row) for row in rows) != shard["logical_digest"]:
        problems.append(_problem(lake, path, "the rows have the manifest's logical digest"))
    return rows


def _verify_copy(lake: Path, path: Path, sha256: str) -> list[Problem]:
    target = _object(lake, sha256)
    if not path.exists():
        return [_problem(lake, path, "the split file exists")]
    if target.exists() and path.samefile(target):
        return []
    if _sha256_of(path) != sha256:
        return [_problem(lake, path, "the split file is the manifest's object")]
    return []


def _problem(lake: Path, path: Path, rule: str) -> Problem:
    remedy = (
        "build the dataset again from the same signals: it puts back what differs; "
        "or restore the file from a backup of the lake"
    )
    return Problem(path.relative_to(lake).as_posix(), rule, remedy)


def _register(conn: psycopg.Connection[Any], stored: Stored, uri: str, run_id: str | None) -> bool:
    inserted = conn.execute(
        """
        insert into registry.dataset_version (dataset, version, manifest, rows, uri, run_id, created_at)
        values (%s, %s, %s, %s, %s, %s, now())
        on conflict (dataset, version) do nothing
        """,
        (stored.dataset, stored.version, Jsonb(stored.manifest), stored.rows, uri, run_id),
    )
    return inserted.rowcount == 1


def _manifest(dataset: str, built: Built, splits: dict[str, Any], lineage: dict[str, Any]) -> dict[str, Any]:
    rows_by_source: dict[str, int] = {}
    for row in built.rows:
        for source in row.sources:
            rows_by_source[source] = rows_by_source.get(source, 0) + 1
    manifest: dict[str, Any] = {
        "dataset": dataset,
        "kind": built.kind,
        "recipe": {"code": CODE_VERSION, "parameters": asdict(built.recipe)},
        "inputs": {"signals": built.inputs_digest, "golden_questions": built.golden_digest},
        "schema": [{"name": field.name, "type": str(field.type)} for field in SCHEMAS[built.kind]],
        # The bytes of Parquet files belong to a writer; without its name a new name would look unexplained.
        "writer": f"pyarrow {pa.__version__}",
        "splits": splits,
        "lineage": lineage,
        "signals": {"read": built.signals, "used": built.used, "dropped": built.dropped},
        "origins": {
            split: _count(row.origin for row in built.rows if row.split == split) for split in SPLITS
        },
        "sources": rows_by_source,
        "groups": {"count": built.groups, "largest_share": built.largest_group_share},
        "characters": _lengths(built.rows),
    }
    if built.kind == "kto":
        labels = {
            split: _count(str(row.content["label"]).lower() for row in built.rows if row.split == split)
            for split in SPLITS
        }
        train = labels["train"]
        manifest["labels"] = labels
        manifest["kto_weights"] = kto_weights(train.get("true", 0), train.get("false", 0))
    return manifest


def _count(items: Iterator[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return counts


def _lengths(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Characters per text column over all rows; a percentile is the nearest rank, so all are whole numbers."""
    lengths: dict[str, list[int]] = {}
    for row in rows:
        for column, messages in row.content.items():
            if column != "label":
                size = sum(len(turn["content"]) for turn in messages)
                lengths.setdefault(column, []).append(size)
    figures = {}
    for column, sizes in lengths.items():
        sizes.sort()
        last = len(sizes) - 1
        figures[column] = {
            "min": sizes[0],
            "p50": sizes[last // 2],
            "p95": sizes[last * 95 // 100],
            "max": sizes[last],
        }
    return figures


def _lineage(row: Row) -> dict[str, Any]:
    return {
        "row_id": row.row_id,
        "split": row.split,
        "origin": row.origin,
        "signal_ids": list(row.signal_ids),
        "event_ids": list(row.event_ids),
        "interaction_ids": list(row.interaction_ids),
        "sources": list(row.sources),
    }


def _parts(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows by the first digits of their id, so a new row rewrites one shard; no rows are one empty shard."""
    digits = 0
    while len(rows) > ROWS_PER_SHARD * 16**digits:
        digits += 1
    parts: list[list[Row]] = [[] for _ in range(16**digits)]
    for row in rows:
        parts[int(row.row_id[:digits] or "0", 16)].append(row)
    return parts


def _put_shard(lake: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> dict[str, Any]:
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        compression_level=3,
        version="2.6",
        data_page_version="1.0",
        use_dictionary=True,
        write_statistics=True,
    ) as writer:
        # No row group at all when there are no rows: loaders choke on an empty one.
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema), row_group_size=16_384)
    data = sink.getvalue().to_pybytes()
    sha256 = hashlib.sha256(data).hexdigest()
    _put(_object(lake, sha256), data)
    return {"sha256": sha256, "rows": len(rows), "logical_digest": digest_of_ids(map(digest, rows))}


def _object(lake: Path, sha256: str) -> Path:
    return lake / "datasets" / "objects" / sha256[:2] / f"{sha256}.parquet"


def _folder(lake: Path, dataset: str, version: str) -> Path:
    return lake / "datasets" / dataset / version


def _put(path: Path, data: bytes) -> None:
    """Make `path` hold `data`: nothing is written when it does, and a damaged file is put right."""
    if path.exists() and path.read_bytes() == data:
        return
    write_atomic(path, data)
    # Trainers' files are the objects themselves: a script that edits one in place would change every version.
    path.chmod(0o444)


def _link(target: Path, path: Path) -> None:
    """Make `path` the same file as `target`, or a copy where the file system has no hard links."""
    if path.exists() and (path.samefile(target) or _sha256_of(path) == target.stem):
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.hardlink_to(target)
    except OSError:
        _put(path, target.read_bytes())
    else:
        temporary.replace(path)


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

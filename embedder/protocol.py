"""What the embedding job and its callers agree on: names of files, columns, metadata, checks, exit codes.

Belongs here: constants, the one error type, and reading finished vectors back with pyarrow and numpy.
Does not belong here: anything that plans, encodes or writes; callers import this module, so it stays light.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

CONTRACT_VERSION = 1
"""Raised when the same model folder and text would give vectors that must not be mixed with earlier ones."""

CHUNK_ID = "chunk_id"
CONTENT_HASH = "content_hash"
TEXT = "text"
VECTOR = "vector"
ERROR = "error"
ATTEMPTS = "attempts"
NEXT_ATTEMPT_AT = "next_attempt_at"

FAILURES_FILE = "failures.parquet"
PLAN_FILE = "plan.json"
RUN_FILE = "run.json"
LOCK_FILE = ".lock"
SHARD_PATTERN = "[0-9a-f]" * 32 + ".parquet"

META_FINGERPRINT = b"embedder.fingerprint"
META_RELEASE = b"embedder.release"
META_ENGINE = b"embedder.engine"
META_DEVICE = b"embedder.device"
META_DTYPE = b"embedder.dtype"
META_FAILURES = b"embedder.failures"

CHECK_VECTORS_ARE_SOUND = "vectors_are_sound"

EXIT_OK = 0
EXIT_BAD_INPUT = 2
EXIT_SOME_FAILED = 3
EXIT_OVER_BUDGET = 4
EXIT_INTERRUPTED = 130


class EmbedderError(Exception):
    """The input, the model folder or the output folder is not usable.

    The message names the file, the rule it breaks and what to do.
    """


def shard_paths(folder: Path) -> list[Path]:
    """Finished shard files of an output folder, sorted by name; an absent folder has none."""
    return sorted(folder.glob(SHARD_PATTERN))


def shard_metadata(path: Path) -> dict[bytes, bytes]:
    """The metadata a shard was written with (keys are the META_ constants).

    Raises EmbedderError when the file is not a whole Parquet file or not one of the job's shards.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = dict(pq.read_schema(path).metadata or {})
    except (pa.ArrowInvalid, OSError) as error:
        raise EmbedderError(
            f"{path} is not a readable Parquet file ({error}); remove it and run again"
        ) from error
    if META_FINGERPRINT not in found or META_RELEASE not in found:
        raise EmbedderError(f"{path} carries no embedding fingerprint; move it out of the vectors folder")
    return found


def read_fingerprint(folder: Path) -> dict[str, Any] | None:
    """The fingerprint shared by all shards of a folder, or None when it holds no shard.

    Raises EmbedderError when shards of several releases are mixed.
    """
    by_release: dict[bytes, bytes] = {}
    for path in shard_paths(folder):
        metadata = shard_metadata(path)
        by_release[metadata[META_RELEASE]] = metadata[META_FINGERPRINT]
    if len(by_release) > 1:
        names = ", ".join(sorted(release.decode() for release in by_release))
        raise EmbedderError(
            f"{folder} holds vectors of several releases ({names}), which must never be compared with each "
            "other; name one release, or give each release a folder of its own"
        )
    for fingerprint in by_release.values():
        return dict(json.loads(fingerprint))
    return None


def read_vectors(
    folder: Path, content_hashes: Sequence[str] | None = None, *, release: str | None = None
) -> tuple[list[str], npt.NDArray[np.float32]]:
    """Read vectors back: (hashes, float32[n, dimensions]), row i of the matrix belonging to hash i.

    With `content_hashes`, the rows come in that order and hashes without a vector are left out, so compare
    the returned hashes with the wanted ones. Without, all vectors come in the order of the shard files.
    `release` selects the shards of one release; without it the folder must hold only one, or EmbedderError
    is raised. A folder without vectors gives an empty list and an array of shape (0, 0).
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if release is None:
        read_fingerprint(folder)
        paths = shard_paths(folder)
    else:
        wanted_release = release.encode()
        paths = [path for path in shard_paths(folder) if shard_metadata(path)[META_RELEASE] == wanted_release]

    wanted = None if content_hashes is None else pa.array(content_hashes, pa.string())
    hashes: list[pa.Array] = []
    blocks: list[npt.NDArray[np.float32]] = []
    for path in paths:
        table = pq.read_table(path, columns=[CONTENT_HASH, VECTOR])
        if wanted is not None:
            table = table.filter(pc.is_in(table[CONTENT_HASH], value_set=wanted))
        if table.num_rows == 0:
            continue
        vectors = table[VECTOR].combine_chunks()
        if isinstance(vectors, pa.ChunkedArray):
            vectors = vectors.chunk(0)
        hashes.extend(table[CONTENT_HASH].chunks)
        blocks.append(vectors.flatten().to_numpy().reshape(table.num_rows, vectors.type.list_size))
    if not blocks:
        return [], np.zeros((0, 0), np.float32)
    found = pa.chunked_array(hashes, pa.string())
    matrix = np.concatenate(blocks)
    if wanted is None:
        return found.to_pylist(), matrix
    position = pc.index_in(wanted, value_set=found)
    present = position.is_valid()
    rows = position.filter(present).to_numpy()
    return wanted.filter(present).to_pylist(), matrix[rows]

"""The batch job: a Parquet file of texts in, shards of vectors out, embedding only what is not there yet.

Belongs here: the order of the steps, counting, progress, stopping.
Does not belong here: the command line, Dagster, the steps themselves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embedder import protocol, shards
from embedder.encode import Embedder
from embedder.protocol import EmbedderError
from embedder.shards import Plan, Shard
from embedder.tokens import TokenIds, Tokenised

TOO_LONG = ("truncate", "refuse")


class Interrupted(Exception):
    """The job was asked to stop. Finished shards stay; the same command continues after them."""


@dataclass(frozen=True)
class Progress:
    """How far a run is. Total tokens are an estimate until the last shard is tokenised."""

    tokens: int
    total_tokens: int
    seconds: float
    shard: int
    shards: int

    @property
    def tokens_per_second(self) -> float:
        """0 before the first batch."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float:
        """By tokens, so that sorting by length does not skew it; 0 before the first batch."""
        rate = self.tokens_per_second
        return max(0, self.total_tokens - self.tokens) / rate if rate else 0.0


@dataclass
class Summary:
    """What a run did. distinct = skipped + embedded + failed."""

    release: str
    fingerprint: dict[str, Any]
    chunks: int = 0
    """Rows of the input."""
    distinct: int = 0
    """Distinct content hashes of the input."""
    skipped: int = 0
    """Already in the output folder."""
    embedded: int = 0
    failed: int = 0
    """Rows of failures.parquet."""
    truncated: int = 0
    """Texts embedded without their end, among `embedded`."""
    tokens: int = 0
    """Tokens embedded, special tokens included, filler not."""
    padding_share: float = 0.0
    """Filler among the tokens computed, 0 to 1."""
    shards: int = 0
    """Shard files written by this run."""
    seconds: float = 0.0
    """From reading the input to the last file written, start-up of the engine included."""
    chunks_per_s: float = 0.0
    """Embedded chunks per second of embedding, start-up left out."""
    tokens_per_s: float = 0.0
    engine: str | None = None
    """None when nothing had to be embedded."""
    precision: str | None = None
    streams: int | None = None
    sound: bool = True
    """Every key is accounted for and every new vector is finite, of the right size and length."""
    unsound: list[str] = field(default_factory=list)
    """What is not, in words."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Tokens:
    shard: Shard
    tokenised: Tokenised


def run(
    input_file: Path,
    output: Path,
    *,
    embedder: Embedder,
    too_long: str = "truncate",
    shard_size: int = shards.SHARD_SIZE,
    progress: Callable[[Progress], None] = lambda _progress: None,
    stop: threading.Event | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> Summary:
    """Embed the distinct texts of `input_file` that `output` does not hold yet.

    The input has the string columns content_hash and text; of several rows with one hash the first counts.
    `stop`, once set, ends the run with Interrupted at the next batch. `say` gets notices for a person.
    Raises EmbedderError for an unusable input, output or model; single bad texts are failures, not errors.
    """
    if too_long not in TOO_LONG:
        raise EmbedderError(
            f"unknown policy {too_long!r} for over-long texts; choose {' or '.join(TOO_LONG)}"
        )
    if shard_size < 1:
        raise EmbedderError(f"shard size {shard_size} is below 1; choose the default {shards.SHARD_SIZE}")
    started = time.perf_counter()
    model = embedder.model
    fingerprint = model.fingerprint()
    keys = read_keys(input_file)
    summary = Summary(model.release(), fingerprint, chunks=len(keys))
    told = False

    def waiting() -> None:
        nonlocal told
        _check_stop(stop)
        if not told:
            say(f"another embedding run is writing to {output}: waiting for it to end")
            told = True

    with shards.locked(output, waiting):
        plan = shards.make_plan(output, fingerprint, keys, shard_size=shard_size, say=say)
        failures = _embed(input_file, output, plan, embedder, too_long, progress, stop, summary)
        shards.write_failures(output, failures)
        shards.end_plan(output)
        summary.distinct = plan.distinct
        summary.failed = len(failures)
        present = shards.count_present(output, fingerprint, keys)
    summary.skipped = plan.distinct - summary.embedded - summary.failed
    if present != plan.distinct - summary.failed:
        summary.unsound.append(
            f"{plan.distinct} distinct texts, {summary.failed} failed, but {present} have vectors"
        )
    summary.sound = not summary.unsound
    summary.seconds = time.perf_counter() - started
    return summary


def read_keys(input_file: Path) -> pa.ChunkedArray:
    """The content hashes of the input, one per row. Raises EmbedderError when the file is not as promised."""
    try:
        schema = pq.read_schema(input_file)
        for name in (protocol.CONTENT_HASH, protocol.TEXT):
            if name not in schema.names:
                raise EmbedderError(
                    f"{input_file} has no column {name}, only {', '.join(schema.names)}; the input needs "
                    f"{protocol.CONTENT_HASH} and {protocol.TEXT}"
                )
            kind = schema.field(name).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise EmbedderError(f"{input_file}: column {name} has type {kind}; write it as string")
        keys = pq.read_table(input_file, columns=[protocol.CONTENT_HASH])[protocol.CONTENT_HASH]
    except FileNotFoundError as error:
        raise EmbedderError(
            f"input file {input_file} does not exist; name an existing Parquet file"
        ) from error
    except (pa.ArrowInvalid, OSError) as error:
        raise EmbedderError(
            f"{input_file} is not a readable Parquet file ({error}); write the input again"
        ) from error
    if keys.null_count:
        raise EmbedderError(
            f"{input_file}: {keys.null_count} rows have no {protocol.CONTENT_HASH}; every text needs its key"
        )
    return keys


def _embed(
    input_file: Path,
    output: Path,
    plan: Plan,
    embedder: Embedder,
    too_long: str,
    progress: Callable[[Progress], None],
    stop: threading.Event | None,
    summary: Summary,
) -> dict[str, str]:
    """Make the missing shards one after the other, tokenising the next while one is encoded."""
    missing = [shard for shard in plan.shards if shard.shard_id not in plan.finished]
    failures: dict[str, dict[str, str]] = {
        shard.shard_id: shards.shard_failures(output, shard)
        for shard in plan.shards
        if shard.shard_id in plan.finished
    }
    if missing:
        _check_stop(stop)
        embedder.engine  # noqa: B018 (opened here so that start-up does not count as embedding)
    meter = _Meter(progress, stop, sum(len(shard.keys) for shard in missing), len(missing))
    padded = 0
    with ThreadPoolExecutor(1, "tokenise") as background:
        ahead = _one_ahead(background, _tokenised(input_file, missing, embedder, too_long))
        for tokens in ahead:
            meter.shard_tokenised(tokens.tokenised)
            shard = tokens.shard
            vectors, failed, computed = _encode_shard(tokens, embedder, meter)
            padded += computed
            summary.unsound.extend(_unsound(vectors, len(shard.keys) - len(failed), embedder))
            shards.write_shard(
                output,
                shard,
                vectors,
                failed,
                fingerprint=summary.fingerprint,
                engine=embedder.engine.name,
                dtype=embedder.engine.precision,
            )
            failures[shard.shard_id] = failed
            summary.embedded += len(vectors)
            summary.truncated += tokens.tokenised.truncated
            summary.shards += len(vectors) > 0
    if missing:
        engine = embedder.engine
        summary.engine, summary.precision, summary.streams = engine.name, engine.precision, engine.streams
    seconds = meter.seconds
    summary.tokens = meter.tokens
    summary.padding_share = round(1 - meter.tokens / padded, 4) if padded else 0.0
    summary.chunks_per_s = round(summary.embedded / seconds, 1) if summary.embedded else 0.0
    summary.tokens_per_s = round(meter.tokens / seconds, 1) if meter.tokens else 0.0
    return dict(chain.from_iterable(failures[shard.shard_id].items() for shard in plan.shards))


def _encode_shard(
    tokens: _Tokens, embedder: Embedder, meter: _Meter
) -> tuple[npt.NDArray[np.float32], dict[str, str], int]:
    """(vectors of the keys that did not fail, the failures, tokens computed with filler)."""
    keys = tokens.shard.keys
    failed = {keys[i]: error for i, error in tokens.tokenised.errors.items()}
    places = [i for i, row in enumerate(tokens.tokenised.rows) if row is not None]
    rows: list[TokenIds] = [row for row in tokens.tokenised.rows if row is not None]
    encoded = embedder.encode_tokens(rows, on_batch=meter.batch)
    failed |= {keys[places[i]]: error for i, error in encoded.errors.items()}
    good = [i for i in range(len(rows)) if i not in encoded.errors]
    in_order = {key: failed[key] for key in keys if key in failed}
    return encoded.vectors[good], in_order, encoded.padded_tokens


def _unsound(vectors: npt.NDArray[np.float32], expected: int, embedder: Embedder) -> list[str]:
    found = []
    if vectors.shape != (expected, embedder.model.dimensions):
        found.append(f"vectors of shape {vectors.shape}, expected {(expected, embedder.model.dimensions)}")
    if not np.isfinite(vectors).all():
        found.append("a vector is not finite")
    norms = np.linalg.norm(vectors, axis=1)
    if embedder.model.normalize and len(norms) and np.abs(norms - 1).max() > 1e-3:
        found.append(f"a vector has length {norms[np.abs(norms - 1).argmax()]:.4f} instead of 1")
    return found


def _tokenised(
    input_file: Path, missing: list[Shard], embedder: Embedder, too_long: str
) -> Iterator[_Tokens]:
    texts = _texts_at(input_file, [shard.rows for shard in missing])
    for shard, found in zip(missing, texts, strict=True):
        yield _Tokens(
            shard, embedder.tokeniser.tokenise(found, prefix=embedder.model.prefix, too_long=too_long)
        )


def _texts_at(input_file: Path, wanted: list[npt.NDArray[np.int64]]) -> Iterator[list[Any]]:
    """The texts at row numbers that rise within and across the lists; one list's texts in memory at a time."""
    if not wanted:
        return
    number = 0
    collected: list[Any] = []
    with pq.ParquetFile(input_file) as file:
        start = 0
        for batch in file.iter_batches(batch_size=8192, columns=[protocol.TEXT]):
            while number < len(wanted):
                rows = wanted[number]
                inside = rows[(rows >= start) & (rows < start + batch.num_rows)] - start
                collected.extend(_strings(batch.column(0).take(pa.array(inside))))
                if len(collected) < len(rows):
                    break
                yield collected
                number, collected = number + 1, []
            if number == len(wanted):
                return
            start += batch.num_rows


def _strings(column: pa.Array) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:  # Parquet does not check that its strings are UTF-8
        found: list[Any] = []
        for value in column:
            try:
                found.append(value.as_py())
            except UnicodeDecodeError:
                found.append(b"")
        return found


def _one_ahead(background: ThreadPoolExecutor, items: Iterator[_Tokens]) -> Iterator[_Tokens]:
    """The items, each next one being made in the background."""
    pending = background.submit(next, items, None)
    while (item := pending.result()) is not None:
        pending = background.submit(next, items, None)
        yield item


def _check_stop(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise Interrupted


class _Meter:
    """Counts tokens as batches are handed out, reports progress and notices the wish to stop."""

    def __init__(
        self,
        report: Callable[[Progress], None],
        stop: threading.Event | None,
        chunks: int,
        shard_count: int,
    ) -> None:
        self._report = report
        self._stop = stop
        self._chunks = chunks
        self._shard_count = shard_count
        self._seen_chunks = 0
        self._seen_tokens = 0
        self._shard = 0
        self._started = time.perf_counter()
        self.tokens = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def shard_tokenised(self, tokenised: Tokenised) -> None:
        self._shard += 1
        self._seen_chunks += len(tokenised.rows)
        self._seen_tokens += sum(len(row) for row in tokenised.rows if row is not None)

    def batch(self, tokens: int) -> None:
        _check_stop(self._stop)
        total = self._seen_tokens * self._chunks // max(1, self._seen_chunks)
        self.tokens += tokens
        self._report(Progress(self.tokens, total, self.seconds, self._shard, self._shard_count))

"""From changed chunks to a searched index: each step's share, loading beside `psql`, search, and swaps under readers.

Run by hand: `python -m benchmarks.embedding --index`. It starts a durable Postgres of its own in a temporary folder and
takes the steps of the assets `embedding_dataset`, `vectors` and `index` with the functions that these call, in a process
of its own. Tables go to stderr, and the last line of stdout is one JSON object.

Embedding takes most of the time, so that only `--embed` chunks are, the first ones, and by `python -m embedder`; the
others get vectors that are drawn to lie like those (`benchmarks.corpus`). The embedding of all is then calculated from
the rate of those that were, and named so. Everything else is measured on all rows.

Belongs here: the steps and what they cost. Does not belong here: the corpus, searching (`benchmarks.searches`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
import pyarrow.parquet as pq

from assets.embeddings.dataset import export_chunks
from assets.embeddings.index import (
    graph_of,
    graph_resources,
    load_vectors,
    refresh_passages,
)
from assets.embeddings.postings import refresh_postings
from assets.embeddings.registry import promote, release_table, rollback
from assets.embeddings.release import Release, current_release
from benchmarks import corpus as corpora
from benchmarks import searches
from benchmarks.corpus import SOURCE, Corpus
from benchmarks.feedback import real_disk
from benchmarks.processes import Postgres, program
from embedder import protocol, shards
from embedder.encode import Embedder
from embedder.model import open_model
from storage.copy import copy_vectors
from storage.database import Database
from storage.warehouse import WRITER

Floats = npt.NDArray[np.float32]
Steps = dict[str, float]

ROOT = Path(__file__).resolve().parent.parent
CHANGED = 0.01
WHO, WHY = "benchmark", "to measure the swap"

# What the statements of a load do; all others find out what is missing, and note what was done.
_STATEMENTS = {
    "copy": r"copy ",
    "graph": r"create index .* hnsw",
    "analyze": r"analyze ",
    "keys": r"alter table .* add (primary|foreign) key",
}


@dataclass(frozen=True)
class Place:
    """Where one deployment keeps its data."""

    url: str
    lake: Path

    @contextmanager
    def connect(self) -> Iterator[psycopg.Connection[Any]]:
        with Database.from_url(self.url).connect(role=WRITER, application_name="benchmark") as connection:
            yield connection


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Timed(psycopg.Cursor[Any]):
    """A cursor that adds up the seconds of each kind of statement."""

    seconds: Steps

    def execute(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        with self._clock(query):
            return super().execute(query, *args, **kwargs)

    @contextmanager
    def copy(self, statement: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with self._clock(statement), super().copy(statement, *args, **kwargs) as copy:
            yield copy

    @contextmanager
    def _clock(self, query: Any) -> Iterator[None]:
        text = (query if isinstance(query, str | bytes) else query.as_string(self.connection)) or ""
        text = text.decode() if isinstance(text, bytes) else text
        kind = next((name for name, start in _STATEMENTS.items() if re.match(start, text, re.I)), "")
        started = time.perf_counter()
        yield
        if kind:
            self.seconds[kind] += time.perf_counter() - started


def export(place: Place) -> tuple[float, Path]:
    """The step before embedding: (seconds, the file of all chunks)."""
    with place.connect() as connection:
        started = time.perf_counter()
        dataset = export_chunks(connection, SOURCE, place.lake)
        return time.perf_counter() - started, dataset.path


def index(place: Place) -> tuple[Steps, dict[str, Any]]:
    """The steps after embedding: (seconds of each, the load's report)."""
    release = current_release(None)
    steps: Steps = {}
    with place.connect() as connection:
        for name, action in (
            ("passages", lambda: refresh_passages(connection)),
            ("postings", lambda: refresh_postings(connection, str(release.chunking))),
        ):
            started = time.perf_counter()
            action()
            connection.commit()
            steps[name] = time.perf_counter() - started
        _Timed.seconds = defaultdict(float)
        connection.cursor_factory = _Timed
        started = time.perf_counter()
        report = load_vectors(connection, SOURCE, release, release.folder(place.lake))
        connection.commit()
        whole = time.perf_counter() - started
        connection.cursor_factory = psycopg.Cursor
        steps |= {name: _Timed.seconds[name] for name in _STATEMENTS}
        steps["work list"] = whole - sum(_Timed.seconds.values())
    return steps, vars(report)


def apart(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """(what a function returns in a process of its own, the most memory that held, in MB)."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        result = process.submit(function, *arguments).result()
        return result, process.submit(_peak_mb).result()


def run_embedder(source: Path, place: Place) -> tuple[float, dict[str, Any]]:
    """(seconds of the whole job, its summary)."""
    summary = place.lake / "summary.json"
    output = current_release(None).folder(place.lake)
    command = ["-m", "embedder", "--input", source, "--output", output, "--summary", summary]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"the embedding job failed: {done.stderr[-2000:]}")
    return seconds, json.loads(summary.read_text())


def full(place: Place, corpus: Corpus, embed: int) -> dict[str, Any]:
    """Index everything for the first time, and what each step took."""
    rows = len(corpus.chunks)
    first = place.lake / "first.parquet"
    (exported, path), export_peak = apart(export, place)
    pq.write_table(pq.read_table(path).slice(0, embed), first)
    seconds, summary = run_embedder(first, place)
    if embed < rows:
        draw(place, corpus, embed)
    (steps, report), load_peak = apart(index, place)
    assert report["loaded"] == rows and report["live"]
    vectors = seconds + (rows - embed) / summary["chunks_per_s"]
    return {
        "steps": {"export": exported, "vectors": vectors, **steps},
        "embedding_s": seconds,
        "embedding_extrapolated_s": vectors,
        "embedding_chunks_per_s": summary["chunks_per_s"],
        "embedding_tokens_per_s": summary["tokens_per_s"],
        "tokens_per_chunk": summary["tokens"] / summary["embedded"],
        "graph": report["graph"],
        "export_peak_mb": export_peak,
        "load_peak_mb": load_peak,
    }


def draw(place: Place, corpus: Corpus, embedded: int) -> None:
    """Write shards of drawn vectors for all but the first chunks, into the folder of those that were embedded."""
    model = open_model()
    folder = current_release(None).folder(place.lake)
    hashes = [corpora.content_hash(text) for text in corpus.chunks[embedded:]]
    vectors = corpora.drawn(corpus, stored_vectors(place, corpus.chunks[:embedded]))
    for start in range(0, len(hashes), shards.SHARD_SIZES["cpu"]):
        keys = hashes[start : start + shards.SHARD_SIZES["cpu"]]
        name = shards.shard_id(model.fingerprint(), keys)
        shards.write_shard(
            folder,
            shards.Shard(0, name, np.zeros(0, np.int64)),
            keys,
            vectors[start : start + len(keys)],
            {},
            fingerprint=model.fingerprint(),
            engine="drawn",
            device="cpu",
            dtype="f32",
        )


def stored_vectors(place: Place, texts: Sequence[str]) -> Floats:
    """float32[n, d] of texts that have vectors in the lake."""
    hashes = [corpora.content_hash(text) for text in texts]
    found, vectors = protocol.read_vectors(current_release(None).folder(place.lake), hashes)
    assert found == hashes
    return vectors


def changes(place: Place, rounds: int) -> dict[str, Any]:
    """The same steps where nothing changed, and where 1 % did: medians of the rounds."""
    seconds: dict[str, list[Steps]] = {"unchanged": [], "changed": []}
    starts = []
    for turn in range(rounds):
        for kind, found in seconds.items():
            if kind == "changed":
                with place.connect() as connection:
                    changed = corpora.revise(connection, CHANGED, turn)
            exported, path = export(place)
            vectors, summary = run_embedder(path, place)
            steps, report = index(place)
            assert report["loaded"] == (changed if kind == "changed" else 0)
            found.append({"export": exported, "vectors": vectors, **steps})
        starts.append(summary["startup_seconds"])
    medians = {
        kind: {name: median(one[name] for one in found) for name in found[0]}
        for kind, found in seconds.items()
    }
    whole = {f"{kind}_s": median(sum(one.values()) for one in found) for kind, found in seconds.items()}
    return {
        "changed_rows": changed,
        **{f"{kind}_steps": steps for kind, steps in medians.items()},
        **whole,
        # Finding out what changed, and, where anything did, loading the model.
        "fixed_start_s": whole["unchanged_s"] + median(starts),
    }


def load_vs_copy(place: Place, vectors: Floats, rounds: int) -> dict[str, float]:
    """`copy_vectors` and `psql \\copy` of a binary file, in turns, into the same emptied table: rows a second."""
    rows = len(vectors)
    keys = np.arange(rows, dtype=np.int32)
    seconds: dict[str, list[float]] = {"load": [], "copy": []}
    file = place.lake / "vectors.copy"
    with psycopg.connect(place.url) as connection:
        connection.execute(
            "create schema bench; create table bench.load (passage_no int not null, embedding "
            f"halfvec({vectors.shape[1]}) not null)".encode()
        )
        connection.commit()

        def load() -> None:
            connection.execute("truncate bench.load")
            copy_vectors(connection, "bench.load", keys, vectors)
            connection.commit()

        load()
        _psql(place.url, f"\\copy bench.load to '{file}' (format binary)")
        for turn in range(rounds + 1):
            for kind in ("load", "copy") if turn % 2 else ("copy", "load"):
                connection.execute("checkpoint")
                connection.commit()
                if kind == "load":
                    started = time.perf_counter()
                    load()
                    taken = time.perf_counter() - started
                else:
                    # In one transaction, as ours: what is loaded into a table emptied there needs no log.
                    taken = _psql(
                        place.url,
                        "begin",
                        "truncate bench.load",
                        f"\\copy bench.load from '{file}' (format binary)",
                        "commit",
                    )
                if turn:  # the first is to warm up
                    seconds[kind].append(taken)
        connection.execute("drop schema bench cascade")
    file.unlink()
    rates = {kind: rows / median(found) for kind, found in seconds.items()}
    return {
        "load_vs_copy": rates["load"] / rates["copy"],
        "load_rows_per_s": rates["load"],
        "copy_rows_per_s": rates["copy"],
    }


def _psql(url: str, *commands: str) -> float:
    """The seconds that psql says the commands took, its own start not among them."""
    arguments = [one for command in ("\\timing on", *commands) for one in ("--command", command)]
    done = subprocess.run(
        [program("psql"), "--no-psqlrc", "--set", "ON_ERROR_STOP=1", *arguments, url],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"psql failed: {done.stderr[-2000:]}")
    return sum(float(taken) for taken in re.findall(r"^Time: ([0-9.]+) ms", done.stdout, re.M)) / 1000


def swaps(place: Place, asked: Sequence[searches.Question], seconds: float) -> dict[str, Any]:
    """Promote a second release of the same vectors and roll back, in turns, under readers."""
    first = current_release(None)
    second = replace(first, name=f"{first.name[:-1]}x")
    with place.connect() as connection:
        load_vectors(connection, SOURCE, second, second.folder(place.lake), follow=False)

    with Database.from_url(place.url).connect(role=WRITER, autocommit=True) as connection:

        def swap(number: int) -> None:
            if number % 2 == 0:
                promote(connection, second.name, WHO, WHY, force=True)
            else:
                rollback(connection, WHO, WHY)

        return searches.under_swaps(place.url, asked, swap, seconds)


def sizes(connection: psycopg.Connection[Any], place: Place, release: Release, rows: int) -> dict[str, Any]:
    """What the index weighs, in MB (10^6 bytes), and with what memory its graph was built."""
    table = release_table(release.name)
    graph = graph_of(connection, table)
    memory, workers = graph_resources(connection, rows, release.dimensions) or (0, 0)

    def weigh(measure: str, *names: str) -> float:
        row = connection.execute(
            f"select sum({measure}(name::regclass)) from unnest(%s::text[]) as name".encode(), [list(names)]
        ).fetchone()
        return float(row[0]) / 1e6 if row else 0.0

    folder = release.folder(place.lake)
    return {
        "graph_mb": weigh("pg_relation_size", graph) if graph else 0.0,
        "table_mb": weigh("pg_table_size", table.as_string(connection)),
        "postings_mb": weigh(
            "pg_total_relation_size", "retrieval.posting", "retrieval.term", "retrieval.passage_text"
        ),
        "passages_mb": weigh("pg_total_relation_size", "retrieval.passage"),
        "chunks_mb": weigh("pg_total_relation_size", "corpus.piece"),
        "shards_mb": sum(path.stat().st_size for path in protocol.shard_paths(folder)) / 1e6,
        "maintenance_work_mem_mb": memory / 1e6 if graph else None,
        "graph_workers": workers if graph else None,
    }


def measure(place: Place, options: argparse.Namespace) -> dict[str, Any]:
    """Everything, one after the other."""
    corpus = corpora.make(options.rows)
    with place.connect() as connection:
        corpora.fill(connection, corpus)
    say(f"indexing {options.rows:,} chunks, of which {options.embed:,} are embedded")
    figures = full(place, corpus, options.embed)
    vectors = stored_vectors(place, corpus.chunks)
    embedder = Embedder.open()
    embedder.encode(corpus.queries[:1])
    taken, found = [], []
    for query in corpus.queries:
        started = time.perf_counter()
        found.append(embedder.encode([query])[0])
        taken.append(1000 * (time.perf_counter() - started))
    queries = np.array(found, np.float32)
    near = np.sort(queries @ vectors.T, axis=1)[:, ::-1]
    figures |= {
        "question_embedding_ms": median(taken),
        "nearest_cosines": {str(rank): float(near[:, rank - 1].mean()) for rank in (1, 10, 100)},
    }
    with psycopg.connect(place.url, autocommit=True) as connection:
        # As autovacuum does within a minute.
        connection.execute("vacuum (analyze) corpus.piece, corpus.document, retrieval.passage")
        figures |= sizes(connection, place, current_release(None), options.rows)
    say("searching")
    with Database.from_url(place.url).connect(role=WRITER, autocommit=True) as connection:
        figures["search"] = searches.search(connection, corpus, vectors, queries, options.rounds)
    say(f"changing {CHANGED:.0%}, {options.rounds} times")
    figures |= changes(place, options.rounds)
    say("loading beside psql")
    figures |= load_vs_copy(place, vectors, options.rounds)
    say("swapping under readers")
    figures |= swaps(place, searches.questions(corpus.queries, queries), options.seconds)
    return figures


def summary(figures: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The figures with those that follow from them."""
    steps = figures["steps"]
    whole = sum(steps.values())
    return {
        "rows": options.rows,
        "embedded": options.embed,
        "drawn": options.rows - options.embed,
        "end_to_end_s": whole,
        "shares": {name: seconds / whole for name, seconds in steps.items()},
        **figures,
        "changed_share": figures["changed_s"] / whole,
        "changed_share_beyond_start": (figures["changed_s"] - figures["fixed_start_s"]) / whole,
        "cpus": os.cpu_count(),
        "load_before": options.load_before,
    }


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    note = (
        f"; embedding calculated from {result['embedded']:,} embedded in {result['embedding_s']:.1f} s, the vectors of"
        f" the other {result['drawn']:,} are drawn"
        if result["drawn"]
        else ""
    )
    say(f"\n{result['rows']:,} chunks in {result['end_to_end_s']:.1f} s{note}")
    say(f"{'step':12}{'seconds':>10}{'share':>8}{'nothing changed':>17}{'1 % changed':>13}")
    for name, seconds in result["steps"].items():
        say(
            f"{name:12}{seconds:10.2f}{result['shares'][name]:8.1%}{result['unchanged_steps'][name]:17.2f}"
            f"{result['changed_steps'][name]:13.2f}"
        )
    say(
        f"1 % changed: {result['changed_s']:.1f} s, {result['changed_share']:.1%} of the whole; the fixed"
        f" start: {result['fixed_start_s']:.1f} s; beyond that {result['changed_share_beyond_start']:.1%}"
    )
    say(
        f"load {result['load_rows_per_s']:,.0f} rows/s, psql {result['copy_rows_per_s']:,.0f}: {result['load_vs_copy']:.2f};"
        f" peak of the export {result['export_peak_mb']:.0f} MB, of the load {result['load_peak_mb']:.0f}"
    )
    say(
        f"in MB: chunks {result['chunks_mb']:.0f}, shards {result['shards_mb']:.0f}, table {result['table_mb']:.0f},"
        f" graph {result['graph_mb']:.0f}, postings {result['postings_mb']:.0f}"
    )
    say(f"\n{'search':8}{'filter':>8}{'p50 ms':>9}{'p95':>9}{'p99':>9}{'rows':>7}{'recall':>8}")
    for mode, shares in result["search"].items():
        for share, one in shares.items():
            say(
                f"{mode:8}{float(share):8.1%}{one['p50_ms']:9.2f}{one['p95_ms']:9.2f}{one['p99_ms']:9.2f}"
                f"{one['rows']:7.2f}{one.get('recall', float('nan')):8.3f}"
            )
    say(
        f"\n{searches.SWAPS} swaps under {searches.READERS} readers: {result['failed_reads']} reads failed; a swap"
        f" {result['swap_median_ms']:.0f} ms, {result['swap_max_ms']:.0f} at most; a rollback"
        f" {result['rollback_max_s']:.3f} s at most"
    )
    say(f"{'reader':8}{'swaps':>9}{'reads':>9}{'p50 ms':>9}{'p95':>9}{'p99':>9}{'longest':>9}")
    for mode, phases in result["readers"].items():
        for when, one in phases.items():
            say(
                f"{mode:8}{when:>9}{one['reads']:9,}{one['p50_ms']:9.2f}{one['p95_ms']:9.2f}{one['p99_ms']:9.2f}"
                f"{one['longest_ms']:9.2f}"
            )


def main(arguments: list[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.embedding --index",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=100_000, help="chunks (%(default)s)")
    parser.add_argument("--embed", type=int, default=20_000, help="how many of them to embed (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="medians are over these (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=10, help="of reading without swaps, and with (%(default)s)"
    )
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on the disk to measure")
    options = parser.parse_args(arguments)
    options.embed = min(options.embed, options.rows)
    if options.rows < 500:
        parser.error("--rows must be at least 500, for filters of 1 % to let anything through")
    if options.embed < (least := min(options.rows // 10, 2 * corpora.PIECES)):
        parser.error(
            f"--embed must be at least {least:,} of {options.rows:,} rows, lest the others are drawn from few"
        )
    options.load_before = os.getloadavg()[0]
    # Slow to import, and no matter of the processes that this starts.
    from storage.migrations import upgrade

    folder = Path(tempfile.mkdtemp(prefix="datamoat-bench-", dir=options.folder))
    # The server's account must pass through it; what it holds is protected by itself.
    folder.chmod(0o711)
    postgres = Postgres(folder / "home")
    try:
        postgres.start()
        real_disk(postgres.data.resolve())
        place = Place(postgres.new_database(), folder / "lake")
        upgrade(Database.from_url(place.url))
        place.lake.mkdir()
        result = _rounded(summary(measure(place, options), options))
    finally:
        postgres.destroy()
        shutil.rmtree(folder)
    show(result)
    print(json.dumps(result))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def _peak_mb() -> float:
    """The most memory this process has held, in MB. (What getrusage says, a child inherits from its parent.)"""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.M)
        if found:
            return int(found[1]) * 1024 / 1e6
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / 1e6

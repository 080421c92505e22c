"""The job and its command line: counts, failures, stopping, reports. The engine is replaced by a quick one."""

from __future__ import annotations

import functools
import tempfile
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedder import engines, job, protocol, shards, texts
from embedder.budget import Estimate, Ledger, Limits
from embedder.encode import Embedder
from embedder.job import Progress, Stopped, Summary, Watcher
from embedder.model import open_model
from embedder.protocol import EmbedderError, read_vectors
from embedder.shards import locked
from embedder.stage import Settings, ShardStage
from embedder.tokens import Tokens, pad

POISON = 9947  # the id of the token "poison" in the default model's vocabulary
NAN = 16660  # "nan"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


class QuickEngine:
    """A vector of a text is made of its token ids, so it can be told whose it is."""

    name, device, precision, streams, token_budget, packed = "quick", "cpu", "f32", 1, 64, False

    def __init__(self) -> None:
        self.batches = 0

    def encode(self, batches: Iterable[Tokens], take: Callable[[int, npt.NDArray[np.float32]], None]) -> None:
        for number, batch in enumerate(batches):
            self.batches += 1
            ids = pad(batch)
            if (ids == POISON).any():
                raise RuntimeError("poison in the batch\nmore detail")
            found = np.zeros((len(ids), 384), np.float32)
            for row, length in enumerate(batch.lengths):
                np.add.at(found[row], ids[row, :length] % 384, np.arange(length) + 1)
            found[(ids == NAN).any(axis=1)] = np.nan
            take(number, found)


class Watching(Watcher):
    """Keeps what it is told; `at` is called with each progress."""

    def __init__(self, at: Callable[[Progress], None] = lambda _progress: None) -> None:
        self.said: list[str] = []
        self.estimates: list[Estimate] = []
        self.progress: list[Progress] = []
        self._at = at

    def say(self, line: str) -> None:
        self.said.append(line)

    def estimated(self, estimate: Estimate) -> None:
        self.estimates.append(estimate)

    def progressed(self, progress: Progress) -> None:
        self.progress.append(progress)
        self._at(progress)


def write_input(path: Path, rows: list[tuple[str, str | None]]) -> Path:
    columns = {
        "chunk_id": pa.array([f"c{i}" for i in range(len(rows))]),
        "content_hash": pa.array([key for key, _text in rows], pa.string()),
        "text": pa.array([text for _key, text in rows], pa.string()),
    }
    pq.write_table(pa.table(columns), path, row_group_size=7)
    return path


def some(n: int) -> list[tuple[str, str | None]]:
    words = ["alpha", "beta", "gamma", "delta", "river", "stone", "window", "paper"]
    return [(f"h{i}", " ".join(words[(i * j) % 8] for j in range(1, 2 + i % 23)) + f" {i}") for i in range(n)]


def run(tmp_path: Path, rows: list[tuple[str, str | None]], **options: Any) -> Summary:
    source = write_input(tmp_path / "in.parquet", rows)
    defaults: dict[str, Any] = {"embedder": quick_embedder(), "shard_size": 16, "now": NOW}
    return job.run(source, tmp_path / "out", **(defaults | options))


@functools.cache
def quick_embedder() -> Embedder:
    """One for all tests, so that the model is read once."""
    return Embedder(open_model(), engine=QuickEngine())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def stop_at(shard: int) -> dict[str, Any]:
    """Options of a run that is asked to stop when the first batch of this shard is done."""
    stop = threading.Event()

    def look(progress: Progress) -> None:
        if progress.shard == shard:
            stop.set()

    return {"stop": stop, "watcher": Watching(look)}


def failures_of(folder: Path) -> dict[str, str]:
    table = pq.read_table(folder / "failures.parquet")
    return dict(zip(table["content_hash"].to_pylist(), table["error"].to_pylist(), strict=True))


def test_every_text_gets_its_own_vector(tmp_path: Path) -> None:
    rows = some(50)
    summary = run(tmp_path, rows)
    assert (summary.chunks, summary.distinct, summary.embedded, summary.shards) == (50, 50, 50, 4)
    assert summary.sound and summary.failed == summary.skipped == 0
    embedder = quick_embedder()
    found, vectors = read_vectors(tmp_path / "out", [key for key, _text in rows])
    assert found == [key for key, _text in rows]
    expected = [embedder.encode([str(text)])[0] for _key, text in rows]
    np.testing.assert_allclose(vectors, np.stack(expected), atol=1e-6)


def test_unchanged_input_embeds_nothing_and_opens_no_engine(tmp_path: Path) -> None:
    run(tmp_path, some(40))
    before = {path.name: path.stat().st_mtime_ns for path in protocol.shard_paths(tmp_path / "out")}
    engine = QuickEngine()
    summary = run(tmp_path, some(40), embedder=Embedder(open_model(), engine=engine))
    assert (summary.embedded, summary.skipped, summary.shards) == (0, 40, 0)
    assert (engine.batches, summary.engine, summary.tokens_per_s) == (0, None, 0.0)
    assert before == {path.name: path.stat().st_mtime_ns for path in protocol.shard_paths(tmp_path / "out")}


def test_one_changed_text_embeds_one(tmp_path: Path) -> None:
    rows = some(40)
    run(tmp_path, rows)
    rows[20] = ("new", "a new text")
    summary = run(tmp_path, rows)
    assert (summary.embedded, summary.skipped) == (1, 39)


def test_duplicates_are_embedded_once(tmp_path: Path) -> None:
    summary = run(tmp_path, some(20) * 3)
    assert (summary.chunks, summary.distinct, summary.embedded) == (60, 20, 20)
    assert len(read_vectors(tmp_path / "out")[0]) == 20


def test_one_bad_text_is_one_failure_and_its_neighbours_are_embedded(tmp_path: Path) -> None:
    rows = some(30)
    rows[3:3] = [("empty", " \n"), ("null", None), ("poison", "some poison here"), ("nan", "nan vector")]
    summary = run(tmp_path, rows)
    assert (summary.distinct, summary.embedded, summary.failed) == (34, 30, 4)
    assert summary.sound
    assert failures_of(tmp_path / "out") == {
        "empty": "text is empty",
        "null": "text is not a string but NoneType",
        "poison": "the engine refused the text: poison in the batch",
        "nan": "the engine gave a vector that is not finite",
    }
    found, vectors = read_vectors(tmp_path / "out")
    assert set(found) == {key for key, _text in some(30)}
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_string_that_is_not_utf8_is_one_failure(tmp_path: Path) -> None:
    text = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary()).view(pa.string())
    table = pa.table({"content_hash": pa.array(["a", "b", "c"]), "text": text})
    pq.write_table(table, tmp_path / "in.parquet")
    embedder = Embedder(open_model(), engine=QuickEngine())
    summary = job.run(tmp_path / "in.parquet", tmp_path / "out", embedder=embedder)
    assert (summary.embedded, summary.failed) == (2, 1)
    assert failures_of(tmp_path / "out") == {"b": "text is not valid UTF-8"}


class Breaking(QuickEngine):
    """Computes nothing any more once it has met a poison, as a GPU whose context is lost."""

    broken = False

    def encode(self, batches: Iterable[Tokens], take: Callable[[int, npt.NDArray[np.float32]], None]) -> None:
        try:
            if self.broken:
                raise RuntimeError("context lost")
            super().encode(batches, take)
        except RuntimeError:
            self.broken = True
            raise


def isolated_with(monkeypatch: pytest.MonkeyPatch, engine: QuickEngine) -> None:
    """Isolated stages get this engine, in this process."""

    def isolated(stage: ShardStage) -> ShardStage:
        embedder = Embedder(open_model(), engine=engine)
        return ShardStage(stage._input_file, stage._output, Settings(), embedder=embedder)

    monkeypatch.setattr(ShardStage, "isolated", isolated)


def test_an_engine_that_breaks_costs_no_text_but_the_one_that_broke_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*some(30), ("bad", "poison"), *some(60)[30:]]
    run(tmp_path, rows)
    expected = contents(tmp_path / "out")
    (tmp_path / "second").mkdir()
    isolated_with(monkeypatch, QuickEngine())
    watcher = Watching()
    broken = Embedder(open_model(), engine=Breaking())
    summary = run(tmp_path / "second", rows, embedder=broken, watcher=watcher)
    assert (summary.embedded, summary.failed, summary.sound) == (60, 1, True)
    assert contents(tmp_path / "second" / "out") == expected
    assert any("computes nothing any more" in line for line in watcher.said)

    (tmp_path / "third").mkdir()
    isolated_with(monkeypatch, Breaking())
    broken = Embedder(open_model(), engine=Breaking())
    with pytest.raises(EmbedderError, match=r"computes nothing any more, .*context lost"):
        run(tmp_path / "third", rows, embedder=broken)
    assert not (tmp_path / "third" / "out" / "failures.parquet").exists()
    assert not list((tmp_path / "third" / "out").glob(".*.begun"))


def test_texts_that_end_the_tokenisers_processes_are_tokenised_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedder import tokenise_pool

    class Pool:
        def __init__(self, *_: object, **_options: object) -> None:
            pass

        def tokenise(self, texts: list[str], **options: Any) -> Any:
            if "venom" in texts and len(texts) > 15:  # not in the sample
                raise tokenise_pool.TokeniserDied("a tokeniser process died twice")
            return quick_embedder().tokeniser.tokenise(texts, **options)

        def close(self) -> None:
            pass

    monkeypatch.setattr(tokenise_pool, "TokeniserPool", Pool)
    isolated_with(monkeypatch, QuickEngine())
    rows = [*some(40), ("venom", "venom"), *some(100)[40:]]
    source, watcher = write_input(tmp_path / "in.parquet", rows), Watching()
    settings = Settings(tokeniser_processes=2)
    embedder = quick_embedder()
    summary = job.run(source, tmp_path / "out", settings, embedder=embedder, shard_size=50, watcher=watcher)
    assert (summary.embedded, summary.shards) == (101, 3)
    assert "a tokeniser process died twice" in watcher.said


def test_an_error_that_nobody_foresaw_leaves_marks_and_others_do_not(tmp_path: Path) -> None:
    class Raising(QuickEngine):
        def encode(self, *_: Any) -> None:
            raise ValueError("nobody foresaw this")

    with pytest.raises(ValueError, match="nobody foresaw"):
        run(tmp_path, some(60), embedder=Embedder(open_model(), engine=Raising()))
    marks = shards.marks(tmp_path / "out")
    assert frozenset(f"h{i}" for i in range(16)) in marks.values() and len(marks) <= 2
    shards.settle(dict.fromkeys(marks, frozenset()))
    with pytest.raises(Stopped):
        run(tmp_path, some(60), **stop_at(2))
    assert not shards.marks(tmp_path / "out")


def test_over_long_texts_are_counted_or_refused(tmp_path: Path) -> None:
    rows = [*some(3), ("long", "river " * 400)]
    summary = run(tmp_path, rows)
    assert (summary.truncated, summary.failed, summary.embedded) == (1, 0, 4)
    assert summary.truncated_tokens == 402 - 256
    source = write_input(tmp_path / "in2.parquet", rows)
    embedder = Embedder(open_model(), engine=QuickEngine())
    refused = job.run(source, tmp_path / "out2", Settings(too_long="refuse"), embedder=embedder)
    assert (refused.truncated, refused.failed, refused.embedded) == (0, 1, 3)
    assert failures_of(tmp_path / "out2") == {"long": "text has 402 tokens, the model takes 256"}


def test_a_stopped_run_continues_with_the_same_bytes_and_reports_all_failures(tmp_path: Path) -> None:
    rows = some(60)
    rows[2] = ("bad", "")
    run(tmp_path, rows)
    expected = contents(tmp_path / "out")

    (tmp_path / "second").mkdir()
    with pytest.raises(Stopped, match="run the same command again") as caught:
        run(tmp_path / "second", rows, **stop_at(3))
    assert caught.value.status == job.INTERRUPTED
    assert caught.value.summary is not None
    assert (caught.value.summary.status, caught.value.summary.embedded) == (job.INTERRUPTED, 31)
    out = tmp_path / "second" / "out"
    assert len(protocol.shard_paths(out)) == 2
    summary = run(tmp_path / "second", rows, now=NOW + timedelta(hours=3))
    assert (summary.skipped, summary.embedded, summary.failed) == (31, 28, 1)
    assert expected == contents(out)


words = st.sampled_from(["river", "stone", "poison", "", "nan", "window river", "paper " * 30])
inputs = st.lists(st.tuples(st.sampled_from([f"h{i}" for i in range(12)]), words), max_size=24)


@settings(max_examples=12, deadline=None)
@given(inputs, inputs, st.lists(st.integers(1, 5), max_size=3))
def test_whatever_the_input_and_the_stops_the_files_are_those_of_an_uninterrupted_run(
    before: list[tuple[str, str]], rows: list[tuple[str, str]], stops: list[int]
) -> None:
    embedder = quick_embedder()
    with (
        tempfile.TemporaryDirectory() as one,
        tempfile.TemporaryDirectory() as two,
        mock.patch("os.fsync"),  # no power is lost here
    ):
        for folder in (Path(one), Path(two)):
            run(folder, list(before), embedder=embedder, shard_size=3)
        for shard in stops:
            try:
                run(Path(two), list(rows), embedder=embedder, shard_size=3, **stop_at(shard))
            except Stopped:
                continue
            break
        later = NOW if not stops else NOW + timedelta(minutes=30)
        summary = run(Path(one), list(rows), embedder=embedder, shard_size=3)
        run(Path(two), list(rows), embedder=embedder, shard_size=3, now=later)
        assert summary.sound
        assert summary.distinct == summary.embedded + summary.skipped + summary.failed + summary.parked
        assert contents(Path(one) / "out").keys() == contents(Path(two) / "out").keys()
        assert read_all(Path(one) / "out") == read_all(Path(two) / "out")


def read_all(folder: Path) -> dict[str, Any]:
    """Shards byte for byte; failures without their times, for the runs were not at one time."""
    files: dict[str, Any] = dict(contents(folder))
    files["failures.parquet"] = failures_of(folder)
    return files


def test_the_three_steps_give_what_the_runner_gives_in_any_order_and_place(tmp_path: Path) -> None:
    rows = some(60)
    rows[7] = ("bad", "")
    summary = run(tmp_path, rows)
    other = tmp_path / "other"
    source = tmp_path / "in.parquet"
    stages = [ShardStage(source, other, Settings(), embedder=quick_embedder()) for _ in range(2)]
    with locked(other):
        work = job.plan(source, other, Settings(), shard_size=16, now=NOW)
        results = [stages[shard.number % 2].embed(shard) for shard in reversed(work.missing)]
        ledger = Ledger(other, work.plan.work, Limits())
        figures = job.finish(work, results, ledger)
    for stage in stages:
        stage.close()
    assert contents(other) == contents(tmp_path / "out")
    assert (figures.embedded, figures.failed, figures.tokens) == (59, 1, summary.tokens)
    assert figures.sound


def test_chunk_ids_are_those_of_the_first_row_with_the_text(tmp_path: Path) -> None:
    run(tmp_path, [*some(5), ("bad", ""), *some(5), ("h9", "river")])
    (path,) = protocol.shard_paths(tmp_path / "out")
    table = pq.read_table(path)
    assert table.column_names == ["chunk_id", "content_hash", "vector"]
    assert table["chunk_id"].to_pylist() == ["c0", "c1", "c2", "c3", "c4", "c11"]
    assert table["content_hash"].to_pylist() == ["h0", "h1", "h2", "h3", "h4", "h9"]


def test_an_input_without_chunk_ids_gives_shards_without(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["river"], "content_hash": ["a"]}), tmp_path / "in.parquet")
    job.run(tmp_path / "in.parquet", tmp_path / "out", embedder=quick_embedder())
    (path,) = protocol.shard_paths(tmp_path / "out")
    assert pq.read_schema(path).names == ["content_hash", "vector"]


def test_keys_before_several_texts_are_counted_and_the_first_text_is_taken(tmp_path: Path) -> None:
    rows: list[tuple[str, str | None]] = [
        ("a", "river"),
        ("b", "stone"),
        ("a", "window"),
        ("b", "stone"),
        ("a", "x"),
    ]
    summary = run(tmp_path, rows)
    assert (summary.conflicting, summary.distinct) == (1, 2)
    _found, vectors = read_vectors(tmp_path / "out", ["a"])
    np.testing.assert_allclose(vectors[0], quick_embedder().encode(["river"])[0], atol=1e-6)


def test_an_input_replaced_while_it_is_read_is_an_error_and_no_wrong_vector(tmp_path: Path) -> None:
    rows = some(40)
    source = write_input(tmp_path / "in.parquet", rows)
    out = tmp_path / "out"
    stage = ShardStage(source, out, Settings(), embedder=quick_embedder())
    with locked(out):
        work = job.plan(source, out, Settings(), shard_size=16, now=NOW)
        write_input(source, rows[1:])
        for shard in work.missing:
            with pytest.raises(EmbedderError, match=r"in\.parquet has changed"):
                stage.embed(shard)
    assert not protocol.shard_paths(out)


@pytest.mark.parametrize("row_group", [1, 7, 1000])
@pytest.mark.parametrize("wanted", [[0], [3, 4, 5], [0, 39], [8, 30], list(range(40))])
def test_rows_are_read_by_number_whatever_the_row_groups(
    tmp_path: Path, row_group: int, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_BATCH_ROWS", 5)
    table = pa.table({"content_hash": [f"h{i}" for i in range(40)], "text": [f"t{i}" for i in range(40)]})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=row_group)
    with texts.TextReader(tmp_path / "in.parquet") as reader:
        for rows in (wanted, [20, 21], wanted):  # forward, and back again
            found = reader.read(np.array(rows))
            assert found.texts == [f"t{row}" for row in rows]
            assert (found.keys, found.chunk_ids) == ([f"h{row}" for row in rows], None)
        with pytest.raises(EmbedderError, match="has changed"):
            reader.read(np.array([39, 40]))


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view()])
def test_every_kind_of_string_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(["a", "b", "a"]).cast(kind)
    pq.write_table(pa.table(dict.fromkeys(("chunk_id", "content_hash", "text"), column)), tmp_path / "i")
    summary = job.run(tmp_path / "i", tmp_path / "out", embedder=quick_embedder())
    assert (summary.distinct, summary.embedded) == (2, 2)


def test_hostile_texts_are_embedded_or_fail_alone(tmp_path: Path) -> None:
    rows: list[tuple[str, str | None]] = [
        ("nul", "a\0b"),
        ("huge", "river " * 200_000),
        ("controls", "\x1b[2J\u202e\ufffd"),
        ("one word", "x" * 100_000),
        ("fine", "stone"),
    ]
    summary = run(tmp_path, rows)
    assert summary.embedded + summary.failed == 5
    assert "fine" in read_vectors(tmp_path / "out")[0]
    assert (summary.truncated, summary.truncated_tokens > 199_000) == (1, True)


def test_progress_counts_every_token_and_text_and_ends_at_all(tmp_path: Path) -> None:
    watcher = Watching()
    summary = run(tmp_path, some(50), watcher=watcher)
    seen = watcher.progress
    assert [progress.tokens for progress in seen] == sorted({progress.tokens for progress in seen})
    assert [progress.rows for progress in seen] == sorted(progress.rows for progress in seen)
    last = seen[-1]
    assert (last.rows, last.total_rows, last.share) == (50, 50, 1.0)
    assert last.tokens == last.total_tokens == summary.tokens
    assert (last.shard, last.shards, last.seconds_left) == (4, 4, 0.0)
    assert 0 < last.padding_share < 1


def test_padding_share_is_the_filler_among_the_tokens_computed(tmp_path: Path) -> None:
    summary = run(tmp_path, [("a", "river"), ("b", "river stone stone")])
    assert summary.tokens == 8
    assert summary.padding_share == 0.2  # 3 and 5 tokens in a batch of 2 x 5


KEYS_TWICE = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["content_hash", "text", "text"])
NOT_UTF8 = pa.array([b"\xff"], pa.binary()).view(pa.string())


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (pa.table({"text": ["a"]}), "has no column content_hash"),
        (pa.table({"content_hash": ["a"], "body": ["a"]}), "has no column text, only content_hash, body"),
        (pa.table({"content_hash": ["a"], "text": [1]}), "column text has type int64; write it as string"),
        (pa.table({"chunk_id": [1], "content_hash": ["a"], "text": ["a"]}), "column chunk_id has type int64"),
        (pa.table({"content_hash": [None, "a"], "text": ["a", "b"]}), "1 rows have no content_hash"),
        (pa.table({"content_hash": NOT_UTF8, "text": ["a"]}), "column content_hash cannot be read"),
        (KEYS_TWICE, "has 2 columns text; keep one of them"),
    ],
)
def test_an_input_that_breaks_the_promise_is_refused(tmp_path: Path, table: pa.Table, says: str) -> None:
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(EmbedderError, match=r"in\.parquet") as caught:
        texts.read_keys(tmp_path / "in.parquet")
    assert says in str(caught.value)


def test_an_absent_or_broken_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EmbedderError, match=r"absent\.parquet does not exist"):
        texts.read_keys(tmp_path / "absent.parquet")
    no_text = pa.table({"chunk_id": NOT_UTF8, "content_hash": ["a"], "text": ["a"]})
    pq.write_table(no_text, tmp_path / "in.parquet")
    with pytest.raises(EmbedderError, match="column chunk_id cannot be read"):
        job.run(tmp_path / "in.parquet", tmp_path / "out", embedder=quick_embedder())
    (tmp_path / "broken.parquet").write_text("no")
    with pytest.raises(EmbedderError, match=r"broken\.parquet is not a readable Parquet file"):
        texts.read_keys(tmp_path / "broken.parquet")
    with pytest.raises(EmbedderError, match="is not a readable Parquet file"):
        texts.read_keys(tmp_path)


def test_an_empty_input_gives_an_empty_result(tmp_path: Path) -> None:
    summary = run(tmp_path, [])
    assert (summary.chunks, summary.distinct, summary.embedded, summary.sound) == (0, 0, 0, True)
    assert failures_of(tmp_path / "out") == {}


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(EmbedderError, match="unknown policy 'drop' for over-long texts"):
        Settings(too_long="drop")


def test_a_run_waits_for_the_folder_and_hears_the_wish_to_stop_meanwhile(tmp_path: Path) -> None:
    stop = threading.Event()

    class Impatient(Watcher):
        def say(self, line: str) -> None:
            assert "another embedding run is writing to" in line
            stop.set()

    with locked(tmp_path / "out"), pytest.raises(Stopped) as caught:
        run(tmp_path, some(2), watcher=Impatient(), stop=stop)
    assert (caught.value.status, caught.value.summary) == (job.INTERRUPTED, None)


def test_a_shard_is_larger_on_cuda_and_what_another_device_made_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[tuple[str, str | None]] = [(f"h{i}", "river") for i in range(5000)]
    source, out = write_input(tmp_path / "in.parquet", rows), tmp_path / "out"
    sizes = []
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(engines, "choose", lambda *_, device=device: ("some", device))
        with locked(out):
            work = job.plan(source, out, Settings(), model=quick_embedder().model, now=NOW)
        sizes.append([len(shard.rows) for shard in work.missing])
    assert sizes == [[4096, 904], [5000]]
    monkeypatch.setattr(QuickEngine, "device", "another")
    run(tmp_path, rows[:20], shard_size=20)
    monkeypatch.undo()
    assert run(tmp_path, rows[:20]).skipped == 20


@pytest.mark.parametrize(
    ("wanted", "device", "pools"),
    [(None, "cpu", []), (None, "cuda", [None]), (0, "cuda", []), (3, "cpu", [3])],
)
def test_texts_are_tokenised_by_processes_where_that_pays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: int | None, device: str, pools: list[int | None]
) -> None:
    from embedder import tokenise_pool

    opened: list[int | None] = []
    closed: list[bool] = []

    class Pool:
        def __init__(self, _model: object, workers: int | None, **_options: object) -> None:
            opened.append(workers)

        tokenise = staticmethod(quick_embedder().tokeniser.tokenise)

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(tokenise_pool, "TokeniserPool", Pool)
    monkeypatch.setattr(engines, "choose", lambda *_: ("some", device))
    source = write_input(tmp_path / "in.parquet", some(3))
    settings = Settings(tokeniser_processes=wanted)
    assert job.run(source, tmp_path / "out", settings, embedder=quick_embedder()).embedded == 3
    assert (opened, len(closed)) == (pools, len(pools))

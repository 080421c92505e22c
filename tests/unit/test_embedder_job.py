"""The job and its command line: counts, failures, stopping, reports. The engine is replaced by a quick one."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedder import __main__ as command
from embedder import encode, job, protocol
from embedder.encode import Embedder
from embedder.job import Interrupted, Progress, Summary
from embedder.model import open_model
from embedder.protocol import EmbedderError, read_vectors
from embedder.tokens import TokenIds

POISON = 9947  # the id of the token "poison" in the default model's vocabulary
NAN = 16660  # "nan"


class QuickEngine:
    """A vector of a text is made of its token ids, so it can be told whose it is."""

    name, precision, streams, token_budget = "quick", "f32", 1, 64

    def __init__(self) -> None:
        self.batches = 0

    def encode(
        self,
        batches: Iterable[tuple[TokenIds, TokenIds]],
        take: Callable[[int, npt.NDArray[np.float32]], None],
    ) -> None:
        for number, (ids, lengths) in enumerate(batches):
            self.batches += 1
            if (ids == POISON).any():
                raise RuntimeError("poison in the batch\nmore detail")
            found = np.zeros((len(ids), 384), np.float32)
            for row, length in enumerate(lengths):
                for column in range(length):
                    found[row, ids[row, column] % 384] += column + 1
            found[(ids == NAN).any(axis=1)] = np.nan
            take(number, found)


def write_input(path: Path, rows: list[tuple[str, str | None]]) -> Path:
    columns = {
        "chunk_id": pa.array([f"c{i}" for i in range(len(rows))]),
        "content_hash": pa.array([key for key, _text in rows], pa.string()),
        "text": pa.array([text for _key, text in rows], pa.string()),
    }
    pq.write_table(pa.table(columns), path, row_group_size=7)
    return path


def texts(n: int) -> list[tuple[str, str | None]]:
    words = ["alpha", "beta", "gamma", "delta", "river", "stone", "window", "paper"]
    return [(f"h{i}", " ".join(words[(i * j) % 8] for j in range(1, 2 + i % 23)) + f" {i}") for i in range(n)]


def run(tmp_path: Path, rows: list[tuple[str, str | None]], **options: Any) -> Summary:
    source = write_input(tmp_path / "in.parquet", rows)
    options.setdefault("embedder", Embedder(open_model(), engine=QuickEngine()))
    options.setdefault("shard_size", 16)
    return job.run(source, tmp_path / "out", **options)


def failures_of(folder: Path) -> dict[str, str]:
    table = pq.read_table(folder / "failures.parquet")
    return dict(zip(table["content_hash"].to_pylist(), table["error"].to_pylist(), strict=True))


def test_every_text_gets_its_own_vector(tmp_path: Path) -> None:
    rows = texts(50)
    summary = run(tmp_path, rows)
    assert (summary.chunks, summary.distinct, summary.embedded, summary.shards) == (50, 50, 50, 4)
    assert summary.sound and summary.failed == summary.skipped == 0
    embedder = Embedder(open_model(), engine=QuickEngine())
    found, vectors = read_vectors(tmp_path / "out", [key for key, _text in rows])
    assert found == [key for key, _text in rows]
    expected = [embedder.encode([str(text)])[0] for _key, text in rows]
    np.testing.assert_allclose(vectors, np.stack(expected), atol=1e-6)


def test_unchanged_input_embeds_nothing_and_opens_no_engine(tmp_path: Path) -> None:
    run(tmp_path, texts(40))
    before = {path.name: path.stat().st_mtime_ns for path in protocol.shard_paths(tmp_path / "out")}
    engine = QuickEngine()
    summary = run(tmp_path, texts(40), embedder=Embedder(open_model(), engine=engine))
    assert (summary.embedded, summary.skipped, summary.shards) == (0, 40, 0)
    assert (engine.batches, summary.engine, summary.tokens_per_s) == (0, None, 0.0)
    assert before == {path.name: path.stat().st_mtime_ns for path in protocol.shard_paths(tmp_path / "out")}


def test_one_changed_text_embeds_one(tmp_path: Path) -> None:
    rows = texts(40)
    run(tmp_path, rows)
    rows[20] = ("new", "a new text")
    summary = run(tmp_path, rows)
    assert (summary.embedded, summary.skipped) == (1, 39)


def test_duplicates_are_embedded_once(tmp_path: Path) -> None:
    summary = run(tmp_path, texts(20) * 3)
    assert (summary.chunks, summary.distinct, summary.embedded) == (60, 20, 20)
    assert len(read_vectors(tmp_path / "out")[0]) == 20


def test_one_bad_text_is_one_failure_and_its_neighbours_are_embedded(tmp_path: Path) -> None:
    rows = texts(30)
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
    assert set(found) == {key for key, _text in texts(30)}
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    again = run(tmp_path, rows)
    assert (again.embedded, again.skipped, again.failed) == (0, 30, 4)
    assert run(tmp_path, texts(30)).failed == 0
    assert failures_of(tmp_path / "out") == {}


def test_a_string_that_is_not_utf8_is_one_failure(tmp_path: Path) -> None:
    text = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary()).view(pa.string())
    table = pa.table({"content_hash": pa.array(["a", "b", "c"]), "text": text})
    pq.write_table(table, tmp_path / "in.parquet")
    embedder = Embedder(open_model(), engine=QuickEngine())
    summary = job.run(tmp_path / "in.parquet", tmp_path / "out", embedder=embedder)
    assert (summary.embedded, summary.failed) == (2, 1)
    assert failures_of(tmp_path / "out") == {"b": "text is not valid UTF-8"}


def test_over_long_texts_are_counted_or_refused(tmp_path: Path) -> None:
    rows = [*texts(3), ("long", "river " * 400)]
    summary = run(tmp_path, rows)
    assert (summary.truncated, summary.failed, summary.embedded) == (1, 0, 4)
    source = write_input(tmp_path / "in2.parquet", rows)
    embedder = Embedder(open_model(), engine=QuickEngine())
    refused = job.run(source, tmp_path / "out2", embedder=embedder, too_long="refuse")
    assert (refused.truncated, refused.failed, refused.embedded) == (0, 1, 3)
    assert failures_of(tmp_path / "out2") == {"long": "text has 402 tokens, the model takes 256"}


def test_a_stopped_run_continues_with_the_same_bytes_and_reports_all_failures(tmp_path: Path) -> None:
    rows = texts(60)
    rows[2] = ("bad", "")
    run(tmp_path, rows)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.parquet")}

    (tmp_path / "second").mkdir()
    stop = threading.Event()

    def stop_in_the_third_shard(progress: Progress) -> None:
        if progress.shard == 3:
            stop.set()

    with pytest.raises(Interrupted):
        run(tmp_path / "second", rows, progress=stop_in_the_third_shard, stop=stop)
    out = tmp_path / "second" / "out"
    assert len(protocol.shard_paths(out)) == 2
    summary = run(tmp_path / "second", rows)
    assert (summary.skipped, summary.embedded, summary.failed) == (31, 28, 1)
    assert expected == {path.name: path.read_bytes() for path in out.glob("*.parquet")}


def test_progress_counts_every_token_and_ends_at_all(tmp_path: Path) -> None:
    seen: list[Progress] = []
    summary = run(tmp_path, texts(50), progress=seen.append)
    assert [progress.tokens for progress in seen] == sorted({progress.tokens for progress in seen})
    assert seen[-1].tokens == seen[-1].total_tokens == summary.tokens
    assert (seen[-1].shard, seen[-1].shards, seen[-1].seconds_left) == (4, 4, 0.0)


def test_padding_share_is_the_filler_among_the_tokens_computed(tmp_path: Path) -> None:
    summary = run(tmp_path, [("a", "river"), ("b", "river stone stone")])
    assert summary.tokens == 8
    assert summary.padding_share == 0.2  # 3 and 5 tokens in a batch of 2 x 5


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (pa.table({"text": ["a"]}), "has no column content_hash"),
        (pa.table({"content_hash": ["a"], "body": ["a"]}), "has no column text, only content_hash, body"),
        (pa.table({"content_hash": ["a"], "text": [1]}), "column text has type int64; write it as string"),
        (
            pa.table({"content_hash": pa.array([None, "a"]), "text": ["a", "b"]}),
            "1 rows have no content_hash",
        ),
    ],
)
def test_an_input_that_breaks_the_promise_is_refused(tmp_path: Path, table: pa.Table, says: str) -> None:
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(EmbedderError, match=r"in\.parquet") as caught:
        job.read_keys(tmp_path / "in.parquet")
    assert says in str(caught.value)


def test_an_absent_or_broken_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EmbedderError, match=r"absent\.parquet does not exist"):
        job.read_keys(tmp_path / "absent.parquet")
    (tmp_path / "broken.parquet").write_text("no")
    with pytest.raises(EmbedderError, match=r"broken\.parquet is not a readable Parquet file"):
        job.read_keys(tmp_path / "broken.parquet")


def test_an_empty_input_gives_an_empty_result(tmp_path: Path) -> None:
    summary = run(tmp_path, [])
    assert (summary.chunks, summary.distinct, summary.embedded, summary.sound) == (0, 0, 0, True)
    assert failures_of(tmp_path / "out") == {}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Embedder, "_open_checked_engine", lambda _self: QuickEngine())
    monkeypatch.setattr(command, "_stop_on_signals", lambda _stop: None)
    monkeypatch.delenv("EMBEDDING_MODEL", raising=False)


@pytest.mark.usefixtures("quick")
def test_the_command_reports_and_exits_by_what_happened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_input(tmp_path / "in.parquet", texts(20))
    arguments = ["--input", str(source), "--output", str(tmp_path / "out")]
    assert command.main([*arguments, "--summary", str(tmp_path / "s" / "summary.json")]) == 0
    figures = json.loads((tmp_path / "s" / "summary.json").read_text())
    assert (figures["embedded"], figures["release"]) == (20, open_model().release())
    assert "20 embedded, 0 already there, 0 failed" in capsys.readouterr().out
    write_input(source, [*texts(20), ("bad", "")])
    assert command.main(arguments) == 3
    assert command.main(["--input", str(tmp_path / "no.parquet"), "--output", str(tmp_path / "out")]) == 2
    assert "no.parquet does not exist" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_the_model_is_named_by_option_or_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--input", str(tmp_path / "i"), "--output", str(tmp_path / "o")]
    monkeypatch.setenv("EMBEDDING_MODEL", str(tmp_path / "from-environment"))
    assert command.main(arguments) == 2
    assert "from-environment" in capsys.readouterr().err
    assert command.main([*arguments, "--model", str(tmp_path / "from-option")]) == 2
    assert "from-option" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--shard-size", "0"], ["--precision", "int8"], []])
def test_bad_arguments_exit_with_2(arguments: list[str], tmp_path: Path) -> None:
    required = ["--input", "a", "--output", "b"] if arguments else []
    with pytest.raises(SystemExit) as caught:
        command.main([*required, *arguments])
    assert caught.value.code == 2


def test_help_lists_the_exit_codes() -> None:
    text = command.build_parser().format_help()
    for code in (
        protocol.EXIT_OK,
        protocol.EXIT_BAD_INPUT,
        protocol.EXIT_SOME_FAILED,
        protocol.EXIT_INTERRUPTED,
    ):
        assert f"\n  {code} " in text


@pytest.mark.usefixtures("quick")
def test_a_signal_ends_the_run_with_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_stop_on_signals", lambda stop: stop.set())
    source = write_input(tmp_path / "in.parquet", texts(20))
    assert command.main(["--input", str(source), "--output", str(tmp_path / "out")]) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_the_first_signal_asks_and_the_second_kills() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stop = threading.Event()
    try:
        command._stop_on_signals(stop)
        assert not stop.is_set()
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def test_progress_lines_are_throttled(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    seen: list[Progress] = []
    report = command._at_most_every(1, seen.append)
    for step in range(40):
        now = step / 10
        report(Progress(step, 100, now, 1, 1))
    assert [progress.tokens for progress in seen] == [10, 20, 30]


def test_a_progress_line_says_rate_and_time_left() -> None:
    line = command._progress_line(Progress(30_000, 120_000, 10.0, 1, 4))
    assert line == "shard 1 of 4, 30,000 of about 120,000 tokens (25%), 3,000 tokens/s, 30 s left"


def test_failing_rows_are_found_by_halving() -> None:
    rows = [np.array([i + 1], np.int32) for i in range(64)]
    rows[5] = rows[41] = np.array([POISON], np.int32)
    engine = QuickEngine()
    encoded = encode._encode_rows(engine, rows, 384, True, lambda _tokens: None)
    assert set(encoded.errors) == {5, 41}
    good = [i for i in range(64) if i not in encoded.errors]
    np.testing.assert_allclose(np.linalg.norm(encoded.vectors[good], axis=1), 1, atol=1e-6)
    assert engine.batches < 40

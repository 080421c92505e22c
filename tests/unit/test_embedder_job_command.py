"""The command line of the job: arguments, words, JSON and exit codes. The engine is replaced by a quick one."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path

import pytest

from embedder import __main__ as command
from embedder import protocol, report
from embedder.budget import Estimate
from embedder.encode import Embedder
from embedder.job import Progress
from embedder.model import open_model
from tests.unit.test_embedder_job import QuickEngine, some, write_input


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Embedder, "_open_checked", lambda _self, _name: QuickEngine())
    monkeypatch.setattr(command, "_stop_on_signals", lambda _stop: None)
    monkeypatch.delenv("EMBEDDING_MODEL", raising=False)


def arguments(tmp_path: Path, rows: list[tuple[str, str | None]], *more: str) -> list[str]:
    source = write_input(tmp_path / "in.parquet", rows)
    return ["--input", str(source), "--output", str(tmp_path / "out"), *more]


@pytest.mark.usefixtures("quick")
def test_the_command_reports_and_exits_by_what_happened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = tmp_path / "s" / "summary.json"
    assert command.main(arguments(tmp_path, some(20), "--summary", str(summary))) == 0
    figures = json.loads(summary.read_text())
    assert (figures["embedded"], figures["release"]) == (20, open_model().release())
    assert "20 embedded, 0 already there, 0 failed" in capsys.readouterr().out
    bad = arguments(tmp_path, [*some(20), ("bad", "")])
    assert command.main(bad) == 3
    assert command.main(bad) == 3
    assert "20 already there, 0 failed, 1 parked" in capsys.readouterr().out
    assert command.main([*bad, "--retry-failed"]) == 3
    assert "20 already there, 1 failed, 0 parked" in capsys.readouterr().out
    assert command.main(["--input", str(tmp_path / "no.parquet"), "--output", str(tmp_path / "out")]) == 2
    assert "no.parquet does not exist" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_the_model_is_named_by_option_or_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    required = ["--input", str(tmp_path / "i"), "--output", str(tmp_path / "o")]
    monkeypatch.setenv("EMBEDDING_MODEL", str(tmp_path / "from-environment"))
    assert command.main(required) == 2
    assert "from-environment" in capsys.readouterr().err
    assert command.main([*required, "--model", str(tmp_path / "from-option")]) == 2
    assert "from-option" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--shard-size=0", "0 is below 1"),
        ("--shard-size=many", "'many' is not a whole number"),
        ("--tokeniser-processes=-1", "-1 is below 0"),
        ("--max-cost=nan", "nan is not above 0"),
        ("--price-per-hour=-2", "-2 is not above 0"),
        ("--rate=fast", "'fast' is not a number"),
        ("--precision=int8", "invalid choice: 'int8'"),
        ("--engine=abacus", "invalid choice: 'abacus'"),
    ],
)
def test_a_bad_value_exits_with_2_and_its_reason(
    option: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(["--input", "a", "--output", "b", option])
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_missing_arguments_exit_with_2() -> None:
    with pytest.raises(SystemExit) as caught:
        command.main([])
    assert caught.value.code == 2


@pytest.mark.usefixtures("quick")
def test_a_ceiling_without_a_price_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments(tmp_path, some(3), "--max-cost", "1")) == 2
    assert "give --price-per-hour with --max-cost" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_the_budget_stops_the_command_with_4_and_more_of_it_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = tmp_path / "summary.json"
    options = arguments(tmp_path, some(60), "--shard-size=10", f"--summary={summary}")
    assert command.main([*options, "--max-tokens", "300"]) == 4
    err = capsys.readouterr().err
    assert "above the ceiling, so the run stops there" in err
    assert "stopped by the budget" in err and "raise --max-tokens to continue" in err
    figures = json.loads(summary.read_text())
    assert figures["status"] == "over budget"
    assert 0 < figures["tokens"] <= 300
    assert len(protocol.shard_paths(tmp_path / "out")) == figures["shards"] > 0
    assert command.main([*options, "--max-tokens", "300"]) == 4
    assert json.loads(summary.read_text())["embedded"] == 0
    assert command.main([*options, "--max-tokens", "30000"]) == 0
    assert json.loads(summary.read_text())["skipped"] == figures["embedded"]


@pytest.mark.usefixtures("quick")
def test_an_estimate_embeds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = arguments(tmp_path, some(20), "--estimate", "--rate=10", "--price-per-hour=3600", "--summary=-")
    assert command.main(options) == 0
    printed = capsys.readouterr()
    figures = json.loads(printed.out)
    assert (figures["status"], figures["embedded"]) == ("estimated", 0)
    assert figures["estimated_tokens"] > 0
    assert figures["estimated_cost"] == pytest.approx(figures["estimated_tokens"] / 10)
    assert "to embed: 20 texts, about" in printed.err
    assert not protocol.shard_paths(tmp_path / "out")


@pytest.mark.usefixtures("quick")
def test_a_json_log_is_one_object_a_line_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report.Every, "__call__", lambda _self: True)
    options = arguments(tmp_path, [*some(20), ("bad", "")], "--log-format=json", "--summary=-")
    assert command.main(options) == 3
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.err.splitlines()]
    assert all({"ts", "level", "event"} <= line.keys() for line in lines)
    events = [line["event"] for line in lines]
    assert (events[0], events[-1]) == ("estimate", "ended")
    assert "progress" in events
    progress = next(line for line in lines if line["event"] == "progress")
    assert {"rows", "tokens_per_s", "seconds_left", "share", "padding_share"} <= progress.keys()
    assert json.loads(printed.out)["failed"] == lines[-1]["failed"] == 1
    assert command.main([*options, "--input", str(tmp_path / "absent")]) == 2
    (failed,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert (failed["level"], failed["event"]) == ("error", "failed")
    assert "does not exist" in failed["message"]


@pytest.mark.usefixtures("quick")
def test_a_summary_that_cannot_be_written_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments(tmp_path, some(2), "--summary", str(tmp_path))) == 2
    assert "the vectors are written, but" in capsys.readouterr().err


def test_help_lists_the_exit_codes() -> None:
    text = command.build_parser().format_help()
    codes = [value for name, value in vars(protocol).items() if name.startswith("EXIT_")]
    assert len(codes) == 5
    for code in codes:
        assert f"\n  {code} " in text


@pytest.mark.usefixtures("quick")
def test_a_signal_ends_the_run_with_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_stop_on_signals", lambda stop: stop.set())
    assert command.main(arguments(tmp_path, some(20))) == 130
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


def test_progress_is_throttled(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    due = report.Every(1)
    seen = []
    for step in range(40):
        now = step / 10
        if due():
            seen.append(step)
    assert seen == [10, 20, 30]


PROGRESS = Progress(2_500, 10_000, 30_000, 120_000, 10.0, 1, 4, 0.005)
IN_WORDS = "25%: 2,500 of 10,000 texts, shard 1 of 4, 3,000 tokens/s, padding 0.5%, 30 s left"


def test_progress_on_a_terminal_is_one_line_and_elsewhere_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report.Every, "__call__", lambda _self: True)
    report.Lines(terminal=False).progressed(PROGRESS)
    assert capsys.readouterr().err == f"{IN_WORDS}\n"
    report.Lines(terminal=True).progressed(PROGRESS)
    assert capsys.readouterr().err == f"\x1b[K{IN_WORDS}\r"


def test_an_estimate_says_what_is_known() -> None:
    unknown = report.estimate_in_words(Estimate(1_000, 90_000, None, None, None, True))
    assert (
        unknown == "to embed: 1,000 texts, about 90,000 tokens; the first shard will tell how long that takes"
    )
    known = report.estimate_in_words(Estimate(1_000, 90_000, 30_000.0, 3.5, 0.0029, True))
    assert known == "to embed: 1,000 texts, about 90,000 tokens, 4 s at 30,000 tokens/s, cost 0.0029"

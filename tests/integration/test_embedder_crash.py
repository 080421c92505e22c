"""Texts that end the process they are in: one failure each, whatever they do it with and whoever runs the job."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedder.protocol import PLAN_FILE, RUN_FILE, shard_paths
from tests.integration.test_embedder_pipes import materialize

# Python runs this at the start of the job and of its children. The engine's vectors tell the shape of their batch, so
# that another way of cutting batches is another vector. WAY says how a deadly text ends the process.
ENGINE = """
import multiprocessing, os, signal, time
import numpy as np
from embedder.encode import Embedder
from embedder.tokens import Tokeniser

POISON = 9947  # the token of the word
WAY = os.environ["WAY"]

def end(how):
    if how == "refuse":
        raise RuntimeError("refused")
    if how == "group":  # what a container does whose memory is short
        if (parent := multiprocessing.parent_process()) is not None:
            os.kill(parent.pid, signal.SIGKILL)
        how = "SIGKILL"
    os.kill(os.getpid(), getattr(signal, how))

class Engine:
    name, device, precision, streams, token_budget, packed = "quick", "cpu", "f32", 1, 64, False

    def encode(self, batches, take):
        for number, batch in enumerate(list(batches)):
            time.sleep(float(os.environ.get("SLOW", 0)))
            if POISON in batch.ids:
                end(WAY)
            found = np.repeat(batch.lengths[:, None], 384, axis=1).astype(np.float32)
            found[:, 0] += len(batch.lengths)
            found[:, 1] += np.add.reduceat(batch.ids, batch.offsets[:-1])
            take(number, found)

tokenise = Tokeniser.tokenise

def checked(self, texts, **options):
    if any("venom" in str(text) for text in texts):
        end(WAY)
    return tokenise(self, texts, **options)

Tokeniser.tokenise = checked
Embedder._open_checked = lambda self, name: Engine()
"""

# What Dagster's own Pipes client calls inside Dagster.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:AssetExecutionContext\.run_id is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::dagster.PreviewWarning"),
]


@pytest.fixture(autouse=True)
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(ENGINE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(Path.cwd())]))
    monkeypatch.delenv("EMBEDDING_MODEL", raising=False)


def texts(**special: str) -> dict[str, str]:
    """60 texts of different lengths, in six shards; the special ones stand in the fourth."""
    words = ["river", "stone", "window", "paper"]
    found = {f"h{i}": " ".join(words[(i * j) % 4] for j in range(1, 2 + i % 19)) for i in range(60)}
    return dict(list(found.items())[:35]) | special | dict(list(found.items())[35 + len(special) :])


def write(path: Path, rows: dict[str, str]) -> Path:
    pq.write_table(pa.table({"content_hash": list(rows), "text": list(rows.values())}), path)
    return path


def start(source: Path, output: Path, *more: str, way: str = "refuse", **how: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "embedder", "--input", str(source), "--output", str(output)]
    return subprocess.Popen(
        [*command, "--shard-size", "10", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"WAY": way},
        **how,
    )


def run(source: Path, output: Path, *more: str, **how: Any) -> subprocess.CompletedProcess[str]:
    with start(source, output, *more, **how) as process:
        out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess([], process.returncode, out, err)


def vectors(output: Path) -> dict[str, Any]:
    return {path.name: pq.read_table(path).to_pydict() for path in shard_paths(output)}


def failures(output: Path) -> dict[str, tuple[str, int]]:
    rows = pq.read_table(output / "failures.parquet").to_pylist()
    return {row["content_hash"]: (row["error"], row["attempts"]) for row in rows}


def names(output: Path) -> set[str]:
    return {path.name for path in output.iterdir() if path not in shard_paths(output)}


def test_a_text_that_ends_the_process_costs_one_run_and_then_itself(tmp_path: Path) -> None:
    rows = texts(bad="window poison window")
    source = write(tmp_path / "in.parquet", rows)
    assert run(source, tmp_path / "refused").returncode == 3
    out = tmp_path / "out"
    assert run(source, out, way="SIGKILL").returncode == -signal.SIGKILL
    survivors = {path: path.stat().st_mtime_ns for path in shard_paths(out)}
    assert len(survivors) in (2, 3)  # the third may have been on its way to disk
    second = run(source, out, way="SIGKILL")
    assert second.returncode == 3, second.stderr
    assert "may hold a text that ends the process" in second.stderr
    assert "1 failed" in second.stdout
    assert survivors.items() <= {path: path.stat().st_mtime_ns for path in shard_paths(out)}.items()
    assert vectors(out) == vectors(tmp_path / "refused")  # cut into the same batches
    error = "the engine refused the text: it ended the process it was in (SIGKILL, which the kernel sends when memory is short)"
    assert failures(out) == {"bad": (error, 1)}
    assert names(out) == {".lock", RUN_FILE, "failures.parquet"}

    # Tried again, beside a new text.
    again = run(write(source, rows | {"new": "a new text"}), out, "--retry-failed", way="SIGKILL")
    assert again.returncode == 3, again.stderr
    assert "1 embedded, 59 already there, 1 failed" in again.stdout
    assert failures(out) == {"bad": (error, 2)}


def test_a_text_that_ends_the_tokeniser_is_found_also_when_the_input_has_changed_since(
    tmp_path: Path,
) -> None:
    """Also when the estimate meets it first, before any shard is begun."""
    rows = texts(bad="venom")
    source, out = write(tmp_path / "in.parquet", rows), tmp_path / "out"
    assert run(source, out, way="SIGSEGV").returncode == -signal.SIGSEGV
    assert not shard_paths(out)
    second = run(write(source, {"first": "paper"} | rows), out, way="SIGSEGV")
    assert second.returncode == 3 and "60 embedded, 0 already there, 1 failed" in second.stdout, second.stderr
    error, attempts = failures(out)["bad"]
    assert error == "tokenizer refused the text: it ended the process it was in (SIGSEGV)"
    assert attempts == 1


def test_a_text_that_ends_the_job_with_its_child_is_found_by_the_runs_after_it(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.parquet", texts(bad="venom")), tmp_path / "out"
    codes = [run(source, out, way="group").returncode]
    while codes[-1] == -signal.SIGKILL and len(codes) < 6:
        codes.append(run(source, out, way="group").returncode)
    assert codes[-1] == 3, codes
    ((key, (error, attempts)),) = failures(out).items()
    assert (key, attempts) == ("bad", 1) and "it ended the process it was in" in error
    assert names(out) == {".lock", RUN_FILE, "failures.parquet"}


def test_signals_at_any_moment_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write(tmp_path / "in.parquet", texts(bad="window poison window")), tmp_path / "out"
    assert run(source, tmp_path / "whole").returncode == 3
    monkeypatch.setenv("SLOW", "0.02")
    chance = random.Random(7)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        with start(source, out) as process:
            time.sleep(chance.uniform(0.1, 1.5))
            process.send_signal(number)
            process.communicate()
        # A signal may come before Python can handle it, or after all is done.
        assert process.returncode in (130, -number, 3)
    monkeypatch.delenv("SLOW")
    assert run(source, out).returncode == 3
    shards = {path.name: path.read_bytes() for path in shard_paths(out)}
    assert shards == {path.name: path.read_bytes() for path in shard_paths(tmp_path / "whole")}
    assert failures(out) == failures(tmp_path / "whole")
    assert names(out) == {".lock", RUN_FILE, "failures.parquet"}


def test_a_disk_that_is_full_is_named_and_then_costs_nothing(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.parquet", texts()), tmp_path / "out"
    assert run(source, tmp_path / "whole").returncode == 0
    small = 1000, resource.RLIM_INFINITY
    full = run(source, out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, small))
    assert full.returncode == 2
    assert (
        "cannot be written (" in full.stderr and "make room" in full.stderr and "Traceback" not in full.stderr
    )
    assert names(out) <= {".lock", PLAN_FILE}
    assert run(source, out).returncode == 0
    assert vectors(out) == vectors(tmp_path / "whole")


def test_dagster_sees_one_failed_run_and_then_one_failed_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WAY", "SIGABRT")
    source = write(tmp_path / "in.parquet", texts(bad="poison"))
    command = source, tmp_path / "out", "--shard-size", "10"
    assert not materialize(*command).success
    again = materialize(*command)
    assert again.success, capfd.readouterr().err
    (materialization,) = again.asset_materializations_for_node("vectors")
    metadata = {name: value.value for name, value in materialization.metadata.items()}
    assert (metadata["distinct"], metadata["failed"], metadata["parked"]) == (60, 1, 0)

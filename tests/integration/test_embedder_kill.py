"""The real job as a process of its own: killed without warning, interrupted, and run again."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedder.protocol import PLAN_FILE, RUN_FILE, read_vectors, shard_paths

WORDS = [
    "river",
    "stone",
    "window",
    "paper",
    "letter",
    "garden",
    "engine",
    "market",
    "winter",
    "colour",
    "number",
    "signal",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 distinct texts of 10 to 80 words."""
    chance = random.Random(11)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(10, 80))) for _ in range(320)]
    path: Path = tmp_path_factory.mktemp("input") / "chunks.parquet"
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    pq.write_table(pa.table({"chunk_id": hashes, "content_hash": hashes, "text": texts}), path)
    return path


def start(source: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "embedder", "--input", str(source), "--output", str(output)]
    environment = {name: value for name, value in os.environ.items() if name != "EMBEDDING_MODEL"}
    return subprocess.Popen(
        [*command, "--shard-size", "20", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen[str], *, code: int = 0) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    return out + err


def summary_of(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def wait_for_shards(process: subprocess.Popen[str], output: Path, number: int) -> None:
    deadline = time.monotonic() + 120
    while len(shard_paths(output)) < number:
        assert process.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("*.parquet")}


def test_kill_9_twice_and_resume_gives_the_bytes_of_an_uninterrupted_run(
    source: Path, tmp_path: Path
) -> None:
    finish(start(source, tmp_path / "whole"))
    whole = contents(tmp_path / "whole")
    assert len(whole) == 17  # 16 shards and failures.parquet

    output = tmp_path / "killed"
    for shards_before_kill in (3, 9):
        process = start(source, output)
        wait_for_shards(process, output, shards_before_kill)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert (output / PLAN_FILE).exists()
    survivors = {path.name: path.stat().st_mtime_ns for path in shard_paths(output)}
    assert 9 <= len(survivors) < 16

    report = tmp_path / "summary.json"
    finish(start(source, output, "--summary", str(report)))
    assert contents(output) == whole
    assert sorted(path.name for path in output.iterdir()) == sorted([".lock", RUN_FILE, *whole])
    after = {path.name: path.stat().st_mtime_ns for path in shard_paths(output)}
    assert {name: after[name] for name in survivors} == survivors
    figures = summary_of(report)
    assert (figures["embedded"], figures["skipped"]) == (320 - 20 * len(survivors), 20 * len(survivors))

    assert "0 embedded, 320 already there" in finish(start(source, output))
    hashes, vectors = read_vectors(output)
    assert len(set(hashes)) == len(hashes) == 320
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_job_soon_and_cleanly(source: Path, tmp_path: Path, number: int) -> None:
    process = start(source, tmp_path / "out")
    wait_for_shards(process, tmp_path / "out", 1)
    process.send_signal(number)
    said = finish(process, code=130)
    assert "run the same command again to continue" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "out").glob(".*.tmp"))
    assert 1 <= len(shard_paths(tmp_path / "out")) < 16


def test_the_budget_stops_the_process_with_4_and_its_log_is_json(source: Path, tmp_path: Path) -> None:
    options = ["--max-tokens", "6000", "--price-per-hour", "2", "--log-format", "json", "--summary", "-"]
    process = start(source, tmp_path / "out", *options)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 4, err
    figures = json.loads(out)
    assert figures["status"] == "over budget"
    assert 0 < figures["tokens"] <= 6000
    assert figures["cost"] == pytest.approx(2 * figures["seconds"] / 3600, rel=0.01)
    assert len(shard_paths(tmp_path / "out")) == figures["shards"]
    events = [json.loads(line) for line in err.splitlines()]
    assert events[-1]["event"] == "failed"
    assert "raise --max-tokens to continue" in events[-1]["message"]

"""How fast the embedder's CPU engine is, and which share of this machine's matrix rate it reaches.

Run by hand: `python benchmarks/embedding.py INPUT.parquet` (a string column `text`; 1,000 texts are enough).
Rates are given per second and per CPU-second: on a machine shared with others only the second is comparable,
and the share is taken of a matrix rate measured in the same CPU-seconds, in the same process.
Belongs here: measuring. Does not belong here: peers, which need environments of their own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from embedder.canary import worst_cosine
from embedder.encode import Embedder
from embedder.model import Model
from embedder.openvino_engine import import_openvino

GEMM_ROWS, GEMM_LAYERS = 2048, 8


def best_of(rounds: int, work: Callable[[], object]) -> tuple[float, float]:
    """(seconds, CPU-seconds), each the least of the rounds."""
    wall, cpu = [], []
    for _ in range(rounds):
        started, cpu_started = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - cpu_started)
    return min(wall), min(cpu)


def gemm_rate(model: Model, precision: str) -> float:
    """FLOP per CPU-second of the model's feed-forward shapes alone, one thread."""
    ov = import_openvino()
    op = ov.opset13
    random = np.random.default_rng(0)
    inner = 4 * model.hidden
    x: Any = op.parameter([GEMM_ROWS, model.hidden], np.float32)
    inputs = [x]
    for shape in [(inner, model.hidden), (model.hidden, inner)] * GEMM_LAYERS:
        x = op.matmul(x, op.constant(random.normal(0, 0.03, shape).astype(np.float32)), False, True)
    settings = {"INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": "1"}
    compiled = ov.Core().compile_model(ov.Model([op.result(x)], inputs, "gemm"), "CPU", settings)
    request = compiled.create_infer_request()
    ones = np.ones((GEMM_ROWS, model.hidden), np.float32)
    request.infer({0: ones})
    _wall, cpu = best_of(20, lambda: request.infer({0: ones}))
    return 2 * 2 * GEMM_ROWS * model.hidden * inner * GEMM_LAYERS / cpu


def flops(model: Model, lengths: list[int]) -> float:
    """Multiplications and additions of the matrix products for texts of these token counts."""
    per_token = 2 * 12 * model.hidden**2 * model.layers
    per_pair = 4 * model.hidden * model.layers
    return float(sum(length * (per_token + per_pair * length) for length in lengths))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    texts = pq.read_table(options.input, columns=["text"])["text"].to_pylist()
    exact = Embedder.open(precision="f32").encode(texts, as_query=False)

    started = time.perf_counter()
    embedder = Embedder.open()
    precision = embedder.engine.precision
    ready = time.perf_counter() - started
    tokenised = embedder.tokeniser.tokenise(texts)
    lengths = [len(row) for row in tokenised.rows if row is not None]
    wall, cpu = best_of(options.rounds, lambda: embedder.encode(texts, as_query=False))
    rate = gemm_rate(embedder.model, precision)
    share = flops(embedder.model, lengths) / cpu / rate
    cosine = worst_cosine(embedder.encode(texts, as_query=False), exact)
    print(
        f"{len(texts):,} texts, {sum(lengths):,} tokens, mean {np.mean(lengths):.0f}; ready in {ready:.2f} s"
    )
    print(
        f"{len(texts) / wall:,.0f} texts/s, {sum(lengths) / wall:,.0f} tokens/s on {embedder.engine.streams} streams"
    )
    print(f"{len(texts) / cpu:,.0f} texts and {sum(lengths) / cpu:,.0f} tokens per CPU-second")
    print(
        f"{share:.0%} of the {precision} matrix rate, {rate / 1e9:,.0f} GFLOP per CPU-second; tokenising included"
    )
    print(f"worst cosine against f32 {cosine:.5f}")


if __name__ == "__main__":
    main()

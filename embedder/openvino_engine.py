"""The CPU engine: a BERT graph built straight from the weights with OpenVINO's operations.

Belongs here: the graph, how it is compiled for this machine, and running batches through it.
Does not belong here: tokenising, choosing batches, checking the vectors (see `encode`).
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedder.model import WEIGHTS_FILE, Model
from embedder.protocol import EmbedderError
from embedder.tokens import TokenIds

F32 = "f32"
BF16 = "bf16"

# Throughput is flat between 512 and 2,048 tokens a batch; smaller batches keep the streams evenly busy.
TOKEN_BUDGET = 1024

Batch = tuple[TokenIds, TokenIds]
Floats = npt.NDArray[np.float32]


class OpenVinoEngine:
    """Pooled, not yet normalised vectors from padded token ids. One stream per physical core, one thread each."""

    name = "openvino"
    token_budget = TOKEN_BUDGET

    def __init__(
        self, model: Model, weights: dict[str, Floats], *, precision: str, streams: int | None = None
    ) -> None:
        """`precision` is 'f32' or 'bf16' and is never left to OpenVINO, which would pick bf16 silently."""
        ov = import_openvino()
        self.precision = precision
        self.streams = streams or physical_cores()
        compiled = ov.Core().compile_model(
            build_graph(model, weights),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": precision,
                "NUM_STREAMS": str(self.streams),
                "INFERENCE_NUM_THREADS": str(self.streams),
                "ENABLE_CPU_PINNING": "NO",
            },
        )
        # More requests than streams, so that no stream waits for this side to look at a finished one.
        self._lock = threading.Lock()
        self._requests = [compiled.create_infer_request() for _ in range(2 * self.streams)]

    def encode(self, batches: Iterable[Batch], take: Callable[[int, Floats], None]) -> None:
        """Run every batch; `take(i, vectors float32[n, d])` is called for batch i, in order, on this thread.

        The array given to `take` is reused afterwards. `batches` is read lazily, and an exception it raises
        comes out once the batches in flight are done.
        Raises RuntimeError when OpenVINO cannot run a batch; later batches are then left undone. Calls from
        several threads take turns.
        """
        with self._lock:
            self._run(batches, take)

    def _run(self, batches: Iterable[Batch], take: Callable[[int, Floats], None]) -> None:
        # No AsyncInferQueue: its callbacks are Python objects that a stream's thread releases after the result
        # is out, and deleting the compiled model meanwhile joins that thread while holding the interpreter lock.
        free = list(self._requests)
        running: deque[tuple[int, Any, Batch]] = deque()

        def finish() -> None:
            number, request, _inputs = running[0]
            try:
                request.wait()
            finally:
                running.popleft()
                free.append(request)
            take(number, request.get_output_tensor(0).data)

        try:
            for number, (ids, lengths) in enumerate(batches):
                if not free:
                    finish()
                request = free.pop()
                request.start_async({0: ids, 1: lengths}, share_inputs=True)
                running.append((number, request, (ids, lengths)))
            while running:
                finish()
        finally:
            for _number, request, _inputs in running:
                with contextlib.suppress(RuntimeError):
                    request.wait()


def build_graph(model: Model, weights: dict[str, Floats]) -> Any:
    """The model as an `openvino.Model`: ids int32[n, m], lengths int32[n] -> pooled float32[n, d].

    Scaling to unit length is left to the caller, who does it in float32: inside a bf16 graph the result would
    be rounded after it. Raises EmbedderError when a weight is missing or has another shape than the config says.
    """
    ov = import_openvino()
    op = ov.opset13
    hidden, heads = model.hidden, model.heads

    def weight(name: str, *shape: int | None) -> Floats:
        found = weights.get(name)
        if found is None or len(found.shape) != len(shape):
            raise EmbedderError(
                f"{model.folder / WEIGHTS_FILE} has no usable tensor {name}; the file does not hold a BertModel as "
                "config.json says; download the model again"
            )
        if any(want is not None and want != have for want, have in zip(shape, found.shape, strict=True)):
            raise EmbedderError(
                f"{model.folder / WEIGHTS_FILE}: tensor {name} has shape {found.shape}, config.json asks for {shape}; "
                "download the model again"
            )
        return found

    def constant(values: Floats) -> Any:
        return op.constant(np.ascontiguousarray(values, np.float32))

    def integers(*values: int) -> Any:
        return op.constant(np.array(values, np.int64))

    def axis(value: int) -> Any:
        return op.constant(np.int64(value))

    def normalised(x: Any, name: str) -> Any:
        scaled = op.mvn(x, integers(-1), True, model.layer_norm_eps, "inside_sqrt")
        gamma, beta = weight(f"{name}.weight", hidden), weight(f"{name}.bias", hidden)
        return op.add(op.multiply(scaled, constant(gamma)), constant(beta))

    def linear(x: Any, matrix: Floats, bias: Floats) -> Any:
        return op.add(op.matmul(x, constant(matrix), False, True), constant(bias))

    def dense(x: Any, name: str, outputs: int | None, inputs: int | None) -> Any:
        matrix = weight(f"{name}.weight", outputs, inputs)
        return linear(x, matrix, weight(f"{name}.bias", matrix.shape[0]))

    def per_head(x: Any) -> Any:
        split = op.reshape(x, integers(0, 0, heads, hidden // heads), True)
        return op.transpose(split, integers(0, 2, 1, 3))

    ids = op.parameter([-1, -1], np.int32, name="ids")
    lengths = op.parameter([-1], np.int32, name="lengths")
    longest = op.gather(op.shape_of(ids), axis(1), axis(0))
    positions = op.range(axis(0), longest, axis(1), "i64")

    words = weight("embeddings.word_embeddings.weight", None, hidden)
    # All tokens are of type 0, so its row is folded into the position table.
    places = weight("embeddings.position_embeddings.weight", None, hidden)
    places = places + weight("embeddings.token_type_embeddings.weight", None, hidden)[0]
    x = op.add(op.gather(constant(words), ids, axis(0)), op.gather(constant(places), positions, axis(0)))
    x = normalised(x, "embeddings.LayerNorm")

    real = op.less(op.unsqueeze(op.convert(positions, "i32"), axis(0)), op.unsqueeze(lengths, axis(1)))
    mask = op.convert(real, "f32")
    bias = op.multiply(op.subtract(op.constant(np.float32(1)), mask), op.constant(np.float32(-1e9)))
    bias = op.unsqueeze(bias, integers(1, 2))

    for layer in range(model.layers):
        name = f"encoder.layer.{layer}"
        parts = [f"{name}.attention.self.{part}" for part in ("query", "key", "value")]
        fused = linear(
            x,
            np.concatenate([weight(f"{part}.weight", hidden, hidden) for part in parts]),
            np.concatenate([weight(f"{part}.bias", hidden) for part in parts]),
        )
        query, key, value = op.variadic_split(fused, axis(2), integers(hidden, hidden, hidden)).outputs()
        attended = op.scaled_dot_product_attention(per_head(query), per_head(key), per_head(value), bias)
        merged = op.reshape(op.transpose(attended, integers(0, 2, 1, 3)), integers(0, 0, hidden), True)
        x = op.add(dense(merged, f"{name}.attention.output.dense", hidden, hidden), x)
        x = normalised(x, f"{name}.attention.output.LayerNorm")
        inner = op.gelu(dense(x, f"{name}.intermediate.dense", None, hidden), "erf")
        x = op.add(dense(inner, f"{name}.output.dense", hidden, None), x)
        x = normalised(x, f"{name}.output.LayerNorm")

    if model.pooling == "cls":
        pooled = op.gather(x, axis(0), axis(1))
    else:
        total = op.squeeze(op.matmul(op.unsqueeze(mask, axis(1)), x, False, False), axis(1))
        pooled = op.divide(total, op.unsqueeze(op.convert(lengths, "f32"), axis(1)))
    return ov.Model([op.result(op.convert(pooled, "f32"))], [ids, lengths], "embedder")


def fast_precision() -> str:
    """bf16 where the CPU multiplies it in hardware, else f32: elsewhere bf16 is emulated and slower."""
    if platform.system() != "Linux":
        return F32
    flags = _cpu_flags(Path("/proc/cpuinfo"))
    return BF16 if flags & {"avx512_bf16", "amx_bf16"} else F32


def physical_cores() -> int:
    """Physical cores this process may use; hyper-threads share the units that multiply matrices."""
    if platform.system() != "Linux":
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    cores = {_core_of(cpu) for cpu in allowed}
    return max(1, min(len(cores), _cpu_quota(Path("/sys/fs/cgroup/cpu.max")) or len(cores)))


def _core_of(cpu: int) -> tuple[str, str]:
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return (topology / "physical_package_id").read_text(), (topology / "core_id").read_text()
    except OSError:
        return "cpu", str(cpu)


def _cpu_quota(path: Path) -> int | None:
    """Whole CPUs a container may use, None where nothing limits it."""
    try:
        quota, period = path.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(1, int(quota) // int(period))


def _cpu_flags(path: Path) -> set[str]:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def import_openvino() -> Any:
    """The openvino package, loaded so that nothing in this process can send usage data."""
    # OpenVINO's package imports its conversion tools, and those a telemetry client that sends usage data
    # unless it cannot be imported, in which case they fall back to a stub.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino

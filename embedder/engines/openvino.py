"""The CPU engine: a graph compiled by OpenVINO for this machine, and batches running through it.

Belongs here: compiling, running.
Does not belong here: the graph (see `encoder_graph`); tokenising, choosing batches, checking vectors (see `encode`).
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from embedder.engines.encoder_graph import EncoderGraph, import_openvino
from embedder.machine import fast_precision, physical_cores
from embedder.model import Model, load_weights
from embedder.tokens import Int32s, Tokens, pad

# Throughput is flat between 512 and 2,048 tokens a batch; smaller batches keep the streams evenly busy.
TOKEN_BUDGET = 1024

Floats = npt.NDArray[np.float32]


def open_engine(model: Model, *, device: str, precision: str | None, streams: int | None) -> OpenVinoEngine:
    """The engine for a model's pooled vectors on the CPU, which is the only `device` it has.

    Scaling to unit length is left to the caller, who does it in float32: inside a bf16 graph the result would
    be rounded after it.
    """
    assert device == "cpu"
    graph = EncoderGraph(model.folder, model.config, model.architecture, load_weights(model.folder))
    encoded = graph.encoded()
    pooled = graph.pooled(encoded, model.pooling)
    return OpenVinoEngine(pooled, [encoded.ids, encoded.lengths], precision=precision, streams=streams)


class OpenVinoEngine:
    """Rows of floats from padded token ids. One stream per physical core, one thread each."""

    name = "openvino"
    device = "cpu"
    packed = False

    def __init__(
        self,
        output: Any,
        inputs: list[Any],
        *,
        precision: str | None = None,
        streams: int | None = None,
    ) -> None:
        """`output` is a node float[n, d], `inputs` its parameters in the order in which batches give them.

        `precision` None is chosen here and never left to OpenVINO, which would pick bf16 silently.
        """
        ov = import_openvino()
        self.precision = precision or fast_precision()
        self.streams = streams or physical_cores()
        self.token_budget = TOKEN_BUDGET
        result = ov.opset13.result(ov.opset13.convert(output, "f32"))
        compiled = ov.Core().compile_model(
            ov.Model([result], inputs, "embedder"),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": self.precision,
                "NUM_STREAMS": str(self.streams),
                "INFERENCE_NUM_THREADS": str(self.streams),
                "ENABLE_CPU_PINNING": "NO",
            },
        )
        # More requests than streams, so that no stream waits for this side to look at a finished one.
        self._lock = threading.Lock()
        self._requests = [compiled.create_infer_request() for _ in range(2 * self.streams)]

    def encode(self, batches: Iterable[Tokens], take: Callable[[int, Floats], None]) -> None:
        """See `embedder.encode.Engine.encode`."""
        self.run(((pad(tokens), tokens.lengths) for tokens in batches), take)

    def run(self, batches: Iterable[Sequence[Int32s]], take: Callable[[int, Floats], None]) -> None:
        """As `encode`, for batches that are the graph's inputs already."""
        # No AsyncInferQueue: its callbacks are Python objects that a stream's thread releases after the result
        # is out, and deleting the compiled model meanwhile joins that thread while holding the interpreter lock.
        free = list(self._requests)
        running: deque[tuple[int, Any, Sequence[Int32s]]] = deque()

        def finish() -> None:
            number, request, _inputs = running[0]
            try:
                request.wait()
            finally:
                running.popleft()
                free.append(request)
            take(number, request.get_output_tensor(0).data)

        with self._lock:
            try:
                for number, inputs in enumerate(batches):
                    if not free:
                        finish()
                    request = free.pop()
                    request.start_async(dict(enumerate(inputs)), share_inputs=True)
                    running.append((number, request, inputs))
                while running:
                    finish()
            finally:
                for _number, request, _inputs in running:
                    with contextlib.suppress(RuntimeError):
                        request.wait()

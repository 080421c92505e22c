"""One contender of `benchmarks.embedding` in a process of its own: it loads its engine, then embeds whenever it is told.

Runs in the contender's own environment: `python -m benchmarks.peers.worker OPENER JSON_OPTIONS`. It answers each line
on stdin with one JSON line on stdout; the commands are at `main`.

Belongs here: how each peer is opened, by its documentation. Does not belong here: what is compared, and when.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Encode = Callable[[Sequence[str]], Floats]


def datamoat(model: str, precision: str | None = None) -> Encode:
    """Ours; `precision` None takes the fastest the CPU has."""
    from embedder.encode import Embedder

    embedder = Embedder.open(Path(model), precision=precision)
    return lambda texts: embedder.encode(texts, as_query=False)


def sentence_transformers(
    model: str,
    batch: int = 32,
    bf16: bool = False,
    backend: str = "torch",
    pool: int = 0,
    precision: str | None = None,
) -> Encode:
    """`SentenceTransformer.encode`; `pool` processes. `precision` is OpenVINO's; left out, it chooses."""
    from sentence_transformers import SentenceTransformer

    arguments: dict[str, Any] = {}
    if bf16:
        import torch

        arguments = {"model_kwargs": {"dtype": torch.bfloat16}}
    if precision is not None:
        arguments = {"model_kwargs": {"ov_config": {"INFERENCE_PRECISION_HINT": precision}}}
    arguments |= {"backend": backend, "device": "cpu", "local_files_only": True}
    opened: Any = SentenceTransformer(model, **arguments)
    if pool:
        workers = opened.start_multi_process_pool(["cpu"] * pool)
        return lambda texts: np.asarray(
            opened.encode(list(texts), pool=workers, batch_size=batch, normalize_embeddings=True), np.float32
        )

    def encode(texts: Sequence[str]) -> Floats:
        found = opened.encode(
            list(texts), batch_size=batch, normalize_embeddings=True, convert_to_tensor=bf16
        )
        return np.asarray(found.float().numpy() if bf16 else found, np.float32)

    return encode


def fastembed(model: str, onnx: str, batch: int = 256, parallel: int | None = None) -> Encode:
    """`TextEmbedding.embed` on the same weights, exported to ONNX."""
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    TextEmbedding.add_custom_model(
        model="local/model",
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf="local/model"),
        dim=json.loads((Path(model) / "config.json").read_text())["hidden_size"],
        model_file="onnx/model.onnx",
    )
    opened = TextEmbedding("local/model", specific_model_path=onnx, providers=["CPUExecutionProvider"])
    return lambda texts: np.array(
        list(opened.embed(list(texts), batch_size=batch, parallel=parallel)), np.float32
    )


def infinity(model: str, batch: int = 32) -> Encode:
    """Infinity's engine within the process, without its server."""
    import asyncio

    from infinity_emb import AsyncEmbeddingEngine, EngineArgs

    engine = AsyncEmbeddingEngine.from_args(
        EngineArgs(
            model_name_or_path=model,
            engine="torch",
            device="cpu",
            batch_size=batch,
            model_warmup=False,
            bettertransformer=False,
        )
    )
    loop = asyncio.new_event_loop()
    loop.run_until_complete(engine.astart())

    async def embed(texts: list[str]) -> Any:
        found, _usage = await engine.embed(sentences=texts)
        return found

    return lambda texts: np.array(loop.run_until_complete(embed(list(texts))), np.float32)


def llama_cpp(gguf: str, context: int) -> Encode:
    """llama.cpp through llama-cpp-python, the weights as a bf16 GGUF file; texts are cut to `context` tokens."""
    from llama_cpp import LLAMA_POOLING_TYPE_MEAN, Llama

    opened = Llama(
        gguf,
        embedding=True,
        n_ctx=context,
        n_batch=context,
        n_ubatch=context,
        n_threads=os.cpu_count(),
        n_threads_batch=os.cpu_count(),
        pooling_type=LLAMA_POOLING_TYPE_MEAN,
        verbose=False,
    )
    return lambda texts: np.array(opened.embed(list(texts), normalize=True, truncate=True), np.float32)


OPENERS: dict[str, Callable[..., Encode]] = {
    function.__name__: function
    for function in (datamoat, sentence_transformers, fastembed, infinity, llama_cpp)
}


def main() -> None:
    """Answer `run TEXTS.json [VECTORS.npy]` with seconds, CPU-seconds and the peak of memory."""
    answers = os.fdopen(os.dup(1), "w")
    # What libraries print must not stand between the answers.
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    encode = OPENERS[sys.argv[1]](**json.loads(sys.argv[2]))
    encode(["ready"])
    answer(ready=True)
    for line in sys.stdin:
        _run, path, *save = line.split()
        texts = json.loads(Path(path).read_text("utf-8"))
        started, cpu_started = time.perf_counter(), _cpu()
        vectors = encode(texts)
        seconds, cpu = time.perf_counter() - started, _cpu() - cpu_started
        if save:
            np.save(save[0], vectors)
        answer(seconds=seconds, cpu_seconds=cpu, peak_mb=_peak_mb())


def _cpu() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _peak_mb() -> float:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()

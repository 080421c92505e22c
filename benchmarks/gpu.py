"""How fast the torch engine turns texts into vectors on a CUDA device, beside sentence-transformers' best setting there.

Run by hand: `python -m benchmarks.embedding --gpu` (or `python -m benchmarks.gpu`). Needs a checkout and the wheels of
the extras `gpu` and `compat` (torch built for the machine's driver, sentence-transformers, transformers) with numpy,
safetensors, tokenizers and pyarrow; for the peer's padding-free path also flash-attn or kernels. No network. Without
the package of the default model, name a folder with its tokenizer files with --tokenizer; the model's shape then gets
random weights too. `--device cpu --tiny` runs the same code anywhere in a minute and says nothing about speed.

Shapes other than the default model's have random weights and its tokenizer (a smaller vocabulary than Qwen3's, which no
matrix product sees): their rates are those of the real models, their cosines those of random ones. Texts are pieces of
the Python manual and of packages' descriptions, cut at random places to log-normal lengths.

Measured for each model: texts to vectors end to end; the engine alone on tokens; the tokeniser processes alone. FLOP are
two for each weight of a matrix product and token, and four for each pair of tokens, hidden unit and layer in attention
(half of that in a decoder); the utilisation is taken of a matrix product's rate measured in the same process. The
device waits when no batch of ours runs on it, by CUDA events (gaps between the kernels of a batch are not counted).

Belongs here: shapes, turns, figures. Does not belong here: the CPU engine and its peers (`benchmarks.embedding`).
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.texts import MEDIAN_WORDS, SIGMA, texts
from embedder.canary import MIN_COSINE, worst_cosine
from embedder.encode import Embedder
from embedder.engines.torch_packed import TorchEngine
from embedder.model import Model, default_folder, open_model
from embedder.protocol import EmbedderError
from embedder.tokenise_pool import TokeniserPool
from embedder.tokens import Tokeniser, cut_by_budget

ROOT = Path(__file__).resolve().parent.parent
SHARD = 65_536
"""Texts handed over together, as the job does on a GPU."""
SAMPLE = 256
"""Texts whose vectors are compared."""
CALIBRATION = 4096
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@dataclass(frozen=True)
class Shape:
    """A model's size, and the tokens/s that a run on one H200 should reach."""

    kind: str
    hidden: int
    layers: int
    heads: int
    inner: int
    max_length: int
    target: float = 0.0
    key_heads: int = 0
    head_size: int = 0


SHAPES = {
    "minilm": Shape("bert", 384, 6, 12, 1536, 256, 9e6),
    "bge-base": Shape("bert", 768, 12, 12, 3072, 512, 2e6),
    "bge-large": Shape("bert", 1024, 24, 16, 4096, 512, 0.7e6),
    "qwen3-0.6b": Shape("qwen3", 1024, 28, 16, 3072, 512, 0.38e6, key_heads=8, head_size=128),
}
TINY = {
    "tiny-bert": Shape("bert", 64, 2, 4, 128, 64),
    "tiny-qwen3": Shape("qwen3", 64, 2, 4, 128, 64, key_heads=2, head_size=16),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when a vector differs from sentence-transformers in float32 (cosine below 0.999)."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.embedding --gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", help="cuda (all devices), cuda:0, or cpu")
    parser.add_argument("--tiny", action="store_true", help="two tiny models, a moment each: does it run?")
    parser.add_argument("--models", help=f"of {', '.join(SHAPES)}; separated by commas, default all")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each timed run, about")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs, of which the median counts")
    parser.add_argument("--workers", type=int, help="tokeniser processes, default all cores but two")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json and its companions")
    parser.add_argument("--no-peer", action="store_true", help="leave sentence-transformers out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(CHILDREN[options.child](json.load(sys.stdin))))
        return 0
    shapes = TINY if options.tiny else SHAPES
    names = options.models.split(",") if options.models else list(shapes)
    if unknown := set(names) - shapes.keys():
        parser.error(f"unknown models {', '.join(sorted(unknown))}; choose of {', '.join(shapes)}")
    if options.tiny:
        options.seconds, options.rounds = 0.2, 1
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        for name in names:
            _say(f"\n{name}")
            found[name] = _measure(shapes[name], Path(work), options)
    cosines = [one["min_cosine"] for one in found.values() if "min_cosine" in one]
    ratios = [one["ratio_st_best"] for one in found.values() if "ratio_st_best" in one]
    summary = {
        "tokens_per_s": {name: one["tokens_per_s"] for name, one in found.items()},
        "mfu": {name: one["mfu"] for name, one in found.items()},
        "waiting_share": max(one["waiting_share"] for one in found.values()),
        "ratio_st_best": min(ratios, default=None),
        "min_cosine": min(cosines, default=None),
        "cpu_cores": os.cpu_count(),
        "models": found,
    }
    print(json.dumps(summary))
    return int(any(cosine < MIN_COSINE for cosine in cosines))


def _measure(shape: Shape, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    folder = work / "model"
    shutil.rmtree(folder, ignore_errors=True)
    installed = _installed()
    if shape is SHAPES["minilm"] and installed is not None and options.tokenizer is None:
        folder = installed
    else:
        tokenizer = options.tokenizer or installed
        if tokenizer is None:
            raise SystemExit(
                "the default model's package is not installed: name a tokenizer with --tokenizer"
            )
        write_model(folder, shape, tokenizer)
        _say(f"  random weights, tokenizer of {tokenizer}")
    task = {
        "folder": str(folder),
        "device": options.device,
        "gemm_size": 256 if options.tiny else 8192,
        "batches": [32] if options.tiny else [32, 128, 512],
        "sample": 48 if options.tiny else SAMPLE,
        "calibration": 48 if options.tiny else CALIBRATION,
        "seconds": options.seconds,
        "rounds": options.rounds,
        "workers": options.workers,
    }
    ours = _child("ours", task | {"save": str(work / "ours.npy")})
    found = ours | {
        "share_of_target": round(ours["tokens_per_s"] / shape.target, 3) if shape.target else None
    }
    _say(
        f"  {ours['device']} {ours['precision']}: {ours['tokens_per_s']:,.0f} tokens/s end to end (target "
        f"{shape.target:,.0f}), {ours['model_tokens_per_s']:,.0f} model alone, {ours['mfu']:.1%} of "
        f"{ours['gemm_tflops']:,.1f} TFLOP/s end to end, {ours['model_mfu']:.1%} alone"
    )
    _say(
        f"  tokeniser {ours['tokeniser_tokens_per_s']:,.0f} tokens/s in {ours['tokeniser_workers']} processes, "
        f"{ours['tokeniser_share']:.0%} used; device waits {ours['waiting_share']:.1%}; "
        f"{ours['peak_mb']:,} MB; batches of {ours['engine']['token_budget']:,} tokens; ready in "
        f"{ours['startup_s']:.1f} s"
    )
    if options.no_peer:
        return found
    peer = _child("sentence_transformers", task | {"save": str(work / "peer.npy")})
    for setting in peer["settings"]:
        rate = f"{setting['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in setting else setting["error"]
        _say(f"  sentence-transformers {setting['name']}: {rate}")
    rates = [setting["tokens_per_s"] for setting in peer["settings"] if "tokens_per_s" in setting]
    cosine = worst_cosine(np.load(work / "ours.npy"), np.load(work / "peer.npy"))
    _say(f"  least cosine against sentence-transformers in float32 over {task['sample']} texts: {cosine:.5f}")
    found |= {"min_cosine": round(cosine, 6), "peers": peer["settings"]}
    if rates:
        found["ratio_st_best"] = round(ours["tokens_per_s"] / max(rates), 2)
        _say(f"  {found['ratio_st_best']:.2f} x its best setting")
    return found


def _child(name: str, task: dict[str, Any]) -> dict[str, Any]:
    """A contender in a process of its own, so that nobody's memory or threads stand in another's way."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--child", name],
        input=json.dumps(task),
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}; its complaint is above")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def ours(task: dict[str, Any]) -> dict[str, Any]:
    """What our engine reaches on the folder of the task."""
    started = time.perf_counter()
    embedder = Embedder.open(Path(task["folder"]), engine="torch", device=task["device"], say=_say)
    engine = embedder.engine
    assert isinstance(engine, TorchEngine)
    startup = time.perf_counter() - started
    gemm = gemm_rate(task["device"], engine.precision, task["gemm_size"])
    np.save(task["save"], embedder.encode(list(_texts(task["sample"])), as_query=False))
    with TokeniserPool(embedder.model, task["workers"], say=_say) as pool:
        calibration = list(_texts(task["calibration"]))
        _end_to_end(embedder, pool, calibration)  # starts the processes too
        rate = len(calibration) / _end_to_end(embedder, pool, calibration)
        wanted = list(_texts(max(task["sample"], int(rate * task["seconds"]))))

        started = time.perf_counter()
        shards = [wanted[start : start + SHARD] for start in range(0, len(wanted), SHARD)]
        tokens = [pool.tokenise(shard).tokens for shard in shards]
        tokenising = time.perf_counter() - started
        total = sum(len(one.ids) for one in tokens)
        flop = sum(flops(embedder.model, one.lengths) for one in tokens)

        whole, alone, waiting = [], [], []
        for _ in range(task["rounds"]):
            busy = sum(engine.info["busy_s"])
            seconds = _end_to_end(embedder, pool, wanted)
            whole.append(seconds)
            waiting.append(1 - (sum(engine.info["busy_s"]) - busy) / (seconds * engine.streams))
            started = time.perf_counter()
            engine.encode(
                (
                    one.take(batch)
                    for one in tokens
                    for batch in cut_by_budget(one.lengths, engine.token_budget, packed=True)
                ),
                lambda _number, _vectors: None,
            )
            alone.append(time.perf_counter() - started)
        workers = pool.workers
    seconds, model_seconds = statistics.median(whole), statistics.median(alone)
    peak = gemm * engine.streams
    return {
        "device": engine.device,
        "precision": engine.precision,
        "texts": len(wanted),
        "tokens": total,
        "tokens_per_s": round(total / seconds),
        "model_tokens_per_s": round(total / model_seconds),
        "gemm_tflops": round(gemm / 1e12, 3),
        "mfu": round(flop / seconds / peak, 4),
        "model_mfu": round(flop / model_seconds / peak, 4),
        "tokeniser_tokens_per_s": round(total / tokenising),
        "tokeniser_workers": workers,
        "tokeniser_share": round(tokenising / seconds, 4),
        "waiting_share": round(statistics.median(waiting), 4),
        "startup_s": round(startup, 2),
        "peak_mb": max(engine.info["peak_mb"]),
        "engine": dict(engine.info),
    }


def sentence_transformers(task: dict[str, Any]) -> dict[str, Any]:
    """What sentence-transformers reaches in each setting, and its float32 vectors of the sample."""
    import torch
    from sentence_transformers import SentenceTransformer

    device = task["device"]
    # On a CPU it would be emulated, and the peer's best setting another one.
    precision, dtype = ("f32", torch.float32) if device == "cpu" else ("bf16", torch.bfloat16)
    exact = SentenceTransformer(task["folder"], device=device, local_files_only=True)
    sample = list(_texts(task["sample"]))
    np.save(
        task["save"], exact.encode(sample, normalize_embeddings=open_model(Path(task["folder"])).normalize)
    )
    del exact
    tokeniser = Tokeniser(open_model(Path(task["folder"])))
    attentions = ["sdpa"]
    if device != "cpu" and any(importlib.util.find_spec(name) for name in ("flash_attn", "kernels")):
        attentions.append("flash_attention_2")
    settings: list[dict[str, Any]] = []
    for attention in attentions:
        opened = SentenceTransformer(
            task["folder"],
            device=device,
            local_files_only=True,
            model_kwargs={"dtype": dtype, "attn_implementation": attention},
        )
        for batch in task["batches"]:
            setting: dict[str, Any] = {"name": f"{precision} {attention} batch {batch}"}
            settings.append(setting)
            try:
                calibration = list(_texts(task["calibration"]))
                opened.encode(calibration, batch_size=batch, convert_to_tensor=True)
                started = time.perf_counter()
                opened.encode(calibration, batch_size=batch, convert_to_tensor=True)
                rate = len(calibration) / (time.perf_counter() - started)
                wanted = list(_texts(max(task["sample"], int(rate * task["seconds"]))))
                seconds = []
                for _ in range(task["rounds"]):
                    started = time.perf_counter()
                    opened.encode(wanted, batch_size=batch, convert_to_tensor=True).float().cpu().numpy()
                    seconds.append(time.perf_counter() - started)
            except (RuntimeError, ImportError, ValueError) as error:
                setting["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            tokens = len(tokeniser.tokenise(wanted).tokens.ids)
            setting["tokens_per_s"] = round(tokens / statistics.median(seconds))
            if device != "cpu":
                setting["peak_mb"] = round(torch.cuda.max_memory_allocated() / 1e6)
        del opened
    if len(attentions) == 1 and device != "cpu":
        settings.append({"name": "flash_attention_2", "error": "neither flash-attn nor kernels is installed"})
    return {"settings": settings}


CHILDREN = {function.__name__: function for function in (ours, sentence_transformers)}


def _end_to_end(embedder: Embedder, pool: TokeniserPool, wanted: list[str]) -> float:
    """Seconds from texts to vectors on the host: shards tokenised ahead, finished beside the next one's batches."""
    started = time.perf_counter()
    running: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(2) as encoders:
        for start in range(0, len(wanted), SHARD):
            tokenised = ahead.submit(pool.tokenise, wanted[start : start + SHARD])
            if len(running) == 2:
                running.popleft().result()
            running.append(encoders.submit(embedder.encode_tokens, tokenised.result().tokens))
        for encoded in running:
            assert not encoded.result().errors
    return time.perf_counter() - started


def gemm_rate(device: str, precision: str, size: int) -> float:
    """FLOP/s of one square matrix product of random numbers, the median of several."""
    import torch

    device = "cuda:0" if device == "cuda" else device
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    seconds = []
    for _ in range(13):
        if device != "cpu":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(5):
            left @ right
        if device != "cpu":
            torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() - started) / 5)
    return 2 * size**3 / statistics.median(seconds[3:])


def flops(model: Model, lengths: npt.NDArray[np.int32]) -> float:
    """Multiplications and additions of the matrix products for rows of these lengths."""
    config, hidden = model.config, model.hidden
    inner = int(config["intermediate_size"])
    size = int(config.get("head_dim") or hidden // model.heads) * model.heads
    if model.architecture == "qwen3":
        key_size = size * int(config["num_key_value_heads"]) // model.heads
        weights, pair = 2 * hidden * (size + key_size) + 3 * hidden * inner, 2 * size
    else:
        weights, pair = 4 * hidden**2 + 2 * hidden * inner, 4 * size
    wide = lengths.astype(np.float64)
    return model.layers * float((2 * weights * wide + pair * wide**2).sum())


def write_model(folder: Path, shape: Shape, tokenizer: Path) -> None:
    """A model folder of this shape with random weights and the tokenizer of another folder."""
    import torch
    from safetensors.torch import save_file

    (folder / "1_Pooling").mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
    stored = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocabulary = 1 + max([*stored["model"]["vocab"].values(), *(one["id"] for one in stored["added_tokens"])])
    decoder = shape.kind == "qwen3"
    config: dict[str, Any] = {
        "model_type": shape.kind,
        "architectures": ["Qwen3Model" if decoder else "BertModel"],
        "vocab_size": vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.inner,
        "max_position_embeddings": shape.max_length,
        "pad_token_id": 0,
    }
    config |= (
        {"num_key_value_heads": shape.key_heads, "head_dim": shape.head_size, "rms_norm_eps": 1e-6}
        | {"rope_theta": 1_000_000, "hidden_act": "silu", "use_sliding_window": False}
        if decoder
        else {"layer_norm_eps": 1e-12, "hidden_act": "gelu", "type_vocab_size": 2}
    )
    files = {
        "config.json": config,
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ],
        "sentence_bert_config.json": {"max_seq_length": shape.max_length, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": shape.hidden,
            "pooling_mode_mean_tokens": not decoder,
            "pooling_mode_lasttoken": decoder,
        },
    }
    for path, content in files.items():
        (folder / path).write_text(json.dumps(content))
    torch.manual_seed(0)
    save_file(
        {
            name: torch.randn(size) * 0.02
            if len(size) > 1
            else torch.full(size, float("norm" in name.lower() and "bias" not in name))
            for name, size in _tensors(shape, vocabulary)
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def _tensors(shape: Shape, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = shape.hidden, shape.inner
    if shape.kind == "qwen3":
        size, key_size = shape.heads * shape.head_size, shape.key_heads * shape.head_size
        yield "embed_tokens.weight", (vocabulary, hidden)
        yield "norm.weight", (hidden,)
        for layer in range(shape.layers):
            attention, mlp = f"layers.{layer}.self_attn", f"layers.{layer}.mlp"
            for name, outputs in (("q", size), ("k", key_size), ("v", key_size)):
                yield f"{attention}.{name}_proj.weight", (outputs, hidden)
            yield f"{attention}.o_proj.weight", (hidden, size)
            for name in ("q", "k"):
                yield f"{attention}.{name}_norm.weight", (shape.head_size,)
            for name in ("gate", "up"):
                yield f"{mlp}.{name}_proj.weight", (inner, hidden)
            yield f"{mlp}.down_proj.weight", (hidden, inner)
            for name in ("input", "post_attention"):
                yield f"layers.{layer}.{name}_layernorm.weight", (hidden,)
        return
    rows = {"word": vocabulary, "position": shape.max_length, "token_type": 2}
    yield from ((f"embeddings.{name}_embeddings.weight", (count, hidden)) for name, count in rows.items())
    linear = {"attention.output.dense": (hidden, hidden)}
    linear |= {f"attention.self.{name}": (hidden, hidden) for name in ("query", "key", "value")}
    linear |= {"intermediate.dense": (inner, hidden), "output.dense": (hidden, inner)}
    norms = ["embeddings.LayerNorm"]
    for layer in range(shape.layers):
        for name, size_pair in linear.items():
            yield f"encoder.layer.{layer}.{name}.weight", size_pair
            yield f"encoder.layer.{layer}.{name}.bias", size_pair[:1]
        norms += [f"encoder.layer.{layer}.{name}.LayerNorm" for name in ("attention.output", "output")]
    for norm in norms:
        yield f"{norm}.weight", (hidden,)
        yield f"{norm}.bias", (hidden,)


def _texts(count: int) -> Iterator[str]:
    """The first `count` of endless texts, the same on every call, no two of them equal but by chance."""
    words = _words()
    chance = random.Random(4)
    for _ in range(count):
        length = max(3, round(chance.lognormvariate(0, SIGMA) * MEDIAN_WORDS))
        start = chance.randrange(len(words) - length)
        yield " ".join(words[start : start + length])


@functools.cache
def _words() -> list[str]:
    return " ".join(texts(1000)).split()


def _installed() -> Path | None:
    try:
        return default_folder()
    except EmbedderError:
        return None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())

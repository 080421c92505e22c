"""How fast texts become vectors, beside the tools a user could pick instead and the matrix rate of this machine.

Run by hand: `python -m benchmarks.embedding` (`make bench-embedding`); the first run makes one virtual environment a
peer below `--peers`. Tables go to stderr, and the last line of stdout is one JSON object. `--index` measures the way
from changed chunks to a searched index instead (`benchmarks.index`), `--gpu` the GPU engine (`benchmarks.gpu`).

Every contender is a process of its own with the model loaded; all but the one that runs are stopped (SIGSTOP). They
take turns, the order reversed each round, and the median of the rounds counts. A peer whose vectors differ from
sentence-transformers in float32 (least cosine below 0.999) gives another output and is not ranked.

The limit is measured in the same run: the rate of the model's feed-forward matrix products alone, on all cores.

Belongs here: turns, ranking, figures. Does not belong here: how a peer is opened (`benchmarks.peers.worker`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.gpu import flops
from benchmarks.texts import texts
from embedder.canary import MIN_COSINE, worst_cosine
from embedder.encode import Embedder
from embedder.engines.encoder_graph import import_openvino
from embedder.machine import fast_precision, physical_cores
from embedder.model import Model, open_model

Floats = npt.NDArray[np.float32]

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = Path(__file__).with_name("peers")
OURS, DEFAULT = "datamoat", "sentence-transformers torch f32 b32 (default)"
# Beyond this share of the machine taken by others, a round says little; it is said and shown.
QUIET = 0.1
GEMM_ROWS, GEMM_LAYERS = 2048, 8
LOAD_SECONDS, RUN_SECONDS = 600, 1200


@dataclass
class Contender:
    """One setting of one tool: how to open it, and what it measured."""

    name: str
    environment: str
    """Name of its virtual environment; empty for ours."""
    opener: str
    options: dict[str, Any]
    variables: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None
    startup: float = 0.0
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    cosine: float = 1.0
    error: str = ""

    def start(self, python: Path) -> None:
        """Open it, then stop its processes. What it cannot do is kept in `error`."""
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [str(python), "-m", "benchmarks.peers.worker", self.opener, json.dumps(self.options)],
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"} | self.variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if not _VERBOSE else None,
            text=True,
            start_new_session=True,
        )
        if self._answer(LOAD_SECONDS):
            self.startup = time.perf_counter() - started
            self._signal(signal.SIGSTOP)

    def run(self, path: Path, save: Path | None = None) -> None:
        """Embed the texts of a file once, alone."""
        assert self.process is not None and self.process.stdin is not None
        self._signal(signal.SIGCONT)
        busy, own = _busy_seconds(), self._cpu()
        started = time.perf_counter()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"run {path}{f' {save}' if save else ''}\n")
            self.process.stdin.flush()
        found = self._answer(RUN_SECONDS)
        if not found:
            return
        wall = time.perf_counter() - started
        others = max(0.0, _busy_seconds() - busy - (self._cpu() - own))
        self._signal(signal.SIGSTOP)
        self.seconds.append(found["seconds"])
        self.cpu.append(found["cpu_seconds"])
        self.others.append(others / wall / (os.cpu_count() or 1))
        self.peak_mb = max(self.peak_mb, found["peak_mb"])

    def end(self) -> None:
        """End its processes."""
        if self.process is not None:
            self._signal(signal.SIGKILL)
            self.process.communicate()

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if selector.select(seconds) else ""
        if line:
            return dict(json.loads(line))
        self._signal(signal.SIGKILL)
        _out, complaint = self.process.communicate()
        self.error = (complaint or "no answer").strip().splitlines()[-1][:200]
        return {}

    def _cpu(self) -> float:
        assert self.process is not None
        return sum(_session_cpu(self.process.pid))

    def _signal(self, number: int) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


_VERBOSE = False


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def contenders(model: Model, onnx: Path, gguf: Path, precision: str) -> list[Contender]:
    """Ours and every peer at each setting that could be its best where products are of ``precision``."""
    st, folder, bf16 = "sentence_transformers", {"model": str(model.folder)}, precision == "bf16"
    one_thread = {"OMP_NUM_THREADS": "1"}
    found = [
        Contender(OURS, "", "datamoat", folder | {"precision": precision}),
        Contender(DEFAULT, "torch", st, folder),
        Contender("sentence-transformers torch f32 b8", "torch", st, folder | {"batch": 8}),
        Contender("sentence-transformers onnx b8", "onnx", st, folder | {"backend": "onnx", "batch": 8}),
        Contender("sentence-transformers onnx b32", "onnx", st, folder | {"backend": "onnx"}),
        *(
            Contender(
                f"sentence-transformers openvino b{batch}",
                "openvino",
                st,
                folder | {"backend": "openvino", "batch": batch, "precision": precision},
            )
            for batch in (4, 8, 32)
        ),
        *(
            Contender(
                f"fastembed b{batch}{f' parallel={parallel}' if parallel else ''}",
                "fastembed",
                "fastembed",
                folder | {"onnx": str(onnx), "batch": batch, "parallel": parallel},
            )
            for batch, parallel in ((8, None), (256, None), (32, os.cpu_count()))
        ),
        Contender("infinity b32", "infinity", "infinity", folder),
        Contender(
            "llama.cpp bf16", "llama-cpp", "llama_cpp", {"gguf": str(gguf), "context": model.max_length}
        ),
    ]
    if bf16:
        found.insert(1, Contender(f"{OURS} f32", "", "datamoat", folder | {"precision": "f32"}))
        for batch in (8, 32):
            found.append(
                Contender(
                    f"sentence-transformers torch bf16 b{batch}",
                    "torch",
                    st,
                    folder | {"batch": batch, "bf16": True},
                )
            )
    found.append(
        Contender(
            f"sentence-transformers torch {'bf16' if bf16 else 'f32'} b8, pool of {physical_cores()}",
            "torch",
            st,
            folder | {"batch": 8, "bf16": bf16, "pool": physical_cores()},
            one_thread,
        )
    )
    return found


def base_contenders(model: Path, precision: str) -> list[Contender]:
    """Ours and the peers that come closest, for a model of another size."""
    st, folder, bf16 = "sentence_transformers", {"model": str(model)}, precision == "bf16"
    return [
        Contender(OURS, "", "datamoat", folder | {"precision": precision}),
        Contender(DEFAULT, "torch", st, folder),
        Contender(
            f"sentence-transformers torch {precision} b8", "torch", st, folder | {"batch": 8, "bf16": bf16}
        ),
        *(
            Contender(
                f"sentence-transformers openvino b{batch}",
                "openvino",
                st,
                folder | {"backend": "openvino", "batch": batch, "precision": precision},
            )
            for batch in (4, 8)
        ),
    ]


def measure(
    found: Sequence[Contender], pythons: dict[str, Path], sample: list[str], rounds: int, folder: Path
) -> list[Contender]:
    """Run all contenders in turns; those that could not are said and left out."""
    path, warm = folder / "texts.json", folder / "warm.json"
    path.write_text(json.dumps(sample), "utf-8")
    warm.write_text(json.dumps(sample[:50]), "utf-8")
    running: list[Contender] = []
    try:
        for contender in found:
            if contender.environment in pythons:
                say(f"opening {contender.name}")
                contender.start(pythons[contender.environment])
            else:
                contender.error = f"no environment {contender.environment}"
            if not contender.error:
                contender.run(warm)
            if contender.error:
                say(f"left out: {contender.name}: {contender.error}")
            else:
                contender.seconds, contender.cpu, contender.others = [], [], []
                running.append(contender)
        for number in range(rounds):
            for contender in running if number % 2 == 0 else reversed(running):
                save = folder / f"{running.index(contender)}.npy" if number == 0 else None
                contender.run(path, save)
                if contender.error:
                    say(f"left out: {contender.name}: {contender.error}")
                else:
                    say(
                        f"round {number + 1}: {contender.name}: {len(sample) / contender.seconds[-1]:.0f} texts/s"
                    )
            running = [contender for contender in running if not contender.error]
        reference = next((one for one in running if one.name == DEFAULT), running[0])
        exact = np.load(folder / f"{running.index(reference)}.npy")
        for number, contender in enumerate(running):
            contender.cosine = worst_cosine(np.load(folder / f"{number}.npy"), exact)
    finally:
        for contender in found:
            contender.end()
    return running


def gemm_rate(model: Model, precision: str, streams: int) -> float:
    """FLOP/s of the model's feed-forward shapes alone, one thread a stream, all streams at once: the best of 20."""
    ov = import_openvino()
    op = ov.opset13
    random = np.random.default_rng(0)
    inner = int(model.config["intermediate_size"])
    x: Any = op.parameter([GEMM_ROWS, model.hidden], np.float32)
    inputs = [x]
    for shape in [(inner, model.hidden), (model.hidden, inner)] * GEMM_LAYERS:
        x = op.matmul(x, op.constant(random.normal(0, 0.03, shape).astype(np.float32)), False, True)
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "NUM_STREAMS": str(streams),
        "INFERENCE_NUM_THREADS": str(streams),
    }
    compiled = ov.Core().compile_model(ov.Model([op.result(x)], inputs, "gemm"), "CPU", settings)
    requests = [compiled.create_infer_request() for _ in range(streams)]
    ones = np.ones((GEMM_ROWS, model.hidden), np.float32)
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        for request in requests:
            request.start_async({0: ones}, share_inputs=True)
        for request in requests:
            request.wait()
        seconds.append(time.perf_counter() - started)
    return streams * 2 * 2 * GEMM_ROWS * model.hidden * inner * GEMM_LAYERS / min(seconds)


def runners(model: Path, precision: str, sample: list[str], rounds: int, folder: Path) -> dict[str, float]:
    """Tokens a second of the job from file to file, and through Ray, each as a share of the same texts in memory."""
    source = folder / "texts.parquet"
    hashes = [f"{number:064x}" for number in range(len(sample))]
    pq.write_table(pa.table({"content_hash": hashes, "text": sample}), source)
    embedder = Embedder.open(model, precision=precision)
    embedder.encode(sample[:50], as_query=False)
    tokens = int(embedder.tokeniser.tokenise(sample).tokens.lengths.sum())
    rates: dict[str, list[float]] = {"memory": [], "file": [], "ray": []}
    for number in range(rounds):
        started = time.perf_counter()
        embedder.encode(sample, as_query=False)
        rates["memory"].append(tokens / (time.perf_counter() - started))
        for name, runner in (("file", "local"), ("ray", "ray")):
            summary = folder / f"{name}{number}.json"
            arguments = {
                "input": source,
                "output": folder / f"{name}{number}",
                "model": model,
                "precision": precision,
                "runner": runner,
                "shard-size": len(sample) // 4,
                "summary": summary,
            }
            done = subprocess.run(
                [sys.executable, "-m", "embedder", *(f"--{key}={value}" for key, value in arguments.items())],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(f"the job failed: {done.stderr[-2000:]}")
            rates[name].append(float(json.loads(summary.read_text())["tokens_per_s"]))
        say(f"round {number + 1}: " + ", ".join(f"{name} {found[-1]:,.0f}" for name, found in rates.items()))
    memory = median(rates["memory"])
    return {
        "file_to_memory": round(median(rates["file"]) / memory, 3),
        "ray_to_file": round(median(rates["ray"]) / median(rates["file"]), 3),
    }


def environments(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """The Python of each environment, made from its pinned requirements where it is missing; ours is the empty name."""
    pythons = {"": Path(sys.executable)}
    for name in names:
        python = folder / name / "bin" / "python"
        requirements = REQUIREMENTS / f"{name}.txt"
        done = folder / name / "requirements.txt"
        if not done.exists() or done.read_text() != requirements.read_text():
            say(f"making {folder / name} from {requirements.name}")
            shutil.rmtree(folder / name, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
            made = subprocess.run(
                # The lists are whole, and pip's own choice of torchvision would not fit torch.
                [
                    str(python),
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--no-deps",
                    "--requirement",
                    str(requirements),
                ],
                check=False,
            )
            if made.returncode:
                say(f"left out: pip cannot install {requirements.name} here")
                continue
            shutil.copy(requirements, done)
        pythons[name] = python
    return pythons


def base_folder(folder: Path, vocabulary_of: Path) -> Path:
    """A model of BGE-base's shape with random weights: speed does not depend on what they are."""
    from safetensors.numpy import save_file

    if (folder / "model.safetensors").exists():
        return folder
    shutil.copytree(vocabulary_of, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    (folder / "config.json").write_text(json.dumps(config))
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    pooling["word_embedding_dimension"] = 768
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    random = np.random.default_rng(0)
    hidden, inner = 768, 3072
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
        "embeddings.token_type_embeddings.weight": (config.get("type_vocab_size", 2), hidden),
        "embeddings.LayerNorm.weight": (hidden,),
        "embeddings.LayerNorm.bias": (hidden,),
        "pooler.dense.weight": (hidden, hidden),
        "pooler.dense.bias": (hidden,),
    }
    for layer in range(12):
        name = f"encoder.layer.{layer}"
        for part in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
        ):
            shapes |= {f"{name}.{part}.weight": (hidden, hidden), f"{name}.{part}.bias": (hidden,)}
        shapes |= {
            f"{name}.intermediate.dense.weight": (inner, hidden),
            f"{name}.intermediate.dense.bias": (inner,),
            f"{name}.output.dense.weight": (hidden, inner),
            f"{name}.output.dense.bias": (hidden,),
        }
        for part in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{name}.{part}.weight": (hidden,), f"{name}.{part}.bias": (hidden,)}
    weights = {
        name: np.ones(shape, np.float32)
        if name.endswith("LayerNorm.weight")
        else random.normal(0, 0.03, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    (folder / "model.safetensors").unlink(missing_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def show(found: Sequence[Contender], count: int, tokens: int) -> None:
    """The table, fastest first."""
    say(f"\n{count:,} texts, {tokens:,} tokens")
    say(f"{'':50} {'texts/s':>8} {'tokens/s':>9} {'min cos':>8} {'MB':>6} {'ready s':>8} {'others':>7}")
    for one in sorted(found, key=lambda one: median(one.seconds)):
        seconds = median(one.seconds)
        note = "" if one.cosine >= MIN_COSINE else "  other output"
        say(
            f"{one.name:50} {count / seconds:8.0f} {tokens / seconds:9,.0f} {one.cosine:8.5f} {one.peak_mb:6.0f} "
            f"{one.startup:8.1f} {median(one.others):7.0%}{note}"
        )


def ratios(found: Sequence[Contender]) -> dict[str, Any]:
    """Ours beside the best peer of the same output, and beside sentence-transformers as it comes."""
    seconds = {one.name: median(one.seconds) for one in found if one.cosine >= MIN_COSINE}
    peers = {name: value for name, value in seconds.items() if not name.startswith(OURS)}
    best = min(peers, key=lambda name: peers[name]) if peers else None
    return {
        "best_peer": best,
        "ratio_best_peer": round(peers[best] / seconds[OURS], 2) if best else None,
        "ratio_st_default": round(peers[DEFAULT] / seconds[OURS], 2) if DEFAULT in peers else None,
    }


def main() -> None:
    """Measure and print."""
    for module in ("index", "gpu"):
        if f"--{module}" in sys.argv[1:]:
            arguments = [one for one in sys.argv[1:] if one != f"--{module}"]
            raise SystemExit(import_module(f"benchmarks.{module}").main(arguments))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path, default=ROOT / ".datamoat" / "benchmark-peers", metavar="DIR")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="measure only contenders whose name has this in it"
    )
    parser.add_argument(
        "--precision",
        choices=("bf16", "f32"),
        default=fast_precision(),
        help="of matrix products; f32 is what a CPU without bf16 has, for us and for peers (%(default)s)",
    )
    parser.add_argument("--verbose", action="store_true", help="show what the peers print")
    parser.add_argument(
        "--index", action="store_true", help="see python -m benchmarks.embedding --index --help"
    )
    parser.add_argument("--gpu", action="store_true", help="see python -m benchmarks.embedding --gpu --help")
    options = parser.parse_args()
    global _VERBOSE
    _VERBOSE = options.verbose
    options.peers.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(_figures(options, Path(temporary))))


def _figures(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = open_model()
    sample = texts(options.texts)
    lengths = Embedder(model).tokeniser.tokenise(sample).tokens.lengths
    pythons = environments(options.peers, [path.stem for path in sorted(REQUIREMENTS.glob("*.txt"))])
    onnx, gguf = exported(options.peers, pythons, model)
    precision, streams = options.precision, physical_cores()
    gemm = [gemm_rate(model, precision, streams)]
    wanted = [one for one in contenders(model, onnx, gguf, precision) if _chosen(one, options.only)]
    found = measure(wanted, pythons, sample, options.rounds, folder)
    gemm.append(gemm_rate(model, precision, streams))
    show(found, len(sample), int(lengths.sum()))
    ours = next(one for one in found if one.name == OURS)
    seconds = median(ours.seconds)
    say(f"\nmatrix rate {max(gemm) / 1e9:,.0f} GFLOP/s in {precision} on {streams} cores")

    padded = _padding(model, sample)
    say("\nthe job from file to file, and through Ray")
    shares = runners(model.folder, precision, texts(4 * options.texts), options.rounds, folder)
    say("\na model of BGE-base's shape")
    base = base_folder(options.peers / "base", model.folder)
    base_sample = texts(max(20, options.texts // 10))
    wanted = [one for one in base_contenders(base, precision) if _chosen(one, options.only)]
    of_base = measure(wanted, pythons, base_sample, options.rounds, folder)
    show(of_base, len(base_sample), int(lengths[: len(base_sample)].sum()))
    return {
        "tokens_per_s": round(int(lengths.sum()) / seconds),
        "texts_per_s": round(len(sample) / seconds),
        **ratios(found),
        "min_cosine": round(ours.cosine, 5),
        "peak_mb": round(ours.peak_mb),
        "startup_s": round(ours.startup, 2),
        "gemm_share": round(flops(model, lengths) / seconds / max(gemm), 3),
        "gemm_gflops": round(max(gemm) / 1e9),
        "padded_to_real": round(padded, 4),
        **shares,
        "base": {
            "tokens_per_s": round(
                int(lengths[: len(base_sample)].sum())
                / median(next(one for one in of_base if one.name == OURS).seconds)
            ),
            **ratios(of_base),
            "min_cosine": round(next(one for one in of_base if one.name == OURS).cosine, 5),
        },
        "precision": precision,
        "others_share": round(max(median(one.others) for one in found), 3),
        "quiet": all(median(one.others) <= QUIET for one in found),
        "peers": {
            one.name: {
                "tokens_per_s": round(int(lengths.sum()) / median(one.seconds)),
                "min_cosine": round(one.cosine, 5),
                "peak_mb": round(one.peak_mb),
            }
            for one in found
            if not one.name.startswith(OURS)
        },
        "left_out": {one.name: one.error for one in wanted if one.error},
    }


def exported(folder: Path, pythons: dict[str, Path], model: Model) -> tuple[Path, Path]:
    """The model as ONNX and as GGUF, for peers that read no safetensors."""
    onnx, gguf = folder / "model-onnx", folder / "model.gguf"
    for target, name in ((onnx, "onnx"), (gguf, "llama-cpp")):
        if name in pythons and not target.exists():
            say(f"exporting {target.name}")
            script = REQUIREMENTS / f"export_{name.replace('-', '_')}.py"
            subprocess.run([str(pythons[name]), str(script), str(model.folder), str(target)], check=True)
    return onnx, gguf


def _padding(model: Model, sample: list[str]) -> float:
    embedder = Embedder(model)
    tokens = embedder.tokeniser.tokenise(sample).tokens
    return embedder.encode_tokens(tokens).padded_tokens / int(tokens.lengths.sum())


def _chosen(contender: Contender, text: str) -> bool:
    return text in contender.name or contender.name in (OURS, DEFAULT)


def _busy_seconds() -> float:
    """CPU-seconds the whole machine has spent since it started."""
    user, nice, system, _idle, _wait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _session_cpu(leader: int) -> Iterator[float]:
    """CPU-seconds of each process of a session."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader:
                yield sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()

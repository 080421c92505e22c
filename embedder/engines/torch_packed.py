"""The GPU engine: packed batches through torch, on every CUDA device at once; on a CPU the same code, plainly.

Each device has its weights, one thread that hands it work, and three streams: copying in, computing, copying out.
Several batches are queued on a device, so that it never waits for the host. One process serves all devices: a batch
costs its thread about a millisecond of Python and the device several, so that the interpreter lock starts to bind at
some eight devices with the smallest models; there, and across machines, run one job a device (Ray does).

Belongs here: devices, copies, compiling, the size of a batch. Does not belong here: the arithmetic (see
`torch_forward`), tokenising, choosing batches, checking vectors (see `encode`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedder.engines import BF16, F32
from embedder.engines.torch_forward import Layout, arrange, build, pool
from embedder.model import Model
from embedder.protocol import EmbedderError
from embedder.tokens import Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from embedder.engines.torch_forward import Forward

Floats = npt.NDArray[np.float32]

CPU_TOKENS = 4096
CUDA_TOKENS = 65_536
"""A batch where nothing was measured: in float32, and on devices that refuse to be measured."""
SMALLEST_TOKENS, LARGEST_TOKENS = 16_384, 262_144
WORTHWHILE_GAIN = 1.03
MEMORY_SHARE = 0.6
TYPICAL_LENGTH = 128

COMPILED_MULTIPLE = 1024
"""Compiled code gets its tokens in multiples of this, so that sizes keep their divisors and kernels are not remade."""
IN_FLIGHT = 3
"""Batches queued on a device: one runs, one waits, one is being handed over."""


def open_engine(
    model: Model,
    *,
    device: str,
    precision: str | None,
    streams: int | None,
    say: Callable[[str], None] = lambda _line: None,
) -> TorchEngine:
    """See `embedder.engines`; `streams` limits how many CUDA devices are used."""
    return TorchEngine(model, device=device, precision=precision, streams=streams, say=say)


class TorchEngine:
    """Pooled, not yet normalised vectors from packed token ids."""

    name = "torch"
    packed = True

    def __init__(
        self,
        model: Model,
        *,
        device: str,
        precision: str | None = None,
        streams: int | None = None,
        token_budget: int | None = None,
        compiler: str | Callable[..., Any] | None = "inductor",
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:
        """`device` is 'cpu', 'cuda' (all of them) or one CUDA device such as 'cuda:1'.

        `precision` None is bf16 where the device multiplies it in hardware, else f32. `token_budget` None is
        measured once a machine and model and then kept, so that a resumed job cuts the batches that it cut before.
        `compiler` is a backend of torch.compile, None for none; it serves bf16 on CUDA and, when it is a function,
        every device. `say` gets notices for a person.
        Raises EmbedderError for a device this machine lacks and for weights that do not fit the configuration.
        """
        torch = _import_torch()
        devices = _devices(device, streams)
        cuda = devices[0] != "cpu"
        if precision is None:
            precision = BF16 if cuda and torch.cuda.get_device_capability(devices[0]) >= (8, 0) else F32
        self.precision = precision
        self.streams = len(devices)
        self.device = _describe(devices)
        self._lock = threading.Lock()
        folder = _cache_folder() if cuda else None
        fast = cuda and precision == BF16
        if not (fast or callable(compiler)):
            compiler = None
        self._replicas: list[_Replica] = []
        for name in devices:  # one after the other: their compilers share this process
            self._replicas.append(_Replica(model, name, precision, compiler, say))
        tuned: list[dict[str, float]] = []
        if token_budget is None:
            token_budget = CUDA_TOKENS if cuda else CPU_TOKENS
            if fast:
                key = f"{model.model_sha256} {model.max_length} {self._replicas[0].hardware} {torch.__version__}"
                token_budget = _kept(folder, key, lambda: tune(self._replicas[0].measure, tuned.append))
        self.token_budget = token_budget
        self._tuned = tuned

    @property
    def info(self) -> Mapping[str, Any]:
        """What a run's record should keep: versions, the measured batch sizes, memory, seconds the devices computed."""
        torch = _import_torch()
        return {
            "torch": torch.__version__,
            "compiled": all(replica.compiled for replica in self._replicas),
            "token_budget": self.token_budget,
            "tuned": self._tuned,
            "busy_s": [round(replica.busy_seconds, 3) for replica in self._replicas],
            "peak_mb": [round(replica.peak_bytes() / 1e6) for replica in self._replicas],
        }

    def encode(self, batches: Iterable[Tokens], take: Callable[[int, Floats], None]) -> None:
        """See `embedder.encode.Engine.encode`. Batch i runs on device i modulo their number."""
        with self._lock:
            self._run(batches, take)

    def _run(self, batches: Iterable[Tokens], take: Callable[[int, Floats], None]) -> None:
        running: deque[tuple[int, Future[_Ticket]]] = deque()

        def finish() -> None:
            number, ticket = running.popleft()
            take(number, ticket.result().wait())

        try:
            for number, batch in enumerate(batches):
                if len(running) == IN_FLIGHT * len(self._replicas):
                    finish()
                running.append((number, self._replicas[number % len(self._replicas)].submit(batch)))
            while running:
                finish()
        finally:
            for _number, ticket in running:
                with contextlib.suppress(RuntimeError, MemoryError):
                    ticket.result().wait()


@dataclass
class _Ticket:
    """A batch on its way through a device."""

    vectors: Tensor
    """float32[n, d] on the host, to be read once `wait` returned."""
    wait_for: Callable[[], None]
    held: tuple[Any, ...] = ()
    """What the device still reads: memory given back earlier could be handed to the next batch's copy."""

    def wait(self) -> Floats:
        """The vectors, once they are there."""
        self.wait_for()
        self.held = ()
        found: Floats = self.vectors.numpy()
        return found


class _Replica:
    """The model on one device, with the thread that hands it work."""

    def __init__(
        self,
        model: Model,
        device: str,
        precision: str,
        compiler: str | Callable[..., Any] | None,
        say: Callable[[str], None],
    ) -> None:
        torch = _import_torch()
        self._model = model
        self._device = device
        self._cuda = device != "cpu"
        self._say = say
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"embedder {device}")
        self.hardware = torch.cuda.get_device_name(device) if self._cuda else "cpu"
        self.busy_seconds = 0.0
        self._eager = build(
            model, device=device, precision=torch.bfloat16 if precision == BF16 else torch.float32
        )
        self._compiled: Forward | None = None
        if self._cuda:
            self._copy_in, self._copy_out = torch.cuda.Stream(device), torch.cuda.Stream(device)
        if compiler is not None:
            self._compile(compiler)

    @property
    def compiled(self) -> bool:
        """Whether compiled code serves, and not the same operations one by one."""
        return self._compiled is not None

    def submit(self, batch: Tokens) -> Future[_Ticket]:
        """Queue a batch; the ticket is there once the device has all it needs to compute it."""
        return self._thread.submit(self._launch, batch)

    def peak_bytes(self) -> int:
        """The most device memory that torch has held for tensors, 0 on a CPU."""
        torch = _import_torch()
        return torch.cuda.max_memory_allocated(self._device) if self._cuda else 0

    def measure(self, tokens: int) -> tuple[float, float]:
        """(tokens/s, share of the device's memory) of batches of this size, weights included."""
        torch = _import_torch()
        batch = _made_up(self._model, tokens, TYPICAL_LENGTH)
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        self.submit(batch).result().wait()
        started = time.perf_counter()
        tickets = [self.submit(batch) for _ in range(IN_FLIGHT)]
        for ticket in tickets:
            ticket.result().wait()
        rate = IN_FLIGHT * len(batch.ids) / (time.perf_counter() - started)
        if not self._cuda:
            return rate, 0.0
        return rate, self.peak_bytes() / torch.cuda.get_device_properties(self._device).total_memory

    def _compile(self, compiler: str | Callable[..., Any]) -> None:
        torch = _import_torch()
        # Every device compiles the same function; torch counts that as recompiling and would give up at eight.
        limit = torch._dynamo.config
        limit.recompile_limit = max(limit.recompile_limit, 4 * max(1, torch.cuda.device_count()))
        # Not `dynamic=True`, which makes the sizes of the weights unknown too. `mark_dynamic` names what does change.
        self._compiled = torch.compile(self._eager, backend=compiler, fullgraph=True)
        # Twice, in sizes with nothing in common: what differs is then known to differ before the first real batch.
        for tokens, length in ((COMPILED_MULTIPLE, 7), (3 * COMPILED_MULTIPLE, 50)):
            if self.compiled:
                self.submit(_made_up(self._model, tokens, length)).result().wait()

    def _launch(self, batch: Tokens) -> _Ticket:
        torch = _import_torch()
        # Caught here, for on CUDA it would be the end of the whole process.
        if (worst := int(batch.ids.max())) >= (known := int(self._model.config["vocab_size"])):
            raise RuntimeError(
                f"token id {worst} is beyond the model's vocabulary of {known:,}; tokenizer.json and the weights of "
                f"{self._model.folder} do not belong together"
            )
        layout = arrange(self._model, batch, COMPILED_MULTIPLE if self.compiled else 1)
        with torch.no_grad():
            if not self._cuda:
                started = time.perf_counter()
                vectors = self._pooled(layout, self._inputs(layout))
                self.busy_seconds += time.perf_counter() - started
                return _Ticket(vectors, lambda: None)
            try:
                return self._launch_on_cuda(layout)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()  # smaller batches are to follow, and want other blocks
                raise

    def _launch_on_cuda(self, layout: Layout) -> _Ticket:
        torch = _import_torch()
        torch.cuda.set_device(self._device)
        compute = torch.cuda.current_stream()
        with torch.cuda.stream(self._copy_in):
            inputs = self._inputs(layout)
        compute.wait_stream(self._copy_in)
        started, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record(compute)
        pooled = self._pooled(layout, inputs)
        done.record(compute)
        copied = torch.cuda.Event(blocking=True)  # sleeps while it waits: this thread's core may tokenise
        with torch.cuda.stream(self._copy_out):
            self._copy_out.wait_event(done)
            vectors = torch.empty(pooled.shape, dtype=torch.float32, pin_memory=True)
            vectors.copy_(pooled, non_blocking=True)
            copied.record(self._copy_out)

        def wait() -> None:
            copied.synchronize()
            self.busy_seconds += started.elapsed_time(done) / 1000

        return _Ticket(vectors, wait, (inputs, pooled))

    def _inputs(self, layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The layout's arrays as tensors; runs stay on the host, where they are read."""
        torch = _import_torch()
        found = [torch.from_numpy(x) for x in (layout.ids, layout.positions, layout.starts)]
        if self._cuda:
            # torch keeps pinned blocks for reuse until their copies are done: buffers in turn, without our counting.
            found = [x.pin_memory().to(self._device, non_blocking=True) for x in found]
        return found[0], found[1], found[2], torch.from_numpy(layout.runs)

    def _pooled(self, layout: Layout, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        return pool(self._hidden(layout, inputs), inputs[2], layout.rows, self._model.pooling)

    def _hidden(self, layout: Layout, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        torch = _import_torch()
        if self._compiled is None:
            return self._eager(*inputs, layout.longest)
        for changing in inputs:
            torch._dynamo.mark_dynamic(changing, 0)
        try:
            return self._compiled(*inputs, layout.longest)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the compiler trips over, the plain operations still work
            self._compiled = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._say(
                f"torch.compile does not work here ({reason}); computing on {self._device} without it, slower"
            )
            return self._eager(*inputs, layout.longest)


def tune(measure: Callable[[int], tuple[float, float]], record: Callable[[dict[str, float]], None]) -> int:
    """Tokens a batch: doubled as long as it gains 3 % and stays within 60 % of the memory.

    `measure(tokens)` gives (tokens/s, share of memory); `record` gets every measurement.
    """
    best, best_rate = SMALLEST_TOKENS, 0.0
    tokens = SMALLEST_TOKENS
    while tokens <= LARGEST_TOKENS:
        try:
            rate, share = measure(tokens)
        except (RuntimeError, MemoryError):  # too large: what went before stands
            break
        record({"tokens": tokens, "tokens_per_s": round(rate), "memory_share": round(share, 4)})
        if share > MEMORY_SHARE or rate < best_rate * WORTHWHILE_GAIN:
            break
        best, best_rate = tokens, rate
        tokens *= 2
    return best


def _kept(folder: Path | None, key: str, find: Callable[[], int]) -> int:
    """A number found once and kept for the next process; of processes that find it at once, the first counts."""
    if folder is None:
        return find()
    path = folder / f"batch-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    found = find()
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            file.write(str(found))
        with contextlib.suppress(FileExistsError):
            os.link(file.name, path)
        Path(file.name).unlink()
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return found


def _cache_folder() -> Path | None:
    """Where compiled code and measured sizes outlive the process; None where nothing can be written."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(base) / "datamoat" / "torch")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no folder there, or no home
        return None
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    return folder


def _made_up(model: Model, tokens: int, length: int) -> Tokens:
    length = min(length, model.max_length)
    rows = max(1, tokens // length)
    ids = np.arange(rows * length, dtype=np.int32) % int(model.config["vocab_size"])
    return Tokens(ids, np.full(rows, length, np.int32))


def _devices(device: str, limit: int | None) -> list[str]:
    torch = _import_torch()
    if device == "cpu":
        return ["cpu"]
    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    found = there if device == "cuda" else [name for name in there if name == device]
    if not found:
        raise EmbedderError(
            f"device {device!r} is not here (found: {', '.join(['cpu', *there])}); choose one of them, or install "
            "torch built for this machine's CUDA driver"
        )
    return found[:limit]


def _describe(devices: list[str]) -> str:
    torch = _import_torch()
    if devices[0] == "cpu":
        return "cpu"
    names = [torch.cuda.get_device_name(device) for device in devices]
    return f"cuda ({', '.join(f'{names.count(name)} x {name}' for name in dict.fromkeys(names))})"


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise EmbedderError(
            f"the engine torch needs the package torch ({error}); install the extra gpu, or choose another engine"
        ) from error
    return torch

"""The batch job on a Ray cluster: the same shards, made by workers on any number of machines or GPUs.

What travels is small: a shard's name and row numbers go to a worker, a shard's figures come back. The worker reads
the rows and writes the shard itself, so every machine needs the input, the output folder and the model at the
same paths. A worker that dies is replaced and its shards are made again; those that ended two come last, the model
in a process of its own beside the worker. A shard that ends its workers even so fails the job.

Belongs here: the pipeline, its place on the cluster, what a dead worker means.
Does not belong here: making a shard, the plan, the summary (see `job`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import queue
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedder.budget import Ledger
from embedder.encode import EngineBroken
from embedder.job import Progress, Runner, Watcher, Work, padding_share
from embedder.machine import physical_cores
from embedder.protocol import EmbedderError
from embedder.shards import Shard
from embedder.stage import Settings, ShardResult, ShardStage
from embedder.tokenise_pool import TokeniserDied

# A shard is begun so often before it is suspected, and so often with an isolated model before it is given up.
_ATTEMPTS = 2
# With more suspects for each worker than that, it is not the shards.
_SUSPECTS = 4
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Places:
    """How the workers lie on the cluster."""

    workers: int
    resources: dict[str, float]
    """What Ray keeps free for each."""
    per_machine: int
    device: str | None
    """cuda when each worker has a GPU, else what the settings say."""


class RayRunner(Runner):
    """Makes the missing shards on a cluster.

    `address` is Ray's, such as host:6379; None takes the one in RAY_ADDRESS, else starts Ray on this machine for as
    long as the job lasts. `workers` None is one a GPU, or one a machine where there are none.
    """

    def __init__(
        self,
        work: Work,
        stage: ShardStage,
        ledger: Ledger,
        watcher: Watcher,
        stop: threading.Event,
        *,
        settings: Settings,
        address: str | None = None,
        workers: int | None = None,
    ) -> None:
        super().__init__(work, stage, ledger, watcher, stop)
        # Other processes have other working folders.
        self._input_file, self._output = work.input_file.absolute(), work.output.absolute()
        self._settings = replace(settings, model=settings.model and settings.model.absolute())
        self._address, self._workers = address, workers
        self._rows = self._tokens = self._padded = 0

    def run(self) -> None:
        """See `job.Runner`. Raises EmbedderError when Ray is missing, when the workers cannot open the model, and
        when a shard ends every worker it is given."""
        if not self._shards:
            return
        with _cluster(self._address) as ray:
            places = _places(ray, self._settings.device, self._workers)
            missing = {shard.shard_id: shard for shard in self._shards}
            if self._estimate is not None:
                self._reserve(list(missing.values()), places, self._estimate.tokens / self._total_rows)
            for isolated in (False, True):
                wanted = list(missing.values()) if isolated else self._trusted
                for result in self._made(ray, wanted, places, isolated) if wanted else ():
                    del missing[result.shard_id]
                    self._take(result, list(missing.values()), places)
            if missing:
                raise _poison(list(missing.values()))

    def _made(
        self, ray: Any, wanted: Sequence[Shard], places: Places, isolated: bool
    ) -> Iterator[ShardResult]:
        """The results as they come, less those of shards that ended their workers."""
        at_a_time = 1 if isolated else 2  # two keep a worker busy, but both fall with it
        settings = replace(self._settings, device=places.device)
        attempts = ray.remote(Attempts).options(num_cpus=0).remote()
        ray.data.DataContext.get_current().enable_progress_bars = False
        pipeline = ray.data.from_items(
            [_packed(shard) for shard in wanted], override_num_blocks=len(wanted)
        ).map_batches(
            ShardWorker,
            fn_constructor_args=(self._input_file, self._output, settings, places, attempts, isolated),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                size=min(places.workers, len(wanted)),
                max_tasks_in_flight_per_actor=at_a_time,
                max_concurrent_calls_per_actor=at_a_time,
                enable_true_multi_threading=at_a_time > 1,
            ),
            **places.resources,
        )
        suspects = 0
        for row in self._polled(pipeline.iter_rows()):
            if row["error"]:
                raise EmbedderError(row["error"])
            if row["result"]:
                yield ShardResult(**json.loads(row["result"]))
            else:
                suspects += 1
                if suspects > _SUSPECTS * places.workers:
                    raise _poison(wanted)

    def _polled(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """`rows`, with a look at the wish to stop and at the budget while none comes."""
        come: queue.SimpleQueue[dict[str, Any] | BaseException | None] = queue.SimpleQueue()
        left = threading.Event()

        def read() -> None:
            try:
                for row in rows:
                    come.put(row)
                    if left.is_set():
                        return
                come.put(None)
            except BaseException as error:
                come.put(error)

        threading.Thread(target=read, name="ray results", daemon=True).start()
        try:
            while True:
                self._check()
                try:
                    row = come.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    self._ledger.check()
                    continue
                if row is None:
                    return
                if isinstance(row, BaseException):
                    raise row
                yield row
        finally:
            left.set()

    def _take(self, result: ShardResult, missing: Sequence[Shard], places: Places) -> None:
        if not self.results:  # until a worker began this, all of them were starting
            self._ledger.start_embedding(result.seconds)
        self.results.append(result)
        self._rows += result.rows
        self._tokens += result.tokens
        self._padded += result.padded_tokens
        total_tokens = self._tokens * self._total_rows // self._rows
        self._ledger.spend(result.tokens)
        self._measure(total_tokens)
        self._ledger.save()
        self._watcher.progressed(
            Progress(
                self._rows,
                self._total_rows,
                self._tokens,
                total_tokens,
                self._ledger.embedding_seconds,
                len(self._shards) - len(missing),
                len(self._shards),
                padding_share(self._tokens, self._padded),
            )
        )
        self._reserve(missing, places, self._tokens / self._rows)

    def _reserve(self, missing: Sequence[Shard], places: Places, tokens_per_row: float) -> None:
        """Raises OverBudget when what the workers make next would not be finished below the ceiling."""
        rows = sum(len(shard.rows) for shard in missing[: places.workers])
        if rows:
            self._ledger.reserve(round(rows * tokens_per_row))


class Attempts:
    """What was begun and has not come back: a process of its own, which outlives the workers."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, what: str) -> int:
        """How often it has been begun, this time included."""
        self._begun[what] += 1
        return self._begun[what]

    def done(self, what: str) -> None:
        """It came back."""
        del self._begun[what]


class ShardWorker:
    """One worker: a process with the model open, which makes one shard after the other.

    Called by two threads it prepares a shard, or writes one, while it encodes another.
    """

    def __init__(
        self,
        input_file: Path,
        output: Path,
        settings: Settings,
        places: Places,
        attempts: Any,
        isolated: bool = False,
    ) -> None:
        import ray

        if settings.device != "cuda" and settings.streams is None and places.per_machine > 1:
            settings = replace(settings, streams=max(1, physical_cores() // places.per_machine))
        self._stage = ShardStage(input_file, output, settings)
        self._preparing, self._encoding, self._writing = threading.Lock(), threading.Lock(), threading.Lock()
        self._attempts = attempts
        self._broken = ""
        if ray.get(attempts.begin.remote("open")) > _ATTEMPTS * places.workers:
            self._broken = "workers end while they open the model; look for what ends them (memory, a driver)"
            return
        try:
            if isolated:
                self._stage = self._stage.isolated()
            self._stage.open()
        except EmbedderError as error:
            self._broken = str(error)
        ray.get(attempts.done.remote("open"))

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, list[str]]:
        """Make the shard: its figures, or the error that ends the job, or neither when it ends the workers."""
        import ray

        shard = _unpacked(batch)
        if self._broken:
            return {"result": [""], "error": [self._broken]}
        if ray.get(self._attempts.begin.remote(shard.shard_id)) > _ATTEMPTS:
            return {"result": [""], "error": [""]}
        try:
            result = self._make(shard)
        except EngineBroken:
            os._exit(1)  # Ray gives the shard another worker, with another engine
        except TokeniserDied:
            return {"result": [""], "error": [""]}
        except EmbedderError as error:
            return {"result": [""], "error": [str(error)]}
        return {"result": [json.dumps(asdict(result))], "error": [""]}

    def _make(self, shard: Shard) -> ShardResult:
        with self._preparing:
            prepared = self._stage.prepare(shard)
        with self._encoding:
            computed = self._stage.encode(prepared)
        with self._writing:
            return self._stage.write(computed)


def _packed(shard: Shard) -> dict[str, Any]:
    # Most rows follow one another, so their distances are nearly nothing.
    rows = zlib.compress(np.diff(shard.rows, prepend=0).tobytes(), 1)
    return {"number": shard.number, "shard_id": shard.shard_id, "rows": rows}


def _unpacked(batch: dict[str, npt.NDArray[Any]]) -> Shard:
    distances = np.frombuffer(zlib.decompress(batch["rows"][0]), np.int64)
    return Shard(int(batch["number"][0]), str(batch["shard_id"][0]), np.cumsum(distances))


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected; left as it was found. Raises EmbedderError when it cannot be had."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise EmbedderError(f"--runner ray needs Ray ({error}); install the extra ray") from error
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS")
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            # The workers are the job, so they run at its priority; what travels is small, so the store may be.
            os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's own spelling
            cpus = max(2, len(os.sched_getaffinity(0)))
            ray.init(num_cpus=cpus, include_dashboard=False, object_store_memory=128 << 20, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EmbedderError(f"Ray at {address or 'this machine'} does not answer ({error})") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _places(ray: Any, device: str | None, workers: int | None) -> Places:
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not machines:
        raise EmbedderError("no machine of the Ray cluster offers a CPU; start workers, or let it scale up")
    gpus = int(sum(machine.get("GPU", 0) for machine in machines))
    if gpus and device != "cpu":
        if workers is not None and workers > gpus:
            raise EmbedderError(
                f"{workers} workers need a GPU each, the Ray cluster has {gpus}; lower --workers"
            )
        return Places(workers or gpus, {"num_gpus": 1}, 1, "cuda")
    workers = workers or len(machines)
    per_machine = -(-workers // len(machines))
    # One CPU of each machine stays free for Ray's own tasks: they would wait for the workers, and these for them.
    share = max(0.0, min(machine["CPU"] for machine in machines) - 1) / per_machine
    return Places(workers, {"num_cpus": int(share) if share >= 1 else round(share, 2)}, per_machine, device)


def _poison(shards: Sequence[Shard]) -> EmbedderError:
    first = shards[0]
    return EmbedderError(
        f"{len(shards)} shards ended every worker they were given, the first of them {first.shard_id} with the input "
        f"rows {first.rows[0]} to {first.rows[-1]}; finished shards stay. Look in Ray's log of the workers for what "
        "ended them (memory, a driver), or leave those rows out, then run the same command again"
    )


def runner(settings: Settings, address: str | None, workers: int | None) -> functools.partial[RayRunner]:
    """What `job.run` takes as `make_runner`."""
    return functools.partial(RayRunner, settings=settings, address=address, workers=workers)

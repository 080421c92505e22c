"""The job on a local Ray cluster with two workers: the same bytes, also when one is killed; poison; stopping."""

import gc
import os
import random
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedder import job, ray_job
from embedder.budget import Estimate, Limits
from embedder.encode import Embedder
from embedder.isolate import IsolatedEmbedder
from embedder.job import Progress, Stopped, Summary, Watcher
from embedder.protocol import CHECK_VECTORS_ARE_SOUND, EmbedderError, shard_paths
from embedder.ray_job import RayRunner, ShardWorker
from embedder.shards import Shard
from embedder.stage import Settings, ShardResult, ShardStage
from embedder.tokens import Tokens

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")

SHARDS, SHARD_SIZE = 12, 20
HELD, DEADLY, CRASHING = 5, 7, 9
"""Numbers of the shards that the workers below stumble over."""

pytestmark = [
    # Ray Data's own defaults set off its own deprecations.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\.context"),
    pytest.mark.filterwarnings(r"ignore:AssetExecutionContext\.\w+ is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::dagster.PreviewWarning"),
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning"),
    # A pipeline that is left early leaves its log open, a log that was read its event loop.
    pytest.mark.filterwarnings(
        r"ignore:Exception ignored in.*(ray-data|socket|EventLoop):pytest.PytestUnraisableExceptionWarning"
    ),
]


class NotedWorker(ShardWorker):
    """Notes in the output folder what it begins and what it finishes."""

    def __init__(self, input_file: Path, output: Path, *more: Any) -> None:
        super().__init__(input_file, output, *more)
        self._notes = output.parent

    def _make(self, shard: Shard) -> ShardResult:
        self._note("begun", shard.number)
        self._stumble(shard.number)
        result = super()._make(shard)
        self._note("made", shard.number)
        return result

    def _note(self, what: str, number: int) -> None:
        (self._notes / f"{what}-{number}-{uuid.uuid4().hex}").touch()

    def _stumble(self, number: int) -> None:
        pass


class HeldWorker(NotedWorker):
    """Who gets the shard first says so and waits to be killed."""

    def _stumble(self, number: int) -> None:
        if number == HELD:
            try:
                file = (self._notes / "held").open("x")
            except FileExistsError:
                return
            file.write(str(os.getpid()))
            file.close()
            time.sleep(600)


class QuickEngine:
    """Vectors of no meaning, at once."""

    name, device, precision, streams, token_budget, packed = "quick", "cpu", "f32", 1, 4096, True

    def encode(self, batches: Iterable[Tokens], take: Callable[[int, npt.NDArray[np.float32]], None]) -> None:
        for number, batch in enumerate(batches):
            take(number, np.repeat(batch.lengths[:, None], 384, axis=1).astype(np.float32))


class QuickWorker(NotedWorker):
    """Starts sooner than a real engine does, where the vectors do not matter."""

    def __init__(self, *arguments: Any) -> None:
        with mock.patch.object(Embedder, "_open_checked", lambda *_: QuickEngine()):
            super().__init__(*arguments)


class MortalWorker(QuickWorker):
    """Ends with one of the shards, and with another one while the model is in the same process."""

    def _stumble(self, number: int) -> None:
        isolated = isinstance(self._stage.embedder, IsolatedEmbedder)
        if number == DEADLY or (number == CRASHING and not isolated):
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str | None]:
    """Two CPUs for two workers and one that stays free. The address of its job server, where it has one."""
    from importlib.util import find_spec

    serves_jobs = all(map(find_spec, ("aiohttp_cors", "opencensus", "colorful")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        context = ray.init(
            num_cpus=3,
            include_dashboard=serves_jobs,
            object_store_memory=100 << 20,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
        yield f"http://{context.dashboard_url}" if serves_jobs else None
        ray.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance = random.Random(3)
    words = ["river", "stone", "window", "paper", "letter", "garden"]
    texts = [" ".join(chance.choices(words, k=chance.randint(3, 40))) for _ in range(SHARDS * SHARD_SIZE)]
    hashes = [f"h{i}" for i in range(len(texts))]
    texts[3] = " "
    path: Path = tmp_path_factory.mktemp("input") / "in.parquet"
    pq.write_table(
        pa.table({"chunk_id": hashes, "content_hash": hashes, "text": texts}), path, row_group_size=50
    )
    return path


def run(source: Path, output: Path, *, on_ray: bool = True, **more: Any) -> Summary:
    settings = Settings()
    runner = ray_job.runner(settings, None, 2) if on_ray else None
    return job.run(source, output, settings, shard_size=SHARD_SIZE, make_runner=runner, **more)


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("*.parquet")}


def noted(folder: Path, what: str) -> Counter[int]:
    return Counter(int(path.name.split("-")[1]) for path in folder.glob(f"{what}-*"))


def figures(summary: Summary) -> tuple[Any, ...]:
    return summary.distinct, summary.embedded, summary.failed, summary.tokens, summary.shards, summary.sound


@pytest.mark.usefixtures("cluster")
def test_a_killed_worker_costs_its_shards_and_changes_no_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = run(source, tmp_path / "direct", on_ray=False)
    now = direct_planned_at(tmp_path / "direct")
    monkeypatch.setattr(ray_job, "ShardWorker", HeldWorker)
    killed: list[int] = []

    def kill() -> None:
        held = tmp_path / "held"
        while not (held.exists() and held.read_text()):
            time.sleep(0.01)
        while len(noted(tmp_path, "made")) < HELD:
            time.sleep(0.01)
        os.kill(int(held.read_text()), signal.SIGKILL)
        killed.append(len(shard_paths(tmp_path / "on_ray")))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    summary = run(source, tmp_path / "on_ray", now=now)
    killer.join(60)
    assert killed and killed[0] < SHARDS, "the worker was not killed mid-way"
    assert contents(tmp_path / "on_ray") == contents(tmp_path / "direct")
    assert figures(summary) == figures(direct)
    twice = {number for number, times in noted(tmp_path, "begun").items() if times > 1}
    # What the worker had at hand: one it encodes, one it prepares, and one whose end it has not yet told.
    assert HELD in twice and len(twice) <= 3
    made = noted(tmp_path, "made")
    assert made.keys() == {*range(SHARDS)}
    assert {number for number, times in made.items() if times > 1} <= twice - {HELD}


@pytest.mark.usefixtures("cluster")
def test_a_shard_that_ends_every_worker_fails_the_job_and_one_that_can_be_made_apart_does_not(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_job, "ShardWorker", MortalWorker)
    first, last = DEADLY * SHARD_SIZE, DEADLY * SHARD_SIZE + SHARD_SIZE - 1
    with pytest.raises(EmbedderError, match=rf"1 shards ended every worker .* rows {first} to {last};"):
        run(source, tmp_path / "out")
    assert len(shard_paths(tmp_path / "out")) == SHARDS - 1
    # One that falls with the other, in the same worker, may not have come to noting that it was begun.
    assert ray_job._ATTEMPTS < noted(tmp_path, "begun")[DEADLY] <= 2 * ray_job._ATTEMPTS
    assert noted(tmp_path, "made")[CRASHING] == 1


@pytest.mark.usefixtures("cluster")
def test_a_stop_is_noticed_between_shards(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_job, "ShardWorker", QuickWorker)
    stop = threading.Event()
    seen: list[Progress] = []

    class Stopper(Watcher):
        def progressed(self, progress: Progress) -> None:
            seen.append(progress)
            stop.set()

    with pytest.raises(Stopped) as stopped:
        run(source, tmp_path / "out", watcher=Stopper(), stop=stop)
    assert stopped.value.summary is not None
    assert stopped.value.summary.shards == seen[-1].shard < SHARDS
    assert seen[-1].rows == seen[-1].shard * SHARD_SIZE


@pytest.mark.usefixtures("cluster")
def test_a_model_that_does_not_open_on_the_workers_fails_with_its_words(source: Path, tmp_path: Path) -> None:
    broken = Settings(tmp_path / "absent")
    with pytest.raises(EmbedderError, match=r"absent"):
        job.run(source, tmp_path / "out", make_runner=ray_job.runner(broken, None, 2))


def test_dagster_gets_the_report_of_a_job_on_the_cluster(
    cluster: str | None, source: Path, tmp_path: Path
) -> None:
    if cluster is None:
        pytest.skip("Ray's job server needs the extra 'default' of ray")
    # Not above: each worker imports this module.
    import dagster as dg

    from assets.embeddings.launch import JobRequest, RayLauncher

    request = JobRequest(source, tmp_path / "out", options=("--shard-size", "100", "--workers", "1"))

    # Dagster reads the annotation and knows only the bare class.
    @dg.asset(check_specs=[dg.AssetCheckSpec(CHECK_VECTORS_ARE_SOUND, asset="vectors")])
    def vectors(context: dg.AssetExecutionContext) -> dg.MaterializeResult:  # type: ignore[type-arg]
        return RayLauncher(cluster).run(context, request)

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([vectors], instance=instance)
    (materialization,) = result.asset_materializations_for_node("vectors")
    metadata = {name: value.value for name, value in materialization.metadata.items()}
    assert (metadata["embedded"], metadata["failed"], metadata["shards"]) == (SHARDS * SHARD_SIZE - 1, 1, 3)
    assert "Ray Job ID" in metadata
    (evaluation,) = result.get_asset_check_evaluations()
    assert evaluation.passed
    gc.collect()  # dagster-ray leaves the loop open in which it read the log: let it be said here


def test_a_ceiling_holds_on_a_cluster_too(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    rates: list[float | None] = []

    class Told(Watcher):
        def estimated(self, estimate: Estimate) -> None:
            rates.append(estimate.tokens_per_s)

    def made(_self: RayRunner, _ray: Any, wanted: list[Shard], *_more: Any) -> Iterator[ShardResult]:
        clock[0] += 1000  # the workers start
        stage = ShardStage(source, tmp_path / "out", Settings())
        yield from map(stage.embed, wanted)
        stage.close()

    machine = {"Alive": True, "Resources": {"CPU": 2}}
    monkeypatch.setattr(ray_job, "_cluster", lambda _: nullcontext(SimpleNamespace(nodes=lambda: [machine])))
    monkeypatch.setattr(RayRunner, "_made", made)
    with pytest.raises(Stopped, match="max-tokens") as stopped:
        run(source, tmp_path / "out", limits=Limits(max_tokens=2500), timer=lambda: clock[0], watcher=Told())
    figures = stopped.value.summary
    assert figures is not None and 1500 < figures.tokens <= 2500
    assert rates[0] is None and len(rates) == 2 and rates[1]
    assert 0 <= figures.seconds - figures.startup_seconds < 100 < figures.startup_seconds
    assert figures.shards == len(shard_paths(tmp_path / "out")) > 0


def test_a_shard_travels_whole() -> None:
    shard = Shard(3, "abc", np.array([5, 6, 7, 100, 2**40], np.int64))
    packed = ray_job._packed(shard)
    found = ray_job._unpacked({name: np.array([value], object) for name, value in packed.items()})
    assert (found.number, found.shard_id) == (3, "abc")
    np.testing.assert_array_equal(found.rows, shard.rows)
    many = Shard(0, "x", np.arange(4096, dtype=np.int64))
    assert len(ray_job._packed(many)["rows"]) < 300


@pytest.mark.parametrize(
    ("machines", "workers", "expected"),
    [
        ([{"CPU": 2}], None, (1, {"num_cpus": 1}, 1)),
        ([{"CPU": 2}], 2, (2, {"num_cpus": 0.5}, 2)),
        ([{"CPU": 1}], None, (1, {"num_cpus": 0}, 1)),
        ([{"CPU": 64}, {"CPU": 16}, {}], None, (2, {"num_cpus": 15}, 1)),
        ([{"CPU": 8}, {"CPU": 8}], 3, (3, {"num_cpus": 3}, 2)),
        ([{"CPU": 64, "GPU": 8}, {"CPU": 4}], None, (8, {"num_gpus": 1}, 1)),
    ],
)
def test_the_workers_leave_a_cpu_of_each_machine_free(
    machines: list[dict[str, float]], workers: int | None, expected: tuple[Any, ...]
) -> None:
    fake = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": machine} for machine in machines])
    places = ray_job._places(fake, None, workers)
    assert (places.workers, places.resources, places.per_machine) == expected
    for machine in machines:
        if machine and "num_cpus" in places.resources:
            assert places.per_machine * places.resources["num_cpus"] <= max(0, machine["CPU"] - 1)


@pytest.mark.parametrize(
    ("machines", "workers", "says"),
    [([], None, "offers a CPU"), ([{"CPU": 8, "GPU": 2}], 3, "the Ray cluster has 2")],
)
def test_a_cluster_that_would_wait_for_ever_is_refused(
    machines: list[dict[str, float]], workers: int | None, says: str
) -> None:
    fake = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": machine} for machine in machines])
    with pytest.raises(EmbedderError, match=says):
        ray_job._places(fake, None, workers)


def direct_planned_at(output: Path) -> Any:
    table = pq.read_table(output / "failures.parquet")
    from embedder.failures import wait_after

    (when,) = table["next_attempt_at"].to_pylist()
    return when - wait_after(1)

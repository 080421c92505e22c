"""The batch job: a Parquet file of texts in, shards of vectors out, embedding only what is not there yet.

Three steps, with the output folder locked around them (`shards.locked`):

    work = plan(input_file, output, settings)                    what is missing, cut into shards
    results = [stage.embed(shard) for shard in work.missing]     each on any machine, in any order
    summary = finish(work, results, ledger)                      failures, record, figures

`run` is the runner for one machine: it tokenises the next shard and writes the one before while one is encoded.
Shards that were in the making when an earlier run died come last, the model in a process of its own: a text that
ends that process is a failure like any other.

Belongs here: the steps, their order, counting, progress, stopping.
Does not belong here: making one shard (see `stage`), the command line, Dagster, the output folder's files, money.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from embedder import failures, shards, texts
from embedder.budget import Estimate, Ledger, Limits, OverBudget
from embedder.encode import Embedder, EngineBroken
from embedder.failures import Failure
from embedder.model import Model, open_model
from embedder.protocol import EmbedderError
from embedder.shards import Plan, Shard
from embedder.stage import Computed, Prepared, Settings, ShardResult, ShardStage
from embedder.tokenise_pool import TokeniserDied

Begin = Callable[[str, list[str]], None]
"""Marks a shard as begun: its name, the keys of its texts."""

DONE, ESTIMATED, INTERRUPTED, OVER_BUDGET = "done", "estimated", "interrupted", "over budget"


class Stopped(Exception):
    """The job ended early and cleanly. Finished shards stay; the same command continues after them."""

    def __init__(self, status: str, words: str, summary: Summary | None = None) -> None:
        super().__init__(words)
        self.status = status
        """INTERRUPTED or OVER_BUDGET."""
        self.summary = summary
        """What was done; None before anything was planned."""


class _Interrupted(Exception):
    def __init__(self) -> None:
        super().__init__("interrupted; run the same command again to continue")


@dataclass(frozen=True)
class Work:
    """What is to be done, decided before anything is done."""

    input_file: Path
    output: Path
    release: str
    fingerprint: dict[str, Any]
    rows: int
    """Of the input."""
    conflicting: int
    """Keys that stand before more than one text."""
    plan: Plan
    known: dict[str, Failure]
    """Every failure of the folder."""
    tried: frozenset[str]
    """Keys of `known` that are in this input and not parked."""
    left: dict[Path, frozenset[str]]
    """What remains of the marks of dead runs once this work is done: keys of other inputs."""

    @property
    def missing(self) -> list[Shard]:
        """The shards to make."""
        return self.plan.missing


@dataclass(frozen=True)
class Progress:
    """How far a run is. Rows and total tokens are estimates until the last shard is done."""

    rows: int
    total_rows: int
    tokens: int
    total_tokens: int
    seconds: float
    """Since the engine was ready."""
    shard: int
    """From 1."""
    shards: int
    padding_share: float
    """Filler among the tokens computed, 0 to 1; of the finished shards."""

    @property
    def tokens_per_s(self) -> float:
        """0 before the first batch."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float:
        """By tokens, so that sorting by length does not skew it; 0 before the first batch."""
        rate = self.tokens_per_s
        return max(0, self.total_tokens - self.tokens) / rate if rate else 0.0

    @property
    def share(self) -> float:
        """Of the tokens, 0 to 1."""
        return min(1.0, self.tokens / self.total_tokens) if self.total_tokens else 0.0


@dataclass
class Summary:
    """What a run did. When it is done, distinct = skipped + embedded + failed + parked."""

    release: str
    fingerprint: dict[str, Any]
    status: str = DONE
    """done, estimated (nothing was to be embedded), interrupted or over budget."""
    chunks: int = 0
    """Rows of the input."""
    distinct: int = 0
    """Distinct content hashes of the input."""
    conflicting: int = 0
    """Content hashes that stand before more than one text; the first counts."""
    skipped: int = 0
    """Already in the output folder."""
    embedded: int = 0
    failed: int = 0
    """Tried and not embedded, see failures.parquet."""
    parked: int = 0
    """Failed earlier and not due yet, so not tried."""
    truncated: int = 0
    """Texts embedded without their end, among `embedded`."""
    truncated_tokens: int = 0
    """The tokens of those ends."""
    tokens: int = 0
    """Tokens embedded, special tokens included, filler not."""
    padding_share: float = 0.0
    """Filler among the tokens computed, 0 to 1."""
    shards: int = 0
    """Shard files written by this run."""
    seconds: float = 0.0
    """From reading the input to the last file written, start-up of the engine included."""
    startup_seconds: float = 0.0
    """Until the first text could be encoded."""
    chunks_per_s: float = 0.0
    """Embedded chunks per second of embedding, start-up left out."""
    tokens_per_s: float = 0.0
    waiting_share: float = 0.0
    """Of the seconds of embedding, those in which the engine had no tokens yet, 0 to 1."""
    estimated_tokens: int | None = None
    """What was said before the work; None when there was none."""
    estimated_seconds: float | None = None
    estimated_cost: float | None = None
    cost: float | None = None
    """True cost of this run, start-up included; None without a price."""
    cost_of_work: float | None = None
    """With the earlier attempts at the same work."""
    engine: str | None = None
    """None when nothing had to be embedded."""
    device: str | None = None
    precision: str | None = None
    streams: int | None = None
    sound: bool = True
    """Every key is accounted for and every new vector is finite, of the right size and length."""
    unsound: list[str] = field(default_factory=list)
    """What is not, in words."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


class Watcher:
    """What a run tells while it runs; override what is of interest."""

    def say(self, line: str) -> None:
        """A notice for a person."""

    def estimated(self, estimate: Estimate) -> None:
        """Before the work; once more after the first shard when no rate was known before."""

    def progressed(self, progress: Progress) -> None:
        """After each batch."""


def plan(
    input_file: Path,
    output: Path,
    settings: Settings,
    *,
    model: Model | None = None,
    shard_size: int | None = None,
    retry_failed: bool = False,
    now: datetime | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> Work:
    """Decide what is to be embedded: the distinct texts of `input_file` that `output` does not hold, less those
    that failed and are not due at `now`, unless `retry_failed`. Needs the lock. Opens no engine.

    `model` saves reading the folder again. `shard_size` None is what suits the device.
    Raises EmbedderError for an unusable input, output or model.
    """
    model = model or open_model(settings.model)
    fingerprint = model.fingerprint()
    keys = texts.read_keys(input_file)
    known = failures.read(output, fingerprint, say)
    marked = shards.marks(output)
    suspects = frozenset().union(*marked.values())
    left = {path: of_it - shards.among(keys, of_it) for path, of_it in marked.items()}
    decided = shards.make_plan(
        output,
        fingerprint,
        keys,
        now=now or datetime.now(UTC),
        parked=lambda at: () if retry_failed else failures.parked(known, at),
        suspects=suspects | failures.deadly(known),
        shard_size=shard_size or shards.SHARD_SIZES[settings.device_for(model)],
        policy=f"{settings.too_long} {retry_failed}",
        say=say,
    )
    tried = shards.among(keys, set(known) - decided.parked)
    conflicting = texts.count_conflicts(input_file, keys) if decided.distinct < len(keys) else 0
    return Work(
        input_file, output, model.release(), fingerprint, len(keys), conflicting, decided, known, tried, left
    )


def finish(work: Work, results: Sequence[ShardResult], ledger: Ledger) -> Summary:
    """End a work whose missing shards are all made: write the failures, forget plan and marks. Needs the lock."""
    failed = {
        key: error
        for shard in work.plan.shards
        if shard.shard_id in work.plan.finished
        for key, error in shards.shard_failures(work.output, shard.shard_id).items()
    }
    for result in results:
        failed |= result.failures
    after = failures.updated(work.known, work.tried, failed, work.plan.planned_at)
    failures.write(work.output, work.fingerprint, after)
    shards.end_plan(work.output, work.plan)
    shards.settle(work.left)
    ledger.close()
    summary = summarise(work, results, ledger)
    summary.failed = len(failed)
    present = summary.skipped + shards.count_rows(work.output, work.missing)
    expected = work.plan.distinct - summary.failed - summary.parked
    if present != expected:
        summary.unsound.append(
            f"{expected} of {work.plan.distinct} distinct texts should have a vector, but {present} have one"
        )
    summary.sound = not summary.unsound
    return summary


def summarise(work: Work, results: Sequence[ShardResult], ledger: Ledger) -> Summary:
    """The figures so far, for a run that is stopped as well."""
    summary = Summary(work.release, work.fingerprint, chunks=work.rows, conflicting=work.conflicting)
    finished = [shard for shard in work.plan.shards if shard.shard_id in work.plan.finished]
    summary.distinct = work.plan.distinct
    summary.skipped = work.plan.present + shards.count_rows(work.output, finished)
    summary.parked = len(work.plan.parked)
    summary.seconds, summary.startup_seconds = round(ledger.seconds, 3), round(ledger.startup_seconds, 3)
    summary.cost, summary.cost_of_work = ledger.cost, ledger.cost_of_work
    padded = 0
    for result in results:
        summary.embedded += result.embedded
        summary.failed += len(result.failures)
        summary.tokens += result.tokens
        summary.truncated += result.truncated
        summary.truncated_tokens += result.truncated_tokens
        summary.shards += result.embedded > 0
        summary.unsound.extend(result.unsound)
        padded += result.padded_tokens
        summary.engine, summary.device = result.engine, result.device
        summary.precision, summary.streams = result.precision, result.streams
    summary.padding_share = padding_share(summary.tokens, padded)
    seconds = ledger.embedding_seconds
    if seconds:
        summary.chunks_per_s = round(summary.embedded / seconds, 1)
        summary.tokens_per_s = round(summary.tokens / seconds, 1)
    summary.sound = not summary.unsound
    return summary


def run(
    input_file: Path,
    output: Path,
    settings: Settings | None = None,
    *,
    limits: Limits | None = None,
    shard_size: int | None = None,
    retry_failed: bool = False,
    only_estimate: bool = False,
    now: datetime | None = None,
    embedder: Embedder | None = None,
    watcher: Watcher | None = None,
    stop: threading.Event | None = None,
    timer: Callable[[], float] = time.perf_counter,
    make_runner: Callable[[Work, ShardStage, Ledger, Watcher, threading.Event], Runner] | None = None,
) -> Summary:
    """Embed what is missing, on this machine, or with `only_estimate` say what that takes; see `plan` for what
    is missing.

    `embedder` replaces the one that `settings` describe, `make_runner` the runner for this machine. `stop`, once
    set, ends the run at the next batch.
    Raises Stopped when it ends early, by `stop` or by a limit, and EmbedderError for an unusable input, output
    or model; single bad texts are failures, not errors.
    """
    started = timer()
    settings, watcher, stop = settings or Settings(), watcher or Watcher(), stop or threading.Event()
    embedder = embedder or settings.open_embedder(watcher.say)
    told = False

    def waiting() -> None:
        nonlocal told
        if stop.is_set():
            raise Stopped(INTERRUPTED, str(_Interrupted()))
        if not told:
            watcher.say(f"another embedding run is writing to {output}: waiting for it to end")
            told = True

    with shards.locked(output, waiting):
        work = plan(
            input_file,
            output,
            settings,
            model=embedder.model,
            shard_size=shard_size,
            retry_failed=retry_failed,
            now=now,
            say=watcher.say,
        )
        ledger = Ledger(output, work.plan.work, limits or Limits(), timer=timer, started=started)
        stage = ShardStage(input_file, output, settings, embedder=embedder, say=watcher.say)
        runner = (make_runner or Runner)(work, stage, ledger, watcher, stop)
        try:
            runner.estimate()
            if only_estimate:
                summary = runner.complete(summarise(work, [], ledger))
                summary.status = ESTIMATED
                return summary
            runner.run()
        except (_Interrupted, OverBudget) as reason:
            ledger.save()
            summary = runner.complete(summarise(work, runner.results, ledger))
            summary.status = OVER_BUDGET if isinstance(reason, OverBudget) else INTERRUPTED
            raise Stopped(summary.status, str(reason), summary) from reason
        finally:
            stage.close()
        return runner.complete(finish(work, runner.results, ledger))


class Runner:
    """Makes the missing shards on this machine. Three threads, each a shard apart, so at most three in memory.

    Those threads mark what they begin, so that after a run that died the next one knows what to suspect.
    """

    def __init__(
        self, work: Work, stage: ShardStage, ledger: Ledger, watcher: Watcher, stop: threading.Event
    ) -> None:
        self._shards, self._output = work.missing, work.output
        self._suspect = [shard for shard in self._shards if shard.shard_id in work.plan.suspect]
        self._trusted = [shard for shard in self._shards if shard.shard_id not in work.plan.suspect]
        self._stage, self._ledger, self._watcher, self._stop = stage, ledger, watcher, stop
        self._total_rows = sum(len(shard.rows) for shard in self._shards)
        self._estimate: Estimate | None = None
        self._waited = 0.0
        self.results: list[ShardResult] = []

    def estimate(self) -> None:
        """Say what is to be done, if anything is. Raises _Interrupted."""
        if not self._shards:
            return
        self._check()
        with self._marked() as begin:
            if self._trusted:
                mean = self._stage.sample(self._trusted, partial(begin, "sample"))
            else:
                with closing(self._stage.isolated()) as stage:
                    mean = stage.sample(self._suspect)
        self._estimate = self._ledger.estimate(self._total_rows, round(mean * self._total_rows))
        self._watcher.estimated(self._estimate)

    def run(self) -> None:
        """Fill `results`. Raises _Interrupted or OverBudget; `results` are then those of the finished shards."""
        meter = _Meter(len(self._shards), self._total_rows)
        if self._trusted:
            with self._marked() as begin:
                self._make(self._stage, self._trusted, meter, begin)
        if self._suspect:
            self._watcher.say(
                f"{len(self._suspect)} shards may hold a text that ends the process it is in (they were in the making "
                "when one ended, or such a text is tried again): made with the model in a process of its own"
            )
            with closing(self._stage.isolated()) as stage:
                self._make(stage, self._suspect, meter)

    def _make(
        self, stage: ShardStage, wanted: Sequence[Shard], meter: _Meter, begin: Begin = lambda *_: None
    ) -> None:
        def prepare(shard: Shard) -> Prepared | TokeniserDied:
            try:
                return stage.prepare(shard, partial(begin, shard.shard_id))
            except TokeniserDied as error:
                return error

        writing: Future[ShardResult] | None = None
        with ThreadPoolExecutor(1, "tokenise") as ahead, ThreadPoolExecutor(1, "write") as behind:
            tokenising = ahead.submit(prepare, wanted[0])
            try:
                self._check()
                self._ledger.check()
                stage.open()
                if not self._ledger.embedding_seconds:
                    self._ledger.start_embedding()
                for number, shard in enumerate(wanted):
                    since = time.perf_counter()
                    prepared = tokenising.result()
                    self._waited += time.perf_counter() - since
                    if number + 1 < len(wanted):
                        tokenising = ahead.submit(prepare, wanted[number + 1])
                    if isinstance(prepared, TokeniserDied):
                        self._check()  # a signal to the whole group ends the tokeniser's processes too
                        self._watcher.say(str(prepared))
                        self._suspect.append(shard)
                        continue
                    try:
                        computed = self._encode(stage, prepared, meter)
                    except EngineBroken as error:
                        if stage is not self._stage:
                            raise
                        self._watcher.say(str(error))
                        self._suspect.extend(wanted[number:])
                        break
                    if writing is not None:
                        done, writing = writing, None
                        self.results.append(done.result())
                    writing = behind.submit(self._write, stage, computed)
            finally:
                if writing is not None:
                    self.results.append(writing.result())

    @contextmanager
    def _marked(self) -> Iterator[Begin]:
        """What marks something as begun, see `shards.begin`. An end that was foreseen takes the marks away."""
        begun: set[str] = set()

        def begin(name: str, keys: list[str]) -> None:
            begun.add(name)
            shards.begin(self._output, name, keys)

        def forget() -> None:
            for name in begun:
                shards.ended(self._output, name)

        try:
            yield begin
        except (EmbedderError, OverBudget, _Interrupted, KeyboardInterrupt):
            forget()
            raise
        forget()

    def complete(self, summary: Summary) -> Summary:
        """The summary with what only this runner knows."""
        if self._estimate is not None:
            summary.estimated_tokens = self._estimate.tokens
            summary.estimated_seconds = self._estimate.seconds
            summary.estimated_cost = self._estimate.cost
        if self._ledger.embedding_seconds:
            summary.waiting_share = round(self._waited / self._ledger.embedding_seconds, 4)
        return summary

    def _encode(self, stage: ShardStage, prepared: Prepared, meter: _Meter) -> Computed:
        ledger, tokens = self._ledger, len(prepared.tokenised.tokens.ids)
        self._check()
        ledger.reserve(tokens)
        meter.start_shard(prepared)

        def on_batch(batch_tokens: int) -> None:
            ledger.spend(batch_tokens)
            self._watcher.progressed(meter.batch(batch_tokens, ledger.embedding_seconds))
            if meter.shard_tokens < tokens:  # what is complete is worth writing
                self._check()
                ledger.check()

        computed = stage.encode(prepared, on_batch)
        meter.end_shard(computed)
        self._measure(meter.total_tokens)
        return computed

    def _measure(self, total_tokens: int) -> None:
        """After a shard: reckon with the rate so far, and estimate once more if there was none before."""
        first_rate = self._ledger.rate is None
        self._ledger.measure()
        if first_rate and self._ledger.rate is not None:
            self._watcher.estimated(self._ledger.estimate(self._total_rows, total_tokens))

    def _write(self, stage: ShardStage, computed: Computed) -> ShardResult:
        result = stage.write(computed)
        shards.ended(self._output, result.shard_id)
        self._ledger.save()
        return result

    def _check(self) -> None:
        if self._stop.is_set():
            raise _Interrupted


class _Meter:
    """How far the run is."""

    def __init__(self, shard_count: int, total_rows: int) -> None:
        self._shards, self._total_rows = shard_count, total_rows
        self._shard = self._shard_rows = self._shard_size = 0
        self._rows = self._tokens = 0
        self._seen_rows = self._seen_tokens = 0
        self._padded = self._padded_from = 0
        self.shard_tokens = 0
        """Done of the shard at hand."""

    @property
    def total_tokens(self) -> int:
        """By the mean of the texts seen so far."""
        return self._seen_tokens * self._total_rows // max(1, self._seen_rows)

    def start_shard(self, prepared: Prepared) -> None:
        self._shard += 1
        self._shard_rows, self._shard_size = len(prepared.keys), len(prepared.tokenised.tokens.ids)
        self._seen_rows += self._shard_rows
        self._seen_tokens += self._shard_size
        self.shard_tokens = 0

    def batch(self, tokens: int, seconds: float) -> Progress:
        self._tokens += tokens
        self.shard_tokens += tokens
        rows = self._rows + self._shard_rows * self.shard_tokens // max(1, self._shard_size)
        return Progress(
            rows,
            self._total_rows,
            self._tokens,
            self.total_tokens,
            seconds,
            self._shard,
            self._shards,
            padding_share(self._padded_from, self._padded),
        )

    def end_shard(self, computed: Computed) -> None:
        self._rows += self._shard_rows
        self._padded_from += self._shard_size
        self._padded += computed.encoded.padded_tokens


def padding_share(tokens: int, computed: int) -> float:
    """Rows that are computed once for several texts can make fewer tokens computed than there are."""
    return round(max(0.0, 1 - tokens / computed), 4) if computed else 0.0

"""``moat run``: one turn of the whole loop, in this process, doing only what has changed.

Belongs here: the order of things and what may be left out. Does not belong here: the work (assets), the
drawing (console) and the figures (report).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import dagster as dg

from assets.embeddings.assets import CANDIDATE_GROUP
from orchestration.console import use_screen
from orchestration.gates import closed_gates, descendants
from orchestration.jobs import CORPUS_GROUPS
from orchestration.prepare import Prepared
from orchestration.screen import Screen
from orchestration.settings import Settings
from sensors import checkpoint
from sensors.feedback_days import changed_days, clock, ledger_for_update, read_ledger
from sensors.feedback_review import mark_reviewed
from sensors.new_feedback import evaluate
from storage.warehouse import Warehouse

CHECKPOINT = "moat_run"
DATASETS = "datasets"
MODELS = "models"
OWNER_TAG = "datamoat/process"

# First and last day, as YYYY-MM-DD.
Span = tuple[str, str]


@dataclass
class Turn:
    """What one turn of the loop did.

    Attributes:
        failed: Assets that failed or were stopped, as ``raw/tickets``.
        run_ids: Dagster runs, in order.
        embedded: Vectors computed now; ``embedding_seconds`` what that took.
        days: Days whose facts were folded.
    """

    failed: list[str] = field(default_factory=list)
    run_ids: list[str] = field(default_factory=list)
    embedded: int = 0
    embedding_seconds: float = 0.0
    days: list[str] = field(default_factory=list)


@contextlib.contextmanager
def one_at_a_time(settings: Settings, screen: Screen) -> Iterator[None]:
    """Let only one turn of this deployment run on this machine; a second one waits for the first."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    with (settings.folder / "run.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            screen.line("waiting", "another moat run of this deployment is under way")
            fcntl.flock(lock, fcntl.LOCK_EX)
        # The kernel drops the lock with the process, however it ends.
        yield


def inputs_digest(settings: Settings, warehouse: Warehouse, source_files: Iterable[Path]) -> str:
    """Digest of all that a turn depends on: source files, contracts, examples, code, model, the log's length,
    promotions.

    Files are told by path, size and time of change, so that asking costs no reading; landing itself compares
    contents.
    """
    digest = hashlib.sha256()
    code = [
        path
        for package in (
            "assets",
            "embedder",
            "feedback",
            "orchestration",
            "sensors",
            "storage",
            "dbt_project",
        )
        for path in (settings.root / package).rglob("*")
        if path.suffix in (".py", ".sql", ".yml")
    ]
    example = [path for path in (settings.root / "examples" / settings.example).rglob("*") if path.is_file()]
    own = [path for folder in settings.contract_folders for path in folder.glob("*") if path.is_file()]
    for path in sorted({*code, *example, *own, *source_files}):
        with contextlib.suppress(OSError):
            status = path.stat()
            digest.update(os.fsencode(path) + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    digest.update(f"{settings}".encode())
    with warehouse.connect("digest") as connection:
        log = connection.execute(
            "select (select count(*) from feedback.interaction), (select count(*) from feedback.feedback_event),"
            # The first release is promoted by the turn itself.
            " (select count(*) from registry.promotion where previous is not null)"
        ).fetchone()
    digest.update(f"{log}".encode())
    return digest.hexdigest()


def is_current(warehouse: Warehouse, digest: str) -> bool:
    """Whether the last whole turn saw exactly these inputs, and every event that can be read is folded."""
    with warehouse.connect("digest") as connection:
        ledger = read_ledger(connection)
        if ledger.days or changed_days(connection, ledger.position).days:
            return False
        return checkpoint.read(connection, CHECKPOINT).get("inputs") == digest


def mark_current(warehouse: Warehouse, digest: str) -> None:
    """Record that a whole turn succeeded on these inputs."""
    with warehouse.connect("digest") as connection:
        checkpoint.write(connection, CHECKPOINT, {"inputs": digest})


# A day without events costs dbt a quarter of a second of processor time, each start of dbt more than four seconds.
BRIDGED_DAYS = 14


def ranges(days: Iterable[str], bridged: int = BRIDGED_DAYS) -> list[Span]:
    """Days as few ranges (first, last) for dbt to walk; gaps of at most ``bridged`` days are walked too.

    One event of last year must not have every day since folded again.
    """
    found: list[Span] = []
    for day in sorted(days):
        if found and (date.fromisoformat(day) - date.fromisoformat(found[-1][1])).days <= bridged + 1:
            found[-1] = (found[-1][0], day)
        else:
            found.append((day, day))
    return found


def turn(defs: dg.Definitions, prepared: Prepared, screen: Screen, log: Path, full: bool = False) -> Turn:
    """Run the graph: sources to index, then feedback to datasets and figures.

    Two Dagster runs, because what feedback and figures need must not wait for a bad source. What failed in the
    first, or stands behind a gate that closed, is left out of the second with everything that depends on it.

    Args:
        log: File that takes what dbt and libraries print.
        full: Fold every day that has events, not only those that changed.
    """
    done = Turn()
    graph = defs.resolve_asset_graph()
    # A candidate release is built when a person says so.
    everything = {
        key for key in graph.materializable_asset_keys if graph.get(key).group_name != CANDIDATE_GROUP
    }
    corpus = {key for key in everything if graph.get(key).group_name in CORPUS_GROUPS}
    known = _days(graph, everything).get_partition_keys()
    with dg.DagsterInstance.get() as instance:
        end_orphaned_runs(instance)
        screen.title("Sources to index")
        with (
            prepared.warehouse.connect("changed days") as connection,
            ledger_for_update(connection) as ledger,
        ):
            # Other models, or another redaction policy, say something else of days long folded.
            same_models = checkpoint.read(connection, MODELS).get("digest") == prepared.models
            since = ledger.position if same_models and not full else 0
            changes = changed_days(connection, since)
            early = ledger.take_in(changes, known[0])
            if not ledger.days and since == 0:
                # No feedback yet: an empty day makes the tables that everything after the days reads.
                ledger.open(known[-1], changes.horizon, clock(connection))
            checkpoint.write(connection, MODELS, {"digest": prepared.models})
            done.days = sorted(set(known) & ledger.days.keys())
        failed = _execute(defs, instance, corpus, None, done, screen, log)
        behind = descendants(graph, failed)
        if early:
            screen.line(
                "feedback",
                f"{len(early)} days before {known[0]} wait for an earlier DATAMOAT_START_DATE",
                "yellow",
            )
        screen.title("Feedback to datasets")
        failed |= behind - corpus

        def folded(first: str, last: str) -> None:
            with (
                prepared.warehouse.connect("folded days") as connection,
                ledger_for_update(connection) as now,
            ):
                for day in done.days:
                    if first <= day <= last:
                        now.folded(day, changes.horizon)

        failed |= fold_days(
            graph,
            everything - corpus - behind,
            ranges(done.days),
            lambda selection, span: _execute(defs, instance, selection, span, done, screen, log),
            folded,
        )
        with prepared.warehouse.connect("folded days") as connection:
            now = read_ledger(connection)
            if not {key for key in failed if graph.get(key).group_name == DATASETS}:
                mark_reviewed(connection, min(ledger.position, now.folded_upto))
        if ledger.given_up() != now.given_up():
            instance.report_runless_asset_event(evaluate(now))
    done.failed = [key.to_user_string() for key in sorted(failed)]
    return done


def fold_days(
    graph: Any,
    selection: AbstractSet[dg.AssetKey],
    spans: Sequence[Span],
    execute: Callable[[AbstractSet[dg.AssetKey], Span | None], set[dg.AssetKey]],
    folded: Callable[[str, str], None],
) -> set[dg.AssetKey]:
    """Run ``selection`` for every span of days: what the days need once before them, what needs them once after.

    Args:
        execute: Runs assets, for a span if they are daily; returns those that failed.
        folded: Told of each span whose daily assets all succeeded; a failure elsewhere does not count.

    Returns:
        Everything that failed or was left out.
    """
    partitioned = {
        key
        for key in graph.materializable_asset_keys
        if isinstance(graph.get(key).partitions_def, dg.TimeWindowPartitionsDefinition)
    }
    daily = partitioned & selection
    after = (descendants(graph, partitioned) - partitioned) & selection
    before = selection - daily - after
    needed = {key for key in before if descendants(graph, [key]) & daily}
    if not spans:
        return execute(before | after, None)
    failed: set[dg.AssetKey] = set()
    for span in spans:
        chosen = daily | (before if span == spans[0] else set()) | (after if span == spans[-1] else set())
        now = execute(chosen, span)
        failed |= now
        if not (partitioned | needed) & now and daily == partitioned:
            folded(*span)
        if needed & now:
            # Later days folded without it would pass for good.
            return failed | daily | after
    return failed


def _days(graph: Any, keys: Iterable[dg.AssetKey]) -> dg.PartitionsDefinition[str]:
    return next(definition for key in keys if (definition := graph.get(key).partitions_def) is not None)


def _execute(
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    selection: AbstractSet[dg.AssetKey],
    days: Span | None,
    done: Turn,
    screen: Screen,
    log: Path,
) -> set[dg.AssetKey]:
    """One Dagster run over ``selection``, of a range of days if given; what failed, was stopped or closed its gate."""
    tags = {OWNER_TAG: f"{socket.gethostname()}:{os.getpid()}"}
    if days:
        tags |= {
            "dagster/asset_partition_range_start": days[0],
            "dagster/asset_partition_range_end": days[1],
        }
    use_screen(screen)
    log.parent.mkdir(parents=True, exist_ok=True)
    with screen.live("starting"), log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        result = defs.resolve_implicit_global_asset_job_def().execute_in_process(
            asset_selection=sorted(selection),
            tags=tags,
            instance=instance,
            run_config={"loggers": {"moat": {}}},
            raise_on_error=False,
        )
    done.run_ids.append(result.run_id)
    # Dagster turns Ctrl-C into the failure of the step under way.
    if any(event.is_failure and "Interrupt" in str(event.event_specific_data) for event in result.all_events):
        raise KeyboardInterrupt
    written = set()
    for event in result.get_asset_materialization_events():
        materialization = event.step_materialization_data.materialization
        written.add(materialization.asset_key)
        if materialization.asset_key.path[0] == "vectors":
            figures: dict[str, Any] = {name: entry.value for name, entry in materialization.metadata.items()}
            done.embedded += figures["embedded"]
            done.embedding_seconds += figures["seconds"]
    closed = closed_gates(instance, defs.resolve_asset_graph()) & selection
    return (set(selection) - written) | closed


def end_orphaned_runs(instance: dg.DagsterInstance) -> list[str]:
    """Mark runs that a killed ``moat run`` on this machine left unfinished as failed; their ids."""
    ended = []
    for run in _unfinished(instance):
        host, _, process = run.tags.get(OWNER_TAG, "").rpartition(":")
        if host == socket.gethostname() and not _is_alive(int(process)):
            _end(instance, run)
            ended.append(run.run_id)
    return ended


def end_left_over_runs(settings: Settings) -> list[str]:
    """Mark runs that an earlier ``moat dev`` was stopped or killed in as failed, before another starts; their ids.

    Nobody else runs anything in a deployment with an embedded database; with an external one another machine may.
    """
    if settings.database_url is not None:
        return []
    with dg.DagsterInstance.get() as instance:
        left_over = [run for run in _unfinished(instance) if OWNER_TAG not in run.tags]
        for run in left_over:
            _end(instance, run)
    return [run.run_id for run in left_over]


def _unfinished(instance: dg.DagsterInstance) -> Sequence[dg.DagsterRun]:
    return instance.get_runs(
        dg.RunsFilter(
            statuses=[
                dg.DagsterRunStatus.STARTED,
                dg.DagsterRunStatus.STARTING,
                dg.DagsterRunStatus.NOT_STARTED,
                dg.DagsterRunStatus.CANCELING,
            ]
        )
    )


def _end(instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    instance.report_run_failed(run, "the process that executed this run was killed")
    # Its claims on pools outlive it, and the next run would wait for them for ever.
    instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()

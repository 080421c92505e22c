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
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import psycopg
from psycopg.types.json import Jsonb

from orchestration.console import use_screen
from orchestration.gates import closed_gates, descendants
from orchestration.jobs import CORPUS_GROUPS
from orchestration.prepare import Prepared
from orchestration.screen import Screen
from orchestration.settings import Settings
from sensors.new_feedback import changed_days, read_checkpoint, write_checkpoint
from storage.warehouse import Warehouse

CHECKPOINT = "moat_run"
MODELS = "models"
OWNER_TAG = "datamoat/process"


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
    """Digest of all that a turn depends on: source files, contracts, examples, code, model, the log's length.

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
            "select (select count(*) from feedback.interaction), (select count(*) from feedback.feedback_event)"
        ).fetchone()
    digest.update(f"{log}".encode())
    return digest.hexdigest()


def is_current(warehouse: Warehouse, digest: str) -> bool:
    """Whether the last whole turn saw exactly these inputs, and no event has become readable since."""
    with warehouse.connect("digest") as connection:
        if changed_days(connection, read_checkpoint(connection)).days:
            return False
        return _read(connection, CHECKPOINT, "inputs") == digest


def mark_current(warehouse: Warehouse, digest: str) -> None:
    """Record that a whole turn succeeded on these inputs."""
    with warehouse.connect("digest") as connection:
        _write(connection, CHECKPOINT, {"inputs": digest})


def _read(connection: psycopg.Connection[Any], name: str, field: str) -> str | None:
    row = connection.execute(
        "select value ->> %s from registry.checkpoint where name = %s", [field, name]
    ).fetchone()
    return row[0] if row else None


def _write(connection: psycopg.Connection[Any], name: str, value: dict[str, str]) -> None:
    connection.execute(
        "insert into registry.checkpoint (name, value) values (%s, %s)"
        " on conflict (name) do update set value = excluded.value, updated_at = now()",
        [name, Jsonb(value)],
    )


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
    everything = graph.materializable_asset_keys
    corpus = {key for key in everything if graph.get(key).group_name in CORPUS_GROUPS}
    with dg.DagsterInstance.get() as instance:
        end_orphaned_runs(instance)
        screen.title("Sources to index")
        with prepared.warehouse.connect("changed days") as connection:
            # Other models, or another redaction policy, say something else of days long folded.
            same_models = _read(connection, MODELS, "digest") == prepared.models
            since = read_checkpoint(connection) if same_models and not full else 0
            changed = changed_days(connection, since)
        _execute(defs, instance, corpus, [], done, screen, log)
        stopped = {dg.AssetKey.from_user_string(name) for name in done.failed}
        behind = descendants(graph, stopped)
        known = _days(graph, everything).get_partition_keys()
        partitions = sorted({day.isoformat() for day in changed.days} & set(known))
        if early := len(changed.days) - len(partitions):
            screen.line(
                "feedback",
                f"{early} days before {known[0]} wait for an earlier DATAMOAT_START_DATE",
                "yellow",
            )
        if not partitions and since == 0:
            # No feedback yet: an empty day makes the tables that everything after the days reads.
            partitions = [known[-1]]
        rest = everything - corpus - behind
        if not partitions:
            rest = {key for key in rest if not graph.get(key).is_partitioned}
        screen.title("Feedback to datasets")
        _execute(defs, instance, rest, partitions, done, screen, log)
        done.failed += [key.to_user_string() for key in sorted(behind - corpus)]
        done.days = partitions
    if not done.failed:
        with prepared.warehouse.connect("changed days") as connection:
            write_checkpoint(connection, changed.horizon)
            _write(connection, MODELS, {"digest": prepared.models})
    return done


def _days(graph: Any, keys: Iterable[dg.AssetKey]) -> dg.PartitionsDefinition[str]:
    return next(definition for key in keys if (definition := graph.get(key).partitions_def) is not None)


def _execute(
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    selection: AbstractSet[dg.AssetKey],
    days: Sequence[str],
    done: Turn,
    screen: Screen,
    log: Path,
) -> None:
    """One Dagster run over ``selection``; days become one range, which dbt walks batch by batch."""
    tags = {OWNER_TAG: f"{socket.gethostname()}:{os.getpid()}"}
    if days:
        tags |= {
            "dagster/asset_partition_range_start": days[0],
            "dagster/asset_partition_range_end": days[-1],
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
    done.failed += [key.to_user_string() for key in sorted((selection - written) | closed)]


def end_orphaned_runs(instance: dg.DagsterInstance) -> list[str]:
    """Mark runs that a killed ``moat run`` on this machine left unfinished as failed; their ids."""
    ended = []
    unfinished = dg.RunsFilter(
        statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.NOT_STARTED]
    )
    for run in instance.get_runs(unfinished):
        host, _, process = run.tags.get(OWNER_TAG, "").rpartition(":")
        if host == socket.gethostname() and not _is_alive(int(process)):
            instance.report_run_failed(run, "the process that executed this run was killed")
            # Its claims on pools outlive it, and the next run would wait for them for ever.
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
            ended.append(run.run_id)
    return ended


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()

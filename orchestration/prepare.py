"""Prepare a deployment: databases, migrations, Dagster's instance, dbt's manifest, keys.

Belongs here: everything that must exist before a run, each step safe to repeat. Does not belong here: data.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from dagster_dbt import DbtProject

from assets.documents.redact import Redactor
from orchestration.deployment import dagster_database, ensure_analyst, open_warehouse, person, pseudonym_key
from orchestration.settings import Settings
from storage.database import Database, check
from storage.lake import write_atomic
from storage.warehouse import Warehouse

STORAGE_URL = "DATAMOAT_DAGSTER_URL"

# Two embedding jobs at once would share one device or the same cores; two dbt commands, one set of tables.
POOL_LIMITS = {"gpu": 1, "dbt": 1, "warehouse": 4}


@dataclass(frozen=True)
class Prepared:
    """A deployment that is ready to run.

    Attributes:
        warehouse: Open for use.
        dagster: Dagster's own database.
        migrations: Revisions applied just now, of all schemas.
        api_key: The feedback service's key for this deployment's own loaders.
        person_key: The key of the person at this machine, who may do everything there.
        models: Digest of the dbt project and what it is told.
    """

    warehouse: Warehouse
    dagster: Database
    migrations: list[str]
    api_key: str
    person_key: str
    models: str


def prepare(settings: Settings, say: Callable[[str], None] = lambda _: None) -> Prepared:
    """Bring everything a run needs into place; a second call finds it there and changes nothing."""
    import psycopg

    from feedback.keys import SCOPES, ensure_key
    from feedback.migrations import upgrade as upgrade_feedback
    from feedback.secret import ensure_secret
    from storage.migrations import upgrade as upgrade_warehouse

    warehouse = open_warehouse(settings)
    if settings.database_url is not None:
        check(warehouse.database)
    dagster = dagster_database(settings)
    migrations = upgrade_warehouse(warehouse.database) + upgrade_feedback(warehouse.database.url)
    if migrations:
        say(f"migrated: {', '.join(migrations)}")
    api_key = ensure_secret(settings.api_key_file)[0].decode()
    person_key = ensure_secret(settings.person_key_file)[0].decode()
    with psycopg.connect(warehouse.database.url) as connection:
        ensure_key(connection, app=settings.deployment, key=api_key)
        ensure_key(connection, app=settings.deployment, key=person_key, scopes=SCOPES, holder=person())
    try:
        ensure_analyst(settings, warehouse.database)
    except psycopg.errors.InsufficientPrivilege as error:
        say(f"'moat sql' will not work, for the analyst's login cannot be made: {str(error).strip()}")
    settings.lake.mkdir(parents=True, exist_ok=True)
    write_dagster_yaml(settings, dagster)
    if manifest_is_stale(settings):
        say("parsing the dbt project")
        write_manifest(settings)
    return Prepared(warehouse, dagster, migrations, api_key, person_key, _project_digest(settings))


def dagster_settings(runs: Path) -> dict[str, Any]:
    """The content of ``dagster.yaml``.

    The URL of Dagster's database is taken from the environment: Dagster passes this content to its processes as
    arguments, which anybody on the machine can read.

    Args:
        runs: Folder for the logs of steps.
    """
    return {
        "storage": {"postgres": {"postgres_url": {"env": STORAGE_URL}}},
        "compute_logs": {
            "module": "dagster._core.storage.local_compute_log_manager",
            "class": "LocalComputeLogManager",
            "config": {"base_dir": str(runs)},
        },
        "local_artifact_storage": {
            "module": "dagster._core.storage.root",
            "class": "LocalArtifactStorage",
            "config": {"base_dir": str(runs)},
        },
        "telemetry": {"enabled": False},
        "nux": {"enabled": False},
        "run_monitoring": {
            "enabled": True,
            "start_timeout_seconds": 300,
            "max_runtime_seconds": 24 * 3600,
            # Without this a cancelled run keeps its pool slot for ever.
            "free_slots_after_run_end_seconds": 60,
        },
        "run_retries": {"enabled": True, "max_retries": 2, "retry_on_asset_or_op_failure": False},
        # A run waits no longer than this for the daemon to look at the queue.
        "run_queue": {"dequeue_interval_seconds": 1},
        "concurrency": {
            "runs": {"max_concurrent_runs": 4},
            "pools": {"default_limit": 4, "granularity": "op"},
        },
        "retention": {
            "schedule": {"purge_after_days": 90},
            "sensor": {"purge_after_days": {"skipped": 7, "failure": 30, "success": 90}},
        },
        "sensors": {"use_threads": True, "num_workers": 4},
        "schedules": {"use_threads": True, "num_workers": 2},
        "code_servers": {"local_startup_timeout": 180},
    }


def write_dagster_yaml(settings: Settings, database: Database) -> None:
    """Write ``dagster.yaml``, name its database and folder in our environment, and set the pool limits."""
    content = yaml.safe_dump(dagster_settings(settings.dagster_home / "storage"), sort_keys=True)
    path = settings.dagster_home / "dagster.yaml"
    if not path.exists() or path.read_text("utf-8") != content:
        write_atomic(path, content.encode())
    os.environ["DAGSTER_HOME"] = str(settings.dagster_home)
    # The driver is named, since SQLAlchemy 2.1 reads a bare postgresql:// as psycopg 3, which Dagster does not use.
    os.environ[STORAGE_URL] = database.sqlalchemy_url("psycopg2")
    from dagster import DagsterInstance

    # Named limits live in the instance's database; the file can only give a default.
    with DagsterInstance.from_config(str(settings.dagster_home)) as instance:
        current = {limit.name: limit.limit for limit in instance.event_log_storage.get_pool_limits()}
        for pool, limit in POOL_LIMITS.items():
            if current.get(pool) != limit:
                instance.event_log_storage.set_concurrency_slots(pool, limit)


def dbt_project(settings: Settings) -> DbtProject:
    """The dbt project as this deployment sees it; under ``dagster dev`` a missing manifest is made.

    Raises:
        FileNotFoundError: There is no manifest, with the command that makes it.
    """
    manifest = settings.dbt_target / "manifest.json"
    if not manifest.exists():
        if os.environ.get("DAGSTER_IS_DEV_CLI"):
            write_manifest(settings)
        else:
            raise FileNotFoundError(
                f"{manifest}: dbt's manifest has not been made yet. Run 'moat prepare' (or 'make run') once."
            )
    return DbtProject(project_dir=settings.dbt_project, target_path=settings.dbt_target)


def dbt_variables(settings: Settings) -> dict[str, Any]:
    """What the dbt models are told: the example, the redaction policy whose texts they may read, the start."""
    return {
        "example": settings.example,
        "redaction_policy": Redactor(pseudonym_key(settings)).policy,
        "start_date": settings.start_date,
    }


def manifest_is_stale(settings: Settings) -> bool:
    """Whether the dbt project, or what it is told, changed since the manifest was made."""
    stamp = settings.dbt_target / "manifest.stamp"
    return not stamp.exists() or stamp.read_text("utf-8") != _project_digest(settings)


def write_manifest(settings: Settings) -> None:
    """Run ``dbt parse``; needs no database.

    Raises:
        RuntimeError: dbt refused the project; the message is dbt's own.
    """
    import json

    digest = _project_digest(settings)
    result = subprocess.run(
        [
            str(Path(sys.executable).parent / "dbt"),
            "parse",
            "--quiet",
            "--project-dir",
            str(settings.dbt_project),
            "--profiles-dir",
            str(settings.dbt_project),
            "--target-path",
            str(settings.dbt_target),
            "--log-path",
            str(settings.dbt_target / "logs"),
            "--vars",
            json.dumps(dbt_variables(settings), sort_keys=True),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "DBT_SEND_ANONYMOUS_USAGE_STATS": "false", "DO_NOT_TRACK": "1"},
    )
    if result.returncode != 0:
        raise RuntimeError(f"dbt could not parse {settings.dbt_project}:\n{result.stdout}{result.stderr}")
    write_atomic(settings.dbt_target / "manifest.stamp", digest.encode())


def _project_digest(settings: Settings) -> str:
    digest = hashlib.sha256(repr(sorted(dbt_variables(settings).items())).encode())
    for path in sorted(settings.dbt_project.rglob("*")):
        if path.is_file() and path.suffix in (".sql", ".yml", ".md") and "target" not in path.parts:
            digest.update(str(path.relative_to(settings.dbt_project)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()

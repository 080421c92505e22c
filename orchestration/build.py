"""build_defs(): the one place where the code location is put together.

Belongs here: calling each stage's factory and giving assets their automation. Does not belong here: decisions
a stage could make for itself.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
from dagster_dbt import DbtCliResource, DbtProject

from assets.datasets.assets import dataset_assets
from assets.documents.assets import REDACTION, document_assets, redaction_asset
from assets.documents.chunk import DEFAULT_CHUNKING
from assets.embeddings.assets import candidate_assets, embedding_assets, embedding_checks
from assets.embeddings.release import Setting
from assets.evaluation.assets import evaluation_assets
from assets.quality.assets import source_checks
from assets.review.assets import review_queues_asset
from assets.sources.assets import source_assets
from assets.sources.contract import load_contracts
from assets.sources.feedback_log import feedback_log
from assets.warehouse.assets import warehouse_assets
from assets.warehouse.tables import shared_tables
from orchestration import jobs
from orchestration.automation import gated_eager
from orchestration.console import moat_logger
from orchestration.prepare import dbt_project, dbt_variables
from orchestration.releases import comparison
from orchestration.resources import resources
from orchestration.settings import Settings
from sensors.feedback_review import feedback_review_sensor
from sensors.new_feedback import every_day_is_folded, new_feedback_sensor

# Stages that follow their inputs by themselves. Sources wait for the clock or a person, embedding for a job
# (it may cost a GPU hour), daily models and training sets for the feedback sensors.
EAGER_LAYERS = frozenset({"documents", "staging", "intermediate", "marts", "evaluation", "review"})

# dbt's views show new rows of these without being made anew; folding them into the marts is the feedback sensor's.
SHOWN_BY_VIEWS = dg.AssetSelection.assets(REDACTION)


def build_defs(settings: Settings, overrides: Mapping[str, Any] | None = None) -> dg.Definitions:
    """The code location for ``settings``.

    Args:
        overrides: Resources to use in place of the real ones, by key; for tests.

    Opens no connection and starts no process; reads the contract files and dbt's manifest.
    """
    contracts, errors = load_contracts(settings.contract_folders, settings.contract_variables)
    days = dg.DailyPartitionsDefinition(
        start_date=datetime.fromisoformat(settings.start_date).replace(tzinfo=UTC), end_offset=1
    )
    project = dbt_project(settings)
    models = warehouse_assets(project, days, dbt_variables(settings))
    daily = dg.AssetSelection.assets(*(model for model in models if model.partitions_def is not None))
    corpus, marts, review = jobs.corpus_job(), jobs.marts_job(daily), jobs.review_job()
    feedback_day, embed = jobs.feedback_day_job(daily, REDACTION), jobs.embed_job()
    release = Setting(settings.embedding_model, settings.chunking)
    candidate = Setting(settings.embedding_candidate, settings.chunking_candidate)
    assets: list[Any] = [
        *source_assets(contracts, errors),
        *document_assets(contracts, settings.chunking or DEFAULT_CHUNKING),
        *embedding_assets(contracts, release, settings.embedding_options),
        *candidate_assets(contracts, candidate, comparison(contracts), release, settings.embedding_options),
        *shared_tables(contracts),
        *feedback_log(),
        redaction_asset(),
        review_queues_asset(),
        *models,
        *dataset_assets(contracts),
        *evaluation_assets(contracts),
    ]
    by_sensor = jobs.fold_of(daily).resolve(models)
    return dg.Definitions(
        assets=[_automated(asset, by_sensor) for asset in assets],
        asset_checks=[*source_checks(contracts), *embedding_checks(contracts), every_day_is_folded],
        jobs=[
            corpus,
            embed,
            feedback_day,
            marts,
            review,
            jobs.retention,
            jobs.index_upkeep,
            jobs.promote_release,
        ],
        schedules=jobs.schedules(corpus, marts),
        sensors=[
            new_feedback_sensor(feedback_day, days),
            feedback_review_sensor(
                review,
                lambda context: jobs.behind_open_gates(context, review),
                settings.feedback_min_events,
                timedelta(hours=settings.feedback_max_age_hours),
            ),
            dg.AutomationConditionSensorDefinition(
                "automation",
                target=dg.AssetSelection.all(),
                default_status=dg.DefaultSensorStatus.RUNNING,
                minimum_interval_seconds=30,
            ),
        ],
        resources={**resources(settings), "dbt": _dbt(project), **(overrides or {})},
        # On a small machine a process for each step takes longer to start than most steps.
        executor=dg.in_process_executor,
        loggers={"console": dg.colored_console_logger, "moat": moat_logger},
    )


def _automated(asset: Any, by_sensor: Container[dg.AssetKey]) -> Any:
    """Give assets of the eager layers their condition, but for those that the feedback sensor asks for."""
    if not isinstance(asset, dg.AssetsDefinition):
        return asset
    return asset.map_asset_specs(
        lambda spec: (
            spec.replace_attributes(
                automation_condition=gated_eager(quiet=SHOWN_BY_VIEWS if "dbt" in spec.kinds else None)
            )
            if spec.tags.get("layer") in EAGER_LAYERS and spec.key not in by_sensor
            else spec
        )
    )


def _dbt(project: DbtProject) -> DbtCliResource:
    import sys

    # dbt from this interpreter's own environment: PATH may name another, or none.
    return DbtCliResource(project_dir=project, dbt_executable=str(Path(sys.executable).parent / "dbt"))

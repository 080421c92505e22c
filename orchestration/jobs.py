"""Jobs and schedules: the selections people and the clock run.

Belongs here: selections, and jobs that are no assets: the upkeep of Dagster's own storage and of the index, promotion.
Does not belong here: asset bodies.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import psycopg

from assets.documents.chunkings import forget_unused_chunkings
from assets.embeddings.registry import ReleaseError, promote
from assets.embeddings.upkeep import keep_up
from orchestration.gates import open_assets
from storage.database import Database
from storage.warehouse import Warehouse

CORPUS_GROUPS = ("sources", "documents", "embeddings")
MODEL_GROUPS = ("staging", "intermediate", "marts")

EVENT_LOG_DAYS = 90

# What was materialized, observed or checked, and how runs ended: partition status, lineage and automation
# conditions are computed from these.
KEPT_EVENTS = (
    "ASSET_MATERIALIZATION",
    "ASSET_MATERIALIZATION_PLANNED",
    "ASSET_OBSERVATION",
    "ASSET_CHECK_EVALUATION",
    "ASSET_CHECK_EVALUATION_PLANNED",
    "PIPELINE_SUCCESS",
    "PIPELINE_FAILURE",
    "PIPELINE_CANCELED",
)


def corpus_job() -> Any:
    """From source files to the searchable index, and the models that read source tables."""
    return dg.define_asset_job(
        "corpus",
        selection=dg.AssetSelection.groups(*CORPUS_GROUPS),
        description="Land every source, gate it, parse, redact, chunk, embed and index what changed.",
        # Sources side by side.
        executor_def=dg.multiprocess_executor,
    )


def embed_job() -> Any:
    """From chunks to the searchable index, on demand."""
    return dg.define_asset_job(
        "embed",
        selection=dg.AssetSelection.groups("embeddings"),
        description="Export chunks, embed those that have no vector yet, and bring the index up to date.",
    )


def fold_of(daily: dg.AssetSelection) -> dg.AssetSelection:
    """The daily models and the models that read them, which are brought up to date in the same run."""
    return daily | (daily.downstream() & dg.AssetSelection.groups(*MODEL_GROUPS))


def feedback_day_job(daily: dg.AssetSelection, redaction: dg.AssetKey) -> Any:
    """One day of feedback: redact its texts and fold it into the marts."""
    return dg.define_asset_job(
        "feedback_day",
        selection=dg.AssetSelection.assets(redaction) | fold_of(daily),
        description="Fold one UTC day of interactions and feedback into the marts.",
    )


def marts_job(daily: dg.AssetSelection) -> Any:
    """The models that are not folded day by day, among them the inventory of sources."""
    return dg.define_asset_job(
        "marts",
        selection=dg.AssetSelection.groups(*MODEL_GROUPS) - daily,
        description="Rebuild the views and the marts that are not partitioned by day.",
    )


def review_job() -> Any:
    """What is made from feedback as a whole: the training sets."""
    return dg.define_asset_job(
        "feedback_review",
        selection=dg.AssetSelection.groups("datasets"),
        description="Publish dataset versions from the feedback so far.",
    )


@dg.op(
    pool="warehouse",
    description=f"Delete step-by-step log rows older than {EVENT_LOG_DAYS} days from Dagster's own storage.",
)
def purge_event_log(context: dg.OpExecutionContext, dagster_database: dg.ResourceParam[Database]) -> None:
    """Dagster keeps its event log for ever; this keeps the bulk of it for 90 days."""
    with dagster_database.connect(application_name="retention") as connection:
        removed = delete_old_events(connection, datetime.now(UTC) - timedelta(days=EVENT_LOG_DAYS))
    context.log.info(f"deleted {removed:,} event-log rows older than {EVENT_LOG_DAYS} days")


def delete_old_events(connection: psycopg.Connection[Any], before: datetime) -> int:
    """Delete event-log rows older than ``before`` that neither the catalogue nor automation reads; how many."""
    return connection.execute(
        "delete from event_logs where timestamp < %s and"
        " (dagster_event_type is null or dagster_event_type <> all(%s))",
        [before.replace(tzinfo=None), list(KEPT_EVENTS)],
    ).rowcount


@dg.job(description=f"Keep Dagster's own event log to {EVENT_LOG_DAYS} days.")
def retention() -> None:
    """See purge_event_log."""
    purge_event_log()


@dg.op(
    pool="warehouse",
    description="Delete chunks that no release needs, rebuild graphs that lost rows, then vacuum, under readers.",
)
def keep_up_releases(context: dg.OpExecutionContext, warehouse: dg.ResourceParam[Warehouse]) -> None:
    """See assets.embeddings.upkeep, and assets.documents.chunkings.forget_unused_chunkings."""
    with warehouse.connect("index upkeep", autocommit=True) as connection:
        unused = forget_unused_chunkings(connection)
        reports = keep_up(connection)
    for chunking in unused:
        context.log.info(f"chunks of {chunking} deleted: no release needs them")
    for report in reports:
        what = "graph rebuilt, table vacuumed" if report.rebuilt else "table vacuumed"
        context.log.info(f"release {report.release}: {report.dead:,} dead rows, {what}")
    if not reports:
        context.log.info("no release lost enough rows to be worth it")


@dg.job(description="Upkeep of the index: rebuild graphs that lost rows, then vacuum.")
def index_upkeep() -> None:
    """See keep_up_releases."""
    keep_up_releases()


class Promotion(dg.Config):
    """Which release to make live, and why; ``force`` promotes it although its checks object."""

    release: str
    why: str
    force: bool = False


@dg.op(description="Make a release the one that is searched; 'moat release rollback' goes back.")
def promote_to_live(
    context: dg.OpExecutionContext, config: Promotion, warehouse: dg.ResourceParam[Warehouse]
) -> None:
    """See assets.embeddings.registry.promote."""
    with warehouse.connect("promote release", autocommit=True) as connection:
        try:
            promote(connection, config.release, f"Dagster run {context.run_id}", config.why, config.force)
        except ReleaseError as error:
            raise dg.Failure(description=str(error), allow_retries=False) from error
    context.log.info(f"release {config.release} is live")


@dg.job(description="Make a release that passed its checks the one that is searched.")
def promote_release() -> None:
    """See promote_to_live."""
    promote_to_live()


def schedules(corpus: Any, marts: Any) -> list[dg.ScheduleDefinition]:
    """Nightly re-index and marts, weekly retention and upkeep of the index; times in UTC."""
    return [
        dg.ScheduleDefinition(
            name="nightly_reindex",
            job=corpus,
            cron_schedule="0 2 * * *",
            default_status=dg.DefaultScheduleStatus.RUNNING,
            description="Every night: land, gate, embed and index what changed.",
        ),
        _gated(
            "nightly_marts",
            marts,
            "0 3 * * *",
            "Every night, after the re-index: the inventory of sources and the other marts.",
        ),
        dg.ScheduleDefinition(
            name="weekly_retention",
            job=retention,
            cron_schedule="0 4 * * 0",
            default_status=dg.DefaultScheduleStatus.RUNNING,
            description="Every Sunday: clean Dagster's own storage.",
        ),
        dg.ScheduleDefinition(
            name="weekly_index_upkeep",
            job=index_upkeep,
            cron_schedule="0 5 * * 0",
            default_status=dg.DefaultScheduleStatus.RUNNING,
            description="Every Sunday: rebuild graphs that lost rows, then vacuum.",
        ),
    ]


def _gated(name: str, job: Any, cron: str, description: str) -> dg.ScheduleDefinition:
    """A schedule of ``job`` that leaves out what stands behind a closed gate."""

    @dg.schedule(
        name=name,
        job=job,
        cron_schedule=cron,
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description=description,
    )
    def gated(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        chosen = behind_open_gates(context, job)
        if not chosen:
            return dg.SkipReason("everything in it stands behind a gate that is closed")
        return dg.RunRequest(asset_selection=chosen)

    return gated


def behind_open_gates(
    context: dg.ScheduleEvaluationContext | dg.SensorEvaluationContext, job: Any
) -> list[dg.AssetKey]:
    """The assets of ``job`` that no closed gate outside of the job stops."""
    assert context.repository_def is not None
    graph = context.repository_def.asset_graph
    wanted = job.selection.resolve(graph) & graph.materializable_asset_keys
    return sorted(open_assets(context.instance, graph, wanted))

"""``feedback/review_queues``: the pipeline fills the service's review queues and reports what each rule chose."""

import asyncio

import dagster as dg

from assets.review.assets import review_queues_asset
from assets.sources.feedback_log import feedback_log
from feedback.review.rules import Rule, save_rule
from storage.database import Database
from storage.warehouse import Warehouse
from tests.integration.review_desk import open_desk


def fill(warehouse: Warehouse) -> dict[str, object]:
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize(
            [*feedback_log(), review_queues_asset()], resources={"warehouse": warehouse}, instance=instance
        )
    (event,) = result.get_asset_materialization_events()
    return {
        name: entry.value for name, entry in event.materialization.metadata.items() if "/table" not in name
    }


def test_it_reports_what_each_rule_chose(database: Database, warehouse: Warehouse) -> None:
    async def arrange() -> None:
        async with open_desk(database) as desk:
            await desk.interactions("down", "flagged", "both", "none")
            for name in ("down", "both"):
                await desk.feedback(name, "thumb", score=0)
            for name in ("flagged", "both"):
                await desk.feedback(name, "flag", label="unsafe")
            queue = await desk.queue()
            for kind in ("low_score", "flag"):
                await save_rule(desk.admin, queue.queue_id, Rule(kind, {}), actor="boss")

    assert fill(warehouse) == {"queues": 0, "queued": 0}
    asyncio.run(arrange())
    first = fill(warehouse)
    assert (first["queues"], first["queued"]) == (1, 3)
    assert (first["chosen/low_score"], first["chosen/flag"], first["chosen/control"]) == (2, 2, 0)
    assert fill(warehouse)["queued"] == 0

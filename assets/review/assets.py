"""``feedback/review_queues``: what the rules of the open queues choose from new feedback, for people to review.

Belongs here: wiring. Rules, samples and queues are the feedback service's own.
"""

from collections import Counter

import dagster as dg

from assets.documents.assets import REDACTION
from assets.sources.feedback_log import FEEDBACK_EVENT, INTERACTION
from storage.warehouse import Warehouse

REVIEW_QUEUES = dg.AssetKey(["feedback", "review_queues"])


def review_queues_asset() -> dg.AssetsDefinition:
    """The asset that fills the queues."""

    @dg.asset(
        key=REVIEW_QUEUES,
        # The log is written from outside and wakes nothing by itself; its texts are redacted with every fold.
        deps=[INTERACTION, FEEDBACK_EVENT, REDACTION],
        group_name="feedback",
        owners=["team:application"],
        kinds={"postgres"},
        tags={"layer": "review"},
        description="One row per interaction that a rule or the control sample chose for a review queue.",
        metadata={"dagster/table_name": "feedback.review_item"},
    )
    def review_queues(warehouse: dg.ResourceParam[Warehouse]) -> dg.MaterializeResult:
        from feedback.review.rules import fill_now

        filled = fill_now(warehouse.database.url)
        chosen, queued = Counter[str](), Counter[str]()
        for one in filled:
            chosen[one.kind] += one.chosen
            queued[one.kind] += one.queued
        return dg.MaterializeResult(
            metadata={
                "queues": len({one.queue_id for one in filled}),
                "queued": queued.total(),
                **{f"chosen/{kind}": number for kind, number in sorted(chosen.items())},
                **{f"queued/{kind}": number for kind, number in sorted(queued.items())},
            }
        )

    return review_queues

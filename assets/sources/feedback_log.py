"""The feedback service's log, as assets that Datamoat reads and never writes.

Belongs here: their specs. The tables, and the service that fills them, are in feedback.
"""

from __future__ import annotations

import dagster as dg

INTERACTION = dg.AssetKey(["feedback", "interaction"])
FEEDBACK_EVENT = dg.AssetKey(["feedback", "feedback_event"])


def feedback_log() -> list[dg.AssetSpec]:
    """The two tables of the log. They hold text as people wrote it: only redaction reads them directly."""
    return [
        dg.AssetSpec(
            INTERACTION,
            group_name="feedback",
            owners=["team:application"],
            kinds={"postgres"},
            tags={"layer": "feedback", "pii": "true"},
            description="One row per interaction: prompt, answer, what was retrieved, cost and versions. Append-only.",
            metadata={"dagster/table_name": "feedback.interaction"},
        ),
        dg.AssetSpec(
            FEEDBACK_EVENT,
            group_name="feedback",
            owners=["team:application"],
            kinds={"postgres"},
            tags={"layer": "feedback", "pii": "true"},
            description="One row per feedback event (create, revise, retract). Append-only; state is a fold of it.",
            metadata={"dagster/table_name": "feedback.feedback_event"},
        ),
    ]

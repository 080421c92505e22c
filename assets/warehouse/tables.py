"""Tables that the assets of many sources fill together, as nodes of the lineage for dbt to read from.

Belongs here: their specs. They are external assets: each is written by the assets it depends on, never by
itself, and a gate on one of those does not close the table for the others.
"""

from collections.abc import Sequence

import dagster as dg

from assets.documents.assets import has_text
from assets.sources.assets import raw_key
from assets.sources.contract import Contract


def shared_tables(contracts: Sequence[Contract]) -> list[dg.AssetSpec]:
    """The registry of files, the quarantine and the corpus."""
    raw = [raw_key(contract.name) for contract in contracts]
    texts = [contract.name for contract in contracts if has_text(contract)]
    documents = [dg.AssetKey(["documents", name]) for name in texts]
    chunks = [dg.AssetKey(["chunks", name]) for name in texts]
    return [
        _table("registry", "source_file", "quality", raw, "One row per source file as last landed."),
        _table("quarantine", "row", "quality", raw, "One row per refused source row, with rule and remedy."),
        _table("quarantine", "file", "quality", [*raw, *documents], "One row per refused file and rule."),
        _table("corpus", "document", "documents", documents, "One row per document: its redacted text."),
        _table("corpus", "chunk", "documents", chunks, "One row per chunk of any document."),
    ]


def _table(
    schema: str, name: str, group: str, filled_by: Sequence[dg.AssetKey], description: str
) -> dg.AssetSpec:
    return dg.AssetSpec(
        [schema, name],
        deps=filled_by,
        group_name=group,
        owners=["team:datamoat"],
        kinds={"postgres"},
        tags={"layer": schema},
        description=description,
        metadata={"dagster/table_name": f"{schema}.{name}"},
    )

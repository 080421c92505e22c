"""For each source with text: ``documents/<source>`` and ``chunks/<source>``; and the redaction of feedback.

Belongs here: wiring. Parsing, redacting and chunking are in parse.py, redact.py, chunk.py and corpus.py.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace

import dagster as dg

from assets.documents.chunk import DEFAULT_CHUNKING, Chunking
from assets.documents.chunkings import chunkings_beside, live_chunking
from assets.documents.corpus import feedback_texts, refresh_chunks, refresh_documents
from assets.documents.parse import Parser
from assets.documents.redact import Redactor, redact_texts
from assets.progress import log_progress
from assets.sources.assets import raw_key
from assets.sources.contract import Contract
from assets.sources.feedback_log import FEEDBACK_EVENT, INTERACTION
from storage.warehouse import Warehouse

REDACTION = dg.AssetKey(["feedback", "redaction"])


def has_text(contract: Contract) -> bool:
    """Whether the source becomes documents: it is a folder of files, or its contract maps rows to documents."""
    return contract.kind == "documents" or contract.corpus is not None


def document_assets(
    contracts: Sequence[Contract], chunking: Chunking = DEFAULT_CHUNKING
) -> list[dg.AssetsDefinition]:
    """The two assets of each source with text.

    Args:
        chunking: How documents are cut while no release is live; see ``live_chunking``.
    """
    return [
        asset
        for contract in contracts
        if has_text(contract)
        for asset in (_documents(contract), _chunks(contract, chunking))
    ]


def _documents(contract: Contract) -> dg.AssetsDefinition:
    @dg.asset(
        key=["documents", contract.name],
        deps=[raw_key(contract.name)],
        group_name="documents",
        owners=[f"team:{contract.owner}"],
        kinds={"postgres", "presidio"},
        tags={"layer": "documents"},
        description=(
            f"One row per document of {contract.name}, parsed and redacted. Unchanged files are not parsed again;"
            " files that cannot be parsed are in quarantine.file."
        ),
        metadata={"dagster/table_name": "corpus.document"},
        pool="warehouse",
    )
    def documents(
        context: dg.AssetExecutionContext, warehouse: dg.ResourceParam[Warehouse]
    ) -> dg.MaterializeResult:
        redactor = Redactor(warehouse.pseudonym_key)
        with Parser() as parser, warehouse.connect(f"documents {contract.name}") as connection:
            counts = refresh_documents(
                connection,
                contract.name,
                redactor,
                parser,
                mapping=contract.corpus,
                run_id=context.run_id,
                progress=log_progress(context.log),
            )
        return dg.MaterializeResult(metadata=asdict(counts))

    return documents


def _chunks(contract: Contract, chunking: Chunking) -> dg.AssetsDefinition:
    @dg.asset(
        key=["chunks", contract.name],
        deps=[["documents", contract.name]],
        group_name="documents",
        owners=[f"team:{contract.owner}"],
        kinds={"postgres"},
        tags={"layer": "documents"},
        description=(
            f"One row per chunk of {contract.name}: text[start_char:end_char] of its redacted document. Chunks of a"
            " candidate and of the release before, where there are any, follow their documents as well."
        ),
        metadata={"dagster/table_name": "corpus.chunk"},
        code_version=replace(chunking, language=contract.language).name,
        pool="warehouse",
    )
    def chunks(
        context: dg.AssetExecutionContext, warehouse: dg.ResourceParam[Warehouse]
    ) -> dg.MaterializeResult:
        with warehouse.connect(f"chunks {contract.name}") as connection:
            progress = log_progress(context.log)
            live = live_chunking(connection, chunking)
            counts = refresh_chunks(connection, contract.name, live, progress)
            # Or a rollback would bring back what documents said before.
            for other in chunkings_beside(connection, contract.name, live):
                refresh_chunks(connection, contract.name, other, progress)
        return dg.MaterializeResult(metadata={**asdict(counts), "chunking": str(live)})

    return chunks


def redaction_asset() -> dg.AssetsDefinition:
    """The asset that redacts the texts of the feedback log for dbt to join by hash."""

    @dg.asset(
        key=REDACTION,
        deps=[INTERACTION, FEEDBACK_EVENT],
        group_name="feedback",
        owners=["team:privacy"],
        kinds={"postgres", "presidio"},
        tags={"layer": "feedback"},
        description="One row per text of the feedback log and redaction policy: the text without personal data.",
        metadata={"dagster/table_name": "corpus.redaction"},
        pool="warehouse",
    )
    def redaction(
        context: dg.AssetExecutionContext, warehouse: dg.ResourceParam[Warehouse]
    ) -> dg.MaterializeResult:
        redactor = Redactor(warehouse.pseudonym_key)
        with warehouse.connect("redaction") as connection:
            new = redact_texts(connection, feedback_texts(connection, redactor.policy), redactor)
        context.log.info(f"{new:,} new texts redacted")
        return dg.MaterializeResult(metadata={"redacted": new, "policy": redactor.policy})

    return redaction

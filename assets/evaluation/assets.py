"""For each golden set: ``evaluation/<golden>``, how well the live index finds what people say is right.

Belongs here: wiring. Measures are in retrieval.py; questions are embedded by the embedder, as queries.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import dagster as dg

from assets.embeddings.assets import index_key
from assets.embeddings.index import NotLive, check_live
from assets.embeddings.release import current_release
from assets.evaluation.retrieval import Mode, evaluate, inputs_digest, read_golden, record, search_run
from assets.sources.assets import raw_key
from assets.sources.contract import Contract
from storage.warehouse import Warehouse


def evaluation_assets(contracts: Sequence[Contract], model: Path | None) -> list[dg.AssetsDefinition]:
    """One asset a contract that maps a golden set."""
    return [_evaluation(contract, model) for contract in contracts if contract.golden is not None]


def _evaluation(contract: Contract, model: Path | None) -> dg.AssetsDefinition:
    golden = contract.golden
    assert golden is not None

    @dg.asset(
        key=["evaluation", contract.name],
        deps=[raw_key(contract.name), index_key(golden.document_source)],
        group_name="evaluation",
        owners=[f"team:{contract.owner}"],
        kinds={"postgres"},
        tags={"layer": "evaluation"},
        description=f"nDCG@10, recall@10 and RR@10 of the live index on {contract.name}, for each search mode.",
    )
    def evaluation(
        context: dg.AssetExecutionContext, warehouse: dg.ResourceParam[Warehouse]
    ) -> dg.MaterializeResult:
        from embedder.encode import Embedder

        metadata: dict[str, Any] = {}
        embedder = Embedder.open(model)
        release = current_release(model)
        with warehouse.connect(f"evaluate {contract.name}") as connection:
            try:
                check_live(connection, release.name)
            except NotLive as error:
                raise dg.Failure(description=str(error), allow_retries=False) from error
            mapping = {
                "question": golden.question,
                "document": golden.document,
                "document_source": golden.document_source,
            }
            found = read_golden(connection, contract.name, mapping)
            vectors = embedder.encode(list(found.queries.values()))
            queries = [
                (qid, text, vector)
                for (qid, text), vector in zip(found.queries.items(), vectors, strict=True)
            ]
            for mode in get_args(Mode):
                run = search_run(connection, queries, mode)
                measures = [measure for measure in evaluate(found.qrels, run) if measure.value is not None]
                record(
                    connection, contract.name, release.name, mode, measures, inputs_digest(found.qrels, run)
                )
                for measure in measures:
                    metadata[f"{mode}/{measure.metric}"] = measure.value
            metadata |= {"questions": len(queries), "unscored": len(found.unscored)}
        for row in found.unscored:
            context.log.warning(f"not scored: {row.reason}: {row.question!r} -> {row.document_id}")
        return dg.MaterializeResult(metadata=metadata)

    return evaluation

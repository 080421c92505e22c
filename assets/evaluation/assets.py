"""For each golden set: ``evaluation/<golden>``, how well the live index finds what people say is right.

Belongs here: wiring. Measuring is in compare.py.
"""

from collections.abc import Sequence
from typing import Any

import dagster as dg

from assets.embeddings.assets import index_key
from assets.embeddings.registry import ReleaseError
from assets.evaluation.compare import evaluate_golden, record_evaluation
from assets.sources.assets import raw_key
from assets.sources.contract import Contract
from storage.warehouse import Warehouse

NO_WORSE = "no_worse_than_before"


def evaluation_assets(contracts: Sequence[Contract]) -> list[dg.AssetsDefinition]:
    """One asset a contract that maps a golden set."""
    return [_evaluation(contract, contracts) for contract in contracts if contract.golden is not None]


def _evaluation(contract: Contract, contracts: Sequence[Contract]) -> dg.AssetsDefinition:
    golden = contract.golden
    assert golden is not None
    key = dg.AssetKey(["evaluation", contract.name])
    tables = dict.fromkeys([contract.name, golden.question_source or contract.name])

    @dg.asset(
        key=key,
        deps=[*map(raw_key, tables), index_key(golden.document_source)],
        check_specs=[
            dg.AssetCheckSpec(
                NO_WORSE,
                asset=key,
                description="nDCG@10 is not surely lower than when last something else was found for the same"
                " questions (paired bootstrap).",
            )
        ],
        group_name="evaluation",
        owners=[f"team:{contract.owner}"],
        kinds={"postgres"},
        tags={"layer": "evaluation"},
        description=f"nDCG@10, recall@10, recall@100 and RR@10 of the live index on {contract.name}, for each search mode.",
    )
    def evaluation(
        context: dg.AssetExecutionContext, warehouse: dg.ResourceParam[Warehouse]
    ) -> dg.MaterializeResult:
        with warehouse.connect(f"evaluate {contract.name}") as connection:
            try:
                found = evaluate_golden(connection, contract, contracts)
            except ReleaseError as error:
                raise dg.Failure(description=str(error), allow_retries=False) from error
            before = [record_evaluation(connection, one) for one in found]
        metadata: dict[str, Any] = {
            f"{one.mode}/{measure.metric}": measure.value
            for one in found
            for measure in one.measures
            if measure.value is not None
        }
        unscored = found[0].unscored
        metadata |= {"questions": found[0].measures[0].n, "unscored": len(unscored)}
        for row in unscored:
            context.log.warning(f"not scored: {row.reason}: {row.question!r} -> {row.document_id}")
        gained = [one for one in before if one is not None and one.value is not None]
        return dg.MaterializeResult(
            metadata=metadata,
            check_results=[
                dg.AssetCheckResult(
                    check_name=NO_WORSE,
                    passed=not any(one.high is not None and one.high < 0 for one in gained),
                    severity=dg.AssetCheckSeverity.WARN,
                    metadata={
                        f"{one.mode}/{label}": value
                        for one in gained
                        for label, value in (("gained", one.value), ("low", one.low), ("high", one.high))
                    },
                )
            ],
        )

    return evaluation

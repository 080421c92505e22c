"""The training sets, one asset a kind, each an immutable version named by its content.

Belongs here: wiring. Building rows is in builders.py, storing versions in versions.py.
"""

from collections.abc import Sequence
from typing import get_args

import dagster as dg

from assets.datasets.builders import Kind, build
from assets.datasets.signals import read_signals
from assets.datasets.versions import publish, verify
from assets.evaluation.golden import golden_questions
from assets.sources.contract import Contract
from storage.warehouse import Warehouse

TRAINING_SIGNALS = dg.AssetKey(["marts", "training_signals"])

_DESCRIPTIONS: dict[Kind, str] = {
    "sft": "One row per prompt and its right answer: corrections first, then answers people liked.",
    "preference": "One row per pair of answers to one prompt: the better one and the worse one.",
    "kto": "One row per answer people agreed on: liked or not.",
}


def dataset_assets(
    contracts: Sequence[Contract],
) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    """The sets and the check of each; golden questions of any contract stay out of them."""
    golden = [contract for contract in contracts if contract.golden is not None]
    return [part for kind in get_args(Kind) for part in (_dataset(kind, golden), _is_sound(kind))]


def _key(kind: Kind) -> dg.AssetKey:
    return dg.AssetKey(["datasets", kind])


def _dataset(kind: Kind, golden: Sequence[Contract]) -> dg.AssetsDefinition:
    @dg.asset(
        key=_key(kind),
        deps=[TRAINING_SIGNALS],
        group_name="datasets",
        owners=["team:ml"],
        kinds={"parquet"},
        tags={"layer": "datasets"},
        description=_DESCRIPTIONS[kind],
    )
    def dataset(
        context: dg.AssetExecutionContext, warehouse: dg.ResourceParam[Warehouse]
    ) -> dg.MaterializeResult:
        with warehouse.connect(f"dataset {kind}") as connection:
            questions = [
                question for contract in golden for question in golden_questions(connection, contract)
            ]
            built = build(kind, read_signals(connection), golden=questions)
            version = publish(connection, warehouse.lake, kind, built, run_id=context.run_id)
        return dg.MaterializeResult(
            metadata={
                "dagster/row_count": version.rows,
                "dagster/uri": version.uri,
                "version": version.version,
                "created": version.created,
                "signals": built.signals,
                "used": built.used,
                **{f"dropped/{reason}": n for reason, n in sorted(built.dropped.items())},
            },
            data_version=dg.DataVersion(version.version[:16]),
        )

    return dataset


def _is_sound(kind: Kind) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=_key(kind),
        name="files_match_their_names",
        blocking=True,
        description="Every object of the latest version still has the content its name was made from.",
    )
    def files_match_their_names(warehouse: dg.ResourceParam[Warehouse]) -> dg.AssetCheckResult:
        with warehouse.connect(f"verify {kind}") as connection:
            row = connection.execute(
                "select version from registry.dataset_alias where dataset = %s and alias = 'latest'", [kind]
            ).fetchone()
        problems = verify(warehouse.lake, kind, row[0]) if row else []
        return dg.AssetCheckResult(
            passed=row is not None and not problems,
            metadata={"problems": [str(problem) for problem in problems]},
        )

    return files_match_their_names

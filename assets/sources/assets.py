"""One asset a contract, ``raw/<source>``, and the catalogue of them all.

Belongs here: wiring. Reading, validating and landing are in contract.py, read.py and land.py.
"""

from collections.abc import Sequence
from datetime import timedelta

import dagster as dg

from assets.documents.corpus import retire_sources
from assets.progress import log_progress
from assets.sources.contract import Contract, ContractError
from assets.sources.land import SourceRefused, land, write_catalogue
from storage.warehouse import Warehouse

CATALOGUE = dg.AssetKey(["registry", "source"])


def raw_key(source: str) -> dg.AssetKey:
    """The key of the asset that lands ``source``."""
    return dg.AssetKey(["raw", source])


def source_assets(
    contracts: Sequence[Contract], errors: Sequence[ContractError]
) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    """An asset for each contract, the catalogue, and the check that every contract file could be read."""
    return [
        _catalogue(contracts, errors),
        _contracts_are_valid(errors),
        *(_raw(contract) for contract in contracts),
    ]


def _catalogue(contracts: Sequence[Contract], errors: Sequence[ContractError]) -> dg.AssetsDefinition:
    @dg.asset(
        key=CATALOGUE,
        group_name="sources",
        owners=["team:datamoat"],
        kinds={"postgres"},
        tags={"layer": "registry"},
        description=(
            "One row per contract: owner, provenance, personal data, allowed uses, freshness. Documents of a source"
            " whose contract is gone leave the corpus."
        ),
    )
    def source_catalogue(warehouse: dg.ResourceParam[Warehouse]) -> dg.MaterializeResult:
        with warehouse.connect("catalogue") as connection:
            write_catalogue(connection, contracts)
            # A contract that cannot be read is a mistake, not a wish to forget the source.
            retired = 0 if errors else retire_sources(connection, [contract.name for contract in contracts])
        return dg.MaterializeResult(
            metadata={
                "dagster/row_count": len(contracts),
                "documents_retired": retired,
                "proprietary": sum(c.provenance == "proprietary" for c in contracts),
                "third_party": sum(c.provenance == "third_party" for c in contracts),
            }
        )

    return source_catalogue


def _contracts_are_valid(errors: Sequence[ContractError]) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=CATALOGUE,
        description="Every contract file could be read. A source whose contract is broken is left out.",
    )
    def contracts_are_valid() -> dg.AssetCheckResult:
        return dg.AssetCheckResult(
            passed=not errors,
            metadata={error.file: str(error) for error in errors},
        )

    return contracts_are_valid


def _raw(contract: Contract) -> dg.AssetsDefinition:
    @dg.asset(
        key=raw_key(contract.name),
        group_name="sources",
        owners=[f"team:{contract.owner}"],
        kinds={"postgres", "file"},
        tags={
            "layer": "raw",
            "provenance": contract.provenance,
            "pii": str(contract.pii).lower(),
            **{f"use/{use}": "" for use in contract.allowed_uses},
        },
        description=f"{contract.grain}\n\n{contract.description}",
        metadata={
            "dagster/table_name": f"raw.{contract.name}",
            "dagster/uri": dg.MetadataValue.path(contract.pattern),
            "contract": dg.MetadataValue.path(contract.file),
            **_column_schema(contract),
        },
        code_version=contract.version,
        pool="warehouse",
        retry_policy=dg.RetryPolicy(max_retries=2, delay=1, backoff=dg.Backoff.EXPONENTIAL),
    )
    def raw(
        context: dg.AssetExecutionContext, warehouse: dg.ResourceParam[Warehouse]
    ) -> dg.MaterializeResult:
        try:
            with warehouse.connect(f"land {contract.name}") as connection:
                report = land(connection, contract, run_id=context.run_id, progress=log_progress(context.log))
        except SourceRefused as error:
            # The data or the folder must change first: trying again cannot help.
            raise dg.Failure(description=str(error), allow_retries=False) from error
        for file in report.files:
            if file.refused is not None:
                context.log.warning(str(file.refused))
        return dg.MaterializeResult(
            metadata={
                "dagster/row_count": report.rows_landed,
                "rows_in": report.rows_in,
                "rows_refused": report.rows_refused,
                "files_refused": report.files_refused,
                "unchanged": report.unchanged,
                **{f"refused/{rule}": n for rule, n in sorted(report.refused_by_rule.items())},
            }
        )

    if contract.freshness_days is None:
        return raw
    window = dg.FreshnessPolicy.time_window(fail_window=timedelta(days=float(contract.freshness_days)))
    return raw.map_asset_specs(lambda spec: spec.replace_attributes(freshness_policy=window))


def _column_schema(contract: Contract) -> dict[str, dg.TableSchema]:
    if not contract.columns:
        return {}
    return {
        "dagster/column_schema": dg.TableSchema(
            columns=[
                dg.TableColumn(
                    column.name,
                    column.type,
                    description=column.description or None,
                    constraints=dg.TableColumnConstraints(nullable=not column.required, unique=column.unique),
                    tags={"pii": ""} if column.pii else {},
                )
                for column in contract.columns
            ]
        )
    }

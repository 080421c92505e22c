"""The checks of each source: one Dagster check a rule, blocking where the contract says error.

Belongs here: wiring. The adapter to Great Expectations is in expectations.py.
"""

from collections.abc import Iterator, Sequence

import dagster as dg

from assets.quality.expectations import Outcome, validate
from assets.sources.assets import raw_key
from assets.sources.contract import Contract, Expectation
from storage.warehouse import Warehouse

_SEVERITY = {"error": dg.AssetCheckSeverity.ERROR, "warning": dg.AssetCheckSeverity.WARN}


def source_checks(contracts: Sequence[Contract]) -> list[dg.AssetChecksDefinition]:
    """For each contract: the checks of its last load, and those of its own expectations if it has any."""
    checks = []
    for contract in contracts:
        checks.append(_load_checks(contract))
        if contract.expectations:
            checks.append(_expectation_checks(contract))
    return checks


def _load_checks(contract: Contract) -> dg.AssetChecksDefinition:
    key = raw_key(contract.name)

    @dg.multi_asset_check(
        name=f"{contract.name}_load",
        specs=[
            dg.AssetCheckSpec(
                "nothing_is_lost",
                asset=key,
                blocking=True,
                description="Rows read = rows landed + rows refused, and the table holds what was landed.",
            ),
            dg.AssetCheckSpec(
                "has_rows",
                asset=key,
                blocking=True,
                description="At least one row landed: an export that came out empty must not empty the index.",
            ),
            dg.AssetCheckSpec(
                "refused_share",
                asset=key,
                blocking=True,
                description=f"At most {contract.max_refused_share:.1%} of the rows were refused.",
            ),
        ],
    )
    def load_checks(warehouse: dg.ResourceParam[Warehouse]) -> Iterator[dg.AssetCheckResult]:
        with warehouse.connect(f"check {contract.name}") as connection:
            rows_in, landed, refused = connection.execute(
                "select coalesce(sum(rows_in), 0)::bigint, coalesce(sum(rows_landed), 0)::bigint,"
                " coalesce(sum(rows_refused), 0)::bigint from registry.source_file where source = %s",
                [contract.name],
            ).fetchall()[0]
            stored = connection.execute(
                _COUNT.format(contract.name)  # contract names match ^[a-z][a-z0-9_]*$
            ).fetchall()[0][0]
        yield dg.AssetCheckResult(
            check_name="nothing_is_lost",
            asset_key=key,
            passed=rows_in == landed + refused and stored == landed,
            metadata={
                "rows_in": rows_in,
                "rows_landed": landed,
                "rows_refused": refused,
                "rows_stored": stored,
            },
        )
        yield dg.AssetCheckResult(
            check_name="has_rows", asset_key=key, passed=landed > 0, metadata={"rows_landed": landed}
        )
        share = refused / rows_in if rows_in else 0.0
        yield dg.AssetCheckResult(
            check_name="refused_share",
            asset_key=key,
            passed=share <= contract.max_refused_share,
            metadata={"refused_share": share, "allowed": contract.max_refused_share, "rows_refused": refused},
        )

    return load_checks


_COUNT = "select count(*) from raw.{}"


def _expectation_checks(contract: Contract) -> dg.AssetChecksDefinition:
    key = raw_key(contract.name)

    @dg.multi_asset_check(
        name=f"{contract.name}_expectations",
        specs=[
            dg.AssetCheckSpec(
                expectation.name,
                asset=key,
                blocking=expectation.severity == "error",
                description=_describe(expectation),
            )
            for expectation in contract.expectations
        ],
        pool="warehouse",
    )
    def expectation_checks(warehouse: dg.ResourceParam[Warehouse]) -> Iterator[dg.AssetCheckResult]:
        outcomes = validate(warehouse.database, "raw", contract.name, contract.expectations)
        for expectation, outcome in zip(contract.expectations, outcomes, strict=True):
            if outcome.error is not None:
                raise dg.Failure(
                    description=(
                        f"{contract.file}: the expectation {expectation.name} could not be evaluated: "
                        f"{outcome.error}. Correct it in the contract."
                    ),
                    allow_retries=False,
                )
            yield _result(key, expectation, outcome)

    return expectation_checks


def _result(key: dg.AssetKey, expectation: Expectation, outcome: Outcome) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name=expectation.name,
        asset_key=key,
        passed=outcome.passed,
        severity=_SEVERITY[expectation.severity],
        metadata=outcome.observed,
    )


def _describe(expectation: Expectation) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in sorted(expectation.kwargs.items()))
    return f"{expectation.type}({arguments})"

"""Run Great Expectations over one Postgres table and say, expectation by expectation, what came out.

Belongs here: the adapter to Great Expectations. Does not belong here: Dagster, or which expectations apply.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from assets.sources.contract import Expectation
from storage.database import Database


@dataclass(frozen=True)
class Outcome:
    """What one expectation came to.

    Attributes:
        passed: Whether the data met it.
        error: Why it could not be evaluated (a column is missing, the arguments make no sense); such an
            outcome is neither pass nor fail.
        observed: Numbers for the catalogue: unexpected_count, unexpected_percent, element_count, observed_value.
    """

    name: str
    passed: bool
    error: str | None = None
    observed: dict[str, Any] = field(default_factory=dict)


def validate(
    database: Database, schema: str, table: str, expectations: Sequence[Expectation]
) -> list[Outcome]:
    """Validate ``schema.table``; one Outcome an expectation, in order.

    A first pass asks only pass or fail, which Great Expectations bundles into few queries; details are
    fetched for failures alone (5x cheaper at 40 expectations). Results carry counts, never values, because
    a raw table may hold personal data.
    """
    if not expectations:
        return []
    # Telemetry is on by default and asks the environment at import.
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations as gx
    from great_expectations.core import ExpectationSuite
    from great_expectations.core.validation_definition import ValidationDefinition
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    source = context.data_sources.add_postgres(
        "warehouse", connection_string=database.sqlalchemy_url("psycopg")
    )
    try:
        asset = source.add_table_asset("table", table_name=table, schema_name=schema)
        batch = asset.add_batch_definition_whole_table("all")

        def run(chosen: Sequence[int], result_format: dict[str, Any]) -> dict[int, Any]:
            suite = context.suites.add(
                ExpectationSuite(
                    name=f"{table}-{result_format['result_format']}",
                    expectations=[_build(gx, expectations[i], i) for i in chosen],
                )
            )
            definition = context.validation_definitions.add(
                ValidationDefinition(name=suite.name, data=batch, suite=suite)
            )
            results = definition.run(result_format=result_format).results
            return {_position(result): result for result in results}

        first = run(range(len(expectations)), {"result_format": "BOOLEAN_ONLY"})
        failed = [i for i, result in first.items() if not result.success]
        details = run(failed, {"result_format": "SUMMARY", "partial_unexpected_count": 0}) if failed else {}
        return [_outcome(expectation, first[i], details.get(i)) for i, expectation in enumerate(expectations)]
    finally:
        source.get_engine().dispose()


def _position(result: Any) -> int:
    return int(result.expectation_config.meta["position"])


def _build(gx: Any, expectation: Expectation, position: int) -> Any:
    name = "".join(part.capitalize() for part in expectation.type.split("_"))
    return getattr(gx.expectations, name)(**expectation.kwargs, meta={"position": position})


def _outcome(expectation: Expectation, first: Any, detail: Any) -> Outcome:
    if first.success:
        return Outcome(expectation.name, passed=True)
    raised = [
        info["exception_message"]
        for info in _exceptions(detail.exception_info)
        if info.get("raised_exception")
    ]
    if raised:
        return Outcome(expectation.name, passed=False, error=raised[0])
    wanted = ("element_count", "unexpected_count", "unexpected_percent", "missing_count", "observed_value")
    observed = {key: detail.result[key] for key in wanted if detail.result.get(key) is not None}
    return Outcome(expectation.name, passed=False, observed=observed)


def _exceptions(info: dict[str, Any]) -> list[dict[str, Any]]:
    """One exception record, or one a metric: Great Expectations returns either shape."""
    if "raised_exception" in info:
        return [info]
    return [value for value in info.values() if isinstance(value, dict)]

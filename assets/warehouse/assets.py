"""The dbt models as assets, and the commands that run them.

Belongs here: wiring. Which models run together is decided in families.py.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
from dagster_dbt import (
    DagsterDbtTranslator,
    DagsterDbtTranslatorSettings,
    DbtCliResource,
    DbtProject,
    dbt_assets,
)
from psycopg.conninfo import conninfo_to_dict

from assets.documents.assets import REDACTION
from assets.warehouse.families import DAILY, Family, families
from storage.database import Database
from storage.warehouse import Warehouse


class Translator(DagsterDbtTranslator):
    """Names dbt models ``<layer>/<model>`` and gives each the facts the rest of the catalogue has."""

    def __init__(self) -> None:
        super().__init__(
            DagsterDbtTranslatorSettings(enable_source_tests_as_checks=True, enable_code_references=False)
        )

    def get_asset_spec(
        self, manifest: Mapping[str, Any], unique_id: str, project: DbtProject | None
    ) -> dg.AssetSpec:
        """The spec of one model; its layer is the first folder below ``models/``."""
        spec = super().get_asset_spec(manifest, unique_id, project)
        node = manifest["nodes"].get(unique_id) or manifest["sources"].get(unique_id)
        if node is None or node["resource_type"] != "model":
            return spec
        layer = node["fqn"][1]
        return spec.replace_attributes(
            key=dg.AssetKey([layer, node["name"]]),
            # Daily models read redacted texts through views, which a run of a day leaves out: without this it may
            # fold the day before its texts are redacted.
            deps=[*spec.deps, REDACTION] if DAILY in node["tags"] else spec.deps,
            group_name=layer,
            owners=spec.owners or ["team:analytics"],
            kinds={"dbt", "postgres", node["config"]["materialized"]},
            tags={**spec.tags, "layer": layer},
        )


def dbt_environment(database: Database) -> dict[str, str]:
    """The variables that ``dbt_project/profiles.yml`` reads."""
    found = conninfo_to_dict(database.url)
    return {
        "DATAMOAT_PG_HOST": str(found.get("host", "localhost")),
        "DATAMOAT_PG_PORT": str(found.get("port", 5432)),
        "DATAMOAT_PG_USER": str(found.get("user", "")),
        "DATAMOAT_PG_PASSWORD": str(found.get("password", "")),
        "DATAMOAT_PG_DATABASE": database.name,
        "DATAMOAT_PG_SSLMODE": str(found.get("sslmode", "prefer")),
        "DBT_SEND_ANONYMOUS_USAGE_STATS": "false",
        "DO_NOT_TRACK": "1",
    }


def warehouse_assets(
    project: DbtProject, days: dg.PartitionsDefinition[str], variables: Mapping[str, Any]
) -> list[dg.AssetsDefinition]:
    """One set of assets a family of models; daily families are partitioned by ``days``."""
    manifest = json.loads(Path(project.manifest_path).read_text("utf-8"))
    return [
        _family_assets(family, project, manifest, days if family.daily else None, variables)
        for family in families(manifest)
    ]


def _family_assets(
    family: Family,
    project: DbtProject,
    manifest: Mapping[str, Any],
    days: dg.PartitionsDefinition[str] | None,
    variables: Mapping[str, Any],
) -> dg.AssetsDefinition:
    @dbt_assets(
        manifest=manifest,
        select=" ".join("fqn:" + ".".join(manifest["nodes"][model]["fqn"]) for model in family.models),
        project=project,
        name=f"dbt_{family.name}",
        partitions_def=days,
        # One dbt command for any range of days: dbt itself walks the daily batches.
        backfill_policy=dg.BackfillPolicy.single_run() if days else None,
        dagster_dbt_translator=Translator(),
        # Two dbt commands at once can collide when they swap tables.
        pool="dbt",
    )
    def models(
        context: dg.AssetExecutionContext,
        dbt: DbtCliResource,
        warehouse: dg.ResourceParam[Warehouse],
    ) -> Iterator[Any]:
        # dbt's command line reads its connection, and where to compile to, from the environment.
        os.environ.update(dbt_environment(warehouse.database))
        os.environ["DBT_TARGET_PATH"] = str(project.target_path)
        # Unit tests test code, not data: they run with the project's tests.
        arguments = [
            "build",
            "--exclude-resource-type",
            "unit_test",
            # A test that also reads a model of another family is not this family's to run.
            "--indirect-selection",
            "cautious",
            "--vars",
            json.dumps(dict(variables), sort_keys=True),
        ]
        if days is not None:
            window = context.partition_time_window
            arguments += [
                "--event-time-start",
                window.start.strftime("%Y-%m-%d"),
                "--event-time-end",
                window.end.strftime("%Y-%m-%d"),
            ]
        # One folder a family, where each run would leave some megabytes of its own; the pool keeps two runs apart.
        target = project.target_path / "runs" / family.name
        yield from dbt.cli(arguments, context=context, target_path=target).stream()

    return models

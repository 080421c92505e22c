"""The code location: light to load, complete, and described."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.datasets.assets import TRAINING_SIGNALS
from orchestration.build import build_defs
from orchestration.prepare import write_manifest
from orchestration.settings import ROOT, Settings

# Each costs seconds to import, or starts threads; the code location needs none of them to be loaded.
HEAVY = (
    "great_expectations",
    "torch",
    "transformers",
    "openvino",
    "ray",
    "dlt",
    "presidio_analyzer",
    "spacy",
    "xberg",
    "trafilatura",
    "pandas",
    "ir_measures",
    "scipy",
    "uvicorn",
    "fastapi",
    "alembic",
    "sqlalchemy.dialects.postgresql.psycopg",
    "numba",
    "IPython",
)


@pytest.fixture(scope="module")
def defs(settings: Settings) -> dg.Definitions:
    return build_defs(settings)


@pytest.fixture(scope="module")
def specs(defs: dg.Definitions) -> Iterator[list[dg.AssetSpec]]:
    yield list(defs.resolve_all_asset_specs())


def environment(settings: Settings) -> dict[str, str]:
    return {
        **os.environ,
        "EXAMPLE": "support",
        "DATAMOAT_HOME": str(settings.home),
        "PYTHONWARNINGS": "ignore",
    }


def test_it_loads_without_heavy_libraries_and_without_a_server(settings: Settings) -> None:
    program = (
        "import json, sys\n"
        "import orchestration.definitions\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(settings), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []
    assert not (settings.home / "postgres").exists()


def test_dg_check_defs_passes(settings: Settings) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "dg"), "check", "defs"],
        cwd=ROOT,
        env=environment(settings),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_workspace_file_loads_from_any_folder(settings: Settings, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "dagster"),
            *("definitions", "validate", "-w", str(ROOT / "workspace.yaml")),
        ],
        cwd=tmp_path,
        env=environment(settings),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_a_manifest_it_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="moat prepare"):
        build_defs(Settings.from_environment({"DATAMOAT_HOME": str(tmp_path)}))


def test_every_asset_is_described(specs: list[dg.AssetSpec]) -> None:
    for spec in specs:
        name = spec.key.to_user_string()
        assert spec.description, name
        assert spec.owners, name
        assert spec.group_name not in (None, "default"), name
        assert 0 < len(spec.kinds) <= 3, name
        assert "layer" in spec.tags, name


def test_every_contract_is_an_asset_with_checks(defs: dg.Definitions) -> None:
    graph = defs.resolve_asset_graph()
    for source in ("handbook", "tickets", "products", "golden", "packages"):
        key = dg.AssetKey(["raw", source])
        assert key in graph.materializable_asset_keys
        blocking = {check.name for check in graph.asset_check_keys if check.asset_key == key}
        assert {"nothing_is_lost", "refused_share"} <= blocking


def test_a_source_that_may_not_be_retrieved_has_no_index(tmp_path: Path, settings: Settings) -> None:
    contracts = tmp_path / "contracts"
    contracts.mkdir()
    text = (ROOT / "examples" / "support" / "contracts" / "handbook.odcs.yaml").read_text()
    (contracts / "manual.odcs.yaml").write_text(
        text.replace("name: handbook", "name: manual").replace("rag, ", "")
    )
    found = Settings.from_environment(
        {"EXAMPLE": "none", "DATAMOAT_CONTRACTS": str(contracts), "DATAMOAT_HOME": str(settings.home)}
    )
    write_manifest(found)
    keys = build_defs(found).resolve_asset_graph().materializable_asset_keys
    assert dg.AssetKey(["chunks", "manual"]) in keys
    assert not [key for key in keys if key.path[0] in ("vectors", "index")]


def test_no_asset_has_two_mechanisms(defs: dg.Definitions) -> None:
    """What automation conditions, the feedback sensors and the re-index job wake does not overlap."""
    graph = defs.resolve_asset_graph()
    eager = {key for key in graph.materializable_asset_keys if graph.get(key).automation_condition}
    daily, review = set(job_assets(defs, "feedback_day")), set(job_assets(defs, "feedback_review"))
    assert not eager & daily
    assert not [key for key in eager if key.path[0] in ("raw", "vectors", "index", "embedding_dataset")]
    # Training sets wait for a batch; the signals they are made of come with each day.
    assert review == {key for key in graph.materializable_asset_keys if key.path[0] == "datasets"}
    assert TRAINING_SIGNALS in daily
    assert not review & (eager | daily)


def test_a_day_is_folded_after_its_texts_are_redacted(defs: dg.Definitions) -> None:
    upstream = defs.resolve_job_def("feedback_day").dependency_structure.input_to_upstream_outputs_for_node
    assert "feedback__redaction" in {
        output.node_name for outputs in upstream("dbt_daily").values() for output in outputs
    }


def job_assets(defs: dg.Definitions, name: str) -> Any:
    return defs.resolve_job_def(name).asset_layer.executable_asset_keys


def test_sensors_and_schedules_run_by_default(defs: dg.Definitions) -> None:
    repository = defs.get_repository_def()
    assert {sensor.name: sensor.default_status.value for sensor in repository.sensor_defs} == {
        "new_feedback": "RUNNING",
        "feedback_review": "RUNNING",
        "automation": "RUNNING",
    }
    assert {schedule.name for schedule in repository.schedule_defs} == {
        "nightly_reindex",
        "nightly_marts",
        "weekly_retention",
        "weekly_index_upkeep",
    }

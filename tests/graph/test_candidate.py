"""A candidate release in the graph: partitioned by source, its gate the release as a whole, never by itself."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.documents.chunk import Chunking
from assets.embeddings.checks import CANDIDATE_CHECKS, INDEX_CHECKS
from assets.embeddings.launch import JobRequest
from orchestration.build import build_defs
from orchestration.settings import Settings

CANDIDATE = {dg.AssetKey(["candidate", name]) for name in ("chunks", "vectors", "index", "release")}


@pytest.fixture(scope="module")
def with_candidate(settings: Settings) -> Settings:
    return Settings.from_environment(
        {
            "DATAMOAT_HOME": str(settings.home),
            "EMBEDDING_CANDIDATE": "/models/other",
            "EMBEDDING_PRICE_PER_HOUR": "3.5",
            "EMBEDDING_MAX_COST": "20",
        }
    )


@pytest.fixture(scope="module")
def defs(with_candidate: Settings) -> dg.Definitions:
    return build_defs(with_candidate)


def test_it_is_partitioned_by_source_and_waits_for_a_person(defs: dg.Definitions) -> None:
    graph = defs.resolve_asset_graph()
    indexed = {key.path[1] for key in graph.materializable_asset_keys if key.path[0] == "index"}
    for name in ("chunks", "vectors", "index"):
        definition = graph.get(dg.AssetKey(["candidate", name])).partitions_def
        assert isinstance(definition, dg.StaticPartitionsDefinition)
        assert set(definition.get_partition_keys()) == indexed
    assert graph.get(dg.AssetKey(["candidate", "release"])).partitions_def is None
    assert graph.get(dg.AssetKey(["candidate", "chunks"])).parent_keys == {
        dg.AssetKey(["documents", source]) for source in indexed
    }
    assert graph.get(dg.AssetKey(["candidate", "vectors"])).parent_keys == {
        dg.AssetKey(["candidate", "chunks"])
    }
    assert not [key for key in CANDIDATE if graph.get(key).automation_condition]
    for job in ("corpus", "embed"):
        assert not CANDIDATE & set(defs.resolve_job_def(job).asset_layer.executable_asset_keys)
    checks = {check.name for check in graph.asset_check_keys if check.asset_key.path[-1] == "release"}
    assert checks == set(CANDIDATE_CHECKS)


def test_every_index_has_its_checks(defs: dg.Definitions) -> None:
    graph = defs.resolve_asset_graph()
    for key in graph.materializable_asset_keys:
        if key.path[0] == "index":
            assert {check.name for check in graph.asset_check_keys if check.asset_key == key} == set(
                INDEX_CHECKS
            )


def test_other_chunks_make_a_candidate_too(settings: Settings) -> None:
    cut = replace(settings, chunking_candidate=Chunking.parse("100-300/80"))
    assert build_defs(cut).resolve_asset_graph().materializable_asset_keys >= CANDIDATE


def test_without_a_candidate_there_is_none(settings: Settings) -> None:
    graph = build_defs(settings).resolve_asset_graph()
    assert not CANDIDATE & graph.materializable_asset_keys


def test_embedding_is_a_job_of_its_own(defs: dg.Definitions) -> None:
    keys = defs.resolve_job_def("embed").asset_layer.executable_asset_keys
    assert {key.path[0] for key in keys} == {"embedding_dataset", "vectors", "index"}


def test_one_source_of_the_candidate_is_embedded_with_its_model_and_budget(
    with_candidate: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from assets.embeddings import assets
    from assets.embeddings.release import Release, Setting

    asked: list[JobRequest] = []

    class Launcher:
        def run(self, context: dg.AssetExecutionContext, request: JobRequest) -> dg.MaterializeResult[None]:
            asked.append(request)
            return dg.MaterializeResult(
                check_results=[dg.AssetCheckResult(passed=True, check_name="vectors_are_sound")]
            )

    class Warehouse:
        lake = tmp_path

        def connect(self, _: str) -> Any:
            return nullcontext()

    def candidate_release(_: Any, candidate: Setting, setting: Setting) -> Release:
        assert setting == Setting()
        return Release("b", {}, 8, "other", candidate.model, Chunking(100, 300, 80))

    monkeypatch.setattr(assets, "candidate_release", candidate_release)
    monkeypatch.setattr(
        assets, "current_dataset", lambda source, lake, chunking: lake / source / str(chunking)
    )
    defs = build_defs(with_candidate, {"launcher": Launcher(), "warehouse": Warehouse()})
    with dg.instance_for_test() as instance:
        result = defs.resolve_implicit_global_asset_job_def().execute_in_process(
            asset_selection=[dg.AssetKey(["candidate", "vectors"])],
            partition_key="handbook",
            instance=instance,
        )
    assert result.success
    options = ("--price-per-hour", "3.5", "--max-cost", "20")
    folder = tmp_path / "embeddings" / "vectors" / "other"
    assert asked == [JobRequest(tmp_path / "handbook" / "100-300/80", folder, Path("/models/other"), options)]

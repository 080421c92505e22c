"""The job launched by Dagster Pipes: what Dagster is told."""

import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedder.model import open_model
from embedder.protocol import CHECK_VECTORS_ARE_SOUND, read_vectors

# What Dagster's own Pipes client calls inside Dagster.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:AssetExecutionContext\.run_id is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::dagster.PreviewWarning"),
]


def materialize(source: Path, output: Path, *more: str) -> dg.ExecuteInProcessResult:
    check = dg.AssetCheckSpec(CHECK_VECTORS_ARE_SOUND, asset="vectors")

    # Dagster reads the annotation and knows only the bare class.
    @dg.asset(check_specs=[check])
    def vectors(context: dg.AssetExecutionContext, pipes: dg.PipesSubprocessClient) -> dg.MaterializeResult:  # type: ignore[type-arg]
        command = [sys.executable, "-m", "embedder", "--input", str(source), "--output", str(output), *more]
        invocation = pipes.run(command=command, context=context)
        return invocation.get_materialize_result(implicit_materialization=False)

    with dg.DagsterInstance.ephemeral() as instance:
        resources = {"pipes": dg.PipesSubprocessClient()}
        return dg.materialize([vectors], instance=instance, resources=resources, raise_on_error=False)


def test_dagster_gets_the_figures_and_the_check(tmp_path: Path) -> None:
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"content_hash": ["a", "b", "c"], "text": ["one text", "another", " "]}), source)
    result = materialize(source, tmp_path / "out", "--price-per-hour", "2", "--rate", "1000")
    assert result.success
    (materialization,) = result.asset_materializations_for_node("vectors")
    metadata: dict[str, Any] = {name: value.value for name, value in materialization.metadata.items()}
    assert (metadata["distinct"], metadata["embedded"], metadata["failed"]) == (3, 2, 1)
    assert (metadata["parked"], metadata["truncated"], metadata["status"]) == (0, 0, "done")
    assert metadata["estimated_tokens"] == metadata["tokens"] > 0
    assert metadata["estimated_cost"] == pytest.approx(2 * metadata["tokens"] / 1000 / 3600, abs=1e-6)
    assert metadata["cost"] == pytest.approx(2 * metadata["seconds"] / 3600, rel=0.1)
    assert 0 <= metadata["padding_share"] < 1
    assert (metadata["engine"], metadata["device"]) == ("openvino", "cpu")
    assert metadata["release"] == open_model().release()
    assert metadata["fingerprint"] == open_model().fingerprint()
    (evaluation,) = result.get_asset_check_evaluations()
    assert (evaluation.check_name, evaluation.passed) == (CHECK_VECTORS_ARE_SOUND, True)
    assert evaluation.metadata["with_vector"].value == 2


def test_an_unusable_input_fails_the_asset_with_its_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = materialize(tmp_path / "absent.parquet", tmp_path / "out")
    assert not result.success
    assert not result.asset_materializations_for_node("vectors")
    assert "absent.parquet does not exist; name an existing Parquet file" in capfd.readouterr().err


def test_a_run_stopped_by_its_budget_fails_the_asset_and_keeps_its_shards(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.parquet"
    texts = [f"text number {i}" for i in range(20)]
    pq.write_table(pa.table({"content_hash": [f"h{i}" for i in range(20)], "text": texts}), source)
    result = materialize(source, tmp_path / "out", "--max-tokens", "60", "--shard-size", "5")
    assert not result.success
    assert not result.asset_materializations_for_node("vectors")
    said = capfd.readouterr().err
    assert "stopped by the budget" in said
    assert "raise --max-tokens to continue" in said
    assert len(read_vectors(tmp_path / "out")[0]) == 10

"""The job launched by Dagster Pipes: what Dagster is told."""

import sys
from pathlib import Path

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedder.model import open_model
from embedder.protocol import CHECK_VECTORS_ARE_SOUND

# What Dagster's own Pipes client calls inside Dagster.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:AssetExecutionContext\.run_id is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::dagster.PreviewWarning"),
]


def materialize(source: Path, output: Path) -> dg.ExecuteInProcessResult:
    check = dg.AssetCheckSpec(CHECK_VECTORS_ARE_SOUND, asset="vectors")

    # Dagster reads the annotation and knows only the bare class.
    @dg.asset(check_specs=[check])
    def vectors(context: dg.AssetExecutionContext, pipes: dg.PipesSubprocessClient) -> dg.MaterializeResult:  # type: ignore[type-arg]
        command = [sys.executable, "-m", "embedder", "--input", str(source), "--output", str(output)]
        invocation = pipes.run(command=command, context=context)
        return invocation.get_materialize_result(implicit_materialization=False)

    with dg.DagsterInstance.ephemeral() as instance:
        resources = {"pipes": dg.PipesSubprocessClient()}
        return dg.materialize([vectors], instance=instance, resources=resources, raise_on_error=False)


def test_dagster_gets_the_figures_and_the_check(tmp_path: Path) -> None:
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"content_hash": ["a", "b", "c"], "text": ["one text", "another", " "]}), source)
    result = materialize(source, tmp_path / "out")
    assert result.success
    (materialization,) = result.asset_materializations_for_node("vectors")
    metadata = {name: value.value for name, value in materialization.metadata.items()}
    assert (metadata["distinct"], metadata["embedded"], metadata["failed"]) == (3, 2, 1)
    assert metadata["engine"] == "openvino"
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

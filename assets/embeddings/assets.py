"""For each document source: ``embedding_dataset/<source>``, ``vectors/<source>``, ``index/<source>``.

Belongs here: wiring. Exporting is in dataset.py, loading in index.py, embedding in the embedder.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import dagster as dg

from assets.documents.assets import has_text
from assets.embeddings.dataset import current_dataset, export_chunks
from assets.embeddings.index import load_vectors
from assets.embeddings.release import Release, current_release
from assets.sources.contract import Contract
from embedder.protocol import CHECK_VECTORS_ARE_SOUND
from storage.warehouse import Warehouse


def index_key(source: str) -> dg.AssetKey:
    """The key of the asset that makes ``source`` searchable."""
    return dg.AssetKey(["index", source])


def embedding_assets(contracts: Sequence[Contract], model: Path | None) -> list[dg.AssetsDefinition]:
    """The three assets of each source with text whose contract allows retrieval (``allowedUses: [rag]``).

    Args:
        model: A local model folder; None takes the installed one.
    """
    return [
        asset
        for contract in contracts
        if has_text(contract) and "rag" in contract.allowed_uses
        for asset in (_dataset(contract), _vectors(contract, model), _index(contract, model))
    ]


def _dataset(contract: Contract) -> dg.AssetsDefinition:
    source = contract.name

    @dg.asset(
        key=["embedding_dataset", source],
        deps=[["chunks", source]],
        group_name="embeddings",
        owners=[f"team:{contract.owner}"],
        kinds={"parquet"},
        tags={"layer": "embeddings"},
        description=f"One row per chunk of {source}: chunk_id, content_hash, redacted text.",
    )
    def embedding_dataset(warehouse: dg.ResourceParam[Warehouse]) -> dg.MaterializeResult:
        with warehouse.connect(f"export {source}") as connection:
            dataset = export_chunks(connection, source, warehouse.lake)
        return dg.MaterializeResult(
            metadata={
                "dagster/row_count": dataset.rows,
                "dagster/uri": dg.MetadataValue.path(dataset.path),
            },
            data_version=dg.DataVersion(dataset.path.stem[:16]),
        )

    return embedding_dataset


def _vectors(contract: Contract, model: Path | None) -> dg.AssetsDefinition:
    source = contract.name
    key = dg.AssetKey(["vectors", source])

    @dg.asset(
        key=key,
        deps=[["embedding_dataset", source]],
        check_specs=[
            dg.AssetCheckSpec(
                CHECK_VECTORS_ARE_SOUND,
                asset=key,
                blocking=True,
                description="Every text has one finite vector of unit length and the right dimension, or a failure row.",
            )
        ],
        group_name="embeddings",
        owners=["team:ml"],
        kinds={"parquet", "openvino"},
        tags={"layer": "embeddings"},
        description=f"One row per distinct text of {source}: content_hash and its vector, in Parquet shards.",
        pool="gpu",
    )
    def vectors(
        context: dg.AssetExecutionContext,
        pipes: dg.PipesSubprocessClient,
        warehouse: dg.ResourceParam[Warehouse],
    ) -> dg.MaterializeResult:
        release = current_release(model)
        command = [
            sys.executable,
            "-m",
            "embedder",
            "--input",
            str(current_dataset(source, warehouse.lake)),
            "--output",
            str(release.folder(warehouse.lake)),
        ]
        if model is not None:
            command += ["--model", str(model)]
        # A job that reports nothing has not succeeded, so nothing is implied.
        return pipes.run(context=context, command=command).get_materialize_result(
            implicit_materialization=False
        )

    return vectors


def _index(contract: Contract, model: Path | None) -> dg.AssetsDefinition:
    source = contract.name

    @dg.asset(
        key=index_key(source),
        deps=[["vectors", source], ["chunks", source]],
        group_name="embeddings",
        owners=["team:ml"],
        kinds={"postgres", "pgvector"},
        tags={"layer": "retrieval"},
        description=f"The vectors of {source} in the release's table, behind retrieval.search().",
        pool="warehouse",
    )
    def index(warehouse: dg.ResourceParam[Warehouse]) -> dg.MaterializeResult:
        release: Release = current_release(model)
        with warehouse.connect(f"index {source}") as connection:
            report = load_vectors(
                connection,
                source,
                release.name,
                release.fingerprint,
                release.dimensions,
                release.folder(warehouse.lake),
            )
        return dg.MaterializeResult(metadata={**asdict(report), "dagster/row_count": report.vectors})

    return index

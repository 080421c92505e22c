"""For each document source: ``embedding_dataset/<source>``, ``vectors/<source>``, ``index/<source>``; and, while a
candidate is set, ``candidate/chunks``, ``candidate/vectors`` and ``candidate/index``, partitioned by source, and
``candidate/release``.

Belongs here: wiring. Exporting is in dataset.py, launching in launch.py, loading in index.py, checks in checks.py,
which release is fed and which is live in registry.py, embedding in the embedder.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import dagster as dg

from assets.documents.assets import has_text
from assets.documents.chunk import DEFAULT_CHUNKING
from assets.documents.chunkings import chunkings_beside, live_chunking
from assets.documents.corpus import refresh_chunks
from assets.embeddings.checks import (
    CANDIDATE_CHECKS,
    INDEX_CHECKS,
    Compare,
    check_candidate,
    embed_questions,
    index_checks,
    recent_questions,
)
from assets.embeddings.dataset import current_dataset, export_chunks
from assets.embeddings.index import graph_of, load_vectors, refresh_passages
from assets.embeddings.launch import JobRequest, Launcher
from assets.embeddings.postings import refresh_postings
from assets.embeddings.registry import (
    Chain,
    ReleaseError,
    candidate_release,
    chain_release,
    find_live,
    register,
    release_table,
)
from assets.embeddings.release import Release, Setting
from assets.progress import log_progress
from assets.sources.contract import Contract
from embedder.protocol import CHECK_VECTORS_ARE_SOUND
from storage.warehouse import Warehouse

CANDIDATE_GROUP = "candidate"

ReleaseOf = Callable[[dg.AssetExecutionContext, Warehouse], Release]
"""Which release an asset makes, when it runs."""


def index_key(source: str) -> dg.AssetKey:
    """The key of the asset that makes ``source`` searchable."""
    return dg.AssetKey(["index", source])


def indexed_sources(contracts: Sequence[Contract]) -> list[Contract]:
    """The sources with text whose contract allows retrieval (``allowedUses: [rag]``)."""
    return [contract for contract in contracts if has_text(contract) and "rag" in contract.allowed_uses]


def embedding_assets(
    contracts: Sequence[Contract], setting: Setting, options: tuple[str, ...] = ()
) -> list[dg.AssetsDefinition]:
    """The three assets of each source that is indexed.

    Args:
        setting: See ``chain_release`` for when it is followed.
        options: Further arguments of the embedding job.
    """
    return [
        asset
        for contract in indexed_sources(contracts)
        for asset in (
            _dataset(contract, setting),
            _vectors(
                ["vectors", contract.name],
                f"One row per distinct text of {contract.name}: content_hash and its vector, in Parquet shards.",
                [dg.AssetKey(["embedding_dataset", contract.name])],
                contract.name,
                lambda context, warehouse: _chain(context, warehouse, setting).release,
                options,
            ),
            _index(contract, setting),
        )
    ]


def embedding_checks(contracts: Sequence[Contract]) -> list[dg.AssetChecksDefinition]:
    """The checks of each source's index."""
    return [_index_checks(contract) for contract in indexed_sources(contracts)]


def candidate_assets(
    contracts: Sequence[Contract],
    candidate: Setting,
    compare: Compare,
    setting: Setting = Setting(),
    options: tuple[str, ...] = (),
) -> list[dg.AssetsDefinition]:
    """The assets that build and check a release beside the live one; none without a candidate.

    They are partitioned by source, so that a backfill can be started, watched and repeated by source; what opens the
    way is the release as a whole, not a partition.

    Args:
        candidate: What makes it another release than the live one.
        compare: Measures two releases on the golden sets.
        setting: What decides as long as nothing is live.
    """
    indexed = indexed_sources(contracts)
    if not candidate or not indexed:
        return []
    sources = dg.StaticPartitionsDefinition([contract.name for contract in indexed])

    def release_of(_context: dg.AssetExecutionContext, warehouse: Warehouse) -> Release:
        with warehouse.connect("candidate") as connection:
            return candidate_release(connection, candidate, setting)

    return [
        _candidate_chunks(release_of, sources),
        _vectors(
            ["candidate", "vectors"],
            "The vectors that the candidate's model makes of its chunks, source by source, in Parquet shards.",
            [dg.AssetKey(["candidate", "chunks"])],
            None,
            release_of,
            options,
            group=CANDIDATE_GROUP,
            partitions=sources,
        ),
        _candidate_index(release_of, sources),
        _candidate_release(contracts, release_of, compare),
    ]


def _dataset(contract: Contract, setting: Setting) -> dg.AssetsDefinition:
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
            chunking = live_chunking(connection, setting.chunking or DEFAULT_CHUNKING)
            dataset = export_chunks(connection, source, warehouse.lake, chunking)
        return dg.MaterializeResult(
            metadata={
                "dagster/row_count": dataset.rows,
                "dagster/uri": dg.MetadataValue.path(dataset.path),
            },
            data_version=dg.DataVersion(dataset.path.stem[:16]),
        )

    return embedding_dataset


def _vectors(
    key: Sequence[str],
    description: str,
    datasets: Sequence[dg.AssetKey],
    source: str | None,
    release_of: ReleaseOf,
    options: tuple[str, ...],
    group: str = "embeddings",
    partitions: dg.PartitionsDefinition[str] | None = None,
) -> dg.AssetsDefinition:
    """An asset that runs the embedding job on ``source``, or on that of its partition."""

    @dg.asset(
        key=key,
        deps=datasets,
        partitions_def=partitions,
        check_specs=[
            dg.AssetCheckSpec(
                CHECK_VECTORS_ARE_SOUND,
                asset=dg.AssetKey(key),
                blocking=True,
                description="Every text has one finite vector of unit length and the right dimension, or a failure row.",
            )
        ],
        group_name=group,
        owners=["team:ml"],
        kinds={"parquet"},
        tags={"layer": "embeddings"},
        description=description,
        pool="gpu",
    )
    def vectors(
        context: dg.AssetExecutionContext,
        launcher: dg.ResourceParam[Launcher],
        warehouse: dg.ResourceParam[Warehouse],
    ) -> dg.MaterializeResult:
        release = release_of(context, warehouse)
        dataset = current_dataset(source or context.partition_key, warehouse.lake, release.chunking)
        return launcher.run(
            context, JobRequest(dataset, release.folder(warehouse.lake), release.model, options)
        )

    return vectors


def _chain(context: dg.AssetExecutionContext, warehouse: Warehouse, setting: Setting) -> Chain:
    with warehouse.connect("release") as connection:
        chain = chain_release(connection, setting)
    for note in chain.notes:
        context.log.warning(note)
    return chain


def _index(contract: Contract, setting: Setting) -> dg.AssetsDefinition:
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
    def index(
        context: dg.AssetExecutionContext, warehouse: dg.ResourceParam[Warehouse]
    ) -> dg.MaterializeResult:
        chain = _chain(context, warehouse, setting)
        folder = chain.release.folder(warehouse.lake)
        with warehouse.connect(f"index {source}", autocommit=True) as connection:
            passages = refresh_passages(connection)
            # Words before vectors: they find a text even where embedding it failed.
            postings = refresh_postings(connection, chunking=str(chain.release.chunking))
            # Those that one can go back to, too: what they say must be what documents say today.
            for other in chunkings_beside(connection, source, chain.release.chunking):
                refresh_postings(connection, chunking=str(other))
            report = load_vectors(connection, source, chain.release, folder, after=chain.live)
        return dg.MaterializeResult(
            metadata={**_figures(report), "texts_removed": passages.removed, "terms": postings.terms}
        )

    return index


def _index_checks(contract: Contract) -> dg.AssetChecksDefinition:
    key = index_key(contract.name)

    @dg.multi_asset_check(
        name=f"{contract.name}_index",
        specs=[
            dg.AssetCheckSpec(name, asset=key, description=description)
            for name, description in INDEX_CHECKS.items()
        ],
    )
    def checks(warehouse: dg.ResourceParam[Warehouse]) -> Iterator[dg.AssetCheckResult]:
        with warehouse.connect(f"check index of {contract.name}") as connection:
            outcomes = index_checks(connection, contract.name)
        for name, outcome in outcomes.items():
            yield dg.AssetCheckResult(
                check_name=name,
                asset_key=key,
                passed=outcome.passed,
                severity=dg.AssetCheckSeverity.ERROR if name == "orphans" else dg.AssetCheckSeverity.WARN,
                metadata=dict(outcome.figures),
            )

    return checks


def _candidate_chunks(release_of: ReleaseOf, sources: dg.PartitionsDefinition[str]) -> dg.AssetsDefinition:
    @dg.asset(
        key=["candidate", "chunks"],
        deps=[["documents", source] for source in sources.get_partition_keys()],
        partitions_def=sources,
        group_name=CANDIDATE_GROUP,
        owners=["team:ml"],
        kinds={"postgres", "parquet"},
        tags={"layer": "embeddings"},
        description="The chunks that the candidate embeds, beside those that are searched, source by source; and the"
        " embedding job's input. Nothing is cut where the candidate is another model only.",
        pool="warehouse",
    )
    def candidate_chunks(
        context: dg.AssetExecutionContext, warehouse: dg.ResourceParam[Warehouse]
    ) -> dg.MaterializeResult:
        release = release_of(context, warehouse)
        source = context.partition_key
        with warehouse.connect(f"candidate chunks of {source}") as connection:
            # From now on its chunks are kept, and go with it.
            with connection.transaction():
                register(connection, release)
            progress = log_progress(context.log)
            counts = refresh_chunks(connection, source, release.chunking, progress)
            dataset = export_chunks(connection, source, warehouse.lake, release.chunking)
        return dg.MaterializeResult(
            metadata={
                **asdict(counts),
                "chunking": str(release.chunking),
                "dagster/row_count": dataset.rows,
                "dagster/uri": dg.MetadataValue.path(dataset.path),
            },
            data_version=dg.DataVersion(dataset.path.stem[:16]),
        )

    return candidate_chunks


def _candidate_index(release_of: ReleaseOf, sources: dg.PartitionsDefinition[str]) -> dg.AssetsDefinition:
    @dg.asset(
        key=["candidate", "index"],
        deps=[["candidate", "vectors"], ["candidate", "chunks"]],
        partitions_def=sources,
        group_name=CANDIDATE_GROUP,
        owners=["team:ml"],
        kinds={"postgres", "pgvector"},
        tags={"layer": "retrieval"},
        description="The candidate's vectors in a table of their own, beside the live release, source by source; and"
        " the words of its chunks.",
        pool="warehouse",
    )
    def candidate_index(
        context: dg.AssetExecutionContext, warehouse: dg.ResourceParam[Warehouse]
    ) -> dg.MaterializeResult:
        release = release_of(context, warehouse)
        with warehouse.connect(f"candidate {context.partition_key}", autocommit=True) as connection:
            refresh_passages(connection)
            refresh_postings(connection, chunking=str(release.chunking))
            report = load_vectors(
                connection, context.partition_key, release, release.folder(warehouse.lake), follow=False
            )
        return dg.MaterializeResult(metadata=_figures(report))

    return candidate_index


def _candidate_release(
    contracts: Sequence[Contract], release_of: ReleaseOf, compare: Compare
) -> dg.AssetsDefinition:
    key = dg.AssetKey(["candidate", "release"])

    @dg.asset(
        key=key,
        deps=[["candidate", "index"]],
        check_specs=[
            dg.AssetCheckSpec(name, asset=key, description=description)
            for name, description in CANDIDATE_CHECKS.items()
        ],
        group_name=CANDIDATE_GROUP,
        owners=["team:ml"],
        kinds={"postgres", "pgvector"},
        tags={"layer": "retrieval"},
        description="The candidate as a whole, checked against the live release. If all is well,"
        " the job promote_release (or 'moat release promote') makes it live.",
        pool="warehouse",
    )
    def candidate_release(
        context: dg.AssetExecutionContext, warehouse: dg.ResourceParam[Warehouse]
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        release = release_of(context, warehouse)
        # In no transaction: checks take minutes, in which loads of the live release must not wait for them.
        with warehouse.connect("candidate release", autocommit=True) as connection:
            try:
                outcomes = check_candidate(
                    connection,
                    release.name,
                    compare,
                    recent_questions(connection, contracts),
                    embed_questions,
                )
            except ReleaseError as error:
                raise dg.Failure(
                    f"{error}. Materialize candidate/chunks, vectors and index for every source first.",
                    allow_retries=False,
                ) from error
            live = find_live(connection)
            graph = graph_of(connection, release_table(release.name)) is not None
        yield dg.MaterializeResult(
            metadata={"release": release.name, "live": live.name if live else "none", "graph": graph}
        )
        for name, outcome in outcomes.items():
            yield dg.AssetCheckResult(
                check_name=name,
                asset_key=key,
                passed=outcome.passed,
                severity=dg.AssetCheckSeverity.ERROR if outcome.needed else dg.AssetCheckSeverity.WARN,
                metadata=dict(outcome.figures),
            )

    return candidate_release


def _figures(report: Any) -> dict[str, Any]:
    return {**asdict(report), "dagster/row_count": report.vectors}

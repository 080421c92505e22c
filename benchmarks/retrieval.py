"""How well retrieval finds what people say is right, on three public sets: ``python -m benchmarks.retrieval``.

Builds each example in a deployment of its own with ``moat run``, which measures vectors, words (BM25) and both, and sets
beside its figures what sentence-transformers finds in float32 with an exact search over the same texts: the index, its
halfvecs and its engine must cost nothing (0.002 nDCG@10 at most). Prints a table; the last line is one JSON object.

The sets are not part of this repository: DATAMOAT_DATA_DIR names the folder that holds them. Belongs here: building,
the reference, printing. Does not belong here: measures (assets.evaluation).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psycopg
from numpy.typing import NDArray

from assets.documents.chunk import embedded_text
from assets.documents.chunkings import in_language
from assets.embeddings.registry import live_release
from assets.evaluation.compare import golden_contracts
from assets.evaluation.golden import Golden, Place, ranking, read_golden
from assets.evaluation.retrieval import METRICS, evaluate
from assets.evaluation.runs import DEPTH
from assets.sources.contract import load_contracts
from orchestration.deployment import open_warehouse
from orchestration.settings import Settings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

EXAMPLES = ("xquad", "feedbackqa", "scifact")
REFERENCE = "sentence-transformers"
ALLOWED = 0.002

Encode = Callable[[Sequence[str]], NDArray[np.float32]]


def main() -> None:
    """Build, measure, compare; exit code 1 where the vectors of the index find less than they must."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("examples", nargs="*", default=EXAMPLES, metavar="EXAMPLE", help=", ".join(EXAMPLES))
    options.add_argument(
        "--home", type=Path, help="keep the deployments in this folder, and go on from what it has"
    )
    arguments = options.parse_args()
    encode = sentence_transformers_encoder()
    figures: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="datamoat-retrieval-") as temporary:
        for example in arguments.examples:
            environment = {
                **os.environ,
                "EXAMPLE": example,
                "DATAMOAT_HOME": str(arguments.home or temporary),
            }
            figures |= measure(example, environment, encode)
    gap = max(abs(modes["vector"][METRICS[0]] - modes[REFERENCE][METRICS[0]]) for modes in figures.values())
    short = max(
        max(modes["vector"][METRICS[0]], modes["text"][METRICS[0]]) - modes["hybrid"][METRICS[0]]
        for modes in figures.values()
    )
    show(figures)
    print(json.dumps({"sets": figures, "vector_gap": gap, "hybrid_short_of_better_leg": max(short, 0.0)}))
    sys.exit(gap > ALLOWED)


def measure(
    example: str, environment: dict[str, str], encode: Encode
) -> dict[str, dict[str, dict[str, float]]]:
    """Golden set -> mode -> metric -> value, of an example that is built first."""
    subprocess.run([sys.executable, "-m", "orchestration.cli", "run"], env=environment, check=True)
    settings = Settings.from_environment(environment)
    contracts, _ = load_contracts(settings.contract_folders, settings.contract_variables)
    by_name = {contract.name: contract for contract in contracts}
    figures: dict[str, dict[str, dict[str, float]]] = {}
    with open_warehouse(settings).connect("benchmark") as connection:
        for contract in golden_contracts(connection, contracts):
            assert contract.golden is not None
            modes: defaultdict[str, dict[str, float]] = defaultdict(dict)
            for mode, metric, value, n in connection.execute(
                "select distinct on (mode, metric) mode, metric, value, n from registry.evaluation where name = %s"
                " order by mode, metric, created_at desc",
                [contract.name],
            ):
                modes[mode] |= {metric: value, "n": n}
            golden = read_golden(connection, contract, by_name.get(contract.golden.question_source or ""))
            run = exact_run(connection, golden, encode)
            reference = evaluate(golden.qrels, run)
            modes[REFERENCE] = {measure.metric: measure.value or 0.0 for measure in reference}
            figures[f"{example}/{contract.name}"] = modes
    return figures


def exact_run(
    connection: psycopg.Connection[Any], golden: Golden, encode: Encode, k: int = DEPTH
) -> dict[str, dict[str, float]]:
    """What an exact search finds among the texts of the judged source, embedded by ``encode`` to unit length."""
    chunking = in_language(connection, golden.document_source, live_release(connection).chunking)
    places: defaultdict[str, list[Place]] = defaultdict(list)
    for heading, text, *place in connection.execute(
        "select heading, text, chunk_id, document_id, start_char, end_char from corpus.chunk where source = %s"
        " order by chunk_id",
        [golden.document_source],
    ):
        places[embedded_text(heading, text, chunking)].append(Place(*place))
    passages = list(places.values())
    vectors, questions = encode(list(places)), encode(list(golden.queries.values()))
    run = {}
    for qid, question in zip(golden.queries, questions, strict=True):
        scores = vectors @ question
        order = np.argsort(-scores, kind="stable")
        run[qid] = ranking(golden.targets[qid], ((float(scores[i]), passages[i]) for i in order), k)
    return run


def sentence_transformers_encoder() -> Encode:
    """The installed model in sentence-transformers, as its documentation uses it, in float32 on the CPU."""
    from sentence_transformers import SentenceTransformer

    from embedder.model import open_model

    model: SentenceTransformer = SentenceTransformer(str(open_model(None).folder), device="cpu")

    def encode(texts: Sequence[str]) -> NDArray[np.float32]:
        return np.asarray(
            model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False), np.float32
        )

    return encode


def show(figures: dict[str, dict[str, dict[str, float]]]) -> None:
    """The table, as Markdown."""
    print(f"| set | questions | search | {' | '.join(METRICS)} |")
    print("|---" * (3 + len(METRICS)) + "|")
    for name, modes in figures.items():
        for mode in ("vector", REFERENCE, "text", "hybrid"):
            values = " | ".join(f"{modes[mode][metric]:.4f}" for metric in METRICS)
            print(f"| {name} | {modes['vector']['n']:,.0f} | {mode} | {values} |")


if __name__ == "__main__":
    main()

"""The scifact example has documents and golden sets, which contracts describe, and no feedback.

Belongs here: saying what is missing where the data is. The data is not part of this repository.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = "scifact_train"


def interactions(data_dir: Path) -> Iterator[dict[str, Any]]:
    """None. Raises FileNotFoundError, naming the folder and the remedy, where the data is missing."""
    if not (data_dir / FOLDER / "corpus.jsonl.gz").is_file():
        raise FileNotFoundError(
            f"{data_dir / FOLDER} is missing: the scifact example needs corpus.jsonl.gz, queries.jsonl and qrels.tsv there."
            f" Set DATAMOAT_DATA_DIR to the folder that holds {FOLDER} (see examples/scifact/README.md), or use the support"
            " example, which brings its own data."
        )
    return iter(())


def feedback(data_dir: Path) -> Iterator[dict[str, Any]]:
    """None."""
    return iter(())

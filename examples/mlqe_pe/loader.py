"""MLQE-PE's rated and post-edited translations as payloads of the feedback service.

Belongs here: turning rows of the data set into interactions and feedback. Does not belong here: the data (it is not
part of this repository).

The post-edits are tokenised (``Stadt , die``). The tokenised form of the machine's output is therefore what counts as
the answer: set against the other form, every correction would teach spaces before commas. Times are made up, evenly
spread over fourteen days in the order of the files.
"""

import gzip
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

FOLDER = "mlqe_pe_dev"
PAIRS = ("en-de", "et-en")
FIRST_DAY = datetime(2026, 10, 1, tzinfo=UTC)
DAYS = 14
_SPACE = UUID("2a0c4c53-1c8f-5f8e-8a43-6f5f0f3d9b77")


def interactions(data_dir: Path) -> Iterator[dict[str, Any]]:
    """One payload of `POST /v1/interactions` per translated sentence.

    `data_dir` is the folder that holds `mlqe_pe_dev/`. Raises FileNotFoundError, naming the file and the remedy.
    """
    for pair, row, at in _rows(data_dir):
        yield {
            "interaction_id": row["_id"],
            "occurred_at": at.isoformat(),
            "messages": [{"role": "user", "content": row["source"]}],
            "output": row["output_tokenised"],
            "provider": "mlqe_pe",
            "model": "nmt",
            "prompt_name": f"translate-{pair}",
            "prompt_version": "1",
            "metadata": {"article": row["doc"], "output_as_shown": row["output"]},
        }


def feedback(data_dir: Path) -> Iterator[dict[str, Any]]:
    """Payloads of `POST /v1/feedback`: one rating per rater, and the post-edit.

    Scores of 0 to 100 become 0 to 1. A post-edit that changes nothing is an approval: it is sent as implicit
    feedback, `accepted`. Errors are those of `interactions`.
    """
    for _, row, at in _rows(data_dir):
        for rater, score in enumerate(row["scores"]):
            yield _event(row, at, f"rating/{rater}") | {
                "kind": "rating",
                "name": "direct_assessment",
                "score": score / 100,
                "author_role": "rater",
                "author_id": f"mlqe-pe-rater/{row['_id']}/{rater}",
            }
        post_edit = _event(row, at, "post_edit") | {
            "author_role": "post_editor",
            "value": {"hter": row["hter"]},
        }
        if row["correction"] == row["output_tokenised"]:
            yield post_edit | {"kind": "implicit", "label": "accepted"}
        else:
            yield post_edit | {"kind": "correction", "correction": row["correction"]}


def _event(row: dict[str, Any], at: datetime, name: str) -> dict[str, Any]:
    return {
        "event_id": str(uuid5(_SPACE, f"{row['_id']}/{name}")),
        "annotator_kind": "HUMAN",
        "interaction_id": row["_id"],
        "occurred_at": (at + timedelta(minutes=5)).isoformat(),
    }


def _rows(data_dir: Path) -> Iterator[tuple[str, dict[str, Any], datetime]]:
    """The rows with their language pair and made-up times."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for pair in PAIRS:
        file = data_dir / FOLDER / f"{pair}.jsonl.gz"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing: the mlqe_pe example needs it. Set DATAMOAT_DATA_DIR to the folder that holds"
                f" {FOLDER} (see examples/mlqe_pe/README.md), or use the support example, which brings its own data."
            )
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            rows += [(pair, json.loads(line)) for line in lines]
    step = timedelta(days=DAYS) / (len(rows) + 1)
    for number, (pair, row) in enumerate(rows):
        yield pair, row, FIRST_DAY + number * step

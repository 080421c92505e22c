"""FeedbackQA's rated answers as payloads of the feedback service.

Belongs here: turning rows of the data set into interactions and ratings. Does not belong here: the data (it is
not part of this repository), and the passages and questions, which are sources with contracts.

The data set does not say when an answer was given or who rated it. Times are therefore made up, evenly spread
over fourteen days in the order of the file, and every rating counts as a person of its own.
"""

import gzip
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

FOLDER = "feedbackqa_dev"
FIRST_DAY = datetime(2026, 10, 1, tzinfo=UTC)
DAYS = 14
SCORES = {"Excellent": 1.0, "Acceptable": 0.67, "Could be Improved": 0.33, "Bad": 0.0}
_SPACE = UUID("0b7b1f0e-6a0d-5a0c-8d0b-4a9d3a1c9e57")


def interactions(data_dir: Path) -> Iterator[dict[str, Any]]:
    """One payload of `POST /v1/interactions` per rated answer: the question, the answer, the passage behind it.

    `data_dir` is the folder that holds `feedbackqa_dev/`. Raises FileNotFoundError, naming the folder and the
    remedy, where the data is missing.
    """
    for row, at in _rows(data_dir):
        yield {
            "interaction_id": row["_id"],
            "session_id": str(uuid5(_SPACE, f"{row['domain']}/{row['question']}")),
            "occurred_at": _stamp(at),
            "messages": [{"role": "user", "content": row["question"]}],
            "output": row["answer_text"],
            "retrieved": [{"document_id": f"passages/{row['passage_id']}", "source": "passages", "rank": 1}],
            "provider": "feedbackqa",
            "model": "retrieval-qa",
            "prompt_name": "question",
            "prompt_version": "1",
            "metadata": {"domain": row["domain"], "page_title": row["page_title"]},
        }


def feedback(data_dir: Path) -> Iterator[dict[str, Any]]:
    """One payload of `POST /v1/feedback` per rater: kind rating, the rater's word as label, and why.

    Errors are those of `interactions`.
    """
    for row, at in _rows(data_dir):
        for rater, (label, explanation) in enumerate(zip(row["ratings"], row["explanations"], strict=True)):
            name = f"{row['_id']}/{rater}"
            yield {
                "event_id": str(uuid5(_SPACE, f"event/{name}")),
                "feedback_id": str(uuid5(_SPACE, f"feedback/{name}")),
                "op": "create",
                "kind": "rating",
                "score": SCORES[label],
                "label": label,
                "explanation": explanation,
                "annotator_kind": "HUMAN",
                "author_role": "crowd",
                "author_id": f"feedbackqa-rater/{name}",
                "interaction_id": row["_id"],
                "occurred_at": _stamp(at + timedelta(minutes=5 * (rater + 1))),
            }


def _rows(data_dir: Path) -> Iterator[tuple[dict[str, Any], datetime]]:
    """The rows with their made-up times; the last rating still falls on the last day."""
    file = data_dir / FOLDER / "feedback.jsonl.gz"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: the feedbackqa example needs the folder {FOLDER} with feedback.jsonl.gz,"
            f" passages.jsonl.gz and questions.jsonl.gz. Set DATAMOAT_DATA_DIR to the folder that holds {FOLDER}"
            " (see examples/feedbackqa/README.md), or use the support example, which brings its own data."
        )
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    step = timedelta(days=DAYS) / (len(rows) + 1)
    for number, row in enumerate(rows):
        yield row, FIRST_DAY + number * step


def _stamp(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")

"""QA-Feedback's ranked, marked and corrected answers as payloads of the feedback service.

Belongs here: turning rows of the data set into interactions and feedback. Does not belong here: the data (it is not
part of this repository).

The data set does not say when an answer was given or who judged it: times are made up, evenly spread over fourteen
days in the order of the file, and there is no author.
"""

import gzip
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

FOLDER = "qa_feedback_dev"
FIRST_DAY = datetime(2026, 10, 1, tzinfo=UTC)
DAYS = 14
_SPACE = UUID("5f0f5f0e-54f7-5d7c-9d5b-3f2f6f1b2a10")


def interactions(data_dir: Path) -> Iterator[dict[str, Any]]:
    """One payload of `POST /v1/interactions` per answer: each question was answered four times.

    `data_dir` is the folder that holds `qa_feedback_dev/`. Raises FileNotFoundError, naming the file and the remedy.
    """
    for row, at in _rows(data_dir):
        for number, answer in enumerate(row["predictions"], start=1):
            yield {
                "interaction_id": _interaction(row, number),
                "session_id": row["_id"],
                "occurred_at": at.isoformat(),
                "messages": [{"role": "user", "content": row["question"]}],
                "output": answer,
                "retrieved": [
                    {"document_id": f"wikipedia/{passage['title']}", "source": "wikipedia", "rank": rank}
                    for rank, passage in enumerate(row["passages"], start=1)
                ],
                "provider": "qa_feedback",
                "model": "t5-large",
                "prompt_name": "question",
                "prompt_version": "1",
                "variant": f"sample-{number}",
            }


def feedback(data_dir: Path) -> Iterator[dict[str, Any]]:
    """Payloads of `POST /v1/feedback`: pairwise judgements, marked errors, missing facts and corrections.

    A correction that leaves the answer as it was is an approval: it is sent as implicit feedback, `accepted`.
    Errors are those of `interactions`.
    """
    for row, at in _rows(data_dir):
        for pair in row["preferences"]:
            a, b = _interaction(row, pair["a"]), _interaction(row, pair["b"])
            chosen, rejected = (b, a) if pair["winner"] == "b" else (a, b)
            value: dict[str, Any] = {"chosen": chosen, "rejected": rejected}
            if pair["winner"] == "tie":
                value = {"tied": [a, b]}
            yield _event(row, at, f"preference/{pair['a']}/{pair['b']}") | {
                "kind": "preference",
                "name": "preferred_answer",
                "label": pair["winner"],
                "value": value,
                "interaction_id": chosen,
            }
        judged = row["feedback_on_prediction_1"]
        for number, error in enumerate(judged["errors"]):
            yield _event(row, at, f"error/{number}") | {
                "kind": "category",
                "name": "error_span",
                "label": error["error type"],
                "explanation": error["explanation"] or None,
                "value": {"start": error["start"], "end": error["end"]},
            }
        for number, missing in enumerate(judged["missing-info"]):
            yield _event(row, at, f"missing/{number}") | {
                "kind": "category",
                "name": "missing_information",
                "label": missing["error type"],
                "value": {"passage": missing["passage_id"], "sentences": missing["sentence_id"]},
            }
        correction = judged["corrected-prediction"]
        if correction == row["predictions"][0]:
            yield _event(row, at, "accepted") | {"kind": "implicit", "label": "accepted"}
        elif correction:
            yield _event(row, at, "correction") | {"kind": "correction", "correction": correction}


def _event(row: dict[str, Any], at: datetime, name: str) -> dict[str, Any]:
    """What every event of a row has; unless said otherwise it is about the first answer."""
    return {
        "event_id": str(uuid5(_SPACE, f"{row['_id']}/{name}")),
        "annotator_kind": "HUMAN",
        "author_role": "annotator",
        "interaction_id": _interaction(row, 1),
        "occurred_at": (at + timedelta(minutes=5)).isoformat(),
    }


def _interaction(row: dict[str, Any], number: int) -> str:
    return f"{row['_id']}/{number}"


def _rows(data_dir: Path) -> Iterator[tuple[dict[str, Any], datetime]]:
    """The rows with their made-up times."""
    file = data_dir / FOLDER / "qa_feedback.jsonl.gz"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: the qa_feedback example needs it. Set DATAMOAT_DATA_DIR to the folder that holds"
            f" {FOLDER} (see examples/qa_feedback/README.md), or use the support example, which brings its own data."
        )
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    step = timedelta(days=DAYS) / (len(rows) + 1)
    for number, row in enumerate(rows):
        yield row, FIRST_DAY + number * step

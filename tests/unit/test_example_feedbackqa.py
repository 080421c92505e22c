"""The feedbackqa example: its contracts load, and its loader turns rows into payloads that are accepted.

Belongs here: checks of the example alone; those of the real data are skipped where it is absent.
"""

import gzip
import importlib.util
import json
import os
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from assets.sources.contract import load_contracts
from feedback.payloads import parse_event, parse_interaction

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "feedbackqa"
DATA_DIR = Path(os.environ.get("DATAMOAT_DATA_DIR") or ROOT.parent / "shared" / "data")

needs_data = pytest.mark.skipif(
    not (DATA_DIR / "feedbackqa_dev" / "feedback.jsonl.gz").is_file(),
    reason=f"FeedbackQA is not in {DATA_DIR}: set DATAMOAT_DATA_DIR to the folder that holds feedbackqa_dev",
)


@cache
def loader() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_feedbackqa_loader", EXAMPLE / "loader.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def real_interactions() -> list[dict[str, Any]]:
    return list(loader().interactions(DATA_DIR))


@cache
def real_feedback() -> list[dict[str, Any]]:
    return list(loader().feedback(DATA_DIR))


def rows(name: str) -> list[dict[str, Any]]:
    with gzip.open(DATA_DIR / "feedbackqa_dev" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A data folder with two rows."""
    (tmp_path / "feedbackqa_dev").mkdir()
    row = {
        "_id": "UK-valid-fb0",
        "domain": "UK",
        "question": "May I travel?",
        "passage_id": "UK-1",
        "answer_text": "Look at the page of your country.",
        "page_title": "Travel",
        "section_headers": ["Abroad"],
        "ratings": ["Excellent", "Could be Improved"],
        "explanations": ["Says where to look.", "Does not say yes or no."],
    }
    with gzip.open(tmp_path / "feedbackqa_dev" / "feedback.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n" + json.dumps({**row, "_id": "UK-valid-fb1"}) + "\n")
    return tmp_path


def test_contracts_load() -> None:
    contracts, errors = load_contracts([EXAMPLE / "contracts"], {"DATAMOAT_DATA_DIR": str(DATA_DIR)})
    assert errors == []
    passages, questions = contracts
    assert (passages.name, questions.name) == ("passages", "questions")
    assert passages.provenance == questions.provenance == "third_party"
    assert passages.allowed_uses == ("rag", "finetune", "eval")
    assert passages.corpus is not None
    assert questions.golden is not None
    assert questions.golden.document_source == "passages"


def test_who_passages_are_refused_by_contract() -> None:
    contracts, _ = load_contracts([EXAMPLE / "contracts"], {"DATAMOAT_DATA_DIR": str(DATA_DIR)})
    assert len(contracts) == 2
    for contract in contracts:
        (domain,) = [column for column in contract.columns if column.name == "domain"]
        assert domain.valid_values == ("Australia", "UK", "CDC")


def test_a_row_becomes_one_interaction_and_one_rating_per_rater(small: Path) -> None:
    first, second = loader().interactions(small)
    assert first["interaction_id"] == "UK-valid-fb0"
    assert first["messages"] == [{"role": "user", "content": "May I travel?"}]
    assert first["output"] == "Look at the page of your country."
    assert first["retrieved"] == [{"document_id": "passages/UK-1", "source": "passages", "rank": 1}]
    assert first["session_id"] == second["session_id"]
    assert first["occurred_at"] < second["occurred_at"]
    ratings = list(loader().feedback(small))
    assert [(one["label"], one["score"], one["explanation"]) for one in ratings[:2]] == [
        ("Excellent", 1.0, "Says where to look."),
        ("Could be Improved", 0.33, "Does not say yes or no."),
    ]
    assert len({one["event_id"] for one in ratings}) == len({one["author_id"] for one in ratings}) == 4
    assert ratings == list(loader().feedback(small)), "ids and times are the same each time"


def test_missing_data_names_the_folder_and_the_remedy(tmp_path: Path) -> None:
    for name in ("interactions", "feedback"):
        with pytest.raises(FileNotFoundError) as caught:
            next(getattr(loader(), name)(tmp_path))
        assert str(tmp_path / "feedbackqa_dev") in str(caught.value)
        assert "Set DATAMOAT_DATA_DIR" in str(caught.value)


@needs_data
def test_counts_are_those_of_the_readme() -> None:
    readme = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    assert len(rows("passages")) == 1540
    assert len(rows("questions")) == 683
    assert len(real_interactions()) == 876
    assert Counter(one["label"] for one in real_feedback()) == {
        "Excellent": 515,
        "Acceptable": 338,
        "Could be Improved": 303,
        "Bad": 596,
    }
    for count in ("1,540", "683", "876 interactions and 1,752 ratings"):
        assert count in readme
    sides: dict[str, set[bool]] = {}
    for one in real_feedback():
        sides.setdefault(one["interaction_id"], set()).add(one["score"] >= 0.5)
    assert sum(len(side) == 2 for side in sides.values()) == 239
    assert "239 of 876 rows" in readme


@needs_data
def test_the_service_would_accept_everything() -> None:
    for item in real_interactions():
        parse_interaction(json.dumps(item).encode())
    for item in real_feedback():
        parse_event(json.dumps(item).encode())
    assert len({item["interaction_id"] for item in real_interactions()}) == 876
    assert len({item["event_id"] for item in real_feedback()}) == 1752


@needs_data
def test_times_cover_fourteen_days() -> None:
    days = {f"2026-10-{day:02d}" for day in range(1, 15)}
    assert {item["occurred_at"][:10] for item in real_interactions()} == days
    assert {item["occurred_at"][:10] for item in real_feedback()} == days


@needs_data
def test_every_retrieved_passage_and_golden_passage_exists() -> None:
    passages = {row["_id"] for row in rows("passages")}
    retrieved = {found["document_id"] for item in real_interactions() for found in item["retrieved"]}
    assert retrieved <= {f"passages/{passage}" for passage in passages}
    assert {row["passage_id"] for row in rows("questions")} <= passages

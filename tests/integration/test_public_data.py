"""Public feedback sets load through the public API, with the counts that their READMEs give.

Belongs here: what the service stores of whole data sets; skipped where the data is absent.
"""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psycopg
import pytest

from feedback.client import FeedbackClient
from tests.integration.conftest import Cluster, FeedbackService

ROOT = Path(__file__).resolve().parents[2]
DATA_DIR = Path(os.environ.get("DATAMOAT_DATA_DIR") or ROOT.parent / "shared" / "data")

# Per example: interactions, events, and those events by kind, name and label that the README counts.
EXPECTED: dict[str, tuple[int, int, dict[tuple[str, str, str | None], int]]] = {
    "feedbackqa": (
        876,
        2 * 876,
        {
            ("rating", "rating", "Excellent"): 515,
            ("rating", "rating", "Acceptable"): 338,
            ("rating", "rating", "Could be Improved"): 303,
            ("rating", "rating", "Bad"): 596,
        },
    ),
    "qa_feedback": (
        4 * 254,
        1524 + 716 + 419 + 247,
        {
            ("preference", "preferred_answer", "a"): 807,
            ("preference", "preferred_answer", "b"): 511,
            ("preference", "preferred_answer", "tie"): 206,
            ("category", "error_span", "Irrelevant"): 468,
            ("category", "error_span", "Wrong-Grounding"): 88,
            ("category", "error_span", "Unverifiable"): 82,
            ("category", "error_span", "Redundant"): 69,
            ("category", "error_span", "Incoherent"): 9,
            ("correction", "correction", None): 241,
            ("implicit", "implicit", "accepted"): 247 - 241,
        },
    ),
    "mlqe_pe": (
        2000,
        6 * 2000 + 2000,
        {
            ("rating", "direct_assessment", None): 6 * 2000,
            ("correction", "correction", None): 2000 - 299 - 82,
            ("implicit", "implicit", "accepted"): 299 + 82,
        },
    ),
}


def loader(example: str) -> ModuleType:
    path = ROOT / "examples" / example / "loader.py"
    spec = importlib.util.spec_from_file_location(f"example_{example}_loader", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not (DATA_DIR / module.FOLDER).is_dir():
        pytest.skip(
            f"{module.FOLDER} is not in {DATA_DIR}: set DATAMOAT_DATA_DIR to the folder that holds it"
        )
    return module


@pytest.fixture
def service(cluster: Cluster, template: str, tmp_path: Path) -> Iterator[FeedbackService]:
    """A service over a database of the test's own, to be counted whole."""
    service = FeedbackService(cluster.new_database(template), tmp_path / "pseudonym.key")
    service.start()
    yield service
    service.stop()
    cluster.drop_database(service.database_url)


@pytest.mark.parametrize("example", EXPECTED)
def test_a_whole_set_arrives_once(example: str, service: FeedbackService) -> None:
    module = loader(example)
    with FeedbackClient(service.base_url, service.api_key) as client:
        for again in (False, True):
            for items, send in (
                (module.interactions(DATA_DIR), client.send_interactions),
                (module.feedback(DATA_DIR), client.send_feedback),
            ):
                report = send(items)
                assert report.refused == []
                assert (report.created == 0) if again else (report.duplicate == 0)
    interactions, events, expected = EXPECTED[example]
    with psycopg.connect(service.database_url) as conn:
        (count,) = conn.execute("select count(*) from feedback.interaction").fetchone() or (0,)
        by_key: dict[tuple[str, str, str | None], int] = {
            (kind, name, label): n
            for kind, name, label, n in conn.execute(
                "select kind, name, label, count(*) from feedback.feedback_event group by 1, 2, 3"
            )
        }
        orphans = conn.execute(
            "select count(*) from feedback.feedback_event e left join feedback.interaction i using (interaction_id)"
            " where i.interaction_id is null"
        ).fetchone()
    assert (count, sum(by_key.values())) == (interactions, events)
    assert {key: by_key.get(key) for key in expected} == expected
    assert orphans == (0,)

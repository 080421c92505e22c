"""``python -m feedback import``: exports arrive whole through the API, once, and can be made again from what is stored."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from feedback.formats import Item
from feedback.importing import format_named, records
from tests.integration.conftest import Cluster, FeedbackService
from tests.unit.test_import_formats import EXPORTS, NAMES, without_people

OURS = {"received_at", "xact_id", "api_key_id", "body_sha256", "user_ref", "author_ref", "app"}


@pytest.fixture(scope="module")
def service(
    cluster: Cluster, template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FeedbackService]:
    """A service over a database that only these imports fill."""
    key_file = tmp_path_factory.mktemp("import") / "pseudonym.key"
    service = FeedbackService(cluster.new_database(template), key_file)
    service.start()
    yield service
    service.stop()


def import_(service: FeedbackService, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "feedback", "import", *map(str, arguments), "--url", service.base_url],
        env={"PATH": os.environ["PATH"], "DATAMOAT_API_KEY": service.api_key},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def stored(service: FeedbackService) -> dict[str, Item]:
    """Everything in the log by id, as the bodies it came from, but for defaults."""
    items = {}
    with psycopg.connect(service.database_url, row_factory=dict_row) as conn:
        for kind, table, key in (
            ("interaction", "interaction", "interaction_id"),
            ("feedback", "feedback_event", "event_id"),
        ):
            for row in conn.execute(f"select * from feedback.{table}"):
                body = {k: v for k, v in row.items() if v is not None and k not in OURS}
                body["occurred_at"] = body["occurred_at"].isoformat()
                items[str(row[key])] = Item(kind, body)  # type: ignore[arg-type]
    return items


def same_times(value: Any) -> Any:
    """The stored moment is the same, its spelling is UTC's."""
    if isinstance(value, dict):
        return {k: same_times(v) for k, v in value.items()}
    if isinstance(value, list):
        return [same_times(one) for one in value]
    try:
        found = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return value
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC).isoformat()


@pytest.mark.parametrize("name", NAMES)
def test_an_export_arrives_once_and_can_be_made_again(name: str, service: FeedbackService) -> None:
    path = EXPORTS / f"{name}.jsonl"
    before = stored(service)
    first = import_(service, name, path)
    assert first.returncode == 0, first.stdout + first.stderr
    after = stored(service)
    again = import_(service, name, path)
    assert again.returncode == 0 and " created" not in again.stdout
    assert stored(service).keys() == after.keys() > before.keys()
    read = format_named(name)
    for _, record in records(path):
        ids = [
            item.body["interaction_id"] if item.kind == "interaction" else item.body["event_id"]
            for item in read.to_items(record)
        ]
        made = read.from_items([after[id] for id in ids])
        assert same_times(made) == same_times(without_people(record))


def test_what_is_refused_is_kept_with_its_reason(service: FeedbackService, tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    shutil.copy(EXPORTS / "opik.jsonl", path)
    with path.open("a") as file:
        file.write('{"no": "trace"}\n')
        file.write('{"id": "at@sign", "start_time": "2026-03-01T09:10:00Z", "input": "x"}\n')
    done = import_(service, "opik", path)
    assert done.returncode == 1
    lost = [json.loads(line) for line in (tmp_path / "traces.jsonl.refused.jsonl").read_text().splitlines()]
    assert [(line["place"], line["field"]) for line in lost] == [(3, "id"), (4, "interaction_id")]
    assert lost[1]["record"]["id"] == "at@sign"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(("nonsense", __file__), "there is no format"), (("opik", "/missing.json"), "/missing.json is missing")],
)
def test_what_cannot_be_imported_is_explained(
    service: FeedbackService, arguments: tuple[str, str], reason: str
) -> None:
    done = import_(service, *arguments)
    assert (done.returncode, reason in done.stderr) == (1, True)

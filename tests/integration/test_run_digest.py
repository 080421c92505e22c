"""What makes a turn of the loop necessary: any input that differs from those of the last whole turn."""

import os
from pathlib import Path
from typing import Any

import psycopg
import pytest

from orchestration.run import inputs_digest, is_current, mark_current
from orchestration.settings import Settings
from storage.warehouse import Warehouse
from tests.integration.test_sensor import add_event

# Whether events can be read yet depends on all transactions of a server, whosever they are.
pytestmark = pytest.mark.alone


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    contracts = tmp_path / "contracts"
    contracts.mkdir()
    (contracts / "one.odcs.yaml").write_text("allowedUses: [rag]")
    return Settings.from_environment(
        {"EXAMPLE": "none", "DATAMOAT_HOME": str(tmp_path / "home"), "DATAMOAT_CONTRACTS": str(contracts)}
    )


def test_a_changed_contract_or_file_changes_it(
    settings: Settings, warehouse: Warehouse, tmp_path: Path
) -> None:
    data = tmp_path / "data.csv"
    data.write_text("a,b")
    seen = [inputs_digest(settings, warehouse, [data])]
    assert inputs_digest(settings, warehouse, [data]) == seen[0]
    (settings.contracts / "one.odcs.yaml").write_text("allowedUses: [rag, finetune]")
    seen.append(inputs_digest(settings, warehouse, [data]))
    data.write_text("a,b,c")
    seen.append(inputs_digest(settings, warehouse, [data]))
    data.unlink()
    seen.append(inputs_digest(settings, warehouse, [data]))
    assert len(set(seen)) == len(seen)


def test_a_file_name_need_not_be_text(settings: Settings, warehouse: Warehouse, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.md"
    try:
        Path(os.fsdecode(name)).write_text("text")
    except OSError:
        pytest.skip("this file system takes no such name")
    inputs_digest(settings, warehouse, [Path(os.fsdecode(name))])


def test_an_event_nobody_has_folded_makes_it_necessary(
    settings: Settings, warehouse: Warehouse, conn: psycopg.Connection[Any]
) -> None:
    add_event(conn, "2026-03-01T10:00:00Z")
    with warehouse.database.connect() as other:
        # Begun before, so that the event above the horizon is counted but cannot be read yet.
        other.execute("select pg_current_xact_id()")
        conn.commit()
        mark_current(warehouse, inputs_digest(settings, warehouse, []))
    assert not is_current(warehouse, inputs_digest(settings, warehouse, []))

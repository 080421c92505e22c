"""Settings come from the environment, and a wrong one says what to do."""

from pathlib import Path

import pytest

from orchestration.settings import ROOT, Settings, SettingsError


def test_defaults() -> None:
    settings = Settings.from_environment({})
    assert settings.home == ROOT / ".datamoat"
    assert (settings.example, settings.deployment) == ("support", "support")
    assert settings.contract_folders == [ROOT / "contracts", ROOT / "examples" / "support" / "contracts"]


def test_an_empty_variable_is_an_unset_one() -> None:
    assert Settings.from_environment({"EXAMPLE": "", "DATABASE_URL": "", "EMBEDDING_MODEL": ""}) == (
        Settings.from_environment({})
    )


def test_no_example_means_only_the_teams_own_contracts(tmp_path: Path) -> None:
    settings = Settings.from_environment({"EXAMPLE": "none", "DATAMOAT_CONTRACTS": str(tmp_path)})
    assert settings.contract_folders == [tmp_path]
    assert settings.deployment == "datamoat"


@pytest.mark.parametrize("day", ["yesterday", "2999-01-01", "2026-13-01"])
def test_a_start_date_that_is_none_says_so(day: str) -> None:
    with pytest.raises(SettingsError, match="DATAMOAT_START_DATE"):
        Settings.from_environment({"DATAMOAT_START_DATE": day})


def test_an_unknown_example_names_those_there_are() -> None:
    with pytest.raises(SettingsError, match="feedbackqa, mlqe_pe, qa_feedback, support"):
        Settings.from_environment({"EXAMPLE": "suport"})

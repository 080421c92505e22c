"""Settings come from the environment, and a wrong one says what to do."""

from pathlib import Path

import pytest

from assets.documents.chunk import Chunking
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
    with pytest.raises(SettingsError, match="feedbackqa, mlqe_pe, qa_feedback, scifact, support, xquad"):
        Settings.from_environment({"EXAMPLE": "suport"})


def test_when_training_sets_are_made_can_be_set() -> None:
    settings = Settings.from_environment(
        {"DATAMOAT_FEEDBACK_MIN_EVENTS": "5", "DATAMOAT_FEEDBACK_MAX_AGE_HOURS": "0.5"}
    )
    assert (settings.feedback_min_events, settings.feedback_max_age_hours) == (5, 0.5)


@pytest.mark.parametrize("name", ["DATAMOAT_FEEDBACK_MIN_EVENTS", "DATAMOAT_FEEDBACK_MAX_AGE_HOURS"])
@pytest.mark.parametrize("value", ["many", "0", "-1", "nan", "inf"])
def test_a_batch_that_is_none_says_so(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"{name}={value}.*at least"):
        Settings.from_environment({name: value})


def test_what_embedding_may_cost_goes_to_the_job() -> None:
    assert Settings.from_environment({}).embedding_options == ()
    settings = Settings.from_environment({"EMBEDDING_PRICE_PER_HOUR": "2.5", "EMBEDDING_MAX_COST": "40"})
    assert settings.embedding_options == ("--price-per-hour", "2.5", "--max-cost", "40")
    with pytest.raises(SettingsError, match=r"EMBEDDING_MAX_COST=40.*EMBEDDING_PRICE_PER_HOUR"):
        Settings.from_environment({"EMBEDDING_MAX_COST": "40"})
    with pytest.raises(SettingsError, match="EMBEDDING_PRICE_PER_HOUR=free"):
        Settings.from_environment({"EMBEDDING_PRICE_PER_HOUR": "free"})


def test_how_documents_are_cut_can_be_set() -> None:
    settings = Settings.from_environment({"DATAMOAT_CHUNKING": "300-800/200"})
    assert (settings.chunking, settings.chunking_candidate) == (Chunking(300, 800, 200), None)
    with pytest.raises(
        SettingsError, match=r"DATAMOAT_CHUNKING_CANDIDATE=1000: give the least .*400-1000/240"
    ):
        Settings.from_environment({"DATAMOAT_CHUNKING_CANDIDATE": "1000"})

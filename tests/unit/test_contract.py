"""Contracts: what is promised is read whole, and a promise nobody could keep is refused by name."""

import copy
import hashlib
from collections.abc import Callable
from datetime import UTC, date, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from assets.sources.contract import (
    Contract,
    ContractError,
    ContractErrors,
    CorpusMapping,
    Expectation,
    GoldenMapping,
    load_contracts,
)

TICKETS: dict[str, Any] = {
    "apiVersion": "v3.1.0",
    "kind": "DataContract",
    "id": "support-tickets",
    "name": "tickets",
    "version": "1.2.0",
    "status": "active",
    "description": {"purpose": "What customers ask."},
    "team": {"name": "support-operations"},
    "servers": [{"server": "local", "type": "local", "path": "../data/tickets/*.csv", "format": "csv"}],
    "schema": [
        {
            "name": "tickets",
            "physicalType": "table",
            "description": "One row per ticket.",
            "properties": [
                {
                    "name": "ticket_id",
                    "logicalType": "string",
                    "primaryKey": True,
                    "logicalTypeOptions": {"pattern": "^T-[0-9]{4}$", "maxLength": 6},
                },
                {
                    "name": "opened_at",
                    "logicalType": "timestamp",
                    "required": True,
                    "logicalTypeOptions": {"minimum": "2020-01-01T00:00:00+01:00"},
                },
                {
                    "name": "status",
                    "logicalType": "string",
                    "quality": [
                        {
                            "type": "library",
                            "metric": "invalidValues",
                            "arguments": {"validValues": ["open", "closed"]},
                            "mustBe": 0,
                        }
                    ],
                },
                {"name": "body", "logicalType": "string", "classification": "pii"},
            ],
            "quality": [
                {"type": "library", "metric": "rowCount", "mustBeGreaterOrEqualTo": 1, "severity": "error"},
                {
                    "type": "custom",
                    "engine": "greatExpectations",
                    "severity": "warning",
                    "implementation": {
                        "type": "expect_column_value_lengths_to_be_between",
                        "kwargs": {"column": "body", "min_value": 1},
                    },
                },
            ],
            "customProperties": [{"property": "corpus", "value": {"id": "ticket_id", "text": "body"}}],
        }
    ],
    "slaProperties": [{"property": "latency", "value": 30, "unit": "d"}],
    "customProperties": [
        {"property": "provenance", "value": "proprietary"},
        {"property": "pii", "value": True},
        {"property": "allowedUses", "value": ["finetune", "rag"]},
        {"property": "maxRefusedShare", "value": 0.1},
    ],
}
HANDBOOK: dict[str, Any] = {
    **TICKETS,
    "name": "handbook",
    "servers": [{"server": "l", "type": "local", "path": "${DATA}/**/*.md", "format": "documents"}],
    "schema": [{"name": "handbook"}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "contracts").mkdir()
    return tmp_path / "contracts"


def save(folder: Path, name: str, content: Any) -> Path:
    path = folder / f"{name}.odcs.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def load_one(folder: Path, content: Any) -> Contract:
    save(folder, "tickets", content)
    contracts, errors = load_contracts([folder], {"DATA": "/data"})
    assert not errors, errors
    return contracts[0]


def errors_of(folder: Path, content: Any) -> list[ContractError]:
    save(folder, "tickets", content)
    save(folder, "other", {**HANDBOOK, "name": "other"})
    contracts, errors = load_contracts([folder], {"DATA": "/data"})
    # One bad contract hides no good one.
    assert [contract.name for contract in contracts] == ["other"]
    for error in errors:
        assert error.file.endswith("tickets.odcs.yaml")
        assert error.reason
        assert error.remedy.endswith(".")
    return errors


def test_everything_promised_is_read(folder: Path) -> None:
    contract = load_one(folder, TICKETS)
    path = folder / "tickets.odcs.yaml"
    assert (contract.name, contract.version, contract.owner) == ("tickets", "1.2.0", "support-operations")
    assert (contract.description, contract.grain) == ("What customers ask.", "One row per ticket.")
    assert (contract.provenance, contract.pii, contract.allowed_uses) == (
        "proprietary",
        True,
        ("rag", "finetune"),
    )
    assert (contract.kind, contract.format, contract.max_refused_share) == ("table", "csv", 0.1)
    assert contract.freshness_days == 30
    assert contract.pattern == f"{folder.parent}/data/tickets/*.csv"
    assert (contract.folder, contract.glob) == (folder.parent / "data" / "tickets", "*.csv")
    assert (contract.file, contract.sha256) == (path, hashlib.sha256(path.read_bytes()).hexdigest())
    key, opened, status, body = contract.columns
    assert (key.name, key.type, key.required, key.primary_key) == ("ticket_id", "string", True, True)
    assert (key.pattern, key.max_length, key.min_length) == ("^T-[0-9]{4}$", 6, None)
    assert opened.minimum == datetime(2019, 12, 31, 23, tzinfo=UTC)
    assert (status.valid_values, status.required, body.pii) == (("open", "closed"), False, True)
    assert contract.primary_key == ("ticket_id",)
    assert contract.corpus == CorpusMapping(id="ticket_id", text="body")
    assert contract.expectations == (
        Expectation(
            "table_row_count_to_be_between", "expect_table_row_count_to_be_between", {"min_value": 1}, "error"
        ),
        Expectation(
            "body_column_value_lengths_to_be_between",
            "expect_column_value_lengths_to_be_between",
            {"column": "body", "min_value": 1},
            "warning",
        ),
    )


def test_documents_source_and_variables(folder: Path) -> None:
    contract = load_one(folder, HANDBOOK)
    assert (contract.kind, contract.columns) == ("documents", ())
    assert (contract.folder, contract.glob) == (Path("/data"), "**/*.md")


def test_wildcards_in_a_variable_are_taken_literally(folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a[b]*"
    (odd / "x").mkdir(parents=True)
    (odd / "x" / "1.md").write_text("1")
    save(folder, "h", HANDBOOK)
    [contract], _ = load_contracts([folder], {"DATA": str(odd)})
    assert [path.name for path in contract.folder.glob(contract.glob)] == ["1.md"]


def test_golden_set_names_the_source_of_its_documents(folder: Path) -> None:
    golden = copy.deepcopy(TICKETS) | {"name": "questions"}
    mapping = {"question": "body", "document": "ticket_id", "document_source": "handbook"}
    golden["schema"][0]["customProperties"] = [{"property": "golden", "value": mapping}]
    save(folder, "questions", golden)
    contracts, errors = load_contracts([folder], {"DATA": "/data"})
    assert (contracts, [error.rule for error in errors]) == ([], ["unknown_source"])
    save(folder, "handbook", HANDBOOK)
    contracts, errors = load_contracts([folder], {"DATA": "/data"})
    assert not errors
    assert contracts[1].kind == "golden"
    assert contracts[1].golden == GoldenMapping("body", "ticket_id", "handbook")


@pytest.mark.parametrize(
    ("rule", "column", "expected"),
    [
        ({"metric": "rowCount", "mustBeBetween": [1, 9]}, None, {"min_value": 1, "max_value": 9}),
        ({"metric": "rowCount", "mustBeGreaterThan": 1}, None, {"min_value": 2}),
        ({"metric": "rowCount", "mustBeLessThan": 9}, None, {"max_value": 8}),
        ({"metric": "rowCount", "mustBe": 9}, None, {"min_value": 9, "max_value": 9}),
        ({"metric": "nullValues", "mustBe": 0}, "body", {"column": "body"}),
        ({"metric": "nullValues", "mustBeLessOrEqualTo": 25, "unit": "percent"}, "body", {"column": "body", "mostly": 0.75}),
        ({"metric": "nullValues", "mustBe": 0, "arguments": {"properties": ["body"]}}, None, {"column": "body"}),
        ({"metric": "duplicateValues", "mustBe": 0}, "body", {"column": "body"}),
        (
            {"metric": "duplicateValues", "mustBe": 0, "arguments": {"properties": ["body", "status"]}},
            None,
            {"column_list": ["body", "status"]},
        ),
        (
            {
                "metric": "invalidValues",
                "mustBeLessOrEqualTo": 1,
                "unit": "percent",
                "arguments": {"validValues": ["a"]},
            },
            "body",
            {"column": "body", "mostly": 0.99, "value_set": ["a"]},
        ),
        (
            {
                "type": "custom",
                "engine": "great-expectations",
                "implementation": {"type": "expect_column_values_to_match_regex", "kwargs": {"regex": "x"}},
            },
            "body",
            {"column": "body", "regex": "x"},
        ),
    ],
)  # fmt: skip
def test_quality_rules_become_expectations(
    folder: Path, rule: dict[str, Any], column: str | None, expected: dict[str, Any]
) -> None:
    content = copy.deepcopy(TICKETS)
    content["schema"][0]["quality"] = [] if column else [rule]
    if column:
        content["schema"][0]["properties"][3]["quality"] = [rule]
    [expectation] = load_one(folder, content).expectations
    assert expectation.kwargs == expected
    assert expectation.severity == "error"


@pytest.mark.parametrize(
    "name",
    [
        "expect_table_row_count_to_be_between",
        "expect_column_values_to_not_be_null",
        "expect_column_values_to_be_unique",
        "expect_compound_columns_to_be_unique",
        "expect_column_values_to_be_in_set",
        "expect_column_values_to_match_regex",
    ],
)
def test_expectation_names_are_those_of_great_expectations(name: str) -> None:
    spec = find_spec("great_expectations")
    assert spec is not None
    assert (Path(str(spec.origin)).parent / "expectations" / "core" / f"{name}.py").exists()


Change = Callable[[dict[str, Any]], None]


def put(*path: Any) -> Change:
    """A change that sets the last of ``path`` at the place that the others lead to."""

    def change(content: dict[str, Any]) -> None:
        *steps, key, value = path
        place: Any = content
        for step in steps:
            place = place[step]
        place[key] = value

    return change


def drop(*path: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        place: Any = content
        for step in path[:-1]:
            place = place[step]
        del place[path[-1]]

    return change


PROPERTIES = ("schema", 0, "properties")


@pytest.mark.parametrize(
    ("change", "rule", "shown"),
    [
        (put("kind", "Table"), "not_a_contract", "kind: DataContract"),
        (put("servers", "x"), "not_a_contract", "servers"),
        (put("version", 1.0), "not_a_contract", "version"),
        (put("surprise", 1), "not_a_contract", "surprise"),
        (put("apiVersion", "v2.2.2"), "wrong_api_version", "v2.2.2"),
        (drop("apiVersion"), "wrong_api_version", "None"),
        (put("name", "Tickets"), "bad_name", "Tickets"),
        (put("name", "a" * 64), "bad_name", "aaa"),
        (drop("name"), "bad_name", "None"),
        (drop("version"), "missing_version", "version"),
        (drop("team"), "missing_owner", "team"),
        (put("team", {}), "missing_owner", "team"),
        (drop("customProperties", 0), "missing_provenance", "provenance"),
        (put("customProperties", 0, "value", "mine"), "bad_provenance", "mine"),
        (put("customProperties", 1, "value", "perhaps"), "bad_pii", "perhaps"),
        (put("customProperties", 1, "value", False), "pii_conflict", "classified"),
        (drop("customProperties", 2), "missing_allowed_uses", "allowedUses"),
        (put("customProperties", 2, "value", ["resale"]), "bad_allowed_uses", "resale"),
        (put("customProperties", 3, "value", 5), "bad_max_refused_share", "5"),
        (put("customProperties", 3, {"property": "language", "value": "German"}), "bad_language", "German"),
        (put("customProperties", 3, {"property": "language", "value": False}), "bad_language", "False"),
        (drop("servers"), "missing_server", "0 servers"),
        (put("servers", []), "missing_server", "0 servers"),
        (put("servers", 0, "type", "kafka"), "unknown_server", "kafka"),
        (put("servers", 0, "format", "xls"), "unknown_format", "xls"),
        (drop("servers", 0, "path"), "missing_path", "path"),
        (put("servers", 0, "path", "data/"), "bad_path", "data/"),
        (put("servers", 0, "path", "${HOME}/x.csv"), "undefined_variable", "${HOME}"),
        (put("servers", 0, "delimiter", "||"), "bad_delimiter", "||"),
        (put("servers", 0, "encoding", "klingon"), "unknown_encoding", "klingon"),
        (drop("schema"), "missing_schema", "0 schema"),
        (put("schema", 0, "properties", []), "missing_schema", "properties"),
        (put("schema", [{"name": "a"}, {"name": "b"}]), "too_many_schemas", "2 schema"),
        (put(*PROPERTIES, 0, "requird", True), "unknown_field", "schema[0].properties[0].requird"),
        (put(*PROPERTIES, 0, "name", "_row"), "bad_column", "_row"),
        (put(*PROPERTIES, 0, "name", "ctid"), "bad_column", "ctid"),
        (put(*PROPERTIES, 0, "physicalName", "ID"), "bad_column", "physicalName"),
        (put(*PROPERTIES, 1, "name", "status"), "duplicate_column", "status"),
        (put(*PROPERTIES, 1, "logicalType", "datetime"), "unknown_type", "datetime"),
        (put(*PROPERTIES, 0, "logicalType", "object"), "bad_key", "object"),
        (put(*PROPERTIES, 0, "logicalTypeOptions", "pattern", "(?=x)"), "bad_pattern", "ticket_id"),
        (put(*PROPERTIES, 0, "logicalTypeOptions", "maxLength", -1), "bad_option", "maxLength"),
        (put(*PROPERTIES, 0, "logicalTypeOptions", "format", "email"), "unknown_option", "format"),
        (put(*PROPERTIES, 1, "logicalTypeOptions", "minimum", "soon"), "bad_value", "soon"),
        (put(*PROPERTIES, 2, "quality", 0, "arguments", "validValues", ["on", True]), "bad_value", "True"),
        (put(*PROPERTIES, 2, "quality", 0, "arguments", {}), "unknown_quality_rule", "invalidValues"),
        (put(*PROPERTIES, 2, "quality", 0, "mustBe", 3), "unknown_quality_rule", "mustBe: 0"),
        (put("schema", 0, "quality", 0, "metric", "freshness"), "unknown_quality_rule", "freshness"),
        (put("schema", 0, "quality", 0, "type", "sql"), "unknown_quality_rule", "sql"),
        (put("schema", 0, "quality", 0, "severity", "fatal"), "unknown_severity", "fatal"),
        (put("schema", 0, "quality", 1, "engine", "soda"), "unknown_quality_rule", "soda"),
        (put("schema", 0, "quality", 1, "implementation", "type", "length"), "unknown_quality_rule", "length"),
        (put("schema", 0, "quality", 1, "implementation", "kwargs", "column", "text"), "unknown_column", "text"),
        (put("schema", 0, "customProperties", 0, "value", "text", "story"), "unknown_column", "story"),
        (put("schema", 0, "customProperties", 0, "value", {"id": "ticket_id"}), "bad_corpus", "corpus"),
        (put("schema", 0, "customProperties", 0, "value", "id", "status"), "bad_key", "status"),
        (put("schema", 0, "customProperties", 0, "property", "korpus"), "unknown_field", "korpus"),
        (put("slaProperties", 0, "unit", "fortnight"), "bad_latency", "fortnight"),
        (put("slaProperties", 0, "value", "often"), "bad_latency", "often"),
    ],
)  # fmt: skip
def test_contract_that_cannot_be_kept_is_refused(folder: Path, change: Change, rule: str, shown: str) -> None:
    content = copy.deepcopy(TICKETS)
    change(content)
    errors = errors_of(folder, content)
    assert rule in [error.rule for error in errors]
    assert any(shown in error.reason for error in errors if error.rule == rule)


def test_all_errors_of_a_file_are_told_at_once(folder: Path) -> None:
    content = copy.deepcopy(TICKETS)
    del content["team"]
    content["name"] = "1"
    content["servers"][0]["format"] = "xls"
    errors = errors_of(folder, content)
    assert [error.rule for error in errors] == ["bad_name", "missing_owner", "unknown_format"]
    assert str(ContractErrors(errors)).count("\n") == 2


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("a: [", "not_yaml"),
        ("- 1", "not_a_contract"),
        ("", "not_a_contract"),
        ("kind: DataContract", "bad_name"),
    ],
)
def test_file_that_is_no_contract_is_refused(folder: Path, content: str, rule: str) -> None:
    assert rule in [error.rule for error in errors_of(folder, content)]


def test_file_that_cannot_be_read_is_refused(folder: Path) -> None:
    (folder / "tickets.odcs.yaml").mkdir()
    (folder / "latin.odcs.yaml").write_bytes(b"name: caf\xe9")
    contracts, errors = load_contracts([folder], {})
    assert contracts == []
    assert [error.rule for error in errors] == ["not_yaml", "unreadable_file"]


def test_two_contracts_of_one_name_are_both_refused(folder: Path) -> None:
    for name, content in (("a", TICKETS), ("b", TICKETS), ("c", HANDBOOK)):
        save(folder, name, content)
    contracts, errors = load_contracts([folder], {"DATA": "/data"})
    assert [contract.name for contract in contracts] == ["handbook"]
    assert [error.rule for error in errors] == ["duplicate_name", "duplicate_name"]
    assert "b.odcs.yaml" in errors[0].reason


def test_missing_folder_is_an_error_of_its_own(folder: Path) -> None:
    save(folder, "tickets", TICKETS)
    contracts, errors = load_contracts([folder, folder / "absent"], {})
    assert len(contracts) == 1
    assert [error.rule for error in errors] == ["missing_folder"]


def test_yaml_dates_are_dates(folder: Path) -> None:
    content = copy.deepcopy(TICKETS)
    content["schema"][0]["properties"].append(
        {"name": "day", "logicalType": "date", "logicalTypeOptions": {"minimum": date(2020, 1, 1)}}
    )
    assert load_one(folder, content).columns[-1].minimum == date(2020, 1, 1)


def test_the_language_is_english_unless_stated(folder: Path) -> None:
    assert load_one(folder, TICKETS).language == "en"
    stated = copy.deepcopy(TICKETS)
    stated["customProperties"].append({"property": "language", "value": "de"})
    assert load_one(folder, stated).language == "de"


def test_unstated_pii_counts_as_personal(folder: Path) -> None:
    content = copy.deepcopy(TICKETS)
    del content["customProperties"][1]
    assert load_one(folder, content).pii is True


@pytest.mark.parametrize(
    ("changes", "rule", "says"),
    [
        ({"answer_start": "ticket_id"}, "bad_golden", "answer_start but no answer"),
        ({"question_source": "handbook"}, "bad_golden", "question_source but no question_key"),
        ({"answer": "reply"}, "unknown_column", "golden.answer is 'reply'"),
        (
            {"question_source": "claims", "question_key": "ticket_id"},
            "unknown_source",
            "question_source 'claims'",
        ),
        (
            {"question_source": "tickets", "question_key": "ticket_id", "question": "text"},
            "unknown_column",
            "golden.question is 'text'",
        ),
    ],
)
def test_a_golden_set_names_what_there_is(
    folder: Path, changes: dict[str, str], rule: str, says: str
) -> None:
    golden = copy.deepcopy(TICKETS) | {"name": "questions"}
    mapping = {"question": "body", "document": "ticket_id", "document_source": "tickets"} | changes
    golden["schema"][0]["customProperties"] = [{"property": "golden", "value": mapping}]
    save(folder, "questions", golden)
    save(folder, "tickets", TICKETS)
    (error,) = load_contracts([folder], {})[1]
    assert error.rule == rule and says in str(error)


def test_a_golden_set_may_have_its_questions_elsewhere(folder: Path) -> None:
    golden = copy.deepcopy(TICKETS) | {"name": "citations"}
    mapping = {
        "question": "body",
        "document": "ticket_id",
        "document_source": "tickets",
        "question_source": "tickets",
        "question_key": "ticket_id",
    }
    golden["schema"][0]["customProperties"] = [{"property": "golden", "value": mapping}]
    save(folder, "citations", golden)
    save(folder, "tickets", TICKETS)
    contracts, errors = load_contracts([folder], {})
    assert errors == []
    assert contracts[0].golden == GoldenMapping(**mapping)


def test_sections_of_a_document_are_an_array(folder: Path) -> None:
    changed = copy.deepcopy(TICKETS)
    changed["schema"][0]["customProperties"] = [
        {"property": "corpus", "value": {"id": "ticket_id", "text": "body", "sections": "body"}}
    ]
    save(folder, "tickets", changed)
    (error,) = load_contracts([folder], {})[1]
    assert error.rule == "bad_corpus" and "sections" in str(error)

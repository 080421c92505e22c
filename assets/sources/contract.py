"""Contracts: what each source promises, read from Open Data Contract Standard v3 YAML.

Belongs here: turning contract files into plain values, and refusing a contract that promises something this
pipeline cannot keep. Does not belong here: source files, rows, Postgres.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow as pa
import pyarrow.compute as pc
import yaml
from open_data_contract_standard import model as odcs
from pydantic import BaseModel, ValidationError

SUFFIX = ".odcs.yaml"
NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
VARIABLE = re.compile(r"\$\{(\w+)\}")
DEFAULT_MAX_REFUSED_SHARE = 0.05

Kind = Literal["table", "documents", "golden"]
Format = Literal["csv", "jsonl", "parquet", "documents"]
Severity = Literal["error", "warning", "info"]
Scalar = str | int | float | bool | date | datetime

PROVENANCES = ("proprietary", "third_party")
USES = ("rag", "finetune", "eval")
FORMATS = ("csv", "jsonl", "parquet", "documents")
TYPES = ("string", "integer", "number", "boolean", "date", "timestamp", "object", "array")
SEVERITIES: Mapping[str, Severity] = {
    "error": "error",
    "critical": "error",
    "warning": "warning",
    "info": "info",
}
OPTIONS = {
    "string": {"pattern", "minLength", "maxLength"},
    "integer": {"minimum", "maximum"},
    "number": {"minimum", "maximum"},
    "date": {"minimum", "maximum"},
    "timestamp": {"minimum", "maximum"},
}
DAYS = {"d": 1.0, "day": 1.0, "days": 1.0, "h": 1 / 24, "hr": 1 / 24, "hour": 1 / 24, "hours": 1 / 24}
# Every raw table has these of ours, and Postgres gives every table those below; a contract cannot have its own.
OUR_COLUMNS = {"_source", "_row", "_loaded_at", "_content_hash"} | {
    # Names the search for repeated keys gives to what it finds.
    *("_place", "_nth", "_first_file", "_first_row", "_whole"),
}
SYSTEM_COLUMNS = {"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"}


class ContractError(Exception):
    """One thing wrong with one contract file.

    Attributes:
        file: The contract file (or the folder that is missing).
        rule: Short name of what was broken, e.g. ``missing_owner``.
        reason: What is wrong, in a sentence.
        remedy: What to do about it.
    """

    def __init__(self, file: Path, rule: str, reason: str, remedy: str) -> None:
        super().__init__(f"{file}: {rule}: {reason}. {remedy}")
        self.file, self.rule, self.reason, self.remedy = str(file), rule, reason, remedy


class ContractErrors(Exception):
    """Everything wrong with a set of contract files, for a caller that cannot go on without all of them."""

    def __init__(self, errors: Sequence[ContractError]) -> None:
        super().__init__("\n".join(str(error) for error in errors))
        self.errors = list(errors)


@dataclass(frozen=True)
class Column:
    """One promised column and the rules that each of its values keeps."""

    name: str
    type: str
    required: bool = False
    primary_key: bool = False
    unique: bool = False
    pattern: str | None = None
    min_length: int | None = None
    max_length: int | None = None
    minimum: Scalar | None = None
    maximum: Scalar | None = None
    valid_values: tuple[Scalar, ...] | None = None
    pii: bool = False
    description: str = ""


@dataclass(frozen=True)
class CorpusMapping:
    """The columns that make a document of a row. ``sections``: headings above its text, an array, outermost first."""

    id: str
    text: str
    title: str | None = None
    sections: str | None = None


@dataclass(frozen=True)
class GoldenMapping:
    """The columns of a retrieval golden set: a question and the document that answers it.

    Attributes:
        question: Its text, in ``question_source`` if there is one.
        document: A path or row key in ``document_source``.
        answer: The words in the document that answer it, or a list of objects with ``text`` and ``answer_start``, any
            of which does. Without, the whole document does.
        answer_start: Where ``answer`` begins in the document's text, in code points.
        question_source: The source whose rows are the questions, where a question has a row for each right document.
        question_key: The column with the primary key of ``question_source``.
    """

    question: str
    document: str
    document_source: str
    answer: str | None = None
    answer_start: str | None = None
    question_source: str | None = None
    question_key: str | None = None


@dataclass(frozen=True)
class Expectation:
    """A table-level gate: a Great Expectations type (snake case) and its arguments."""

    name: str
    type: str
    kwargs: Mapping[str, Any]
    severity: Severity


@dataclass(frozen=True)
class Contract:
    """One source: who answers for it, where its files are, what they promise, what they may be used for.

    Attributes:
        folder: Absolute folder below which the files are; file names are told relative to it.
        glob: Pattern below ``folder``.
        sha256: Of the contract file's bytes.
        language: ISO 639-1 code of what its texts are written in; words are stemmed by it.
        freshness_days: Age above which the newest data is stale; None where nothing is promised.
        max_refused_share: Share of refused rows above which the source is stopped.
    """

    name: str
    version: str
    owner: str
    description: str
    grain: str
    provenance: str
    pii: bool
    allowed_uses: tuple[str, ...]
    freshness_days: float | None
    kind: Kind
    format: Format
    folder: Path
    glob: str
    file: Path
    sha256: str
    columns: tuple[Column, ...] = ()
    corpus: CorpusMapping | None = None
    golden: GoldenMapping | None = None
    expectations: tuple[Expectation, ...] = ()
    max_refused_share: float = DEFAULT_MAX_REFUSED_SHARE
    delimiter: str = ","
    encoding: str = "utf-8"
    language: str = "en"

    @property
    def pattern(self) -> str:
        """The absolute glob, for people to read."""
        return f"{self.folder}/{self.glob}"

    @property
    def primary_key(self) -> tuple[str, ...]:
        """Names of the key columns; empty where the contract promises no key."""
        return tuple(column.name for column in self.columns if column.primary_key)


def load_contracts(
    folders: Sequence[Path], variables: Mapping[str, str]
) -> tuple[list[Contract], list[ContractError]]:
    """Read every ``*.odcs.yaml`` directly in ``folders``.

    A contract with an error is left out and never hides the others. Two contracts of one name are both
    left out: neither can be preferred.

    Args:
        folders: Folders of contract files.
        variables: What ``${NAME}`` in a server's path stands for.

    Returns:
        The good contracts by name, and everything wrong with the others.
    """
    contracts: list[Contract] = []
    errors: list[ContractError] = []
    for folder in folders:
        if not folder.is_dir():
            errors.append(
                ContractError(
                    folder, "missing_folder", "there is no such folder", "Create it or correct the settings."
                )
            )
            continue
        for file in sorted(folder.glob(f"*{SUFFIX}")):
            loaded = load_contract(file, variables)
            if isinstance(loaded, Contract):
                contracts.append(loaded)
            else:
                errors.extend(loaded)

    by_name: dict[str, list[Contract]] = {}
    for contract in contracts:
        by_name.setdefault(contract.name, []).append(contract)
    for name, same in by_name.items():
        for contract in same if len(same) > 1 else ():
            others = ", ".join(str(other.file) for other in same if other is not contract)
            errors.append(
                ContractError(
                    contract.file,
                    "duplicate_name",
                    f"source {name!r} is also promised by {others}",
                    "Give one of them another name, or remove it.",
                )
            )
    good = {name: same[0] for name, same in by_name.items() if len(same) == 1}
    if not errors:  # otherwise the source asked for may be one of those left out
        for contract in list(good.values()):
            if contract.golden and (wrong := _wrong_source(contract, contract.golden, good)):
                errors.append(wrong)
                del good[contract.name]
    return [good[name] for name in sorted(good)], errors


def _wrong_source(
    contract: Contract, golden: GoldenMapping, good: Mapping[str, Contract]
) -> ContractError | None:
    for field, source in (
        ("document_source", golden.document_source),
        ("question_source", golden.question_source),
    ):
        if source is not None and source not in good:
            return ContractError(
                contract.file,
                "unknown_source",
                f"golden {field} {source!r} is no source",
                f"Name one of: {', '.join(sorted(good))}.",
            )
    if golden.question_source is not None:
        questions = good[golden.question_source]
        if (
            golden.question not in {column.name for column in questions.columns}
            or key_column(questions) is None
        ):
            return ContractError(
                contract.file,
                "unknown_column",
                f"golden.question is {golden.question!r}",
                f"Name a column of {questions.name}, which needs one primaryKey column.",
            )
    return None


def key_column(contract: Contract) -> str | None:
    """The column that is the primary key by itself; None where there is none."""
    keys = [column.name for column in contract.columns if column.primary_key]
    return keys[0] if len(keys) == 1 else None


def load_contract(file: Path, variables: Mapping[str, str]) -> Contract | list[ContractError]:
    """Read one contract file; returns everything wrong with it instead, if anything is."""
    try:
        content = file.read_bytes()
    except OSError as error:
        return [
            ContractError(
                file, "unreadable_file", error.strerror or str(error), "Make it a file that can be read."
            )
        ]
    try:
        raw = yaml.safe_load(content.decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return [ContractError(file, "not_yaml", _one_line(error), "Correct the YAML at the place named.")]
    if not isinstance(raw, dict) or raw.get("kind") != "DataContract":
        return [
            ContractError(
                file,
                "not_a_contract",
                "there is no 'kind: DataContract'",
                "Write an Open Data Contract Standard v3 contract, or rename the file.",
            )
        ]
    try:
        parsed = odcs.OpenDataContractStandard(**raw)
    except (ValidationError, TypeError) as error:
        return [
            ContractError(file, "not_a_contract", reason, "Correct the field; quote versions and names.")
            for reason in _validation_reasons(error)
        ]
    return _Builder(file, hashlib.sha256(content).hexdigest(), variables).build(parsed, raw)


class _Builder:
    """Collects every error of one contract file while its values are taken out."""

    def __init__(self, file: Path, sha256: str, variables: Mapping[str, str]) -> None:
        self.file, self.sha256, self.variables = file, sha256, variables
        self.errors: list[ContractError] = []

    def error(self, rule: str, reason: str, remedy: str) -> None:
        self.errors.append(ContractError(self.file, rule, reason, remedy))

    def build(
        self, parsed: odcs.OpenDataContractStandard, raw: Mapping[str, Any]
    ) -> Contract | list[ContractError]:
        for where in _unknown_fields(parsed, raw):
            self.error("unknown_field", f"{where} is not part of the standard", "Correct its spelling.")
        if not re.match(r"v?3\.", parsed.apiVersion or ""):
            self.error("wrong_api_version", f"apiVersion is {parsed.apiVersion!r}", "Use apiVersion: v3.1.0.")
        name = parsed.name or ""
        if not NAME.fullmatch(name):
            self.error(
                "bad_name",
                f"name is {parsed.name!r}",
                "Use lower case, digits and _, starting with a letter.",
            )
        if not parsed.version:
            self.error("missing_version", "there is no version", "Add version: 1.0.0.")
        owner = parsed.team.name if isinstance(parsed.team, odcs.Team) else None
        if not owner:
            self.error("missing_owner", "no team answers for this source", "Add team: {name: ...}.")

        custom: dict[str | None, Any] = {
            entry.property: entry.value for entry in parsed.customProperties or ()
        }
        provenance = self.choice(custom, "provenance", PROVENANCES)
        uses = self.allowed_uses(custom)
        pii = self.pii(custom)
        language = self.language(custom)
        share = custom.get("maxRefusedShare", DEFAULT_MAX_REFUSED_SHARE)
        if not _is_number(share) or not 0 <= share <= 1:
            self.error("bad_max_refused_share", f"maxRefusedShare is {share!r}", "Give a share from 0 to 1.")
            share = DEFAULT_MAX_REFUSED_SHARE

        server = self.server(parsed)
        form = self.format(server)
        folder, pattern = self.location(server)
        encoding = self.encoding(server)
        delimiter = (server.delimiter if server else None) or ","
        if len(delimiter.encode()) != 1 or delimiter in '"\r\n':
            self.error("bad_delimiter", f"delimiter is {delimiter!r}", "Give one ASCII character.")

        table = self.table(parsed)
        columns: tuple[Column, ...] = ()
        expectations: tuple[Expectation, ...] = ()
        corpus = golden = None
        if table is not None:
            gates: list[tuple[odcs.DataQuality, str | None]] = []
            columns = self.columns(table, form, gates)
            if any(column.pii for column in columns) and not pii:
                self.error("pii_conflict", "pii is false but a column is classified pii", "Set pii: true.")
            gates += [(quality, None) for quality in table.quality or ()]
            expectations = self.expectations(gates, {column.name for column in columns})
            corpus, golden = self.mappings(table, {column.name: column for column in columns})

        freshness = self.freshness(parsed)
        if self.errors:
            return self.errors
        kind: Kind = "documents" if form == "documents" else "golden" if golden else "table"
        description = parsed.description.purpose if parsed.description else None
        return Contract(
            name=name,
            version=str(parsed.version),
            owner=str(owner),
            description=description or "",
            grain=(table.description if table else None) or "",
            provenance=provenance,
            pii=pii,
            allowed_uses=uses,
            freshness_days=freshness,
            kind=kind,
            format=cast(Format, form),
            folder=folder,
            glob=pattern,
            file=self.file,
            sha256=self.sha256,
            columns=columns,
            corpus=corpus,
            golden=golden,
            expectations=expectations,
            max_refused_share=float(share),
            delimiter=delimiter,
            encoding=encoding,
            language=language,
        )

    def choice(self, custom: Mapping[str | None, Any], name: str, known: Sequence[str]) -> str:
        value = custom.get(name)
        if value is None:
            self.error(
                f"missing_{name}",
                f"there is no custom property {name}",
                f"Add {name}: one of {', '.join(known)}.",
            )
        elif value not in known:
            self.error(f"bad_{name}", f"{name} is {value!r}", f"Use one of {', '.join(known)}.")
        return str(value)

    def allowed_uses(self, custom: Mapping[str | None, Any]) -> tuple[str, ...]:
        uses = custom.get("allowedUses")
        remedy = f"List what the source may be used for, of {', '.join(USES)}; [] allows nothing."
        if uses is None:
            self.error("missing_allowed_uses", "there is no custom property allowedUses", remedy)
            return ()
        if not isinstance(uses, list) or any(use not in USES for use in uses):
            self.error("bad_allowed_uses", f"allowedUses is {uses!r}", remedy)
            return ()
        return tuple(use for use in USES if use in uses)

    def pii(self, custom: Mapping[str | None, Any]) -> bool:
        # What nobody has looked at is treated as personal.
        value = custom.get("pii", True)
        if not isinstance(value, bool):
            self.error("bad_pii", f"pii is {value!r}", "Use true or false.")
            return True
        return value

    def language(self, custom: Mapping[str | None, Any]) -> str:
        value = custom.get("language", "en")
        # Bare no is false in YAML.
        if not isinstance(value, str) or not re.fullmatch("[a-z]{2}", value):
            self.error(
                "bad_language", f"language is {value!r}", 'Give its ISO 639-1 code, such as en, de or "no".'
            )
            return "en"
        return value

    def server(self, parsed: odcs.OpenDataContractStandard) -> odcs.Server | None:
        servers = parsed.servers or []
        if len(servers) != 1:
            self.error(
                "missing_server" if not servers else "too_many_servers",
                f"there are {len(servers)} servers",
                "Give exactly one, of type local, with path and format.",
            )
            return None
        if servers[0].type != "local":
            self.error("unknown_server", f"the server's type is {servers[0].type!r}", "Use type: local.")
        return servers[0]

    def format(self, server: odcs.Server | None) -> str:
        form = server.format if server else None
        if server is not None and form not in FORMATS:
            self.error("unknown_format", f"format is {form!r}", f"Use one of {', '.join(FORMATS)}.")
        return form or ""

    def encoding(self, server: odcs.Server | None) -> str:
        name = (server.encoding if server else None) or "utf-8"
        try:
            b"a".decode(name)
        except (LookupError, ValueError):
            self.error(
                "unknown_encoding", f"encoding is {name!r}", "Use a name Python knows, such as cp1252."
            )
        return name

    def location(self, server: odcs.Server | None) -> tuple[Path, str]:
        """The folder above the first part with a wildcard, and the pattern below it."""
        if server is None:
            return Path(), ""
        if not server.path:
            self.error("missing_path", "the server has no path", "Add path: the files, relative to this one.")
            return Path(), ""
        missing = [name for name in VARIABLE.findall(server.path) if name not in self.variables]
        if missing:
            self.error(
                "undefined_variable",
                f"the path uses undefined ${{{missing[0]}}}",
                f"Use one of {', '.join(sorted(self.variables)) or 'no variables at all'}.",
            )
            return Path(), ""
        parts = server.path.split("/")
        if parts[-1] in ("", ".", "..", "**"):
            self.error("bad_path", f"the path {server.path!r} names no files", "End it with a file pattern.")
        # Wildcards count only where the contract wrote them: a variable's value is taken literally.
        first = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
        literal = "/".join(
            VARIABLE.sub(lambda match: self.variables[match[1]], part) for part in parts[:first]
        )
        if first and not literal:
            literal = "/"
        pattern = "/".join(
            VARIABLE.sub(lambda match: glob.escape(self.variables[match[1]]), part) for part in parts[first:]
        )
        folder = Path(os.path.normpath(self.file.parent.absolute() / literal))
        return folder, pattern

    def table(self, parsed: odcs.OpenDataContractStandard) -> odcs.SchemaObject | None:
        tables = parsed.schema_ or []
        if len(tables) != 1:
            self.error(
                "missing_schema" if not tables else "too_many_schemas",
                f"there are {len(tables)} schema objects",
                "Give exactly one: a contract promises one source.",
            )
            return None
        return tables[0]

    def columns(
        self, table: odcs.SchemaObject, form: str, gates: list[tuple[odcs.DataQuality, str | None]]
    ) -> tuple[Column, ...]:
        properties = table.properties or []
        if form == "documents":
            if properties:
                self.error("documents_have_no_columns", "a documents source lists properties", "Remove them.")
            return ()
        if not properties:
            self.error("missing_schema", "the schema lists no properties", "List the columns of the files.")
        columns: list[Column] = []
        for entry in properties:
            column = self.column(entry, gates)
            if any(column.name == other.name for other in columns):
                self.error("duplicate_column", f"column {column.name!r} is listed twice", "Remove one.")
            columns.append(column)
        return tuple(columns)

    def column(self, entry: odcs.SchemaProperty, gates: list[tuple[odcs.DataQuality, str | None]]) -> Column:
        name = entry.name or ""
        if (
            not name
            or name in OUR_COLUMNS
            or "\0" in name
            or len(name.encode()) > 63
            or name in SYSTEM_COLUMNS
        ):
            self.error(
                "bad_column",
                f"a column is called {entry.name!r}",
                "Use 1 to 63 bytes, and no name that Postgres or the raw tables keep for themselves.",
            )
        if entry.physicalName and entry.physicalName != name:
            self.error(
                "bad_column",
                f"column {name!r} has another physicalName",
                "Name the column as the files name it.",
            )
        kind = entry.logicalType or ""
        if kind not in TYPES:
            self.error(
                "unknown_type",
                f"column {name!r} has logicalType {entry.logicalType!r}",
                f"Use one of {TYPES}.",
            )
        column = Column(
            name=name,
            type=kind,
            required=bool(entry.required) or bool(entry.primaryKey),
            primary_key=bool(entry.primaryKey),
            unique=bool(entry.unique),
            pii=(entry.classification or "").lower() == "pii",
            description=entry.description or "",
        )
        if kind in ("object", "array") and (column.primary_key or column.unique):
            self.error("bad_key", f"column {name!r} is a key but an {kind}", "Use a column of one value.")
        column = self.options(column, entry.logicalTypeOptions or {})
        for quality in entry.quality or ():
            if _metric(quality) == "invalidValues" and quality.mustBe == 0:
                column = self.row_rule(column, quality.arguments or {})
            else:
                gates.append((quality, name))
        return column

    def options(self, column: Column, options: Mapping[str, Any]) -> Column:
        for option in sorted(set(options) - OPTIONS.get(column.type, set())):
            self.error(
                "unknown_option",
                f"column {column.name!r} has logicalTypeOptions.{option}",
                f"For {column.type or 'this type'} use: {', '.join(sorted(OPTIONS.get(column.type, ()))) or 'none'}.",
            )
        for option in ("minLength", "maxLength"):
            value = options.get(option)
            if value is not None and (type(value) is not int or value < 0):
                self.error(
                    "bad_option", f"column {column.name!r} has {option} {value!r}", "Give a whole number."
                )
                options = {**options, option: None}
        return replace(
            column,
            pattern=self.regex(column, options.get("pattern")),
            min_length=options.get("minLength"),
            max_length=options.get("maxLength"),
            minimum=self.scalar(column, options.get("minimum")),
            maximum=self.scalar(column, options.get("maximum")),
        )

    def regex(self, column: Column, pattern: Any) -> str | None:
        if pattern is None:
            return None
        try:
            pc.match_substring_regex(pa.nulls(1, pa.string()), pattern=str(pattern))
        except pa.ArrowInvalid as error:
            self.error(
                "bad_pattern",
                f"column {column.name!r}: {_one_line(error)}",
                "Use RE2 syntax: no look-around, no back-references.",
            )
        return str(pattern)

    def scalar(self, column: Column, value: Any) -> Scalar | None:
        """``value`` as the column's type; YAML turns bare words and dates into other types than meant."""
        if value is None:
            return None
        try:
            return _scalar(column.type, value)
        except (TypeError, ValueError):
            self.error(
                "bad_value",
                f"column {column.name!r} is {column.type} but a rule gives {value!r}",
                "Give a value of the column's type; quote words such as yes, no, on and off.",
            )
            return None

    def row_rule(self, column: Column, arguments: Mapping[str, Any]) -> Column:
        values = arguments.get("validValues")
        unknown = set(arguments) - {"validValues", "pattern"}
        if unknown or not arguments or (values is not None and not (isinstance(values, list) and values)):
            self.error(
                "unknown_quality_rule",
                f"column {column.name!r}: invalidValues with arguments {sorted(arguments)}",
                "Give arguments: {validValues: [...]} or {pattern: ...}.",
            )
            return column
        if column.type in ("object", "array") and values is not None:
            self.error(
                "bad_value",
                f"column {column.name!r} is an {column.type}",
                "Use validValues on single values.",
            )
            return column
        if values is not None:
            known = tuple(self.scalar(column, value) for value in values)
            column = replace(column, valid_values=tuple(value for value in known if value is not None))
        if "pattern" in arguments:
            if column.type != "string" or column.pattern is not None:
                self.error(
                    "bad_pattern",
                    f"column {column.name!r} is no string or has a pattern already",
                    "Give one pattern, on a string column.",
                )
            column = replace(column, pattern=self.regex(column, arguments["pattern"]))
        return column

    def expectations(
        self, gates: Sequence[tuple[odcs.DataQuality, str | None]], columns: set[str]
    ) -> tuple[Expectation, ...]:
        made: list[Expectation] = []
        for quality, column in gates:
            if quality.type == "text":
                continue
            severity = SEVERITIES.get(quality.severity or "error")
            if severity is None:
                self.error(
                    "unknown_severity",
                    f"severity is {quality.severity!r}",
                    f"Use one of {', '.join(sorted(SEVERITIES))}.",
                )
                continue
            try:
                kind, kwargs = _expectation(quality, column)
            except ValueError as error:
                self.error(
                    "unknown_quality_rule",
                    f"{f'column {column!r}' if column else 'the table'}: {error}",
                    "Use a library metric (rowCount, nullValues, invalidValues, duplicateValues) or "
                    "{type: custom, engine: greatExpectations, implementation: {type, kwargs}}.",
                )
                continue
            for used in _columns_of(kwargs):
                if used not in columns:
                    self.error(
                        "unknown_column",
                        f"expectation {kind} is about column {used!r}",
                        f"Name a column of the schema: {', '.join(sorted(columns)) or 'it has none'}.",
                    )
            title = quality.name or "_".join([*_columns_of(kwargs), kind.removeprefix("expect_")])
            name = re.sub(r"\W+", "_", title, flags=re.ASCII).strip("_")
            if any(name == other.name for other in made):
                self.error(
                    "duplicate_expectation", f"two expectations are called {name!r}", "Give one a name."
                )
            made.append(Expectation(name, kind, kwargs, severity))
        return tuple(made)

    def mappings(
        self, table: odcs.SchemaObject, columns: Mapping[str, Column]
    ) -> tuple[CorpusMapping | None, GoldenMapping | None]:
        corpus: CorpusMapping | None = None
        golden: GoldenMapping | None = None
        for entry in table.customProperties or ():
            if entry.property == "corpus":
                fields = self.fields("corpus", entry.value, {"id", "text"}, {"title", "sections"}, columns)
                sections = columns.get(fields.get("sections", ""))
                if sections is not None and sections.type != "array":
                    self.error(
                        "bad_corpus",
                        f"corpus.sections is {sections.name!r}, of type {sections.type}",
                        "Name a column of type array: the headings above the text, outermost first.",
                    )
                    fields = {}
                if fields:
                    corpus = CorpusMapping(**fields)
            elif entry.property == "golden":
                fields = self.fields(
                    "golden",
                    entry.value,
                    {"question", "document", "document_source"},
                    {"answer", "answer_start", "question_source", "question_key"},
                    columns,
                )
                for one, needs in (
                    ("answer_start", "answer"),
                    ("question_source", "question_key"),
                    ("question_key", "question_source"),
                ):
                    if one in fields and needs not in fields:
                        self.error("bad_golden", f"golden has {one} but no {needs}", f"Give {needs} as well.")
                        fields = {}
                if fields:
                    golden = GoldenMapping(**fields)
            else:
                self.error(
                    "unknown_field",
                    f"schema.customProperties.{entry.property} means nothing here",
                    "Use corpus or golden.",
                )
        if corpus and golden:
            self.error(
                "golden_in_corpus", "the schema has both corpus and golden", "Split it in two sources."
            )
        if corpus and corpus.id in columns:
            column = columns[corpus.id]
            alone = sum(other.primary_key for other in columns.values()) == 1
            if not column.required or not (column.unique or (column.primary_key and alone)):
                self.error(
                    "bad_key",
                    f"corpus id {corpus.id!r} does not tell documents apart",
                    "Make it the only primaryKey, or required and unique.",
                )
        return corpus, golden

    def fields(
        self,
        mapping: str,
        value: Any,
        needed: set[str],
        optional: set[str],
        columns: Mapping[str, Column],
    ) -> dict[str, str]:
        if not isinstance(value, dict) or not needed <= set(value) <= needed | optional:
            self.error(
                f"bad_{mapping}",
                f"{mapping} is {value!r}",
                f"Give {', '.join(sorted(needed))}"
                + (f", perhaps {', '.join(sorted(optional))}." if optional else "."),
            )
            return {}
        elsewhere = {"document_source", "question_source"} | (
            {"question"} if "question_source" in value else set()
        )
        for field, column in value.items():
            if field not in elsewhere and column not in columns:
                self.error(
                    "unknown_column",
                    f"{mapping}.{field} is {column!r}",
                    f"Name a column of the schema: {', '.join(columns) or 'it has none'}.",
                )
        return {str(field): str(column) for field, column in value.items()}

    def freshness(self, parsed: odcs.OpenDataContractStandard) -> float | None:
        for promise in parsed.slaProperties or ():
            if promise.property == "latency":
                unit = DAYS.get(promise.unit or "d")
                if unit is None or not _is_number(promise.value) or not cast(float, promise.value) > 0:
                    self.error(
                        "bad_latency",
                        f"latency is {promise.value!r} {promise.unit or ''}".rstrip(),
                        "Give a positive number and unit d or h.",
                    )
                    return None
                return float(cast(float, promise.value)) * unit
        return None


def _metric(quality: odcs.DataQuality) -> str | None:
    return quality.metric or quality.rule if quality.type in (None, "library") else None


def _expectation(quality: odcs.DataQuality, column: str | None) -> tuple[str, dict[str, Any]]:
    """The Great Expectations type and arguments of a quality rule; ValueError where there is none."""
    if quality.type == "custom":
        return _custom(quality, column)
    metric = _metric(quality)
    if metric == "rowCount" and column is None:
        return "expect_table_row_count_to_be_between", _row_count(quality)
    arguments = dict(quality.arguments or {})
    names = [column] if column else arguments.pop("properties", None)
    if metric in ("nullValues", "duplicateValues", "invalidValues"):
        if not isinstance(names, list) or not names:
            raise ValueError(f"{metric} at table level needs arguments: {{properties: [...]}}")
        mostly = _mostly(quality)
        if metric == "duplicateValues" and len(names) > 1 and not arguments:
            return "expect_compound_columns_to_be_unique", {"column_list": names, **mostly}
        if len(names) == 1:
            target = {"column": names[0], **mostly}
            if metric == "duplicateValues" and not arguments:
                return "expect_column_values_to_be_unique", target
            if metric == "nullValues" and not arguments:
                return "expect_column_values_to_not_be_null", target
            if metric == "invalidValues" and set(arguments) == {"validValues"}:
                return "expect_column_values_to_be_in_set", {**target, "value_set": arguments["validValues"]}
            if metric == "invalidValues" and set(arguments) == {"pattern"}:
                return "expect_column_values_to_match_regex", {**target, "regex": arguments["pattern"]}
        raise ValueError(f"{metric} cannot take {sorted(arguments) or names}")
    raise ValueError(f"type {quality.type or 'library'}, metric {metric!r} cannot be checked")


def _custom(quality: odcs.DataQuality, column: str | None) -> tuple[str, dict[str, Any]]:
    engine = re.sub(r"\W", "", quality.engine or "").lower()
    body = quality.implementation
    if engine != "greatexpectations" or not isinstance(body, dict):
        raise ValueError(f"engine {quality.engine!r} is not run here, or its implementation is no mapping")
    kind = body.get("type") or body.get("expectation_type")
    kwargs = body.get("kwargs", {})
    if not re.fullmatch(r"expect_[a-z0-9_]+|unexpected_rows_expectation", str(kind)):
        raise ValueError(f"{kind!r} is no expectation type")
    if not isinstance(kwargs, dict) or set(body) - {"type", "expectation_type", "kwargs"}:
        raise ValueError("an implementation has type and kwargs, nothing else")
    if column and not any(key.startswith("column") for key in kwargs):
        kwargs = {"column": column, **kwargs}
    return str(kind), kwargs


def _row_count(quality: odcs.DataQuality) -> dict[str, Any]:
    low = quality.mustBeGreaterOrEqualTo
    high = quality.mustBeLessOrEqualTo
    if quality.mustBeGreaterThan is not None:
        low = quality.mustBeGreaterThan + 1
    if quality.mustBeLessThan is not None:
        high = quality.mustBeLessThan - 1
    if quality.mustBeBetween is not None:
        low, high = quality.mustBeBetween
    if quality.mustBe is not None:
        low = high = quality.mustBe
    found = {key: value for key, value in (("min_value", low), ("max_value", high)) if value is not None}
    if not found or any(type(value) is not int for value in found.values()):
        raise ValueError(
            "rowCount needs whole numbers in mustBe, mustBeBetween, mustBeGreater... or mustBeLess..."
        )
    return found


def _mostly(quality: odcs.DataQuality) -> dict[str, float]:
    """The tolerance of a rule about values: none, or so many percent of the rows."""
    if quality.mustBe == 0 or quality.mustBeLessOrEqualTo == 0:
        return {}
    limit = quality.mustBeLessOrEqualTo
    if quality.unit == "percent" and limit is not None and 0 < limit < 100:
        return {"mostly": 1 - limit / 100}
    raise ValueError("use mustBe: 0, or mustBeLessOrEqualTo with unit: percent")


def _columns_of(kwargs: Mapping[str, Any]) -> list[str]:
    named = [kwargs[key] for key in ("column", "column_A", "column_B") if key in kwargs]
    return [str(name) for name in [*named, *kwargs.get("column_list", ())]]


def _scalar(kind: str, value: Any) -> Scalar:
    if kind == "string" and isinstance(value, str):
        return value
    if kind == "integer" and type(value) is int:
        return value
    if kind == "number" and _is_number(value):
        return float(value)
    if kind == "boolean" and isinstance(value, bool):
        return value
    if kind == "date" and not isinstance(value, datetime):
        return value if isinstance(value, date) else date.fromisoformat(value)
    if kind == "timestamp":
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    raise TypeError(kind)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unknown_fields(parsed: BaseModel, raw: Mapping[Any, Any], where: str = "") -> Iterator[str]:
    """Keys of ``raw`` that the model ignored: a misspelt rule would otherwise be a rule nobody keeps."""
    fields = {field.alias or name: name for name, field in type(parsed).model_fields.items()}
    for key, value in raw.items():
        if key not in fields:
            yield f"{where}{key}"
            continue
        child = getattr(parsed, fields[key])
        if isinstance(child, BaseModel) and isinstance(value, dict):
            yield from _unknown_fields(child, value, f"{where}{key}.")
        elif isinstance(child, list) and isinstance(value, list):
            for number, (part, source) in enumerate(zip(child, value, strict=True)):
                if isinstance(part, BaseModel) and isinstance(source, dict):
                    yield from _unknown_fields(part, source, f"{where}{key}[{number}].")


def _validation_reasons(error: ValidationError | TypeError) -> list[str]:
    if isinstance(error, ValidationError):
        return [
            f"{'.'.join(str(part) for part in detail['loc'])}: {detail['msg']}"
            for detail in error.errors(include_url=False, include_input=False)
        ]
    return [str(error)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

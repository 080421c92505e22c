"""What reading a source gives: files, batches of rows, and what is refused.

Belongs here: the types that every format shares, and the words in which they refuse. Does not belong here:
any format, what a contract says about values (``rows``), Postgres.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from assets.sources.contract import Contract

MAX_ROW_BYTES = 16 * 1024 * 1024
KEPT_OF_LONG_LINE = 64 * 1024
# In JSON text: a NUL character, and not a backslash followed by the letters u0000.
NUL_ESCAPE = r"(?:^|[^\\])(?:\\\\)*\\u0000"

JSON = pa.json_(pa.string())
ARROW_TYPES = {
    "string": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us", tz="UTC"),
    "object": JSON,
    "array": JSON,
}
# The standard library reads the machine's own table of types, so its answers differ between machines.
MEDIA_TYPES = {
    ".csv": "text/csv",
    ".docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    ".eml": "message/rfc822",
    ".epub": "application/epub+zip",
    ".htm": "text/html",
    ".html": "text/html",
    ".json": "application/json",
    ".markdown": "text/markdown",
    ".md": "text/markdown",
    ".odt": "application/vnd.oasis.opendocument.text",
    ".pdf": "application/pdf",
    ".pptx": "application/vnd.openxmlformats-officedocument.presentationml.presentation",
    ".rst": "text/x-rst",
    ".rtf": "application/rtf",
    ".txt": "text/plain",
    ".xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    ".xml": "application/xml",
}


class FileRefused(Exception):
    """A file that cannot be read as its contract says; nothing of it is landed.

    Attributes:
        file: Its name, relative to the source's folder.
        rule: Short name of what was broken, e.g. ``wrong_encoding``.
        reason: What is wrong, in a sentence.
        remedy: What to do about it.
    """

    def __init__(self, file: str, rule: str, reason: str, remedy: str) -> None:
        super().__init__(f"{file}: {rule}: {reason}. {remedy}")
        self.file, self.rule, self.reason, self.remedy = file, rule, reason, remedy


@dataclass(frozen=True)
class SourceFile:
    """One file as it was when its bytes were hashed."""

    name: str
    path: Path
    size: int
    sha256: str
    changed_ns: int

    @property
    def media_type(self) -> str:
        """By the name's suffix; ``application/octet-stream`` where that says nothing."""
        return MEDIA_TYPES.get(PurePath(self.name).suffix.lower(), "application/octet-stream")


@dataclass(frozen=True)
class RefusedRow:
    """A row that is not landed: where it was, why, and all of it.

    ``number`` is as in ``Batch.numbers``; ``row`` holds JSON values: the columns of the row, or ``raw_text``, its
    text, where it could not be taken apart.
    """

    number: int
    rule: str
    reason: str
    remedy: str
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of one file.

    Attributes:
        numbers: For text files the line on which each row starts (the first line is 1), for Parquet the row
            (the first is 1).
        columns: The contract's columns in its order: strings where the file holds text, else the file's type.
        original: Gives the n-th row of the batch as the file has it, as JSON values.
        refused: Rows between these that could not be read.
    """

    numbers: NDArray[np.int64]
    columns: Mapping[str, pa.Array]
    original: Callable[[int], Mapping[str, Any]]
    refused: list[RefusedRow] = field(default_factory=list)


def only_refused(contract: Contract, refused: list[RefusedRow]) -> Batch:
    """A batch without rows, to tell of ``refused``."""
    columns = {column.name: pa.nulls(0, pa.string()) for column in contract.columns}
    return Batch(np.zeros(0, np.int64), columns, lambda index: {}, refused)


def nul_refused(number: int, row: Mapping[str, Any]) -> RefusedRow:
    """The refusal of a row that Postgres could not store."""
    return RefusedRow(
        number,
        "nul_character",
        "the row holds a NUL character, which Postgres cannot store",
        "Remove it at the source.",
        row,
    )


def raw_text(text: bytes) -> dict[str, Any]:
    """What stands for a row that could not be taken apart."""
    return {"_raw": text.decode("utf-8", "replace")}


def check_names(contract: Contract, file: SourceFile, names: Sequence[str]) -> None:
    """Hold a file's column names against the contract's.

    Raises:
        FileRefused: ``duplicate_column``, ``unknown_column`` or ``missing_column`` (of a required one).
    """
    known = {column.name: column for column in contract.columns}
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise FileRefused(
            file.name, "duplicate_column", f"column {short(twice[0])} is there twice", "Rename one of them."
        )
    unknown = [name for name in names if name not in known]
    if unknown:
        raise FileRefused(
            file.name,
            "unknown_column",
            f"the contract has no column {', '.join(short(name) for name in unknown[:5])}",
            f"Add it to {contract.file.name} or drop it from the file; a CSV file needs a header line.",
        )
    missing = [name for name, column in known.items() if column.required and name not in names]
    if missing:
        raise FileRefused(
            file.name,
            "missing_column",
            f"there is no column {', '.join(missing[:5])}",
            f"Deliver it, or make it optional in {contract.file.name}.",
        )


def refuse_unreadable(name: str, error: OSError) -> NoReturn:
    """Say that the operating system did not let the file be read."""
    raise FileRefused(
        name,
        "unreadable_file",
        error.strerror or str(error),
        "Let the user who runs the pipeline read the file, or deliver it again.",
    ) from error


def refuse_changed(file: SourceFile) -> NoReturn:
    """Say that the bytes read are not those that were hashed."""
    raise FileRefused(
        file.name,
        "file_changed",
        "it changed while it was read",
        "Run again when it is complete; write to a hidden name and rename.",
    )


def refuse_empty(file: SourceFile) -> NoReturn:
    """Say that a file has bytes but no rows and no header."""
    raise FileRefused(
        file.name, "empty_file", "it holds nothing but blank lines", "Deliver it again, or remove it."
    )


def short(value: str) -> str:
    """``value`` quoted, and cut where it is long."""
    return repr(value if len(value) <= 60 else f"{value[:57]}...")


def one_line(error: Exception) -> str:
    """An error's message without line ends."""
    return " ".join(str(error).split())

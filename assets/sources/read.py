"""Reading source files: which there are, and their rows or bytes.

Every row of a file comes out exactly once: in a batch, or refused whole with the rule it broke. Memory is
bounded by the longest row allowed, whatever the file holds. Belongs here: finding and hashing files, and
choosing the reader. Does not belong here: the formats themselves, Postgres.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from assets.sources.batch import Batch, FileRefused, SourceFile, refuse_changed, refuse_unreadable
from assets.sources.contract import Contract
from assets.sources.csv_file import csv_batches
from assets.sources.jsonl import jsonl_batches
from assets.sources.lines import read_lines
from assets.sources.parquet import parquet_batches

MAX_DOCUMENT_BYTES = 64 * 1024 * 1024


def list_files(contract: Contract) -> list[Path]:
    """The files of a source, sorted by name; none where the folder is missing.

    Hidden files and folders are left out, so a writer may use them for what is not finished.
    """
    return [path for _, path in _matches(contract)]


def find_files(contract: Contract) -> list[tuple[str, Path]]:
    """Names (relative to the contract's folder, ``/`` between parts) and paths of a source's files, sorted.

    Raises:
        FileRefused: The folder is missing (``missing_folder``) or nothing matches (``no_file``).
    """
    if not contract.folder.is_dir():
        raise FileRefused(
            contract.glob,
            "missing_folder",
            f"there is no folder {contract.folder}",
            f"Create it, or correct the path in {contract.file.name}.",
        )
    found = _matches(contract)
    if not found:
        raise FileRefused(
            contract.glob,
            "no_file",
            f"no file matches {contract.pattern}",
            f"Deliver the files, or correct the path in {contract.file.name}.",
        )
    return found


def _matches(contract: Contract) -> list[tuple[str, Path]]:
    documents = contract.format == "documents"
    found = []
    for path in contract.folder.glob(contract.glob):
        name = path.relative_to(contract.folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if not hidden and not (documents and path.is_dir()):
            found.append((name.as_posix(), path))
    return sorted(found)


def fingerprint(contract: Contract, name: str, path: Path) -> SourceFile:
    """Hash one file.

    Raises:
        FileRefused: ``bad_file_name``, ``unreadable_file``, ``empty_file`` or ``too_large``.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(name).decode("utf-8", "backslashreplace")
        raise FileRefused(shown, "bad_file_name", "the name is not UTF-8", "Rename the file.") from None
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            what = "a directory" if stat.S_ISDIR(about.st_mode) else "no regular file"
            raise FileRefused(name, "unreadable_file", f"it is {what}", "Move it away, or deliver a file.")
        if about.st_size == 0:
            raise FileRefused(name, "empty_file", "it has 0 bytes", "Deliver it again, or remove it.")
        if contract.format == "documents" and about.st_size > MAX_DOCUMENT_BYTES:
            raise FileRefused(
                name,
                "too_large",
                f"it has {about.st_size:,} bytes; a document may have {MAX_DOCUMENT_BYTES:,}",
                "Split the document.",
            )
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        refuse_unreadable(name, error)
    return SourceFile(name, path, about.st_size, digest, about.st_mtime_ns)


def read_rows(contract: Contract, file: SourceFile) -> Iterator[Batch]:
    """The rows of a tabular file, in order.

    Raises:
        FileRefused: At any point; what came before is then void too.
    """
    if contract.format == "parquet":
        yield from parquet_batches(contract, file)
    else:
        read = csv_batches if contract.format == "csv" else jsonl_batches
        yield from read(contract, file, read_lines(file, contract.encoding))
    _check_same(file)


def read_document(file: SourceFile) -> bytes:
    """The bytes that ``file.sha256`` names.

    Raises:
        FileRefused: ``unreadable_file`` or ``file_changed``.
    """
    try:
        with file.path.open("rb") as stream:
            content = stream.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        refuse_unreadable(file.name, error)
    if hashlib.sha256(content).hexdigest() != file.sha256:
        refuse_changed(file)
    return content


def _check_same(file: SourceFile) -> None:
    try:
        about = file.path.stat()
    except OSError as error:
        refuse_unreadable(file.name, error)
    if (about.st_size, about.st_mtime_ns) != (file.size, file.changed_ns):
        refuse_changed(file)

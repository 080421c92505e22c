"""The handle that every asset receives: the database, the lake and the pseudonym key of one deployment.

Belongs here: opening connections with the pipeline's role. Does not belong here: SQL.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from storage.database import Database

WRITER = "datamoat_writer"


@dataclass(frozen=True)
class Warehouse:
    """Where one deployment keeps its data.

    Attributes:
        database: The Postgres database.
        lake: Folder of Parquet files.
        pseudonym_key: Key of the HMACs that stand for persons; 32 bytes. Losing it makes new pseudonyms
            differ from old ones; leaking it lets short identifiers be guessed.
    """

    database: Database
    lake: Path
    pseudonym_key: bytes

    @contextmanager
    def connect(
        self, application_name: str = "datamoat", autocommit: bool = False
    ) -> Iterator[psycopg.Connection[Any]]:
        """A connection as ``datamoat_writer``; commits on success, rolls back on error, always closes."""
        with self.database.connect(WRITER, autocommit, application_name) as connection:
            yield connection

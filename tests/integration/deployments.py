"""A small deployment of a test's own, driven through the ``moat`` command as a person would.

Belongs here: what several test files do with a deployment. Does not belong here: any assertion.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from feedback.client import FeedbackClient
from orchestration.settings import Settings
from storage import embedded
from storage.database import Database, release, resolve

NOTES_CONTRACT = """
apiVersion: v3.1.0
kind: DataContract
id: notes
name: notes
version: 1.0.0
status: active
description: {purpose: "Notes written by hand."}
team: {name: writers}
servers: [{server: local, type: local, path: "NOTES/**/*.md", format: documents}]
schema: [{name: notes, physicalType: table, description: One row per note.}]
customProperties:
  - {property: provenance, value: proprietary}
  - {property: pii, value: true}
  - {property: allowedUses, value: [rag, finetune, eval]}
  - {property: maxRefusedShare, value: 0.5}
"""

ORDERS_CONTRACT = """
apiVersion: v3.1.0
kind: DataContract
id: orders
name: orders
version: 1.0.0
status: active
description: {purpose: "Orders as the shop exports them."}
team: {name: shop}
servers: [{server: local, type: local, path: "ORDERS/*.csv", format: csv}]
schema:
  - name: orders
    physicalType: table
    description: One row per order.
    properties:
      - {name: order_id, logicalType: string, required: true, primaryKey: true}
      - {name: amount, logicalType: number, required: true}
      - {name: remark, logicalType: string}
    customProperties:
      - {property: corpus, value: {id: order_id, title: order_id, text: remark}}
customProperties:
  - {property: provenance, value: proprietary}
  - {property: pii, value: true}
  - {property: allowedUses, value: [rag]}
  - {property: maxRefusedShare, value: 0.2}
"""

# Columns that say when or by which run, and may differ between two ways to the same state.
TRANSIENT = (
    "id",
    "run_id",
    "first_seen",
    "last_seen",
    "landed_at",
    "loaded_at",
    "at",
    "updated_at",
    "created_at",
    "moved_at",
    "_loaded_at",
    "received_at",
    "last_landed_at",
    "xact_id",
    "uri",
    "manifest",
    "contract_sha256",
    "location",
    "api_key_id",
)


@dataclass
class Deployment:
    """Two sources (``notes``: Markdown files, ``orders``: a CSV), no example, an embedded Postgres of its own."""

    folder: Path

    @property
    def notes(self) -> Path:
        return self.folder / "notes"

    @property
    def orders(self) -> Path:
        return self.folder / "orders" / "orders.csv"

    @property
    def contracts(self) -> Path:
        return self.folder / "contracts"

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "EXAMPLE": "none",
            "DATAMOAT_HOME": str(self.folder / "home"),
            "DATAMOAT_CONTRACTS": str(self.contracts),
            "PYTHONWARNINGS": "ignore",
            "DATABASE_URL": "",
        }

    @property
    def settings(self) -> Settings:
        return Settings.from_environment(self.environment)

    def write(self, data: Path | None = None) -> "Deployment":
        """Write contracts and data; ``data`` is another deployment's folder whose files to share."""
        shared = data or self.folder
        self.contracts.mkdir(parents=True)
        for name, text in (("notes", NOTES_CONTRACT), ("orders", ORDERS_CONTRACT)):
            text = text.replace("NOTES", str(shared / "notes")).replace("ORDERS", str(shared / "orders"))
            (self.contracts / f"{name}.odcs.yaml").write_text(text)
        key = self.settings.pseudonym_key_file
        key.parent.mkdir(parents=True)
        # The same key gives the same redaction tokens, so that two deployments can be compared.
        key.write_text("5" * 64)
        if data is None:
            self.notes.mkdir()
            self.orders.parent.mkdir()
            for number in range(6):
                (self.notes / f"note-{number}.md").write_text(
                    f"# Note {number}\n\nThe valve of machine {number} closes at {number}0 bar."
                    f" Call +49 30 23125 {number:03d} or write to ann{number}@example.com.\n"
                )
            (self.notes / "broken.md").write_bytes("# Grüße\n".encode("cp1252"))
            self.orders.write_text(
                "order_id,amount,remark\n"
                + "".join(f"O-{n},{n}.50,Please deliver order {n} to the north gate.\n" for n in range(20))
                + "O-3,9.99,A key that was there before.\n"
            )
        return self

    def moat(self, *arguments: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        """Run ``moat`` to its end."""
        return subprocess.run(
            [sys.executable, "-m", "orchestration.cli", *arguments],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=seconds,
        )

    def run_until(
        self, text: str, *options: str, how: signal.Signals = signal.SIGKILL, seconds: float = 300
    ) -> int:
        """Start ``moat run`` and send it a signal as soon as it has printed ``text``; its exit code."""
        log = self.folder / "killed.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "orchestration.cli", "run", *options],
                env=self.environment,
                cwd=self.folder,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + seconds
        while text not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise AssertionError(f"moat run ended before it printed {text!r}:\n{log.read_text()}")
            time.sleep(0.02)
        process.send_signal(how)
        return process.wait(seconds)

    def report(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.settings.report.read_text())
        return content

    def database(self) -> Database:
        return resolve(None, self.settings.home, self.settings.deployment)

    def send_feedback(self) -> None:
        """Six interactions and a few votes, through the feedback service."""
        from orchestration.prepare import prepare
        from orchestration.services import feedback_service

        settings = self.settings
        prepared = prepare(settings)
        interactions = [
            {
                "interaction_id": f"i-{n}",
                "session_id": f"s-{n}",
                "user_id": f"person {n}",
                "occurred_at": f"2026-03-0{1 + n % 3}T10:00:00Z",
                "messages": [
                    {"role": "user", "content": f"How far does valve {n} close? I am ann{n}@example.com"}
                ],
                "output": f"At {n}0 bar.",
                "retrieved": [
                    {"document_id": f"notes/note-{n}.md", "source": "notes", "rank": 1, "score": 0.5}
                ],
                "model": "small-1",
                "prompt_version": "1",
            }
            for n in range(6)
        ]
        events: list[dict[str, Any]] = [
            {
                "event_id": f"00000000-0000-7000-8000-00000000000{n}",
                "kind": "thumb",
                "score": n % 2,
                "interaction_id": f"i-{n}",
                "author_id": f"person {n}",
                "occurred_at": f"2026-03-0{1 + n % 3}T11:00:00Z",
            }
            for n in range(6)
        ]
        events.append(
            {
                "event_id": "00000000-0000-7000-8000-000000000009",
                "kind": "correction",
                "correction": "At 45 bar since spring.",
                "interaction_id": "i-4",
                "author_id": "expert",
                "occurred_at": "2026-03-02T12:00:00Z",
            }
        )
        with feedback_service(settings, prepared) as url, FeedbackClient(url, prepared.api_key) as client:
            client.send_interactions(interactions)
            client.send_feedback(events)

    def state(self) -> dict[str, list[str]]:
        """Every row of every table this product writes, without the columns that say when."""
        found: dict[str, list[str]] = {}
        with psycopg.connect(self.database().url) as connection:
            tables = connection.execute(
                "select table_schema, table_name from information_schema.tables where table_type = 'BASE TABLE'"
                " and table_schema in ('raw', 'quarantine', 'corpus', 'retrieval', 'registry', 'marts')"
                " and table_name not in ('alembic_version', 'checkpoint') order by 1, 2"
            ).fetchall()
            for schema, table in tables:
                rows = connection.execute(
                    sql.SQL("select (to_jsonb(t) - %s::text[])::text from {} t").format(
                        sql.Identifier(schema, table)
                    ),
                    [list(TRANSIENT)],
                )
                found[f"{schema}.{table}"] = sorted(row[0] for row in rows)
        return found

    def destroy(self) -> None:
        release(self.settings.home)
        embedded.destroy(self.settings.home)

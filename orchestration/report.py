"""The report of a turn of the loop: read from the database, printed for people and kept as JSON.

Belongs here: which figures, in what order. Does not belong here: computing them (marts and registry do).
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from psycopg.rows import dict_row
from rich.table import Table

from orchestration.screen import Screen
from orchestration.settings import Settings
from storage.lake import write_atomic

if TYPE_CHECKING:
    from orchestration.loading import Loaded
    from orchestration.prepare import Prepared
    from orchestration.run import Turn

SCHEMA_VERSION = 2
# Below this many ratings or questions a rate is not shown as one.
MIN_N = 30

_QUERIES = {
    "sources": """
        select
          s.source, s.kind, s.owner, s.provenance, s.allowed_uses,
          coalesce(f.rows_in, 0)::bigint as rows_in, coalesce(f.rows_landed, 0)::bigint as rows_landed,
          coalesce(f.rows_refused, 0)::bigint as rows_refused, f.landed_at,
          (select count(*) from quarantine.file q where q.source = s.source and q.resolved_at is null)
            as files_refused,
          (select count(*) from corpus.document d where d.source = s.source) as documents,
          (select count(*) from corpus.chunk c where c.source = s.source) as chunks
        from registry.source as s
        left join (
          select source, sum(rows_in) as rows_in, sum(rows_landed) as rows_landed,
            sum(rows_refused) as rows_refused, max(landed_at) as landed_at
          from registry.source_file group by source
        ) as f using (source)
        order by s.source
    """,
    "refusals": """
        select source, rule, count(*) as rows, min(reason) as example, min(remedy) as remedy
        from quarantine.row where resolved_at is null group by source, rule
        union all
        select source, rule, count(*), min(file || ': ' || reason), min(remedy)
        from quarantine.file where resolved_at is null group by source, rule
        order by 1, 2
    """,
    "redactions": """
        select key as entity, sum(value::int)::bigint as found
        from corpus.document, jsonb_each_text(findings) group by key
        order by key
    """,
    "feedback": """
        select kind, count(*) as events, count(distinct interaction_id) as interactions
        from feedback.feedback_event group by kind order by kind
    """,
    "interactions": "select count(*) as interactions, count(distinct user_ref) as users from feedback.interaction",
    "releases": """
        select release, dimensions, chunking, live, created_at from registry.embedding_release order by created_at
    """,
    "datasets": """
        select a.dataset, a.version, v.rows, v.uri, v.created_at, v.manifest -> 'signals' -> 'dropped' as dropped
        from registry.dataset_alias a join registry.dataset_version v using (dataset, version)
        where a.alias = 'latest' order by a.dataset
    """,
    "quality": """
        select distinct on (name, mode, metric) name, mode, metric, value, low, high, n, created_at
        from registry.evaluation order by name, mode, metric, created_at desc
    """,
    "approval": """
        select model, prompt_version, sum(n_rated)::bigint as n, sum(n_approved)::bigint as approved
        from marts.model_quality_daily group by model, prompt_version having sum(n_rated) > 0 order by 1, 2
    """,
}


def collect(
    settings: Settings, prepared: Prepared, done: Turn, loaded: Loaded, seconds: float, current: bool
) -> dict[str, Any]:
    """The report as plain values. ``current`` says that nothing had changed, so that nothing was done."""
    figures: dict[str, Any] = {}
    with (
        prepared.warehouse.connect("report") as connection,
        connection.cursor(row_factory=dict_row) as cursor,
    ):
        for name, query in _QUERIES.items():
            if name == "approval" and not _exists(cursor, "marts.model_quality_daily"):
                figures[name] = []
                continue
            figures[name] = cursor.execute(query).fetchall()
        for row in figures["approval"]:
            row["rate"] = row["approved"] / row["n"] if row["n"] >= MIN_N else None
            row["low"], row["high"] = wilson(row["approved"], row["n"]) if row["n"] >= MIN_N else (None, None)
        vectors = 0
        for release in figures["releases"]:
            cursor.execute(
                f"select count(*) as n from retrieval.release_{release['release']}"
            )  # our own hex name
            row = cursor.fetchone()
            release["vectors"] = row["n"] if row else 0
            vectors += release["vectors"] if release["live"] else 0
    sources = figures["sources"]
    example = "" if settings.example == "support" else f"EXAMPLE={settings.example} "
    rate = done.embedded / done.embedding_seconds if done.embedding_seconds else None
    return {
        "schema_version": SCHEMA_VERSION,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "example": settings.example,
        "seconds": round(seconds, 1),
        "nothing_changed": current,
        "failed": done.failed,
        "dagster_runs": done.run_ids,
        "rows": {
            "in": sum(s["rows_in"] for s in sources),
            "landed": sum(s["rows_landed"] for s in sources),
            "refused": sum(s["rows_refused"] for s in sources),
            "files_refused": sum(s["files_refused"] for s in sources),
        },
        "documents": sum(s["documents"] for s in sources),
        "chunks": sum(s["chunks"] for s in sources),
        "vectors": vectors,
        "embedded_now": done.embedded,
        "chunks_per_s": round(rate, 1) if rate else None,
        "days_folded": done.days,
        "sent": {
            "interactions": loaded.interactions,
            "feedback": loaded.feedback,
            "refused": loaded.refused,
        },
        **figures,
        "places": {
            "database": prepared.warehouse.database.place,
            "lake": str(settings.lake),
            "dagster": str(settings.dagster_home),
            "logs": str(settings.folder / "logs"),
            "report": str(settings.report),
        },
        "next": [
            f"{example}make dev",
            f'{example}.venv/bin/moat search "your question"',
            f"{example}.venv/bin/moat sql 'select source_name, rows_landed, rows_refused, chunks from marts.source_inventory'",
        ],
    }


def save(settings: Settings, report: dict[str, Any]) -> None:
    """Write the report to ``.datamoat/report.json``."""
    write_atomic(settings.report, (json.dumps(report, indent=2, default=str) + "\n").encode())


def show(screen: Screen, report: dict[str, Any]) -> None:
    """Print the report."""
    console = screen.console
    rows = report["rows"]
    screen.title("Report")
    screen.line(
        "rows",
        f"{rows['in']:,} in = {rows['landed']:,} landed + {rows['refused']:,} refused"
        f" ({rows['files_refused']:,} files refused)",
    )
    table = Table(
        "source", "kind", "uses", "in", "landed", "refused", "documents", "chunks", box=None, pad_edge=False
    )
    for source in report["sources"]:
        table.add_row(
            source["source"],
            source["kind"],
            ",".join(source["allowed_uses"]),
            *(
                f"{source[key]:,}"
                for key in ("rows_in", "rows_landed", "rows_refused", "documents", "chunks")
            ),
        )
    _table(screen, table)
    if report["refusals"]:
        table = Table("refused", "rule", "rows", "for example", box=None, pad_edge=False)
        for refusal in report["refusals"]:
            table.add_row(
                refusal["source"], refusal["rule"], f"{refusal['rows']:,}", _short(refusal["example"])
            )
        _table(screen, table)
    for reason, count in report["sent"]["refused"].items():
        screen.line("refused by the feedback API", f"{count} x {reason}")
    found = ", ".join(f"{r['found']:,} {r['entity']}" for r in report["redactions"])
    screen.line("redacted in documents", found or "nothing")
    speed = f" at {report['chunks_per_s']:,} chunks/s" if report["chunks_per_s"] else ""
    screen.line(
        "chunks and vectors",
        f"{report['chunks']:,} chunks, {report['vectors']:,} vectors; embedded now: {report['embedded_now']:,}{speed}",
    )
    kinds = ", ".join(f"{f['events']:,} {f['kind']}" for f in report["feedback"])
    interactions = report["interactions"][0]
    screen.line("interactions", f"{interactions['interactions']:,} from {interactions['users']:,} people")
    screen.line("feedback events", kinds or "none")
    for dataset in report["datasets"]:
        left_out = ", ".join(f"{n:,} {reason}" for reason, n in sorted(dataset["dropped"].items()))
        screen.line(
            f"dataset {dataset['dataset']}",
            f"{dataset['version'][:16]}  {dataset['rows']:,} rows"
            + (f"; left out: {left_out}" if left_out else ""),
        )
    for figure in report["quality"]:
        screen.line(
            f"{figure['name']} {figure['mode']} {figure['metric']}",
            f"{figure['value']:.3f} {_interval(figure)} n={figure['n']:,}",
        )
    for figure in report["approval"]:
        rate = "" if figure["rate"] is None else f"{figure['rate']:.3f} "
        screen.line(
            f"approval of {figure['model']} prompt {figure['prompt_version']}",
            f"{rate}{_interval(figure)} n={figure['n']:,}",
        )
    screen.title("Where things are")
    for name, place in report["places"].items():
        screen.line(name, place)
    if report["failed"]:
        screen.title("Failed or stopped")
        for name in report["failed"]:
            screen.line(name, "see above, or its run in Dagster UI", style="red")
    screen.title("Next")
    for command in report["next"]:
        console.print(f"  {command}")


def _table(screen: Screen, table: Table) -> None:
    from rich.padding import Padding

    screen.console.print(Padding(table, (0, 0, 0, 2)))


def _short(text: str, limit: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a rate (Wilson 1927), as the macro of the same name computes it for each day."""
    z = 1.959964
    centre = (successes + z * z / 2) / (n + z * z)
    spread = z * math.sqrt(successes * (n - successes) / n + z * z / 4) / (n + z * z)
    return centre - spread, centre + spread


def _interval(figure: dict[str, Any]) -> str:
    if figure["low"] is None or figure["n"] < MIN_N:
        return "not enough data"
    return f"[{figure['low']:.3f}, {figure['high']:.3f}]"


def _exists(cursor: Any, table: str) -> bool:
    row = cursor.execute("select to_regclass(%s) is not null as found", [table]).fetchone()
    return bool(row["found"])

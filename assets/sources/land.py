"""Landing: a source's files into ``raw.<source>``, refused rows and files into quarantine, the ledger of both.

One landing is one transaction: killed at any moment and run again, it leaves what one clean run leaves.
Belongs here: what is written, and when nothing has to be. Does not belong here: file formats (``read``),
rules about single rows (``rows``), Dagster.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from psycopg import Connection, Cursor, sql

from assets.progress import Progress
from assets.sources.batch import ARROW_TYPES, FileRefused, RefusedRow, SourceFile
from assets.sources.contract import Contract
from assets.sources.read import find_files, fingerprint, read_document, read_rows
from assets.sources.rows import check_rows, quarantine_json
from storage.copy import JSON, copy_table, postgres_type

RULE_DUPLICATE = "duplicate_key"
DOCUMENT_BYTES_AT_ONCE = 16 * 1024 * 1024
DOCUMENT_COLUMNS = {
    "path": "text",
    "sha256": "text",
    "size": "bigint",
    "media_type": "text",
    "content": "bytea",
}
LEDGER_COLUMNS = {
    "_source": "text",
    "_row": "bigint",
    "_loaded_at": "timestamp with time zone",
    "_content_hash": "text",
}


class SourceRefused(Exception):
    """No file of a source could be read; what was landed before is kept.

    Attributes:
        source: The source's name.
        problems: Why, file by file; also in ``quarantine.file``.
    """

    def __init__(self, source: str, problems: Sequence[FileRefused]) -> None:
        shown = "\n".join(str(problem) for problem in problems[:20])
        more = f"\n... and {len(problems) - 20} more" if len(problems) > 20 else ""
        super().__init__(f"source {source!r} has no file that can be read:\n{shown}{more}")
        self.source, self.problems = source, list(problems)


@dataclass(frozen=True)
class FileReport:
    """What became of one file: rows in = landed + refused, or the reason why nothing of it was read."""

    file: str
    sha256: str
    rows_in: int = 0
    rows_landed: int = 0
    rows_refused: int = 0
    refused: FileRefused | None = None


@dataclass(frozen=True)
class LandReport:
    """What became of one source.

    ``unchanged`` means that nothing was written, as no file and not the contract changed since the last time;
    the figures are then those of that time.
    """

    files: list[FileReport]
    refused_by_rule: Mapping[str, int] = field(default_factory=dict)
    unchanged: bool = False

    @property
    def rows_in(self) -> int:
        return sum(file.rows_in for file in self.files)

    @property
    def rows_landed(self) -> int:
        return sum(file.rows_landed for file in self.files)

    @property
    def rows_refused(self) -> int:
        return sum(file.rows_refused for file in self.files)

    @property
    def files_refused(self) -> int:
        return sum(file.refused is not None for file in self.files)


@dataclass(frozen=True)
class _Scan:
    """A source's files as found: those that could be hashed, and those that could not."""

    files: list[SourceFile]
    refused: dict[str, FileRefused]

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 by file name; empty where the file could not be read."""
        return {file.name: file.sha256 for file in self.files} | dict.fromkeys(self.refused, "")


class _AllRefused(Exception):
    def __init__(self, scan: _Scan, refused: dict[str, FileRefused]) -> None:
        super().__init__()
        self.scan, self.refused = scan, refused


def land(
    conn: Connection[Any], contract: Contract, run_id: str | None, progress: Progress | None = None
) -> LandReport:
    """Make ``raw.<source>`` hold every good row of the source's files, and quarantine every other.

    Where no file changed (by SHA-256) and the contract did not, nothing is written. Otherwise a table is read
    whole again, in one transaction, and only rows that differ are replaced; of documents, only changed files
    are read. A row of a key seen before, in order of file name and row, is refused. Columns that the contract
    no longer has, or has as another type, are dropped with the views that select them, which dbt makes again.

    Concurrent landings of one source wait for each other. Called inside a transaction, the landing becomes
    part of it.

    Args:
        conn: A connection that may create tables in ``raw``.
        run_id: Noted with what is quarantined.
        progress: Called with the rows (or documents) done so far; the total is not known beforehand.

    Raises:
        SourceRefused: There is no file, or none could be read. Recorded in ``quarantine.file``; ``raw`` and the
            ledger stay as they were.
    """
    try:
        with conn.transaction(), conn.cursor() as cursor:
            _lock(cursor, contract)
            scan = _scan(contract)
            report = _unchanged(cursor, contract, scan)
            if report is None:
                work = _land_documents if contract.kind == "documents" else _land_table
                report = work(cursor, contract, scan, run_id, progress or _silent)
        return report
    except _AllRefused as nothing:
        with conn.transaction(), conn.cursor() as cursor:
            _lock(cursor, contract)
            _record_files(cursor, contract, nothing.scan, nothing.refused, run_id)
        raise SourceRefused(contract.name, list(nothing.refused.values())) from None


def write_catalogue(conn: Connection[Any], contracts: Sequence[Contract]) -> None:
    """Make ``registry.source`` say what ``contracts`` say; unchanged rows are not written.

    A source without a contract loses its row, and with it every allowed use; what it landed stays.
    """
    columns = (
        "source, version, owner, description, provenance, pii, allowed_uses, kind, location, contract_sha256,"
        " freshness_days, language"
    )
    with conn.transaction(), conn.cursor() as cursor:
        cursor.execute(
            "delete from registry.source where source <> all(%s)", [[contract.name for contract in contracts]]
        )
        cursor.executemany(
            f"insert into registry.source as old ({columns}) values (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
            " on conflict (source) do update set (version, owner, description, provenance, pii, allowed_uses,"
            " kind, location, contract_sha256, freshness_days, language, updated_at) = (excluded.version, excluded.owner,"
            " excluded.description, excluded.provenance, excluded.pii, excluded.allowed_uses, excluded.kind,"
            " excluded.location, excluded.contract_sha256, excluded.freshness_days, excluded.language, now())"
            " where (old.contract_sha256, old.location) is distinct from"
            " (excluded.contract_sha256, excluded.location)",
            [
                (
                    contract.name,
                    contract.version,
                    contract.owner,
                    contract.description,
                    contract.provenance,
                    contract.pii,
                    list(contract.allowed_uses),
                    contract.kind,
                    contract.pattern,
                    contract.sha256,
                    contract.freshness_days,
                    contract.language,
                )
                for contract in contracts
            ],
        )


def _silent(what: str, done: int, total: int) -> None:
    pass


def _scan(contract: Contract) -> _Scan:
    try:
        found = find_files(contract)
    except FileRefused as problem:
        raise _AllRefused(_Scan([], {}), {problem.file: problem}) from None
    files: list[SourceFile] = []
    refused: dict[str, FileRefused] = {}
    for name, path in found:
        try:
            files.append(fingerprint(contract, name, path))
        except FileRefused as problem:
            refused[problem.file] = problem
    return _Scan(files, refused)


def _lock(cursor: Cursor[Any], contract: Contract) -> None:
    cursor.execute(
        "select pg_advisory_xact_lock(hashtextextended('datamoat.land.' || %s, 0))", [contract.name]
    )


def _unchanged(cursor: Cursor[Any], contract: Contract, scan: _Scan) -> LandReport | None:
    """The last landing's report, if the same files were landed or refused then by the same contract."""
    landed = cursor.execute(
        "select file, sha256, rows_in, rows_landed, rows_refused, contract_sha256 from registry.source_file"
        " where source = %s order by file",
        [contract.name],
    ).fetchall()
    refused = cursor.execute(
        "select file, coalesce(sha256, ''), rule, reason, remedy from quarantine.file"
        # A file that landed and could not be parsed was refused by the documents stage, which names the table.
        " where source = %s and resolved_at is null and lake_uri is null order by file",
        [contract.name],
    ).fetchall()
    known = [(row[0], row[1]) for row in [*landed, *refused]]
    # A file that is both landed and refused was refused by a later attempt that read nothing.
    if not landed or len(known) != len(dict(known)) or dict(known) != scan.hashes:
        return None
    if any(row[5] != contract.sha256 for row in landed):
        return None
    rules = cursor.execute(
        "select rule, count(*) from quarantine.row where source = %s and resolved_at is null group by rule",
        [contract.name],
    ).fetchall()
    return LandReport(
        [
            *(FileReport(*row[:5]) for row in landed),
            *(FileReport(row[0], row[1], refused=FileRefused(row[0], *row[2:])) for row in refused),
        ],
        dict(rules),
        unchanged=True,
    )


# --- Tables ----------------------------------------------------------------------------------------------


def _land_table(
    cursor: Cursor[Any], contract: Contract, scan: _Scan, run_id: str | None, progress: Progress
) -> LandReport:
    columns = {column.name: postgres_type(ARROW_TYPES[column.type]) for column in contract.columns}
    staged = {**columns, "_source": "text", "_row": "bigint", "_content_hash": "text"}
    cursor.execute(sql.SQL("create temp table landing ({}) on commit drop").format(_definitions(staged)))
    cursor.execute(
        "create temp table refusal (file text, row_number bigint, rule text, reason text, remedy text, row jsonb,"
        " content_hash text) on commit drop"
    )
    refused = dict(scan.refused)
    rows_in: dict[str, int] = {}
    for file in scan.files:
        try:
            # A file refused half-way leaves nothing behind.
            with cursor.connection.transaction():
                rows_in[file.name] = _stage(cursor, contract, file, sum(rows_in.values()), progress)
        except FileRefused as problem:
            refused[file.name] = problem
    if not rows_in:
        raise _AllRefused(scan, refused)
    _refuse_duplicates(cursor, contract)

    if _fit_table(cursor, contract, columns):
        cursor.execute(sql.SQL("delete from {}").format(_table(contract)))
    _replace_rows(cursor, contract, list(columns))
    _record_rows(cursor, contract, run_id)
    _record_files(cursor, contract, scan, refused, run_id)

    landed = dict(cursor.execute("select _source, count(*) from landing group by 1").fetchall())
    bad = dict(cursor.execute("select file, count(*) from refusal group by 1").fetchall())
    rules = dict(cursor.execute("select rule, count(*) from refusal group by 1").fetchall())
    reports = []
    for file in scan.files:
        if file.name in rows_in:
            report = FileReport(
                file.name, file.sha256, rows_in[file.name], landed.get(file.name, 0), bad.get(file.name, 0)
            )
            if report.rows_in != report.rows_landed + report.rows_refused:
                raise RuntimeError(f"{contract.name}: rows were lost: {report}")
            reports.append(report)
    _record_ledger(cursor, contract, scan, reports)
    cursor.execute("drop table landing, refusal")
    # Without statistics a freshly loaded table is scanned sequentially.
    cursor.execute(sql.SQL("analyze {}").format(_table(contract)))
    return LandReport([*reports, *_refusals(scan, refused)], rules)


def _stage(
    cursor: Cursor[Any], contract: Contract, file: SourceFile, done_before: int, progress: Progress
) -> int:
    """Copy one file's rows into the temporary tables; returns how many it had."""
    rows = 0
    for batch in read_rows(contract, file):
        checked = check_rows(contract, batch)
        if len(checked.rows):
            name = pa.array([file.name], pa.string()).take(
                pa.nulls(len(checked.rows), pa.int32()).fill_null(0)
            )
            copy_table(cursor, "landing", checked.rows.append_column("_source", name))
        if checked.refused:
            copy_table(cursor, "refusal", _refusal_table(file.name, checked.refused))
        rows += len(checked.rows) + len(checked.refused)
        progress("rows", done_before + rows, 0)
    return rows


def _refusal_table(file: str, refused: Sequence[RefusedRow]) -> pa.Table:
    texts = [quarantine_json(row.row) for row in refused]
    return pa.table(
        {
            "file": pa.array([file] * len(refused), pa.string()),
            "row_number": pa.array([row.number for row in refused], pa.int64()),
            "rule": pa.array([row.rule for row in refused], pa.string()),
            "reason": pa.array([_storable(row.reason) for row in refused], pa.string()),
            "remedy": pa.array([row.remedy for row in refused], pa.string()),
            "row": pa.ExtensionArray.from_storage(JSON, pa.array(texts, pa.string())),
            "content_hash": pa.array(
                [hashlib.sha256(text.encode()).hexdigest() for text in texts], pa.string()
            ),
        }
    )


def _storable(text: str) -> str:
    return text.replace("\0", "\N{SYMBOL FOR NULL}")


def _refuse_duplicates(cursor: Cursor[Any], contract: Contract) -> None:
    """Move all but the first row of each key, by file name and row, from ``landing`` to ``refusal``."""
    keys = [contract.primary_key] if contract.primary_key else []
    keys += [(column.name,) for column in contract.columns if column.unique and (column.name,) not in keys]
    personal = {column.name for column in contract.columns if column.pii}
    for key in keys:
        names = sql.SQL(", ").join(map(sql.Identifier, key))
        shown = (
            sql.SQL("'(withheld: personal)'")
            if personal & set(key)
            else sql.SQL("left(concat_ws(', ', {}), 60)").format(names)
        )
        cursor.execute(
            sql.SQL(
                """
                with ranked as (
                  select ctid as _place, row_number() over same as _nth,
                    first_value(_source) over same as _first_file, first_value(_row) over same as _first_row
                  from landing
                  where num_nulls({names}) = 0
                  window same as (partition by {names} order by _source collate "C", _row)
                ), gone as (
                  delete from landing using ranked where landing.ctid = ranked._place and ranked._nth > 1
                  returning landing.*, _first_file, _first_row
                )
                insert into refusal
                select _source, _row, {rule},
                  format('%s %s is already in %s, row %s', {key}, {shown}, _first_file, _first_row),
                  'Give every row its own key, or remove the repeated row.', _whole, encode(sha256(convert_to(_whole::text, 'UTF8')), 'hex')
                from gone,
                  lateral (select to_jsonb(gone) - array['_source', '_row', '_content_hash', '_first_file', '_first_row'] as _whole)
                """
            ).format(
                names=names,
                rule=sql.Literal(RULE_DUPLICATE),
                key=sql.Literal(", ".join(key)),
                shown=shown,
            )
        )


def _fit_table(
    cursor: Cursor[Any], contract: Contract, columns: Mapping[str, str], primary_key: str | None = None
) -> bool:
    """Make ``raw.<source>`` have exactly the promised columns; true if a column was there and had to go."""
    promised = {**columns, **LEDGER_COLUMNS}
    exists = cursor.execute("select to_regclass(%s)", [_table(contract).as_string(cursor)]).fetchone()
    if exists is None or exists[0] is None:
        cursor.execute(sql.SQL("create table {} ({})").format(_table(contract), _definitions(promised)))
        if primary_key:
            cursor.execute(
                sql.SQL("alter table {} add primary key ({})").format(
                    _table(contract), sql.Identifier(primary_key)
                )
            )
    there = dict(
        cursor.execute(
            "select attname, format_type(atttypid, atttypmod) from pg_attribute"
            " where attrelid = to_regclass(%s) and attnum > 0 and not attisdropped",
            [_table(contract).as_string(cursor)],
        ).fetchall()
    )
    dropped = [name for name, kind in there.items() if promised.get(name) != kind]
    added = [name for name in promised if name not in there or name in dropped]
    changes = [sql.SQL("drop column {} cascade").format(sql.Identifier(name)) for name in dropped]
    changes += [sql.SQL("add column {}").format(_definitions({name: promised[name]})) for name in added]
    if changes:
        cursor.execute(sql.SQL("alter table {} {}").format(_table(contract), sql.SQL(", ").join(changes)))
    _comment(cursor, contract)
    return bool(dropped)


def _comment(cursor: Cursor[Any], contract: Contract) -> None:
    text = " ".join(f"{contract.grain} {contract.description}".split())
    cursor.execute(sql.SQL("comment on table {} is {}").format(_table(contract), sql.Literal(text)))


def _replace_rows(cursor: Cursor[Any], contract: Contract, columns: Sequence[str]) -> None:
    """Make ``raw.<source>`` equal to ``landing``, writing only rows that differ.

    DELETE and INSERT rather than TRUNCATE: readers go on seeing the old rows until the commit.
    """
    table = _table(contract)
    same = sql.SQL("(r._source, r._row, r._content_hash) = (l._source, l._row, l._content_hash)")
    cursor.execute("analyze landing")
    cursor.execute(
        sql.SQL("delete from {} r where not exists (select from landing l where {})").format(table, same)
    )
    names = sql.SQL(", ").join(map(sql.Identifier, [*columns, "_source", "_row", "_content_hash"]))
    cursor.execute(
        sql.SQL(
            "insert into {table} ({names}, _loaded_at) select {names}, now() from landing l"
            " where not exists (select from {table} r where {same})"
        ).format(table=table, names=names, same=same)
    )


# --- Documents -------------------------------------------------------------------------------------------


def _land_documents(
    cursor: Cursor[Any], contract: Contract, scan: _Scan, run_id: str | None, progress: Progress
) -> LandReport:
    if _fit_table(cursor, contract, DOCUMENT_COLUMNS, primary_key="path"):
        cursor.execute(sql.SQL("delete from {}").format(_table(contract)))
    there = dict(cursor.execute(sql.SQL("select path, sha256 from {}").format(_table(contract))).fetchall())
    refused = dict(scan.refused)
    changed = [file for file in scan.files if there.get(file.name) != file.sha256]
    gone = [*(there.keys() - {file.name for file in scan.files}), *(file.name for file in changed)]
    cursor.execute(sql.SQL("delete from {} where path = any(%s)").format(_table(contract)), [gone])
    read: list[tuple[SourceFile, bytes]] = []
    for done, file in enumerate(changed, 1):
        try:
            read.append((file, read_document(file)))
        except FileRefused as problem:
            refused[file.name] = problem
        if sum(document.size for document, _ in read) >= DOCUMENT_BYTES_AT_ONCE or done == len(changed):
            _copy_documents(cursor, contract, read)
            read = []
        progress("documents", done, len(changed))
    landed = [file for file in scan.files if file.name not in refused]
    if not landed:
        raise _AllRefused(scan, refused)
    reports = [FileReport(file.name, file.sha256, rows_in=1, rows_landed=1) for file in landed]
    _record_files(cursor, contract, scan, refused, run_id)
    _record_ledger(cursor, contract, scan, reports)
    if gone or changed:
        cursor.execute(sql.SQL("analyze {}").format(_table(contract)))
    return LandReport([*reports, *_refusals(scan, refused)])


def _copy_documents(
    cursor: Cursor[Any], contract: Contract, documents: Sequence[tuple[SourceFile, bytes]]
) -> None:
    if not documents:
        return
    (now,) = cursor.execute("select now()").fetchone() or (None,)
    files = [file for file, _ in documents]
    hashes = pa.array([file.sha256 for file in files], pa.string())
    names = pa.array([file.name for file in files], pa.string())
    table = pa.table(
        {
            "path": names,
            "sha256": hashes,
            "size": pa.array([file.size for file in files], pa.int64()),
            "media_type": pa.array([file.media_type for file in files], pa.string()),
            "content": pa.array([content for _, content in documents], pa.binary()),
            "_source": names,
            "_row": pa.array([1] * len(files), pa.int64()),
            "_loaded_at": pa.array([now] * len(files), ARROW_TYPES["timestamp"]),
            "_content_hash": hashes,
        }
    )
    copy_table(cursor, _table(contract), table)


# --- What was found, for people and for the next run -------------------------------------------------------


def _record_rows(cursor: Cursor[Any], contract: Contract, run_id: str | None) -> None:
    """Bring ``quarantine.row`` up to date with ``refusal``; a row refused again keeps its row."""
    same = "(q.file, q.row_number, q.rule, q.content_hash) = (r.file, r.row_number, r.rule, r.content_hash)"
    cursor.execute(
        "update quarantine.row q set resolved_at = now() where q.source = %s and q.resolved_at is null"
        f" and not exists (select from refusal r where {same})",
        [contract.name],
    )
    cursor.execute(
        "insert into quarantine.row as q (source, file, row_number, rule, reason, remedy, row, content_hash,"
        " contract_version, run_id)"
        " select %s, file, row_number, rule, reason, remedy, row, content_hash, %s, %s from refusal"
        " on conflict (source, file, row_number, content_hash, rule) do update set reason = excluded.reason,"
        " remedy = excluded.remedy, contract_version = excluded.contract_version, run_id = excluded.run_id,"
        " last_seen = now(), resolved_at = null",
        [contract.name, contract.version, run_id],
    )


def _record_files(
    cursor: Cursor[Any],
    contract: Contract,
    scan: _Scan,
    refused: Mapping[str, FileRefused],
    run_id: str | None,
) -> None:
    """Bring ``quarantine.file`` up to date: what is refused now is open, everything else is resolved."""
    files = {file.name: file for file in scan.files}
    cursor.execute(
        "update quarantine.file q set resolved_at = now() where q.source = %s and q.resolved_at is null"
        " and q.lake_uri is null and not exists (select from unnest(%s::text[], %s::text[], %s::text[]) as r (file, rule, sha256)"
        " where (q.file, q.rule, coalesce(q.sha256, '')) = (r.file, r.rule, r.sha256))",
        [
            contract.name,
            list(refused),
            [problem.rule for problem in refused.values()],
            [scan.hashes.get(name, "") for name in refused],
        ],
    )
    cursor.executemany(
        "insert into quarantine.file as q (source, file, rule, reason, remedy, sha256, size, run_id)"
        " values (%s, %s, %s, %s, %s, %s, %s, %s)"
        " on conflict (source, file, rule, coalesce(sha256, '')) do update set reason = excluded.reason,"
        " remedy = excluded.remedy, run_id = excluded.run_id, last_seen = now(), resolved_at = null",
        [
            (
                contract.name,
                name,
                problem.rule,
                _storable(problem.reason),
                problem.remedy,
                files[name].sha256 if name in files else None,
                files[name].size if name in files else None,
                run_id,
            )
            for name, problem in refused.items()
        ],
    )


def _record_ledger(
    cursor: Cursor[Any], contract: Contract, scan: _Scan, reports: Iterable[FileReport]
) -> None:
    sizes = {file.name: file.size for file in scan.files}
    cursor.execute("delete from registry.source_file where source = %s", [contract.name])
    cursor.executemany(
        "insert into registry.source_file (source, file, sha256, size, rows_in, rows_landed, rows_refused,"
        " contract_sha256) values (%s, %s, %s, %s, %s, %s, %s, %s)",
        [
            (
                contract.name,
                report.file,
                report.sha256,
                sizes[report.file],
                report.rows_in,
                report.rows_landed,
                report.rows_refused,
                contract.sha256,
            )
            for report in reports
        ],
    )


def _refusals(scan: _Scan, refused: Mapping[str, FileRefused]) -> list[FileReport]:
    hashes = scan.hashes
    return [FileReport(name, hashes.get(name, ""), refused=problem) for name, problem in refused.items()]


def _table(contract: Contract) -> sql.Identifier:
    return sql.Identifier("raw", contract.name)


def _definitions(columns: Mapping[str, str]) -> sql.Composed:
    return sql.SQL(", ").join(
        sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(kind)) for name, kind in columns.items()
    )
